"""
The rollouts of a batch: written, verified, asked again, and those chosen that are trained on.

What is written comes from the trainer's own generation. This is the order of things around it.
"""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState
from trl.data_utils import is_conversational

from .batches import padded, unpadded
from .config import OPSDConfig, completion_lengths
from .context import takes_sibling
from .gate import Verdicts, judge, shortest, shortest_siblings
from .limit import CompletionLimit
from .pass_rates import PassRates, prompt_key
from .saved import Saved
from .verify import Verifiers


logger = get_logger(__name__)


@dataclass
class CollectedRollouts:
    """
    The rollouts of a batch, of this process.

    Args:
        rows (`list[dict[str, Any]]`):
            Row of the dataset of each. It may be another one than the sampler drew.
        batch (`dict[str, torch.Tensor]`):
            The batch as the trainer generates it. With verifiers, `kept`, of shape `(B,)`, says which are trained on, and
            `num_items_in_batch` counts their tokens in the whole global batch.
        siblings (`list[str | None]`):
            Text of the shortest correct rollout of the same prompt, where the teacher's context takes one.
        metrics (`dict[str, float]`):
            What is to be logged.
        rewards (`torch.Tensor`, *optional*):
            Reward by each verifier and, last, what they add up to, of shape `(B, functions + 1)`.
        columns (`dict[str, list]`):
            What the verifiers have logged of each.
        correct (`torch.Tensor`, *optional*):
            Which are correct, `bool`, of shape `(B,)`. `None` without verifiers.
    """

    rows: list[dict[str, Any]]
    batch: dict[str, torch.Tensor]
    siblings: list[str | None]
    metrics: dict[str, float] = field(default_factory=dict)
    rewards: torch.Tensor | None = None
    columns: dict[str, list] = field(default_factory=dict)
    correct: torch.Tensor | None = None


class Rollouts:
    """
    Collects the rollouts of each batch.

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        generate (`Callable`):
            Rollouts of a list of rows, as a batch.
        ask (`Callable`):
            Rollouts of a list of prompts, from token ids to token ids.
        verifiers ([`Verifiers`], *optional*):
            Who judges them. If `None`, all of them are trained on.
        train_dataset ([`~datasets.Dataset`]):
            Where prompts are taken from in the place of those that are skipped.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        eos_token_ids (`list[int]`):
            Tokens that end a rollout.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.

    Attributes:
        pass_rates ([`PassRates`] or `None`):
            Pass rates of the prompts, where some are to be skipped.
        limit ([`CompletionLimit`] or `None`):
            How long the student may write, where that is to follow how long correct rollouts are.
        given (`list[list[int]]` or `None`):
            Completions that the data set holds, which stand in for those that the student would write now.
        messages (`list[list[dict[str, Any]]]` or `None`):
            The turns of each rollout that has tools, as they were parsed when it was written.
    """

    def __init__(
        self,
        args: OPSDConfig,
        generate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
        ask: Callable[[list[list[int]]], list[list[int]]],
        verifiers: Verifiers | None,
        train_dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        accelerator: Accelerator,
    ):
        self.args = args
        self.gate = args.resolve_gate(verifiers is not None)
        self.verifiers = verifiers
        self.takes_sibling = any(map(takes_sibling, args.build_teacher_contexts()))
        self.pass_rates: PassRates | None = None
        if args.min_pass_rate is not None or args.max_pass_rate is not None:
            self.pass_rates = PassRates(
                train_dataset["prompt"], args.min_pass_rate, args.max_pass_rate, args.pass_rate_rollouts, args.seed
            )
        self.limit: CompletionLimit | None = None
        if args.completion_limit_quantile is not None:
            self.limit = CompletionLimit(
                args.max_completion_length, args.completion_limit_quantile, args.completion_limit_headroom
            )
        self.given: list[list[int]] | None = None
        self.messages: list[list[dict[str, Any]]] | None = None
        self._given_rows: list[int] | None = None  # those of the training set that hold a completion
        self._generate, self._ask = generate, ask
        self._train_dataset = train_dataset
        self._tokenizer = tokenizer
        self._ends = (*eos_token_ids, tokenizer.pad_token_id)
        self._accelerator = accelerator

    @property
    def verifier_names(self) -> list[str]:
        """Names of the verifiers."""
        return [] if self.verifiers is None else self.verifiers.names

    @property
    def saved(self) -> list[Saved]:
        """What a checkpoint has to hold."""
        return [state for state in (self.pass_rates, self.limit) if state is not None]

    def collect(self, rows: list[dict[str, Any]], state: TrainerState, is_training: bool) -> CollectedRollouts:
        """
        Has rollouts written, verified and chosen. Called on every process.

        Args:
            rows (`list[dict[str, Any]]`):
                Rows of this process, those of a prompt side by side.
            state ([`~transformers.TrainerState`]):
                State of the training.
            is_training (`bool`):
                Whether they are to be trained on, rather than evaluated.

        Returns:
            [`CollectedRollouts`]: Rollouts.
        """
        # Decided by seed and the first step of the batch: the same on every process, and after resuming
        first = state.global_step // self.args.num_iterations * self.args.num_iterations
        draw = random.Random(f"{self.args.seed} {first}").random()
        is_given = is_training and (first < self.args.off_policy_steps or draw >= self.args.lmbda)
        if is_given:
            rows = self._replace_ungiven(rows, first)
        self.given = [row["completion_ids"] for row in rows] if is_given else None
        is_own = is_training and not is_given  # rollouts of the student's that are trained on
        metrics = {}
        if self.pass_rates is not None and is_own:
            rows, metrics["opsd/skipped"] = self._replace_skipped(rows)
        rollouts = CollectedRollouts(rows, self._generate(rows), siblings=[None] * len(rows), metrics=metrics)
        if self.verifiers is not None:
            self._verify_and_choose(rollouts, state, is_training, is_own)
        return rollouts

    def _replace_skipped(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], float]:
        """The rows, with others of the training set in the place of those whose prompt is skipped, and their share."""
        keys = gather_object([prompt_key(row["prompt"]) for row in rows])
        taken = self.pass_rates.start_batch(keys, self.args.num_generations)
        start = self._accelerator.process_index * len(rows)
        rows = [
            self._train_dataset[taken[slot]] if slot in taken else row for slot, row in enumerate(rows, start=start)
        ]
        return rows, len(taken) / len(keys)

    def _replace_ungiven(self, rows: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
        """The rows, with others of the training set in the place of those that hold no completion."""
        if all(row["completion_ids"] is not None for row in rows):
            return rows
        if self._given_rows is None:
            lengths = completion_lengths(self._train_dataset)
            self._given_rows = [row for row, length in enumerate(lengths) if length is not None]
        # By seed and step, as above. A slot takes its own, wherever it is
        order = random.Random(f"{self.args.seed} {first} given")
        order = order.sample(self._given_rows, len(self._given_rows))
        start = self._accelerator.process_index * len(rows)
        return [
            self._train_dataset[order[slot % len(order)]] if row["completion_ids"] is None else row
            for slot, row in enumerate(rows, start=start)
        ]

    def _verify_and_choose(
        self, rollouts: CollectedRollouts, state: TrainerState, is_training: bool, is_own: bool
    ) -> None:
        """Decides which rollouts are trained on, after those that the gate rejects have been written again."""
        rows, batch, metrics = rollouts.rows, rollouts.batch, rollouts.metrics
        completion_ids = unpadded(batch["completion_ids"], batch["completion_mask"])
        verdicts = self.verify(rows, completion_ids, state)
        if self.given is None:  # what the data set holds does not speak for the student
            for name, column in zip(self.verifiers.names, verdicts.rewards_per_func.unbind(dim=1), strict=True):
                metrics[f"rewards/{name}/mean"] = column.nanmean().item()
            metrics["reward"] = verdicts.rewards[verdicts.verified].mean().item()
            # Of the first round: whoever fails is asked again, and whoever does not is not
            solved = verdicts.correct.float()
            if self.pass_rates is not None and is_own:
                solved = self.pass_rates.end_batch(verdicts.correct, verdicts.verified)
            metrics["opsd/correct"] = solved.mean().item()
            if self.limit is not None and is_own:
                metrics["opsd/completion_limit"] = self.limit.value
                self.limit.update(verdicts.lengths, verdicts.correct, verdicts.finished)
        logged = defaultdict(list)
        for own in gather_object([dict(self.verifiers.metrics)]):
            for name, values in own.items():
                logged[name] += values
        metrics |= {name: sum(values) / len(values) for name, values in logged.items()}
        if self.args.max_generation_rounds > 1 and is_own:
            self._refill(rollouts, completion_ids, verdicts, state)
        self.verifiers.metrics.clear()

        group_size = self.args.num_generations if is_training else 1
        kept = verdicts.passed
        if self.args.keep_shortest is not None:
            kept = kept & shortest(kept, verdicts.lengths, group_size, self.args.keep_shortest)
        start = self._accelerator.process_index * len(rows)
        mine = slice(start, start + len(rows))
        if self.takes_sibling:
            chosen = shortest_siblings(verdicts.correct, verdicts.lengths, group_size)
            texts = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            texts = gather_object(texts)
            rollouts.siblings = [None if index is None else texts[index] for index in chosen][mine]
            if self.args.sibling_fallback is None and self.args.teacher_gate is None:
                kept = kept & torch.tensor([index is not None for index in chosen], device=kept.device)
        metrics["opsd/kept"] = kept.float().mean().item()
        batch["kept"] = kept[mine]

        loss_mask = batch["completion_mask"]
        if "tool_mask" in batch:
            loss_mask = loss_mask * batch["tool_mask"]
        # The loss is a sum over the tokens of the kept rollouts of the whole global batch, divided by their number
        num_tokens = (loss_mask * batch["kept"].unsqueeze(1)).sum()
        batch["num_items_in_batch"] = self._accelerator.gather(num_tokens).sum()
        if batch["num_items_in_batch"] == 0 and is_training:
            logger.warning(
                f"No rollout of step {state.global_step + 1} passed the gate `{self.gate}`: nothing is trained on, and the "
                "weights stay as they are."
            )
        total = verdicts.rewards.where(verdicts.verified, torch.nan)
        rollouts.rewards = torch.cat([verdicts.rewards_per_func, total.unsqueeze(1)], dim=1)[mine]
        rollouts.correct = verdicts.correct[mine]
        rollouts.columns = dict(self.verifiers.columns)
        self.verifiers.columns.clear()

    def verify(self, rows: list[dict[str, Any]], completion_ids: list[list[int]], state: TrainerState) -> Verdicts:
        """
        Has rollouts judged, whoever wrote them. Called on every process, with as many each.

        Args:
            rows (`list[dict[str, Any]]`):
                Row of the dataset of each.
            completion_ids (`list[list[int]]`):
                Token ids of each.
            state ([`~transformers.TrainerState`]):
                State of the training.

        Returns:
            [`~trl_opsd.opsd.gate.Verdicts`]: Verdicts on those of all processes, one process after the other.
        """
        completions = self.messages
        if completions is None:
            completions = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
            if is_conversational({"prompt": rows[0]["prompt"]}):
                completions = [[{"role": "assistant", "content": text}] for text in completions]
        device, gather = self._accelerator.device, self._accelerator.gather
        rewards = gather(self.verifiers.score(rows, completions, completion_ids, state).to(device))
        own = torch.tensor([[len(ids), ids[-1] in self._ends] for ids in completion_ids], device=device)
        lengths, finished = gather(own).unbind(dim=1)
        weights = torch.tensor(self.args.reward_weights or [1.0] * len(self.verifiers.names))
        return judge(rewards, lengths, finished, weights, self.gate, self.args.gate_threshold)

    def _refill(
        self,
        rollouts: CollectedRollouts,
        completion_ids: list[list[int]],
        verdicts: Verdicts,
        state: TrainerState,
    ) -> None:
        """Asks the prompts of rejected rollouts again, and puts those that pass in their place in all the arguments."""
        rows, batch = rollouts.rows, rollouts.batch
        process, num_processes = self._accelerator.process_index, self._accelerator.num_processes
        start, number = process * len(rows), len(rows)
        rounds = 1
        if self.args.max_generation_rounds > 1 and not verdicts.passed.all():
            prompt_ids = gather_object(unpadded(batch["prompt_ids"], batch["prompt_mask"]))
            all_rows = gather_object(rows)
        while rounds < self.args.max_generation_rounds and not verdicts.passed.all():
            # Whoever wrote them, the rejected ones are dealt evenly. Generating and gathering take all processes, and as
            # many rows of each: what is missing to that is asked twice, and dropped
            slots = (~verdicts.passed).nonzero().flatten()
            share = -(-len(slots) // num_processes)
            dealt = slots.repeat(num_processes)[: share * num_processes]
            own = dealt.view(num_processes, share)[process].tolist()
            answers = self._ask([prompt_ids[slot] for slot in own])
            answered = self.verify([all_rows[slot] for slot in own], answers, state)
            taken = answered.passed.clone()
            taken[len(slots) :] = False
            verdicts.replace(dealt[taken], answered, taken)
            # An answer goes to the process whose row it is, and what the verifiers logged of it goes with it
            columns = self.verifiers.columns
            logged = {name: column[number:] for name, column in columns.items() if len(column) == number + share}
            for column in columns.values():
                del column[number:]
            written = gather_object([(answers, logged)])
            for (answers, logged), slots, is_taken in zip(
                written, dealt.view(num_processes, share), taken.view(num_processes, share), strict=True
            ):
                mine = is_taken & (slots >= start) & (slots < start + number)
                for i in mine.nonzero().flatten().tolist():
                    row = slots[i].item() - start
                    completion_ids[row] = answers[i]
                    for name in logged.keys() & columns.keys():
                        columns[name][row] = logged[name][i]
            rounds += 1
        rollouts.metrics["opsd/generation_rounds"] = rounds
        if rounds > 1:
            ids, mask = padded(completion_ids, self._tokenizer.pad_token_id, "right", self.args.pad_to_multiple_of)
            batch["completion_ids"] = ids.to(self._accelerator.device)
            batch["completion_mask"] = mask.to(self._accelerator.device)
