import math
import os
import random
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object, is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.rewards import get_soft_overlong_punishment
from trl.trainer import grpo_trainer
from trl.trainer.utils import get_config_model_id

from ..adapters import FrozenBase
from ..decoding import finished_rows_dropped, never_empty
from ..faults import Faults
from ..rollout_engine import rollout_engine
from ..sampling import RepeatSampler
from .bank import RolloutBank, prompt_id
from .config import RLVRConfig
from .identity import Writer, check_writer, hash_vocabulary, hash_weights


# Reward from which on a rollout is correct, as OPSD's gate has it
CORRECT = 1.0
# What the loss is finite beside, whatever the policy gives: it compares the policy's log-probabilities with these
COMPARED = ("old_per_token_logps", "ref_per_token_logps")
NEUTRAL = {"old_per_token_logps": 0.0, "ref_per_token_logps": -1e4, "importance_sampling_ratio": 1.0}


class NotFinite(RuntimeError):
    """Nothing can be learned any more: the message is one sentence that says since when."""


class _LeftOut(Exception):
    """Rollouts of a micro-batch are not finite, of this process (`finite` says which) or of another."""

    def __init__(self, finite: torch.Tensor):
        super().__init__()
        self.finite = finite


def without(batch: dict[str, Any], finite: torch.Tensor, token_id: int) -> dict[str, Any]:
    """
    A micro-batch of the same shape in which some rollouts count for nothing.

    Args:
        batch (`dict[str, Any]`):
            Micro-batch of `B` rollouts.
        finite (`torch.Tensor`):
            Which of them stay, `bool`, of shape `(B,)`. What is not finite would be in the gradient of the weights even where
            its own is zero, so another rollout is read in its place.
        token_id (`int`):
            What is read where none stays.

    Returns:
        `dict[str, Any]`: Micro-batch, in which no token of the others counts. Where images belong to them, they are read
        themselves.
    """
    rows = torch.arange(len(finite), device=finite.device)
    if finite.any() and "pixel_values" not in batch:
        rows[~finite] = finite.nonzero()[0]
    taken = {
        name: value[rows]
        for name, value in batch.items()
        if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(finite)
    }
    if not finite.any() and "pixel_values" not in batch:
        taken |= {name: torch.full_like(taken[name], value) for name, value in NEUTRAL.items() if name in taken}
        taken |= {name: torch.full_like(taken[name], token_id) for name in ("prompt_ids", "completion_ids")}
    mask = taken["completion_mask"]
    return {**batch, **taken, "completion_mask": mask * finite.unsqueeze(1).to(mask.dtype)}


class RLVRTrainer(GRPOTrainer):
    """
    Trainer for reinforcement learning with verifiable rewards (RLVR), as named in [Tülu
    3](https://huggingface.co/papers/2411.15124): group-relative policy optimization on rewards that a verifier decides.

    The only changes with respect to [`~trl.GRPOTrainer`] are:

    - A truncated completion, one that does not end in an end-of-sequence token, never earns a positive reward. A correct
      answer that the model doesn't stop after is not correct, here as in the gate of [`~trl_opsd.OPSDTrainer`], so both
      stages train towards the same thing.
    - Groups whose verdicts are all the same, all right or all wrong, can be replaced by those of other prompts
      (`max_generation_rounds`): the verifiers decide, not reward models or the punishment. The metrics of rewards and completions stay those of the first round, which no reward has chosen;
      `rlvr/generation_rounds` and `rlvr/groups_without_variance`, the share that is left after the last round, say what
      was done, and `num_tokens` counts every round.
    - Completions that come close to the limit can be punished (`soft_punish_cache`).
    - A resumed run goes on in the order of the pass that it was in (see [`~trl_opsd.sampling.RepeatSampler`]), and leaves the
      table of the last step's completions as it is where it makes no other.
    - A rollout whose log-probabilities are not finite, the policy's or those that its loss compares them with, is left out of
      its step, and counts in the divisor of the loss, but under `loss_type="bnpo"`, which has the tokens that are left; a step
      whose gradient is not finite all the same is not taken. Either is written down ([`~trl_opsd.faults.Faults`]).
    - Correct rollouts are kept, the shortest of each prompt (`bank_rollouts_per_prompt`). Correct is one whose rewards,
      weighted and added up, reach 1; reward models and the punishment don't count.

    Args:
        model, reward_funcs, args, train_dataset, ...:
            As in [`~trl.GRPOTrainer`]. `args` is an [`RLVRConfig`].

    Raises:
        ValueError: If the bank, or a further round, is asked for and rollouts are more than text (tools, environments,
            images), or if a further round is asked for and the training set can't be indexed. Before a model is loaded.
            If the bank in `output_dir` is another model's.
        NotFinite: In training, if the log-probabilities of no rollout of a step are finite, or if something was not finite in
            each of ten steps in a row.
    """

    _tag_names = ["trl", "rlvr"]
    _name = "RLVR"
    _paper = {
        "title": "Tülu 3: Pushing Frontiers in Open Language Model Post-Training",
        "id": "2411.15124",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{lambert2024tulu3,
                title        = {{Tülu 3: Pushing Frontiers in Open Language Model Post-Training}},
                author       = {Nathan Lambert and others},
                year         = 2024,
                eprint       = {arXiv:2411.15124},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,  # noqa: F821
        args: RLVRConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,  # noqa: F821
        peft_config: "PeftConfig | None" = None,  # noqa: F821
        tools: list[Callable] | None = None,
        rollout_func: "RolloutFunc | None" = None,  # noqa: F821
        environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None,  # noqa: F821
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RLVRConfig(f"{model_name.split('/')[-1]}-RLVR")
        if args.max_generation_rounds > 1 and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                f"`max_generation_rounds={args.max_generation_rounds}` draws prompts from the training set, and "
                "`train_dataset` is an IterableDataset: load it without streaming, or set `max_generation_rounds=1`."
            )
        if isinstance(train_dataset, Dataset):
            args.check_num_prompts(len(train_dataset))
        more_than_text = {
            "tools": tools,
            "rollout_func": rollout_func,
            "environment_factory": environment_factory,
            "images": train_dataset is not None and {"image", "images"} & set(train_dataset.column_names or ()),
        }
        for name, given in more_than_text.items():
            if given and (args.bank_rollouts_per_prompt or args.max_generation_rounds > 1):
                raise ValueError(
                    f"The rollout bank and further generation rounds take rollouts that are text alone, and there is "
                    f"`{name}`: set `bank_rollouts_per_prompt=0` and `max_generation_rounds=1`."
                )
        if args.soft_punish_cache is not None:
            reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
            reward_funcs.append(get_soft_overlong_punishment(args.max_completion_length, args.soft_punish_cache))

        name = model if isinstance(model, str) else get_config_model_id(model.config)
        # A model in memory is what it is before an adapter is put on it
        weights = None
        if args.bank_rollouts_per_prompt and PartialState().is_main_process:
            weights = hash_weights(model, (args.model_init_kwargs or {}).get("revision"))

        with rollout_engine(grpo_trainer, args.seed):
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )

        if args.use_vllm:
            self.vllm_generation.end_at(self.eos_token_ids)
            if is_peft_model(self.model):
                self.vllm_generation.sync_within(FrozenBase(self.model).restored)
        self._punishments = int(args.soft_punish_cache is not None)  # the last reward function, if there is one
        functions = self.reward_funcs[: len(self.reward_funcs) - self._punishments]
        self._verifiers = [index for index, func in enumerate(functions) if not isinstance(func, nn.Module)]
        self._bank: RolloutBank | None = None
        self._bank_folder = os.path.join(args.output_dir, "bank")
        if weights is not None:
            self._writer = Writer(name, weights, hash_vocabulary(self._tokenizer))
            check_writer(self._bank_folder, self._writer)
        self._last_verdicts: torch.Tensor | None = None
        self.faults = Faults(
            args.output_dir, self._tokenizer, self.accelerator, "log-probability", NotFinite, args.num_iterations
        )
        self._looked_at: dict[str, torch.Tensor] | None = None  # micro-batch whose log-probabilities are to be finite

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._looked_at = inputs
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        except _LeftOut as error:  # before anything else was measured
            finite = error.finite
        finally:
            self._looked_at = None
        if self.is_deepspeed_enabled:  # which steps in the backward
            self.faults.check_any(self.state.global_step + 1)
        if not finite.any() and self.accelerator.distributed_type == DistributedType.NO:
            return torch.zeros((), device=finite.device, requires_grad=True)
        # Here, where the error holds no activations any more
        inputs = without(inputs, finite, self.eos_token_ids[0])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._looked_at is not None:
            # Of all positions: those that do not count the loss multiplies by 0, which NaN stays NaN under
            compared = (self._looked_at.get(name) for name in COMPARED)
            logps = [found[0].detach(), *(values for values in compared if values is not None)]
            finite = torch.stack([values.isfinite().all(dim=1) for values in logps]).all(dim=0)
            if self.faults.add(self._looked_at, finite):  # on any process, as each of them makes another forward pass
                raise _LeftOut(finite)
        return found

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed has taken the step by now, and a scaler looks at the gradient itself
        is_others = self.is_deepspeed_enabled or self.accelerator.scaler is not None
        if self.faults.end_step(None if is_others else norm, self.state.global_step + 1):
            self.accelerator.sync_gradients = False
            return 0.0
        return norm

    def _get_train_sampler(self, dataset: Dataset | None = None) -> RepeatSampler:
        theirs = super()._get_train_sampler(dataset)
        return RepeatSampler(
            data_source=theirs.data_source,
            mini_repeat_count=theirs.mini_repeat_count,
            batch_size=theirs.batch_size,
            repeat_count=theirs.repeat_count,
            shuffle=theirs.shuffle,
            seed=theirs.seed,
            current_state=lambda: self.state,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A run that goes on after its last step has written nothing, and an empty table would take that step's place
        self.log_completions = self.args.log_completions and len(self._logs["prompt"]) > 0
        super().log(logs, start_time)

    def _generate_single_turn(self, *args, **kwargs):
        with finished_rows_dropped(self.model):
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if logprobs is not None:  # of vLLM: what it has not written it has not weighed either
            logprobs = [row or [0.0] for row in logprobs]
        return never_empty(completion_ids, self.eos_token_ids[0]), logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        truncated = torch.tensor([ids[-1] not in ends for ids in completion_ids_list], device=rewards.device)
        truncated = self.accelerator.gather(truncated)
        rewards = rewards.masked_fill(truncated.unsqueeze(1) & (rewards > 0), 0.0)
        if self.model.training:
            # Where there is no verifier, reward models decide what a group teaches. The punishment never does
            deciding = self._verifiers or list(range(len(self.reward_funcs) - self._punishments))
            self._last_verdicts = self._weighted(rewards, deciding)
            if self.args.bank_rollouts_per_prompt:
                self._fill_bank(inputs, completion_ids_list, self._weighted(rewards, self._verifiers))
        return rewards

    def _weighted(self, rewards: torch.Tensor, functions: list[int]) -> torch.Tensor:
        """Sum of the weighted rewards of some functions, of shape `(N,)`. NaN where none of them gave one."""
        rewards = rewards[:, functions] * self.reward_weights.to(rewards.device)[functions]
        return rewards.nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _fill_bank(self, inputs, completion_ids_list, verdicts: torch.Tensor) -> None:
        """Hands what the verifiers have decided on to the bank; `verdicts` are those of all processes."""
        correct = verdicts >= CORRECT  # never true of a truncated one
        ids = [prompt_id(example["prompt"]) for example in inputs]
        start = self.accelerator.process_index * len(inputs)
        rollouts = []
        for index, example in enumerate(inputs):
            if correct[start + index]:
                # What was generated, whole: a parsed completion may have its reasoning in a field of its own
                text = self.processing_class.decode(completion_ids_list[index], skip_special_tokens=True)
                is_chat = is_conversational({"prompt": example["prompt"]})
                rollouts.append(
                    {
                        "prompt_id": ids[index],
                        "prompt": example["prompt"],
                        "completion": [{"role": "assistant", "content": text}] if is_chat else text,
                        "completion_ids": completion_ids_list[index],
                        "reward": verdicts[start + index].item(),
                    }
                )
        ids, rollouts = gather_object(ids), gather_object(rollouts)
        if self.accelerator.is_main_process:
            if self._bank is None:
                self._bank = RolloutBank(self._bank_folder, self.args.bank_rollouts_per_prompt, self._writer)
            scored = ~verdicts.isnan()
            tried = Counter(prompt for prompt, counts in zip(ids, scored.tolist(), strict=True) if counts)
            solved = Counter(prompt for prompt, counts in zip(ids, correct.tolist(), strict=True) if counts)
            attempts = {prompt: (number, solved[prompt]) for prompt, number in tried.items()}
            self._bank.add(self.state.global_step, rollouts, attempts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.args.log_engine_mismatch:
            self._log_engine_kl(output)
        max_rounds = self.args.max_generation_rounds
        if max_rounds == 1 or not self.model.training:
            return output
        metrics = self._metrics["train"]
        first = {name: list(values) for name, values in metrics.items()}
        num_groups = len(self._last_verdicts) // self.num_generations
        rounds, flat = 1, self._groups_without_variance()
        while flat and rounds < max_rounds and (fresh := self._fresh_examples(len(flat))):
            flat = self._replace_groups(output, flat, super()._generate_and_score_completions(fresh))
            rounds += 1
        first["num_tokens"] = metrics["num_tokens"]
        metrics.clear()
        metrics.update(first)
        metrics["rlvr/generation_rounds"].append(rounds)
        metrics["rlvr/groups_without_variance"].append(len(flat) / num_groups)
        return output

    def _log_engine_kl(self, output: dict[str, Any]) -> None:
        """
        Logs the KL divergence of the policy from the engine, estimated on the tokens that the engine drew as the mean of
        `exp(d) - 1 - d`, where `d` is the policy's log-probability minus the engine's.
        """
        mask = output["completion_mask"].bool() & ~output["sampling_per_token_logps"].isnan()
        difference = (output["old_per_token_logps"] - output["sampling_per_token_logps"])[mask]
        k3 = difference.expm1() - difference
        sums = self.accelerator.reduce(torch.stack([k3.sum(), mask.sum().to(k3.dtype)]))
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["sampling/kl"].append((sums[0] / sums[1]).item())

    def _groups_without_variance(self) -> list[int]:
        """Of the rollouts scored last, over all processes, the groups whose verdicts are all the same."""
        verdicts = self._last_verdicts.view(-1, self.num_generations)
        lowest, highest = (
            verdicts.nan_to_num(nan=torch.inf).amin(dim=1),
            verdicts.nan_to_num(nan=-torch.inf).amax(dim=1),
        )
        return (lowest >= highest).nonzero().flatten().tolist()  # above: no rollout of the group has a verdict

    def _fresh_examples(self, num_groups: int) -> list[dict[str, Any]]:
        """This process's share of at least that many groups of prompts drawn from the training set."""
        num_processes = self.accelerator.num_processes
        # Every process generates as many rollouts, so the number of groups is rounded up to a multiple of this
        unit = num_processes // math.gcd(num_processes, self.num_generations)
        num_groups = min(math.ceil(num_groups / unit), len(self.train_dataset) // unit) * unit
        # The tokens seen so far differ for every draw, are the same on all processes, and come back with a checkpoint
        generator = random.Random(f"{self.args.seed} {self.state.num_input_tokens_seen}")
        rows = generator.sample(range(len(self.train_dataset)), num_groups)
        rows = [row for row in rows for _ in range(self.num_generations)]
        share = len(rows) // num_processes
        start = self.accelerator.process_index * share
        return [self.train_dataset[row] for row in rows[start : start + share]]

    def _replace_groups(self, output: dict[str, Any], flat: list[int], fresh: dict[str, Any]) -> list[int]:
        """Puts groups of `fresh` that have variance in the place of those that do not. Returns the ones left."""
        num_fresh = len(self._last_verdicts) // self.num_generations
        useless = set(self._groups_without_variance())
        pairs = list(zip(flat, [group for group in range(num_fresh) if group not in useless], strict=False))
        if not pairs:
            return flat
        # Rows of this process that are replaced, and by which rows of all that were generated
        size, start = self.num_generations, self.accelerator.process_index * len(output["advantages"])
        moves = [(old * size + i - start, new * size + i) for old, new in pairs for i in range(size)]
        moves = [(row, source) for row, source in moves if 0 <= row < len(output["advantages"])]
        rows, sources = (
            torch.tensor(part, dtype=torch.long) for part in ([m[0] for m in moves], [m[1] for m in moves])
        )
        for name, values in output.items():
            if values.ndim == 0:
                continue
            new, on_left = fresh[name], name.startswith("prompt_")
            fill = self._tokenizer.pad_token_id if name.endswith("_ids") else 0
            if values.ndim == 2:
                new = self.accelerator.pad_across_processes(new, dim=1, pad_index=fill, pad_first=on_left)
            new = self.accelerator.gather(new)
            if values.ndim == 2:
                width = max(values.size(1), new.size(1))
                missing = [width - part.size(1) for part in (values, new)]
                values, new = (
                    nn.functional.pad(part, (number, 0) if on_left else (0, number), value=fill)
                    for part, number in zip((values, new), missing, strict=True)
                )
            values[rows.to(values.device)] = new[sources.to(values.device)]
            output[name] = values
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        return flat[len(pairs) :]
