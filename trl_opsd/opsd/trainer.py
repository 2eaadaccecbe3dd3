import copy
import math
import os
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, is_peft_model, release_memory
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, TrainerState
from trl import DistillationTrainer
from trl.extras.profiling import profiling_context
from trl.trainer import distillation_trainer
from trl.trainer.utils import get_config_model_id

from ..adapters import FrozenBase
from ..decoding import finished_rows_dropped, never_empty
from ..faults import Faults, finite_rows
from ..positions import positions_of
from ..rollout_engine import rollout_engine
from ..sampling import RepeatSampler
from .batches import (
    MULTIMODAL_FIELDS,
    balanced_length,
    gather_rows,
    micro_batches,
    padded,
    select_rows,
    size_of,
    unpadded,
    with_completion,
)
from .completions import RolloutLog
from .config import OPSDConfig, check_arguments, check_text_only
from .context import TeacherContext, TeacherPrompts
from .divergence import DivergenceOutput, linear_divergence_with_metrics
from .ends import check_ends, check_lengths
from .gate import Verdicts
from .head import Head
from .metrics import DivergenceCallback, EngineMismatch, OPSDAlarm, TokenMetrics
from .rollouts import CollectedRollouts, Rollouts
from .saved import Saved
from .teacher import Teacher
from .teacher_gate import TeacherGate, generate_as
from .verify import RewardFunc, Verifiers


logger = get_logger(__name__)


class Collected(NamedTuple):
    """
    A batch of rollouts that is trained on more than once.

    Args:
        step (`int`):
            Optimizer steps before it was written.
        batch (`dict[str, torch.Tensor]`):
            The batch.
        measured (`dict[str, list[float]]`):
            What was logged of it.
    """

    step: int
    batch: dict[str, torch.Tensor]
    measured: dict[str, list[float]]


class OPSDTrainer(DistillationTrainer):
    """
    Trainer for on-policy (self-)distillation as compression: the student writes its own rollouts, a verifier decides
    which of them are trained on, and on those the student matches, token by token over the whole vocabulary, a
    teacher that knows more than it does. The self-teacher is that of [Self-Distilled
    Reasoner](https://huggingface.co/papers/2601.18734), its place after RL that of [OPSD Compresses What RLVR
    Teaches](https://huggingface.co/papers/2605.06188).

    The only changes with respect to [`~trl.DistillationTrainer`] are:

    - the teacher is weights × context: it may be the student's own initial weights, and may see the prompt in a
      privileged context (`teacher_weights`, `teacher_context`);
    - several rollouts per prompt (`num_generations`), and several steps on each batch of them (`num_iterations`);
    - off-policy batches, whose completions are those of the data set (`lmbda`);
    - a gate: rollouts are scored by reward functions before any forward pass, and only those that pass are trained on;
      what it rejects can be asked again (`max_generation_rounds`), and prompts that are always or never solved can be
      left out (`min_pass_rate`, `max_pass_rate`);
    - a gate of the teacher's: its context is used on the prompts on which it is verified right in it, and the plain prompt
      elsewhere (`teacher_gate`);
    - the divergence can be clipped per vocabulary entry without going negative (`kl_clip`).

    With none of them used, and an external teacher, it is `DistillationTrainer`, step by step. It ends on a divergence
    that is not finite on any rollout, and on nothing else: see [`AlarmCallback`] for what else can be watched, and
    [`RolloutPages`] for a page of the rollouts. Single rollouts whose divergence is not finite are left out ([`Faults`]).

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_opsd import OPSDConfig, OPSDTrainer

    >>> trainer = OPSDTrainer(
    ...     model="Qwen/Qwen3-1.7B",
    ...     reward_funcs=accuracy_reward,
    ...     args=OPSDConfig(teacher_context="concise", num_generations=4, per_device_train_batch_size=4),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student, see [`~trl.DistillationTrainer`].
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            External teacher, see [`~trl.DistillationTrainer`]. If `None`, the teacher has the student's initial
            weights.
        args ([`OPSDConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Dataset with the column `prompt`, the columns that the teacher context takes, the columns that the
            reward functions take, and `completion_ids` if `lmbda` is below 1.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], [`~transformers.ProcessorMixin`], *optional*):
            See [`~trl.DistillationTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            See [`~trl.DistillationTrainer`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            See [`~trl.DistillationTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            See [`~trl.DistillationTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. With `teacher_weights="initial"` the teacher is then the base
            model, reached by disabling the adapter.
        tools (list of `Callable`, *optional*):
            See [`~trl.DistillationTrainer`].
        reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Verifiers: functions as [`~trl.GRPOTrainer`] takes them, synchronous or not. Rewards are added up with
            `reward_weights`. A rollout for which every function returns `None` is neither correct nor incorrect.

    Raises:
        ValueError: If the gate needs a verifier and there is none, if teacher and student are the same in weights and
            context, or if the dataset lacks a column that the teacher context takes or has fewer prompts than a batch.
            All of it before a model is loaded.
    """

    _tag_names = ["trl", "opsd"]
    _name = "OPSD"
    _paper = {
        "title": "OPSD Compresses What RLVR Teaches: A Post-RL Compaction Stage for Reasoning Models",
        "id": "2605.06188",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{kim2026opsd,
                title  = {{OPSD Compresses What RLVR Teaches: A Post-RL Compaction Stage for Reasoning Models}},
                author = {Jaehoon Kim and Dongha Lee},
                year   = 2026,
                eprint = {arXiv:2605.06188}
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        teacher_model: str | PreTrainedModel | None = None,
        args: OPSDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,  # noqa: F821
        peft_config: "PeftConfig | None" = None,  # noqa: F821
        tools: list[Callable] | None = None,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = OPSDConfig(f"{model_name.split('/')[-1]}-OPSD")
        reward_funcs = reward_funcs or []
        if not isinstance(reward_funcs, list):
            reward_funcs = [reward_funcs]
        check_arguments(args, model, teacher_model, train_dataset, eval_dataset, reward_funcs, tools)
        if args.uses_fsdp:
            # Else FSDP keeps the gradients of the whole model on every process between two micro-batches
            own = args.accelerator_config.gradient_accumulation_kwargs or {}
            args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **own}
        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        self.teacher = Teacher(args, model, teacher_model, processing_class, has_adapter)

        with rollout_engine(distillation_trainer, args.seed, keeps_logprobs=args.log_engine_mismatch):
            super().__init__(
                model=model,
                teacher_model=None,  # its weights may be the student's: [`Teacher`] has them
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
            )

        if self._is_vlm:
            check_text_only(args)
        check_lengths(args, self.model.config)
        is_external = self.teacher.weights == "external"
        check_ends(self.eos_token_ids, self.teacher.model if is_external else None, self._tokenizer)
        self.teacher.prepare(self.model, self._tokenizer, self.accelerator)
        self.teacher_model = self.teacher.model
        if self.teacher.follows_student:
            self.add_callback(self.teacher.follow(args))

        if train_dataset is not None and self._tokenizer.chat_template is not None:
            if isinstance(next(iter(train_dataset))["prompt"], str):
                logger.warning(
                    "The prompts are plain strings, so the chat template of the tokenizer is not applied: give lists of "
                    'messages (`[{"role": "user", "content": ...}]`) unless the template is in the strings already.'
                )
        verifiers = None
        if reward_funcs:
            verifiers = Verifiers(reward_funcs, partial(profiling_context, self), args.ddp_timeout)
        self.rollouts = Rollouts(
            args,
            super()._generate_and_score_completions,
            self._ask,
            verifiers,
            self.train_dataset,
            self._tokenizer,
            self.eos_token_ids,
            self.accelerator,
        )

        own_kwargs = args.teacher_chat_template_kwargs
        self.teacher_chat_template_kwargs = self.chat_template_kwargs if own_kwargs is None else own_kwargs
        contexts = args.build_teacher_contexts()
        self.teacher_prompts: TeacherPrompts | None = None  # where it sees what the student sees
        if contexts or self.teacher_chat_template_kwargs != self.chat_template_kwargs:
            self.teacher_prompts = TeacherPrompts(
                contexts, args.build_sibling_fallback(), self._tokenize_for_teacher, self._tokenizer
            )
            if isinstance(train_dataset, Dataset):
                if contexts:
                    self.teacher_prompts.check_turns(train_dataset)
                self.teacher_prompts.check_lengths(train_dataset, self._max_teacher_prompt(args.max_completion_length))
            if train_dataset is not None:
                self.teacher_prompts.check_boundary(
                    next(iter(train_dataset)),
                    partial(self._apply_chat_template, self.chat_template_kwargs),
                    partial(self._apply_chat_template, self.teacher_chat_template_kwargs),
                )

        self.teacher_gate: TeacherGate | None = None
        if args.teacher_gate is not None:
            self.teacher_gate = TeacherGate(
                contexts,
                args.teacher_gate,
                args.resolve_teacher_gate_rollouts(None if train_dataset is None else train_dataset.column_names),
                self._write_as_teacher,
                self._verify_teacher,
                self.accelerator,
                args.seed,
            )

        if args.use_vllm:
            self.vllm_generation.end_at(self.eos_token_ids)
            if has_adapter:
                self.vllm_generation.sync_within(self.teacher.hidden, FrozenBase(self.model).restored)
        self.faults = Faults(
            args.output_dir, self._tokenizer, self.accelerator, "divergence", OPSDAlarm, args.num_iterations
        )
        self._collected: Collected | None = None  # where more than one step is made on each batch
        self._given_of_batch: list[list[int]] | None = None
        self._finite: torch.Tensor | None = None  # whose divergence was, of the last forward pass
        self._at_work: tuple[int, int] | None = None  # rollouts and tokens of the micro-batch at hand
        self.token_metrics = {mode: TokenMetrics() for mode in self._metrics}
        self.engine_mismatch = {mode: EngineMismatch() for mode in self._metrics}
        # Sum of the losses of an evaluation, batches that have one, and those that have none
        self._eval_loss = torch.zeros(3)
        # Ours instead of the base class's, which has no rewards and knows nothing of the loss
        self.log_completions = False
        self.rollout_log = RolloutLog(self) if args.log_completions else None

    # Rollouts

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        # As in the base class, with every prompt repeated within the batch of rollouts
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.args.num_generations,
            batch_size=self.args.global_batch_size // self.args.num_generations,
            repeat_count=self.args.gradient_accumulation_steps * self.args.num_iterations,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            current_state=lambda: self.state,
        )

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.rollouts.given is not None:
            return self.rollouts.given
        limit = self.rollouts.limit
        if limit is not None:
            length = limit.value if self.model.training else limit.max_length
            if self.use_vllm:
                self.vllm_generation.max_completion_length = length
            else:
                self.generation_config.max_new_tokens = self.generation_kwargs["max_new_tokens"] = length
        with nullcontext() if self.use_vllm else finished_rows_dropped(self.model):
            completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return never_empty(completion_ids, self.eos_token_ids[0])

    def _tool_call_loop(self, *args, **kwargs):
        turns = super()._tool_call_loop(*args, **kwargs)
        self.rollouts.messages = turns[1]
        return turns

    def _ask(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """More rollouts than those of the batch, which count as generated. Called on every process."""
        completion_ids = self._generate_single_turn(prompt_ids, None, {})
        num_tokens = torch.tensor(sum(map(len, prompt_ids + completion_ids)), device=self.accelerator.device)
        self.state.num_input_tokens_seen += self.accelerator.gather(num_tokens).sum().item()
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        return completion_ids

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training or self.args.num_iterations == 1:
            return self._collect(inputs)
        step, number, metrics = self.state.global_step, self.args.num_iterations, self._metrics["train"]
        if self._collected is None or self._collected.step // number != step // number:
            before = {name: (values, len(values)) for name, values in metrics.items()}
            batch = self._collect(inputs)
            measured = {}
            for name, values in metrics.items():
                known, length = before.get(name, (None, 0))
                new = values[length if values is known else 0 :]  # some put another list in the place of one
                if new:
                    measured[name] = new
            self._collected = Collected(step, batch, measured)
            self._given_of_batch = self.rollouts.given
        else:
            batch = self._collected.batch
            self.rollouts.given = self._given_of_batch  # an evaluation in between has none
            for name, values in self._collected.measured.items():  # of the rollouts that are trained on
                metrics[name].extend(values)
            if self.args.log_engine_mismatch:  # the student is no longer the one that the engine was
                batch["engine_logprobs"] = torch.full_like(batch["engine_logprobs"], torch.nan)
        metrics["opsd/staleness"].append(step - self._collected.step)
        return dict(batch)

    def _collect(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        with self.vllm_generation.awake() if self.use_vllm else nullcontext():
            collected = self.rollouts.collect(inputs, self.state, is_training=self.model.training)
        for name, value in collected.metrics.items():
            self._metrics[mode][name].append(value)
        batch = collected.batch
        if self.teacher_prompts is not None:
            chosen = None if self.teacher_gate is None else self._gate_teacher(mode, collected)
            batch.update(
                self._tokenize_teacher_prompts(
                    collected.rows, collected.siblings, batch["completion_ids"].size(1), chosen
                )
            )
        if self.args.log_engine_mismatch:
            batch["engine_logprobs"] = self._engine_logprobs(batch)
        if self.rollout_log is not None:
            self.rollout_log.add(mode, collected)
        return batch

    def _engine_logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the engine gave each token, of shape `(B, C)`; NaN where it did not write it."""
        found = torch.full_like(batch["completion_ids"], torch.nan, dtype=torch.float32)
        prompts = unpadded(batch["prompt_ids"], batch["prompt_mask"])
        completions = unpadded(batch["completion_ids"], batch["completion_mask"])
        written = self.vllm_generation.written
        for row, prompt, completion in zip(found, prompts, completions, strict=True):
            row[: len(completion)] = row.new_tensor(written.get((*prompt, *completion), torch.nan))
        written.clear()
        return found

    # What the teacher sees

    @contextmanager
    def _chat_template_kwargs(self, kwargs: dict[str, Any]):
        """Lets `_tokenize_prompts` render with the chat template arguments of one side."""
        own, self.chat_template_kwargs = self.chat_template_kwargs, kwargs
        try:
            yield
        finally:
            self.chat_template_kwargs = own

    def _tokenize_for_teacher(self, prompts: list) -> list[list[int]]:
        with self._chat_template_kwargs(self.teacher_chat_template_kwargs):
            return self._tokenize_prompts(prompts)[0]

    def _apply_chat_template(self, kwargs: dict[str, Any], prompt: list, add_generation_prompt: bool) -> list[int]:
        return self.processing_class.apply_chat_template(
            conversation=[prompt],
            tools=self.tools or None,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=True,
            **kwargs,
        )["input_ids"][0]

    def _gate_teacher(self, mode: str, collected: CollectedRollouts) -> list[TeacherContext | None]:
        """Context of each rollout, as the teacher's gate has chosen it."""
        contexts, metrics = self.teacher_gate.choose(
            collected.rows, collected.siblings, collected.batch["kept"].tolist(), self.state
        )
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if self.teacher_gate.num_rollouts > 0:
            # What it has cost so far: a mean over some steps would hide it
            self._metrics[mode]["opsd/teacher_gate_tokens"] = [self.teacher_gate.tokens]
            self._metrics[mode]["opsd/teacher_gate_seconds"] = [self.teacher_gate.seconds]
        return contexts

    def _write_as_teacher(
        self, rows: list[dict[str, Any]], siblings: list[str | None], context: TeacherContext
    ) -> list[list[int]]:
        """Rollouts of the teacher in a context, up to their first end-of-sequence token."""
        # As long as the student's may be; a limit that follows what the student writes says nothing of the teacher
        length = self.generation_kwargs["max_new_tokens"]
        if self.rollouts.limit is not None:
            length = self.rollouts.limit.max_length
        prompt_ids, _ = self.teacher_prompts.encode(
            rows, [context] * len(rows), siblings, self._max_teacher_prompt(length)
        )
        config = copy.deepcopy(self.generation_config)
        config.max_new_tokens = length
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        device, completion_ids = self.accelerator.device, []
        for start in range(0, len(rows), size):
            ids, mask = padded(
                prompt_ids[start : start + size], self._tokenizer.pad_token_id, "left", self.pad_to_multiple_of
            )
            written = generate_as(
                self.teacher,
                self.model,
                self.accelerator,
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
            )
            for row in written[:, ids.size(1) :].tolist():
                end = next((place for place, token in enumerate(row) if token in self.eos_token_ids), len(row))
                completion_ids.append(row[: end + 1])
        return completion_ids

    def _verify_teacher(
        self, rows: list[dict[str, Any]], completion_ids: list[list[int]], state: TrainerState
    ) -> Verdicts:
        """Verdicts on rollouts of the teacher. What the verifiers log of them is not the student's, and is dropped."""
        verdicts = self.rollouts.verify(rows, completion_ids, state)
        self.rollouts.verifiers.metrics.clear()
        self.rollouts.verifiers.columns.clear()
        return verdicts

    def _max_teacher_prompt(self, completion_length: int) -> int | None:
        positions = positions_of(self.teacher.config)
        if self.args.max_teacher_prompt_length is not None or positions is None:
            return self.args.max_teacher_prompt_length
        return positions - completion_length

    def _tokenize_teacher_prompts(
        self,
        rows: list[dict[str, Any]],
        siblings: list[str | None],
        completion_length: int,
        chosen: list[TeacherContext | None] | None = None,  # by the teacher's gate
    ) -> dict[str, torch.Tensor]:
        """The prompts in the teacher's context, left-padded: ids and mask of shape `(B, P_teacher)`."""
        prompts, limit = self.teacher_prompts, self._max_teacher_prompt(completion_length)
        in_contexts = [prompts.context_of(sibling) for sibling in siblings] if chosen is None else chosen
        prompt_ids, num_cut = prompts.encode(rows, in_contexts, siblings, limit)
        if chosen is not None:
            # An anchor is what the student sees, in the student's own rendering
            anchors = [index for index, context in enumerate(chosen) if context is None]
            plain = self._tokenize_prompts([rows[index]["prompt"] for index in anchors])[0] if anchors else []
            for index, ids in zip(anchors, plain, strict=True):
                prompt_ids[index] = ids
        if prompts.contexts:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["opsd/privileged_cut"].append(num_cut / len(rows))
        ids, mask = padded(prompt_ids, self._tokenizer.pad_token_id, "left", self.pad_to_multiple_of)
        device = self.accelerator.device
        return {"teacher_prompt_ids": ids.to(device), "teacher_prompt_mask": mask.to(device)}

    # Micro-batches

    def training_step(self, model, inputs, num_items_in_batch):
        self._at_work = None
        budget = self.args.max_tokens_per_microbatch
        if budget is None:
            try:
                return super().training_step(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error) from error
        accelerator = self.accelerator
        if not accelerator.sync_gradients:
            # How many micro-batches it takes is known when the gate has decided: all of them run in the last of the
            # accumulation steps, each of which has the whole generation batch
            return torch.zeros((), device=accelerator.device)
        start = time.perf_counter()
        model.train()
        self.optimizer.train()
        batch = gather_rows(self._generate_and_score_completions(inputs), accelerator)
        loss = self._accumulate_or_halve(model, batch, budget)
        self._metrics["train"]["step_time"].append(time.perf_counter() - start)
        return loss

    def _accumulate_or_halve(self, model, batch: dict[str, torch.Tensor], budget: int) -> torch.Tensor:
        """As `_accumulate_under`; where memory does not suffice, once more in micro-batches of half of the one at hand."""
        measured = copy.deepcopy(self.token_metrics["train"])
        mismatch = copy.deepcopy(self.engine_mismatch["train"])
        num_entropies = len(self._metrics["train"]["entropy"])
        try:
            return self._accumulate_under(model, batch, budget)
        except torch.OutOfMemoryError as error:
            explained = self._out_of_memory(error)
            rows, tokens = self._at_work or (1, 0)
            # A single rollout has no half, and other processes would wait for what this one does again
            if rows == 1 or self.accelerator.num_processes > 1:
                raise explained from error
        # Here, where the error holds no memory any more
        logger.warning(f"{explained} This step is made again in micro-batches of half of that.")
        self.token_metrics["train"] = measured
        self.engine_mismatch["train"] = mismatch
        del self._metrics["train"]["entropy"][num_entropies:]
        self.faults.start_step()
        model.zero_grad()
        release_memory()
        try:
            return self._accumulate_under(model, batch, tokens // 2)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
        """The error, with the micro-batch that there was no memory for and the settings to lower."""
        if self._at_work is None:
            return error
        rows, tokens = self._at_work
        setting = "`max_tokens_per_microbatch`"
        if self.args.max_tokens_per_microbatch is None:
            setting = "`per_device_train_batch_size` in favour of `gradient_accumulation_steps`, or set " + setting
        if rows == 1:
            setting = "`max_completion_length`"
        return torch.OutOfMemoryError(
            f"Out of memory in step {self.state.global_step + 1}, in a micro-batch of {rows} rollouts and {tokens} tokens with "
            f"padding: lower {setting}."
        )

    def _accumulate_under(self, model, batch: dict[str, torch.Tensor], budget: int) -> torch.Tensor:
        """Adds the gradient of a batch to that of the step, in micro-batches under a budget, and returns its loss."""
        accelerator = self.accelerator
        loss = torch.zeros((), device=accelerator.device)
        dealt = micro_batches(
            batch,
            budget,
            accelerator.num_processes,
            accelerator.process_index,
            balanced_length(self.model.config),
        )
        reduces_each = self.is_deepspeed_enabled or accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
        for micro_batch in dealt:
            is_last = micro_batch is dealt[-1]
            accelerator.sync_gradients = is_last
            with nullcontext() if is_last or reduces_each else accelerator.no_sync(model):
                loss += self._accumulate(model, micro_batch)
        return loss

    def _accumulate(self, model, micro_batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Adds the gradient of a micro-batch to that of the step, and returns its loss."""
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, micro_batch)
        # The loss is scaled already: by the tokens of the whole global batch
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "kept" in inputs:
            kept = inputs["kept"]
            if not kept.any():
                nothing_kept = inputs["num_items_in_batch"] == 0
                if nothing_kept and self.model.training:
                    # No step of the optimizer's, nor of the scaler's. DeepSpeed takes it in the backward
                    self.accelerator.sync_gradients = False
                is_alone = self.accelerator.distributed_type == DistributedType.NO
                if is_alone or (nothing_kept and not self.is_deepspeed_enabled):
                    # Nothing to train on here, and no other process that waits for this one: no forward at all
                    loss = torch.zeros((), device=kept.device, requires_grad=True)
                    return (loss, None) if return_outputs else loss
                # Another process, or what wraps the model, has gradients to reduce in this step, and needs a forward
                # and a backward of this one too: of one row that no token is read from
                kept = torch.arange(len(kept), device=kept.device) == 0
                inputs = {**inputs, "completion_mask": torch.zeros_like(inputs["completion_mask"])}
            inputs = select_rows(inputs, kept, keep_shape=self.pad_to_multiple_of is not None)
        self._at_work = size_of(inputs)
        measured = copy.deepcopy(self.token_metrics["train"])
        mismatch = copy.deepcopy(self.engine_mismatch["train"])
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            finite = self._finite
            any_left_out = self.faults.add(inputs, finite)
            if self.is_deepspeed_enabled:  # which steps in the backward
                self.faults.check_any(self.state.global_step + 1)
            if any_left_out:
                self.token_metrics["train"] = measured
                self.engine_mismatch["train"] = mismatch
                self._metrics["train"]["entropy"].pop()
                loss = self._loss_without(model, inputs, finite, num_items_in_batch)
            metrics = self.token_metrics["train"]
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, DivergenceCallback):
                    callback.on_divergence(self.args, self.state, self.control, metrics=metrics)
        return loss

    def _loss_without(self, model, inputs, finite: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """
        Loss of the rollouts whose divergence is finite. What is not would be in the gradient of the weights even where its own
        is zero, so the forward pass is made again without it. Called on every process.
        """
        if not finite.any():
            if self.accelerator.distributed_type == DistributedType.NO:
                return torch.zeros((), device=finite.device, requires_grad=True)
            # The others go on with a forward and a backward, and so does this one: of a prompt, of which no token counts
            inputs = {**inputs, "completion_mask": torch.zeros_like(inputs["completion_mask"])}
            finite = torch.arange(len(finite), device=finite.device) == 0
        inputs = select_rows(inputs, finite, keep_shape=self.pad_to_multiple_of is not None)
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if not math.isfinite(self._metrics["train"]["entropy"][-1]):  # of all processes
            self._metrics["train"]["entropy"].pop()
        return loss

    def _clip_grad_norm(self, model):
        # Where no step is taken there is nothing to clip, and a scaler that does not step must not be asked to unscale
        return super()._clip_grad_norm(model) if self.accelerator.sync_gradients else torch.zeros(())

    def _get_grad_norm(self, model, grad_norm=None):
        if not self.accelerator.sync_gradients:
            return 0.0
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed has taken the step by now, and a scaler looks at the gradient itself
        if self.faults.end_step(
            norm if not self.is_deepspeed_enabled and self.accelerator.scaler is None else None,
            self.state.global_step + 1,
        ):
            self.accelerator.sync_gradients = False
            return 0.0
        return norm

    # Evaluation: where nothing passes the gate there is no loss, and least of all the lowest one

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        before = self.token_metrics["eval"].num_tokens
        loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.token_metrics["eval"].num_tokens > before:
            self._eval_loss += torch.tensor([loss.item(), 1, 0])
        else:
            self._eval_loss += torch.tensor([0, 0, 1])
        return loss, *rest

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._eval_loss.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, measured, empty = self.accelerator.reduce(self._eval_loss.to(self.accelerator.device)).tolist()
        if empty > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = total / measured if measured else None
        return output

    def _determine_best_metric(self, metrics, trial):
        name = self.args.metric_for_best_model
        if name is not None and metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0) is None:
            return False
        return super()._determine_best_metric(metrics, trial)

    # Divergence

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        # As in the base class this runs inside the student wrapper's forward, so the sharded parameters are whole and
        # no collective may be called here.
        # Nor is accelerate's forward called, which is the one that casts
        with self.accelerator.autocast():
            tokens, valid = self._compute_divergence(unwrapped_student, inputs)
        mode = "train" if self.model.training else "eval"
        self._finite = finite_rows(tokens.divergence.detach(), valid)
        entropy = self.token_metrics[mode].add(tokens)
        if "rollout" in inputs and not self.args.use_liger_kernel:  # whose loss has no values of single tokens
            kl = tokens.divergence if tokens.unclipped is None else tokens.unclipped
            self.rollout_log.measure(mode, inputs["rollout"], valid, kl.masked_fill(~kl.isfinite(), torch.nan))
        num_tokens = valid.sum()
        if num_items_in_batch is None:
            num_items_in_batch = num_tokens.clamp(min=1)
        return tokens.divergence.sum() / num_items_in_batch, entropy, num_tokens

    def _compute_divergence(self, unwrapped_student, inputs) -> tuple[DivergenceOutput, torch.Tensor]:
        """Divergence of every token that counts, `(N,)`, and which of the completions' positions those are, `(B, C)`."""
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]  # (B, C)
        loss_mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]
        multimodal_inputs = {field: inputs[field] for field in MULTIMODAL_FIELDS if field in inputs}

        # Per-token fields of images lie beside the padding
        keep_shape = bool(multimodal_inputs) or self.pad_to_multiple_of is not None
        completion = completion_ids, completion_mask
        student_inputs, student_start = with_completion(
            inputs["prompt_ids"], inputs["prompt_mask"], *completion, keep_shape
        )
        teacher_inputs, teacher_start = student_inputs, student_start
        if "teacher_prompt_ids" in inputs:
            teacher_inputs, teacher_start = with_completion(
                inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"], *completion, keep_shape
            )

        # The teacher first: the student's activations are not there yet
        teacher_hidden, teacher_head = self.teacher.forward(
            unwrapped_student, self._get_last_hidden_state, *teacher_inputs, **multimodal_inputs
        )
        student_hidden = self._get_last_hidden_state(unwrapped_student, *student_inputs, **multimodal_inputs)
        student_head = Head.of(unwrapped_student)
        device = student_head.weight.device
        if teacher_head.weight.device != device:
            raise ValueError(
                f"The `lm_head` of the student is on {device} and that of the teacher on "
                f"{teacher_head.weight.device}: place both on one device in their `device_map`."
            )
        valid = loss_mask.to(device) != 0
        # The state that predicts a token stands one place before it
        row, position = valid.nonzero(as_tuple=True)
        student_hidden = student_hidden.to(device)[row, student_start[row] + position - 1]  # (N, H_student)
        teacher_hidden = teacher_hidden.to(device)[row, teacher_start[row] + position - 1]  # (N, H_teacher)
        if torch.is_autocast_enabled(device.type):
            # As the product with a head would be cast; the rest of the divergence says itself what it computes in
            dtype = torch.get_autocast_dtype(device.type)
            student_hidden, teacher_hidden = student_hidden.to(dtype), teacher_hidden.to(dtype)
        with (
            torch.autocast(device.type, enabled=False),
            student_head.gathered(student_hidden.dtype) as student_head,
            teacher_head.gathered(teacher_hidden.dtype) as teacher_head,
        ):
            tokens = linear_divergence_with_metrics(
                student_hidden,
                student_head.weight,
                teacher_hidden,
                teacher_head.weight,
                beta=self.beta,
                temperature=self.temperature,
                kl_clip=self.args.kl_clip,
                valid_vocab=self.teacher.valid_vocab,
                backend="liger" if self.args.use_liger_kernel else "auto",
                student_bias=student_head.bias,
                teacher_bias=teacher_head.bias,
                student_logit_scale=student_head.logit_scale,
                teacher_logit_scale=teacher_head.logit_scale,
                student_softcap=student_head.softcap,
                teacher_softcap=teacher_head.softcap,
            )
            if "engine_logprobs" in inputs:
                mode = "train" if self.model.training else "eval"
                own = student_head.log_probs(
                    student_hidden, completion_ids.to(device)[row, position], self.temperature
                )
                self.engine_mismatch[mode].add(inputs["engine_logprobs"].to(device)[row, position], own)
        return tokens, valid

    # Logs and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in self.token_metrics[mode].gathered_means(self.accelerator).items():
            self._metrics[mode][name].append(value)
        self.token_metrics[mode].clear()
        if self.args.log_engine_mismatch:
            for name, value in self.engine_mismatch[mode].gathered(self.accelerator).items():
                self._metrics[mode][name].append(value)
            self.engine_mismatch[mode].clear()
        super().log(logs, start_time)
        if self.rollout_log is not None:
            if self.args.log_completions:
                self.rollout_log.write_table(mode, self.state.global_step)
            self.rollout_log.clear(mode)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.teacher.remove_saved_adapter(output_dir or self.args.output_dir)

    @property
    def _saved(self) -> list[Saved]:
        """What a checkpoint has to hold beside the weights."""
        watching = [callback for callback in self.callback_handler.callbacks if isinstance(callback, Saved)]
        return self.rollouts.saved + ([] if self.teacher_gate is None else [self.teacher_gate]) + watching

    def _save_checkpoint(self, model, trial) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        # Before the rest: a checkpoint whose `trainer_state.json` is there is whole, and only then are older ones removed
        if self.args.should_save:
            for state in self._saved:
                state.save(folder)
        if self.teacher.follows_student:
            self.teacher.save(folder, is_main=self.args.should_save)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # Here, because under DeepSpeed `_load_from_checkpoint` is not called
        if checkpoint is not None:
            if self.teacher.follows_student:
                self.teacher.load(checkpoint)
            for state in self._saved:
                state.load(checkpoint)
