import atexit
import json
import os
import random
import shutil
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import DistillationTrainer, GRPOTrainer
from trl.data_utils import is_conversational
from trl.models import prepare_deepspeed
from trl.trainer.utils import (
    RepeatSampler,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    maybe_gather_lm_head_ctx,
    pad,
    shutdown_event_loop_in_daemon,
    split_pixel_values_by_grid,
    start_event_loop_in_daemon,
    unsplit_pixel_values_by_grid,
    use_adapter,
)

from .alarms import AlarmCallback
from .config import OPSDConfig
from .divergence import DivergenceOutput, linear_divergence_with_metrics
from .gate import (
    RewardFunc,
    Verdicts,
    check_completion_ids,
    judge,
    name_errors,
    resolve_gate,
    shortest,
    shortest_siblings,
)
from .head import gather_head, logit_transform
from .microbatch import token_budget_batches
from .pass_rates import PassRates, prompt_key
from .teacher import (
    TeacherSyncCallback,
    assign,
    check_vocabularies,
    copy_of_student,
    load_like_student,
    resolve_teacher_weights,
    shard_teacher,
    sharded_parameters,
    whole,
)
from .view import RolloutLog


logger = get_logger(__name__)

# Fields of a batch that belong to images, as `DistillationTrainer` names them
MULTIMODAL_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# Name of a teacher that is a second adapter, and the file of a teacher that follows the student in a checkpoint
TEACHER_ADAPTER = "teacher"
TEACHER_FILE = "teacher.safetensors"

# File of the prompts' pass rates in a checkpoint
PASS_RATES_FILE = "pass_rates.json"

# What the loss measures for each token
TOKEN_METRICS = (
    "opsd/kl",
    "opsd/clip_fraction",
    "opsd/student_entropy",
    "opsd/teacher_entropy",
    "opsd/top1_agreement",
)


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
    - several rollouts per prompt (`num_generations`);
    - off-policy batches, whose completions are those of the data set (`lmbda`);
    - a gate: rollouts are scored by reward functions before any forward pass, and only those that pass are trained on;
      what it rejects can be asked again (`max_generation_rounds`), and prompts that are always or never solved can be
      left out (`min_pass_rate`, `max_pass_rate`);
    - the divergence can be clipped per vocabulary entry without going negative (`kl_clip`).

    With none of them used, and an external teacher, it is `DistillationTrainer`, step by step.

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

    # Scoring of completions is GRPO's: it reads nothing but the attributes set in `__init__`
    _calculate_rewards = GRPOTrainer._calculate_rewards
    _log_completion_extra = GRPOTrainer._log_completion_extra
    _log_metric = GRPOTrainer._log_metric

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
        if reward_funcs is None:
            reward_funcs = []
        elif not isinstance(reward_funcs, list):
            reward_funcs = [reward_funcs]

        has_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        self.teacher_weights = resolve_teacher_weights(args, model, teacher_model)
        self.gate = resolve_gate(args, reward_funcs)
        self.teacher_context = args.build_teacher_context()
        datasets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        for dataset in datasets:
            if self.teacher_context is not None and dataset is not None and dataset.column_names is not None:
                self.teacher_context.check_columns(dataset.column_names)
        if args.lmbda < 1 and train_dataset is not None and train_dataset.column_names is not None:
            check_completion_ids(train_dataset.column_names, args.lmbda)
        if args.num_generations > 1 and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                f"`num_generations={args.num_generations}` needs a dataset that can be indexed, and `train_dataset` is "
                "an IterableDataset: load it without streaming, or set `num_generations=1`."
            )
        if isinstance(train_dataset, Dataset):
            args.check_num_prompts(len(train_dataset))
        skips_prompts = args.min_pass_rate is not None or args.max_pass_rate is not None
        if skips_prompts and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "`min_pass_rate` and `max_pass_rate` need a dataset that can be indexed, to ask other prompts in place of "
                "those that are skipped, and `train_dataset` is an IterableDataset: load it without streaming."
            )
        if args.max_generation_rounds > 1 and tools:
            raise ValueError(
                f"`max_generation_rounds={args.max_generation_rounds}` asks again for single completions, and `tools` make "
                "conversations of them: leave it at 1, or drop the tools."
            )
        if args.use_liger_kernel and args.kl_clip is not None:
            raise ValueError(
                "`use_liger_kernel=True` and `kl_clip` exclude each other, because Liger's loss has no clip: drop one."
            )

        follows_student = self.teacher_weights in ("ema", "snapshot")
        is_snapshot = self.teacher_weights == "snapshot"
        sync_steps = args.teacher_sync_steps or (50 if is_snapshot else 1)
        if self.teacher_weights == "live" or (is_snapshot and sync_steps <= 10):
            logger.warning(
                "A teacher that keeps up with the student has been seen to collapse: "
                "https://huggingface.co/papers/2603.05433 found 50 steps between copies to be good and 10 too few."
            )

        # The base class takes a teacher whose vocabulary has the student's size. Where only the padding of the
        # vocabulary differs it is prepared below.
        same_size = True
        if self.teacher_weights == "external":
            same_size = check_vocabularies(model, teacher_model, processing_class, args)
            if not same_size:
                teacher_model = load_like_student(teacher_model, args.teacher_model_init_kwargs, args)
        elif self.teacher_weights != "live" and not has_adapter:
            teacher_model = copy_of_student(model, args)

        super().__init__(
            model=model,
            teacher_model=teacher_model if same_size else None,
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

        if self.teacher_context is not None and self._is_vlm:
            raise ValueError(
                "`teacher_context` and `teacher_prompt_template` work on text, and the processing class is a "
                "multimodal processor: use an external teacher without a context."
            )
        if (args.max_generation_rounds > 1 or skips_prompts) and self._is_vlm:
            raise ValueError(
                "`max_generation_rounds`, `min_pass_rate` and `max_pass_rate` work on text, and the processing class is a "
                "multimodal processor: leave them as they are by default."
            )
        if args.max_tokens_per_microbatch is not None and self._is_vlm:
            raise ValueError(
                "`max_tokens_per_microbatch` divides a batch by the length of its text, and the processing class is a "
                "multimodal processor: leave it at None."
            )
        self.valid_vocab = None
        if not same_size:
            self.valid_vocab = len(self._tokenizer)
            if self.is_deepspeed_enabled:
                self.teacher_model = prepare_deepspeed(teacher_model, self.accelerator)
            else:
                self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)
        if self.teacher_model is not None and self.accelerator.is_fsdp2:
            shard_teacher(self.teacher_model, self.accelerator)
        if self.teacher_weights == "initial" and has_adapter:
            trained = [name for name, p in self.model.named_parameters() if "lora_B" in name and p.detach().any()]
            if trained:
                raise ValueError(
                    f"`teacher_weights='initial'` takes the base model with the adapter disabled, but the adapter "
                    f"already changes it (`{trained[0]}` is not zero): merge the adapter first (`merge_and_unload`), "
                    "or initialise it so that it starts as the identity."
                )

        if follows_student:
            if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
                raise ValueError(
                    f"`teacher_weights={self.teacher_weights!r}` is not supported under FSDP1, which hides the "
                    "parameters of a model in flat ones: set `fsdp_version: 2`."
                )
            if has_adapter:
                self._add_teacher_adapter()
            rate = 1.0 if is_snapshot else args.teacher_update_rate
            self.add_callback(TeacherSyncCallback(self._teacher_pairs, rate, sync_steps))

        self.num_generations = args.num_generations
        self.lmbda = args.lmbda
        self._given_completion_ids = None
        self.keep_shortest = args.keep_shortest
        self.sibling_fallback = args.build_sibling_fallback()
        self.teacher_chat_template_kwargs = (
            self.chat_template_kwargs
            if args.teacher_chat_template_kwargs is None
            else args.teacher_chat_template_kwargs
        )
        self.gate_threshold = args.gate_threshold
        self.max_generation_rounds = args.max_generation_rounds
        self.pass_rates = None
        if skips_prompts:
            self.pass_rates = PassRates(
                self.train_dataset["prompt"],
                args.min_pass_rate,
                args.max_pass_rate,
                args.pass_rate_rollouts,
                args.seed,
            )
        self.kl_clip = args.kl_clip
        self._token_sums = {mode: torch.zeros(1 + len(TOKEN_METRICS), dtype=torch.float64) for mode in self._metrics}

        # What `GRPOTrainer._calculate_rewards` reads
        self.reward_func_names = [get_callable_name(func) for func in reward_funcs]
        self.reward_funcs = [name_errors(func) for func in reward_funcs]
        self.reward_processing_classes = [None] * len(reward_funcs)
        self.reward_weights = torch.tensor(args.reward_weights or [1.0] * len(reward_funcs))
        self.environments = None
        self._pending_extra_logs = defaultdict(list)
        self._pending_metrics = defaultdict(list)
        if any(is_async_callable(func) for func in reward_funcs):
            thread, self.async_loop, ready = start_event_loop_in_daemon(name="OPSDTrainer-AsyncLoop")
            ready.wait()
            atexit.register(shutdown_event_loop_in_daemon, thread, self.async_loop)

        # Ours instead of the base class's, which has no rewards and knows nothing of the loss
        self.log_completions = False
        self._rollout_log = RolloutLog(self) if args.log_completions else None

        self.max_teacher_prompt_length = args.max_teacher_prompt_length
        self.max_tokens_per_microbatch = args.max_tokens_per_microbatch
        self.alarms = AlarmCallback(self)
        self.add_callback(self.alarms)
        if train_dataset is not None and self._has_own_teacher_prompt:
            self._check_teacher_boundary(next(iter(train_dataset)))

    @property
    def _has_own_teacher_prompt(self) -> bool:
        return self.teacher_context is not None or self.teacher_chat_template_kwargs != self.chat_template_kwargs

    def _add_teacher_adapter(self) -> None:
        """Adds a second adapter, `teacher`, equal to the student's and frozen."""
        student_adapter = self.model.active_adapter
        with torch.random.fork_rng():  # so that the student's rollouts do not depend on it
            self.model.add_adapter(TEACHER_ADAPTER, self.model.peft_config[student_adapter])
        self.model.set_adapter(student_adapter)
        for teacher, student in self._teacher_pairs().values():
            teacher.requires_grad_(False)
            teacher.data.copy_(student.data)  # before FSDP or DeepSpeed shard the model

    def _teacher_pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Parameters of a teacher that follows the student, and the student's, by name; sharded where they are."""
        student = sharded_parameters(self.model)
        if self.teacher_model is not None:
            teacher = sharded_parameters(self.accelerator.unwrap_model(self.teacher_model))
            return {name: (teacher[name], parameter) for name, parameter in student.items()}
        own = f".{self.model.active_adapter}."
        return {
            name: (student[name.replace(own, f".{TEACHER_ADAPTER}.")], parameter)
            for name, parameter in student.items()
            if own in name
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # PEFT saves every adapter, and reads a folder with several as one without the student's
        shutil.rmtree(os.path.join(output_dir or self.args.output_dir, TEACHER_ADAPTER), ignore_errors=True)

    def _save_checkpoint(self, model, trial) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.pass_rates is not None and self.args.should_save:
            # Before the rest, so that a checkpoint that is whole has it
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, PASS_RATES_FILE)
            with open(f"{path}.tmp", "w") as file:
                json.dump(self.pass_rates.state_dict(), file)
            os.replace(f"{path}.tmp", path)
        super()._save_checkpoint(model, trial)
        if self.teacher_weights in ("ema", "snapshot"):
            # Every process takes part in making the parameters whole, and the main one keeps them
            teacher = {name: whole(teacher) for name, (teacher, _) in self._teacher_pairs().items()}
            if self.args.should_save:
                path = os.path.join(folder, TEACHER_FILE)
                save_file(teacher, f"{path}.tmp")
                os.replace(f"{path}.tmp", path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # Here, because under DeepSpeed `_load_from_checkpoint` is not called
        if checkpoint is not None and self.teacher_weights in ("ema", "snapshot"):
            path = os.path.join(checkpoint, TEACHER_FILE)
            if not os.path.isfile(path):
                raise ValueError(
                    f"`{checkpoint}` has no {TEACHER_FILE}, so the teacher cannot go on from where it was: "
                    f"resume from a checkpoint that was written with `teacher_weights={self.teacher_weights!r}`."
                )
            saved = load_file(path)
            for name, (teacher, _) in self._teacher_pairs().items():
                assign(teacher, saved[name])
        if checkpoint is not None and self.pass_rates is not None:
            path = os.path.join(checkpoint, PASS_RATES_FILE)
            if not os.path.isfile(path):
                raise ValueError(
                    f"`{checkpoint}` has no {PASS_RATES_FILE}, so it is not known which prompts were skipped: resume "
                    "from a checkpoint that was written with `min_pass_rate` or `max_pass_rate`, or resume without them."
                )
            with open(path) as file:
                self.pass_rates.load_state_dict(json.load(file))

    def _check_teacher_boundary(self, example: dict[str, Any]) -> None:
        """Checks that student and teacher are asked for the completion by the same generation prompt."""
        if not is_conversational({"prompt": example["prompt"]}):
            return  # a plain string has no generation prompt: how it ends is the template's own business
        student, teacher = example["prompt"], self._teacher_prompt(example, sibling="")
        endings = []
        for prompt, kwargs in ((student, self.chat_template_kwargs), (teacher, self.teacher_chat_template_kwargs)):
            with self._chat_template_kwargs(kwargs):
                ids = self._tokenize_prompts([prompt])[0][0]
            without = self.processing_class.apply_chat_template(
                conversation=[prompt],
                tools=self.tools or None,
                chat_template=self.chat_template,
                add_generation_prompt=False,
                tokenize=True,
                return_dict=True,
                **kwargs,
            )["input_ids"][0]
            # Not always a prefix: some templates end a conversation that has no generation prompt
            same = next(
                (i for i, pair in enumerate(zip(ids, without, strict=False)) if pair[0] != pair[1]), len(without)
            )
            endings.append(ids[same:])
        if endings[0] != endings[1]:
            raise ValueError(
                "The student and the teacher are asked for the completion in different ways, so the teacher would "
                f"score tokens in a place where it never writes them: the student's prompt ends in "
                f"{self._tokenizer.decode(endings[0])!r} and the teacher's in {self._tokenizer.decode(endings[1])!r}. "
                "Make `chat_template_kwargs` and `teacher_chat_template_kwargs` agree on it."
            )

    @contextmanager
    def _chat_template_kwargs(self, kwargs: dict[str, Any]):
        """Lets `_tokenize_prompts` render with the chat template arguments of one side."""
        own, self.chat_template_kwargs = self.chat_template_kwargs, kwargs
        try:
            yield
        finally:
            self.chat_template_kwargs = own

    def _teacher_prompt(
        self, example: dict[str, Any], sibling: str | None = None, cut: Callable[[str], str] | None = None
    ) -> list[dict[str, Any]] | str:
        """The prompt in the teacher's context; `cut` shortens each privileged text."""
        context = self.teacher_context
        if context is not None and "sibling" in context.fields and sibling is None:
            context = self.sibling_fallback
        if context is None:
            return example["prompt"]
        texts = context.privileged_texts(example, sibling)
        if cut is not None:
            texts = {field: cut(text) for field, text in texts.items()}
        return context.prompt(example, texts)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        # As in the base class, with every prompt repeated within the batch of rollouts
        batch_size = (
            self.args.per_device_train_batch_size
            * self.accelerator.num_processes
            * self.args.gradient_accumulation_steps
        )
        return RepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=batch_size // self.num_generations,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._given_completion_ids is not None:
            return self._given_completion_ids
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Decided by seed and step: the same on every process, and after resuming
        draw = random.Random(f"{self.args.seed} {self.state.global_step}").random()
        off_policy = self.model.training and draw >= self.lmbda
        self._given_completion_ids = [example["completion_ids"] for example in inputs] if off_policy else None
        if self.pass_rates is not None and self._is_rolling_out:
            inputs = self._replace_skipped(inputs)
        output = super()._generate_and_score_completions(inputs)
        siblings = [None] * len(inputs)
        if self.reward_funcs:
            kept, siblings = self._score_and_gate(inputs, output)  # (B,)
            loss_mask = output["completion_mask"]
            if "tool_mask" in output:
                loss_mask = loss_mask * output["tool_mask"]
            output["kept"] = kept
            # The loss is a sum over the tokens of the kept rollouts of the whole global batch, divided by their number
            num_items_in_batch = self.accelerator.gather((loss_mask * kept.unsqueeze(1)).sum()).sum()
            output["num_items_in_batch"] = num_items_in_batch
            if num_items_in_batch == 0 and self.model.training:
                logger.warning(
                    f"No rollout of step {self.state.global_step + 1} passed the gate `{self.gate}`: nothing is "
                    "trained on, and the weights stay as they are."
                )
        if self._has_own_teacher_prompt:
            output.update(self._tokenize_teacher_prompts(inputs, siblings, output["completion_ids"].size(1)))
        if self._rollout_log is not None:
            self._rollout_log.add("train" if self.model.training else "eval", output)
        return output

    @property
    def _is_rolling_out(self) -> bool:
        """Whether the completions at hand are rollouts to train on, rather than those of an evaluation or given ones."""
        return self.model.training and self._given_completion_ids is None

    def _replace_skipped(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, with others of the training set in the place of those whose prompt is skipped."""
        keys = gather_object([prompt_key(example["prompt"]) for example in inputs])
        taken = self.pass_rates.start_batch(keys, self.num_generations)
        self._metrics["train"]["opsd/skipped"].append(len(taken) / len(keys))
        start = self.accelerator.process_index * len(inputs)
        return [
            self.train_dataset[taken[slot]] if slot in taken else example
            for slot, example in enumerate(inputs, start=start)
        ]

    def _refill(
        self,
        inputs: list[dict[str, Any]],
        output: dict[str, Any],
        completion_ids: list[list[int]],
        verdicts: Verdicts,
    ) -> None:
        """Asks the prompts of rejected rollouts again, and puts those that pass in their place in all the arguments."""
        process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
        prompt_ids = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        rounds = 1
        while rounds < self.max_generation_rounds and not verdicts.passed.all():
            # Generating and gathering take all processes: each asks for as many rows as the one with most rejected, its
            # own rejected ones first, and drops what it has no place for
            rejected = ~verdicts.passed.view(num_processes, -1)
            rows = rejected.int().argsort(dim=1, descending=True, stable=True)[:, : rejected.sum(dim=1).max()]
            slots = (rows + torch.arange(num_processes, device=rows.device).unsqueeze(1) * len(inputs)).flatten()
            own = rows[process].tolist()
            asked = [prompt_ids[row] for row in own]
            answers = self._generate_single_turn(asked, None, {})
            num_tokens = torch.tensor(sum(map(len, asked)) + sum(map(len, answers)), device=rows.device)
            self.state.num_input_tokens_seen += self.accelerator.gather(num_tokens).sum().item()
            answered = self._verify([inputs[row] for row in own], answers)
            taken = answered.passed & ~verdicts.passed[slots]
            verdicts.replace(slots[taken], answered, taken)
            # What the verifiers logged of each answer goes where the answer goes
            own_taken = taken.view(num_processes, -1)[process].tolist()
            columns = [(column, column[len(inputs) :]) for column in self._pending_extra_logs.values()]
            for column, new in [(completion_ids, answers), *columns]:
                for row, value, is_taken in zip(own, new, own_taken, strict=False):
                    if is_taken:
                        column[row] = value
                del column[len(inputs) :]
            rounds += 1
        self._metrics["train"]["opsd/generation_rounds"].append(rounds)
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        if rounds == 1:
            return
        padding = {"padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = [torch.tensor(ids) for ids in completion_ids]
        mask = [torch.ones_like(row) for row in ids]
        device = self.accelerator.device
        output["completion_ids"] = pad(ids, padding_value=self._tokenizer.pad_token_id, **padding).to(device)
        output["completion_mask"] = pad(mask, padding_value=0, **padding).to(device)

    def _tokenize_teacher_prompts(
        self, inputs: list[dict[str, Any]], siblings: list[str | None], completion_length: int
    ) -> dict[str, torch.Tensor]:
        """The prompts in the teacher's context, left-padded: ids and mask of shape `(B, P_teacher)`."""
        mode = "train" if self.model.training else "eval"
        limit = self.max_teacher_prompt_length
        if limit is None:
            teacher = self.model if self.teacher_model is None else self.accelerator.unwrap_model(self.teacher_model)
            limit = teacher.config.get_text_config().max_position_embeddings - completion_length
        with self._chat_template_kwargs(self.teacher_chat_template_kwargs):
            pairs = list(zip(inputs, siblings, strict=True))
            prompt_ids, _, _ = self._tokenize_prompts([self._teacher_prompt(*pair) for pair in pairs])
            too_long = [len(ids) > limit for ids in prompt_ids]
            if self.teacher_context is not None:
                prompt_ids = [
                    self._cut_teacher_prompt(*pair, limit) if cut else ids
                    for pair, ids, cut in zip(pairs, prompt_ids, too_long, strict=True)
                ]
                self._metrics[mode]["opsd/privileged_cut"].append(sum(too_long) / len(too_long))
        rows = [torch.tensor(ids) for ids in prompt_ids]
        padding = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        ids = pad(rows, padding_value=self._tokenizer.pad_token_id, **padding)
        mask = pad([torch.ones_like(row) for row in rows], padding_value=0, **padding)
        return {
            "teacher_prompt_ids": ids.to(self.accelerator.device),
            "teacher_prompt_mask": mask.to(self.accelerator.device),
        }

    def _cut_teacher_prompt(self, example: dict[str, Any], sibling: str | None, limit: int) -> list[int]:
        """Ids of a teacher's prompt that fits, with as many tokens of each privileged text as there is room for."""

        def prompt_ids(num_tokens: int) -> list[int]:
            def cut(text: str) -> str:
                return self._tokenizer.decode(
                    self._tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]
                )

            return self._tokenize_prompts([self._teacher_prompt(example, sibling, cut)])[0][0]

        if len(prompt_ids(0)) > limit:
            raise ValueError(
                f"The teacher's prompt is longer than {limit} tokens even without its "
                f"privileged text, and the problem is never cut: raise `max_teacher_prompt_length` or filter out the "
                f"row with the prompt {str(example['prompt'])[:80]!r}."
            )
        logger.warning_once(
            f"A privileged text was cut to fit {limit} tokens of teacher prompt; the share of "
            "prompts is logged as `opsd/privileged_cut`."
        )
        fits, too_many = 0, limit
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if len(prompt_ids(middle)) <= limit:
                fits = middle
            else:
                too_many = middle
        return prompt_ids(fits)

    def _verify(self, inputs: list[dict[str, Any]], completion_ids: list[list[int]]) -> Verdicts:
        """Verdicts on the rollouts of all processes, `(B × processes,)`, those of a prompt side by side."""
        prompts = [example["prompt"] for example in inputs]
        completions = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": prompts[0]}):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        rewards_per_func = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        ends = (*self.eos_token_ids, self._tokenizer.pad_token_id)
        own = torch.tensor([[len(ids), ids[-1] in ends] for ids in completion_ids], device=rewards_per_func.device)
        lengths, finished = self.accelerator.gather(own).unbind(dim=1)
        return judge(rewards_per_func, lengths, finished, self.reward_weights, self.gate, self.gate_threshold)

    def _score_and_gate(
        self, inputs: list[dict[str, Any]], output: dict[str, Any]
    ) -> tuple[torch.Tensor, list[str | None]]:
        """
        Scores the rollouts, and has those that the gate rejects written again. Returns which of them are trained on, a
        `bool` tensor of shape `(B,)`, and the text of the shortest correct sibling of each, where the teacher's context
        takes it.
        """
        mode = "train" if self.model.training else "eval"
        group_size = self.num_generations if mode == "train" else 1
        completion_ids = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
        ]
        verdicts = self._verify(inputs, completion_ids)

        metrics = self._metrics[mode]
        if self._given_completion_ids is None:  # what the data set holds does not speak for the student
            for name, column in zip(self.reward_func_names, verdicts.rewards_per_func.unbind(dim=1), strict=True):
                metrics[f"rewards/{name}/mean"].append(column.nanmean().item())
            metrics["reward"].append(verdicts.rewards[verdicts.verified].mean().item())
            # Of the first round: whoever fails is asked again, and whoever does not is not
            solved = verdicts.correct.float()
            if self.pass_rates is not None and self._is_rolling_out:
                solved = self.pass_rates.end_batch(verdicts.correct, verdicts.verified)
            metrics["opsd/correct"].append(solved.mean().item())
        # What the verifiers log is part of their interface; GRPO drains both once per batch
        for name, values in self._pending_metrics.items():
            metrics[name].append(sum(values) / len(values))

        if self.max_generation_rounds > 1 and self._is_rolling_out:
            self._refill(inputs, output, completion_ids, verdicts)
        self._pending_metrics.clear()

        correct, kept, lengths = verdicts.correct, verdicts.passed, verdicts.lengths
        if self.keep_shortest is not None:
            kept = kept & shortest(kept, lengths, group_size, self.keep_shortest)
        siblings = [None] * len(kept)
        if self.teacher_context is not None and "sibling" in self.teacher_context.fields:
            chosen = shortest_siblings(correct, lengths, group_size)
            all_texts = gather_object(self.processing_class.batch_decode(completion_ids, skip_special_tokens=True))
            siblings = [None if index is None else all_texts[index] for index in chosen]
            if self.sibling_fallback is None:
                kept = kept & torch.tensor([index is not None for index in chosen], device=kept.device)

        metrics["opsd/kept"].append(kept.float().mean().item())

        start = self.accelerator.process_index * len(inputs)
        mine = slice(start, start + len(inputs))
        if self._rollout_log is not None:
            total = verdicts.rewards.where(verdicts.verified, torch.nan)
            output["rewards"] = torch.cat([verdicts.rewards_per_func, total.unsqueeze(1)], dim=1)[mine]
            output["extra"] = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        return kept[mine], siblings[mine]

    def _prepare_inputs(self, generation_batch):
        # A dictionary is a micro-batch of `training_step` below
        return generation_batch if isinstance(generation_batch, dict) else super()._prepare_inputs(generation_batch)

    def training_step(self, model, inputs, num_items_in_batch):
        if self.max_tokens_per_microbatch is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            # How many micro-batches it takes is known when the gate has decided: all of them run in the last of the
            # accumulation steps, each of which has the whole generation batch
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        start = time.perf_counter()
        model.train()  # the base class generates after this, and so knows a training step from an evaluation
        *earlier, last = self._micro_batches(self._generate_and_score_completions(inputs))
        loss = torch.zeros((), device=self.accelerator.device)
        for micro_batch in earlier:
            self.accelerator.gradient_state._set_sync_gradients(False)
            with nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model):
                # Not a step of its own for the base class, which counts and times them
                loss += super(DistillationTrainer, self).training_step(model, micro_batch, num_items_in_batch)
        self.accelerator.gradient_state._set_sync_gradients(True)
        self._current_train_step_time += time.perf_counter() - start
        return loss + super().training_step(model, last, num_items_in_batch)

    def _micro_batches(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The kept rollouts of all processes, dealt out again under the budget: as many micro-batches on each."""
        batch = self._gather_rows(batch)
        kept = batch.pop(
            "kept", torch.ones(len(batch["prompt_ids"]), dtype=torch.bool, device=self.accelerator.device)
        )
        lengths = batch["completion_mask"].sum(dim=1) + torch.stack(
            [batch[name].sum(dim=1) for name in ("prompt_mask", "teacher_prompt_mask") if name in batch]
        ).amax(dim=0)
        rows = kept.nonzero().flatten()
        steps = token_budget_batches(
            lengths[rows].tolist(), self.max_tokens_per_microbatch, self.accelerator.num_processes
        )
        micro_batches = []
        for step in steps or [[[]] * self.accelerator.num_processes]:
            mine = step[self.accelerator.process_index]
            chosen = torch.zeros_like(kept)
            # Without a rollout it still takes part in the collectives of the others, with one that counts for nothing
            chosen[rows[mine] if mine else lengths.argmin()] = True
            micro_batch = self._select_rows(batch, chosen)
            if not mine:
                micro_batch["kept"] = chosen.new_zeros(1)
            micro_batches.append(micro_batch)
        return micro_batches

    def _gather_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batches of all processes as one."""
        if self.accelerator.num_processes == 1:
            return batch
        gathered = {}
        for name, value in batch.items():
            if value.ndim == 2:
                value = self.accelerator.pad_across_processes(value, dim=1, pad_first="prompt" in name)
            gathered[name] = value if value.ndim == 0 else self.accelerator.gather(value)
        return gathered

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "kept" in inputs:
            kept = inputs["kept"]
            if not kept.any():
                nothing_kept = inputs["num_items_in_batch"] == 0
                is_alone = self.accelerator.distributed_type == DistributedType.NO
                if is_alone or (nothing_kept and not self.is_deepspeed_enabled):
                    # Nothing to train on here, and no other process that waits for this one: no forward at all. The
                    # zero has a gradient of its own and leaves the parameters without one, so no optimizer moves them.
                    loss = torch.zeros((), device=kept.device, requires_grad=True)
                    return (loss, None) if return_outputs else loss
                if nothing_kept and self.model.training:
                    # DeepSpeed takes the optimizer step in the backward that ends an accumulation: this one is none
                    self.accelerator.gradient_state._set_sync_gradients(False)
                # Another process, or what wraps the model, has gradients to reduce in this step, and needs a forward
                # and a backward of this one too: of one row that no token is read from
                kept = torch.arange(len(kept), device=kept.device) == 0
                inputs = {**inputs, "completion_mask": torch.zeros_like(inputs["completion_mask"])}
            inputs = self._select_rows(inputs, kept)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            self.alarms.check_divergence()
        return loss

    def _select_rows(self, inputs: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
        """The batch with the given rows only (`rows` is a `bool` tensor of shape `(B,)`), and no padding of others."""
        selected = {}
        for key, value in split_pixel_values_by_grid(inputs).items():
            if isinstance(value, list):
                selected[key] = [item for item, keep in zip(value, rows.tolist(), strict=True) if keep]
            else:
                selected[key] = value[rows] if value.ndim > 0 else value
        selected = unsplit_pixel_values_by_grid(selected)
        # Per-token fields of images span prompt and completion, and a fixed shape is fixed for a reason (Neuron)
        if self.pad_to_multiple_of is None and not any(field in selected for field in MULTIMODAL_FIELDS):
            for part, fields in {
                "prompt_mask": ("prompt_ids", "prompt_mask"),
                "completion_mask": ("completion_ids", "completion_mask", "tool_mask"),
                "teacher_prompt_mask": ("teacher_prompt_ids", "teacher_prompt_mask"),
            }.items():
                if part in selected and selected[part].any():
                    columns = selected[part].any(dim=0)
                    selected.update({field: selected[field][:, columns] for field in fields if field in selected})
        return selected

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        # As in the base class this runs inside the student wrapper's forward, so the sharded parameters are whole and
        # no collective may be called here.
        tokens, valid = self._compute_divergence(unwrapped_student, inputs)
        num_tokens = valid.sum()
        measured = (
            tokens.divergence.detach() if tokens.unclipped is None else tokens.unclipped,
            tokens.clip_fraction,
            tokens.student_entropy,
            tokens.teacher_entropy,
            tokens.top1_agreement,
        )
        # What a backend does not measure is NaN, which `log` shows as missing
        nan = torch.full((), torch.nan, device=valid.device)
        sums = torch.stack([num_tokens.float(), *(nan if values is None else values.sum() for values in measured)])
        mode = "train" if self.model.training else "eval"
        self._token_sums[mode] += sums.cpu().double()
        if "rollout" in inputs and not self.args.use_liger_kernel:  # whose loss has no values of single tokens
            self._rollout_log.measure(mode, inputs["rollout"], valid, measured[0])
        if num_items_in_batch is None:
            num_items_in_batch = num_tokens.clamp(min=1)
        loss = tokens.divergence.sum() / num_items_in_batch
        return loss, sums[1 + TOKEN_METRICS.index("opsd/student_entropy")], num_tokens

    def _compute_divergence(self, unwrapped_student, inputs) -> tuple[DivergenceOutput, torch.Tensor]:
        """Divergence of every token that counts, `(N,)`, and which of the completions' positions those are, `(B, C)`."""
        completion_ids, completion_mask = inputs["completion_ids"], inputs["completion_mask"]  # (B, C)
        loss_mask = completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]
        multimodal_inputs = {field: inputs[field] for field in MULTIMODAL_FIELDS if field in inputs}

        def with_completion(prompt_ids, prompt_mask):
            ids = torch.cat([prompt_ids, completion_ids], dim=1)
            mask = torch.cat([prompt_mask, completion_mask], dim=1)
            start = torch.full_like(prompt_mask[:, 0], prompt_ids.size(1))
            if not multimodal_inputs and self.pad_to_multiple_of is None:
                # Prompts are padded on the left and completions on the right: all of it to the right, as far as needed
                start = prompt_mask.sum(dim=1)
                order = mask.argsort(dim=1, descending=True, stable=True)[:, : mask.sum(dim=1).max()]
                ids, mask = ids.gather(1, order), mask.gather(1, order)
            return (ids, mask, ids.size(1) - 1), start

        student_inputs, student_start = with_completion(inputs["prompt_ids"], inputs["prompt_mask"])
        teacher_inputs, teacher_start = student_inputs, student_start
        if self._has_own_teacher_prompt:
            teacher_inputs, teacher_start = with_completion(
                inputs["teacher_prompt_ids"], inputs["teacher_prompt_mask"]
            )

        # The teacher first: the student's activations are not there yet
        teacher_hidden, unwrapped_teacher = self._teacher_forward(unwrapped_student, teacher_inputs, multimodal_inputs)
        student_hidden = self._get_last_hidden_state(unwrapped_student, *student_inputs, **multimodal_inputs)
        student_head, teacher_head = (m.get_output_embeddings() for m in (unwrapped_student, unwrapped_teacher))
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
        student_scale, student_softcap = logit_transform(unwrapped_student.config)
        teacher_scale, teacher_softcap = logit_transform(unwrapped_teacher.config)
        # ZeRO-3 gathers a parameter in the forward of its own module, which the loss does not go through
        with (
            maybe_gather_lm_head_ctx(student_head.weight, student_head.bias),
            maybe_gather_lm_head_ctx(teacher_head.weight, teacher_head.bias),
        ):
            tokens = linear_divergence_with_metrics(
                student_hidden,
                gather_head(student_head.weight, student_hidden.dtype),
                teacher_hidden,
                gather_head(teacher_head.weight, teacher_hidden.dtype),
                beta=self.beta,
                temperature=self.temperature,
                kl_clip=self.kl_clip,
                valid_vocab=self.valid_vocab,
                backend="liger" if self.args.use_liger_kernel else "auto",
                student_bias=gather_head(student_head.bias, student_hidden.dtype),
                teacher_bias=gather_head(teacher_head.bias, teacher_hidden.dtype),
                student_logit_scale=student_scale,
                teacher_logit_scale=teacher_scale,
                student_softcap=student_softcap,
                teacher_softcap=teacher_softcap,
            )
        return tokens, valid

    @torch.no_grad()
    def _teacher_forward(self, unwrapped_student, teacher_inputs, multimodal_inputs):
        """Hidden states of the teacher, of shape `(B, C, H_teacher)`, and the model that they come from."""
        if self.teacher_model is not None:
            self.teacher_model.eval()
            unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
            hidden = self._forward_redirection(
                self.teacher_model,
                unwrapped_teacher,
                self._get_last_hidden_state,
                unwrapped_teacher,
                *teacher_inputs,
                **multimodal_inputs,
            )
            return hidden, unwrapped_teacher
        # The student's own module. Already inside its wrapper, so nothing to redirect.
        adapter = {"initial": None, "ema": TEACHER_ADAPTER, "snapshot": TEACHER_ADAPTER}
        is_live = self.teacher_weights == "live"
        weights = nullcontext() if is_live else use_adapter(unwrapped_student, adapter[self.teacher_weights])
        was_training = unwrapped_student.training
        unwrapped_student.eval()
        try:
            with weights:
                hidden = self._get_last_hidden_state(unwrapped_student, *teacher_inputs, **multimodal_inputs)
        finally:
            unwrapped_student.train(was_training)
        return hidden, unwrapped_student

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Means over the tokens of all processes since the last log: a batch with few of them weighs little
        mode = "train" if self.model.training else "eval"
        sums = self.accelerator.reduce(self._token_sums[mode].to(self.accelerator.device, torch.float32)).tolist()
        num_tokens, sums = sums[0], sums[1:]
        if num_tokens > 0:
            for name, total in zip(TOKEN_METRICS, sums, strict=True):
                self._metrics[mode][name].append(total / num_tokens)
        self._token_sums[mode].zero_()
        super().log(logs, start_time)
        if self._rollout_log is not None:
            self._rollout_log.write(mode)
