from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute
import torch
from accelerate.utils import parse_flag_from_env
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl import DistillationConfig

from .context import TEACHER_PROMPT_TEMPLATES, TeacherContext
from .teacher_gate import as_list, check_pass_rates, check_preference


TEACHER_WEIGHTS = ("initial", "ema", "snapshot", "live", "external")


@dataclass
class OPSDConfig(DistillationConfig):
    r"""
    Configuration class for the [`OPSDTrainer`].

    The only changes with respect to [`~trl.DistillationConfig`] are the parameters below: which weights and which
    context the teacher has, and which rollouts are trained on.

    Parameters:
        > Parameters that control the teacher

        teacher_weights (`str`, *optional*):
            Weights of the teacher. `"initial"` are the student's own starting weights, frozen; with a PEFT adapter
            they are the base model with the adapter disabled, and cost no second copy. `"ema"` and `"snapshot"` follow
            the student, `"live"` are the student's own. `"external"` is the model given as `teacher_model`. Defaults
            to `"external"` if a teacher model is given and to `"initial"` if not.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            Share of the way from the teacher to the student that an update of `"ema"` goes.
        teacher_sync_steps (`int`, *optional*):
            Number of optimizer steps between two updates of `"ema"` or `"snapshot"`. Defaults to `1` for `"ema"` and
            to `50` for `"snapshot"`.
        teacher_context (`str` or `list[str]`, *optional*):
            What the teacher sees and the student does not. One of `"solution"` (column `solution`), `"answer"` (column
            `answer`), `"concise"` (an instruction to leave out what the result does not depend on),
            `"concise_by_difficulty"` (the same, with room for what is hard), `"sibling"` (the shortest correct rollout
            of the same prompt, other than the one being scored), or `None` (on the command line `none`) for the plain
            prompt. A column `privileged_context` stands in for `solution` and `answer` where a row has it. With
            `teacher_gate` it may be several, in order of preference.
        sibling_fallback (`str`, *optional*):
            Context of a rollout without a correct sibling: `"concise"`, `"concise_by_difficulty"`, `"solution"` or
            `"answer"`. If `None`, such a rollout is not trained on.
        teacher_prompt_template (`str` or `list[str]`, *optional*):
            Prompt of the teacher, in place of the wording that comes with `teacher_context`. Placeholders: `{prompt}`,
            `{solution}`, `{answer}`, `{sibling}`, `{privileged_context}`; a literal brace is written twice. With
            `teacher_gate` it may be several, in order of preference.
        teacher_gate (`float`, *optional*):
            Pass rate of the teacher from which on it is competent. On each prompt it sees the first context of
            `teacher_context` (or `teacher_prompt_template`) in which it is; where it is in none it sees the plain prompt,
            as an anchor. `None` uses the context on every prompt, whatever the teacher would answer there.
        teacher_gate_rollouts (`int`, *optional*):
            Rollouts that its pass rate in a context is measured by, on a prompt of which it is not known, the first time
            that a rollout of the prompt is trained on. They are the teacher's own, by its weights as they are then, and
            their tokens and seconds are logged. With `0` a prompt of which nothing is known has the plain prompt. Defaults
            to `4`, and to `0` if the training data has pass rates (column `teacher_pass_rates`, one for each context).
        max_teacher_prompt_length (`int`, *optional*):
            Most tokens of the teacher's prompt. In one that is longer the privileged text is cut, never the problem.
            Defaults to what the teacher's positions leave beside the longest completion of the batch.
        teacher_chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for the chat template on the teacher's side. Defaults to `chat_template_kwargs`, the
            student's.

        > Parameters that control the rollouts and the gate

        num_generations (`int`, *optional*, defaults to `1`):
            Number of rollouts per prompt. The global batch (`per_device_train_batch_size` × processes ×
            `gradient_accumulation_steps`) counts rollouts, and must be divisible by it.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of the batches whose completions the student writes, as in
            [GKD](https://huggingface.co/papers/2306.13649). The others take the completions that the data set holds,
            as token ids in the column `completion_ids`, and generate nothing; in the place of a row that holds none another
            one is taken. `0.0` is off-policy distillation.
        off_policy_steps (`int`, *optional*, defaults to `0`):
            Updates at the start that take all their completions from the data set, as if `lmbda` were `0.0`; `lmbda` holds
            after them. Rollouts of the model that the student starts from, such as an RLVR run has banked, are as good as
            its own as long as it has not moved far, and cost no generation.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps that are made on each batch of rollouts, as in [`~trl.GRPOTrainer`]. The loss is that of the
            student and the teacher as they are in each step, over the whole vocabulary, so that it needs no importance
            weights; what is stale is only which texts it is taken on, by one step less than this at most. As many steps
            then ask for fewer prompts, and an epoch has more steps. A run that is resumed within a batch has it written
            again: with `save_steps` a multiple it is not.
        completion_limit_quantile (`float`, *optional*):
            Limits what the student writes to `completion_limit_headroom` times this quantile of the lengths of recent
            correct rollouts, `1.0` for the longest (see [`~trl_opsd.opsd.limit.CompletionLimit`]); never above
            `max_completion_length`, and raised again when more rollouts are truncated. `None` is `max_completion_length`.
        completion_limit_headroom (`float`, *optional*, defaults to `1.5`):
            Factor on that quantile.
        gate (`str`, *optional*):
            Which rollouts are trained on: `"correct"`, `"incorrect"` or `"all"`. A rollout is correct if it has
            finished and its reward reaches `gate_threshold`. Decided before any forward pass, so that a rollout that
            is not trained on costs none. Defaults to `"correct"` if reward functions are given and to `"all"` if not.
        gate_threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which on a finished rollout is correct.
        keep_shortest (`int`, *optional*):
            Of the rollouts of one prompt that pass the gate, train on this many only, the shortest ones.
        max_generation_rounds (`int`, *optional*, defaults to `1`):
            How many times a batch is generated at most. From the second round on, the prompts of the rollouts that the
            gate rejected are asked again, and a new rollout that passes takes the place of the rejected one. It ends
            early when nothing is rejected any more. `keep_shortest` and siblings are decided on what is there after
            the last round; what is logged of the student's accuracy, reward and length is measured in the first.
        min_pass_rate (`float`, *optional*):
            Prompts whose pass rate is below this are not asked any more for the rest of the run. `0.01` skips those
            that are never solved. In the place of a skipped prompt another one of the training set is asked.
        max_pass_rate (`float`, *optional*):
            Prompts whose pass rate is above this are not asked any more. `0.99` skips those that are always solved.
        pass_rate_rollouts (`int`, *optional*, defaults to `8`):
            Rollouts of a prompt from which on its pass rate is known. Those of the first round count.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the reward. Defaults to a weight of `1.0` for each.

        > Parameters that control the loss

        kl_clip (`float`, *optional*):
            Upper bound, in nats, on what one vocabulary entry adds to the divergence of one token. Each entry's term
            is written so that it is never negative (see [`~trl_opsd.opsd.divergence.divergence`]), so neither is the
            clipped loss. `None` is the exact divergence.

        > Parameters that control the micro-batches

        max_tokens_per_microbatch (`int`, *optional*):
            Most tokens of one forward pass, padding included, of the longer of the student's and the teacher's input.
            The kept rollouts of all processes are dealt out again in micro-batches of similar length, as many to each
            process, and `per_device_train_batch_size` × `gradient_accumulation_steps` only says how many rollouts are
            written. A rollout that is longer by itself is a micro-batch of its own. `None` is one forward pass for
            each accumulation step, padded to its longest rollout.

        > Parameters that control what is logged

        log_engine_mismatch (`bool`, *optional*, defaults to `False`):
            Whether to log, over the trained tokens, how far the log-probabilities of vLLM are from the student's: mean
            and largest difference under the names of [`~trl.GRPOTrainer`], and `sampling/kl`, the KL divergence of the
            student from the engine. Costs the product with the student's head once more. Rollouts that are written in
            several turns, with tools, are left out.
    """

    _VALID_DICT_FIELDS = DistillationConfig._VALID_DICT_FIELDS + ["teacher_chat_template_kwargs"]

    # Parameters that control the teacher
    teacher_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the teacher: 'initial' (the student's own starting weights, frozen; with PEFT the "
            "adapter disabled), 'ema', 'snapshot', 'live' or 'external' (the teacher model). Defaults to 'external' "
            "if a teacher model is given and to 'initial' if not.",
            "choices": list(TEACHER_WEIGHTS),
        },
    )
    teacher_update_rate: float = field(
        default=0.05,
        metadata={"help": "Share of the way from the teacher to the student that an update of 'ema' goes."},
    )
    teacher_sync_steps: int | None = field(
        default=None,
        metadata={
            "help": "Number of optimizer steps between two updates of 'ema' or 'snapshot'. Defaults to 1 for 'ema' and "
            "to 50 for 'snapshot'."
        },
    )
    # A single one may be text: command lines know one type for a field
    teacher_context: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the teacher sees and the student does not: 'solution', 'answer', 'concise', "
            "'concise_by_difficulty', 'sibling', or 'none'. With `teacher_gate` several, in order of preference.",
            "choices": [*TEACHER_PROMPT_TEMPLATES, "none"],
        },
    )
    sibling_fallback: str | None = field(
        default=None,
        metadata={
            "help": "Context for rollouts without a correct sibling: 'concise', 'concise_by_difficulty', 'solution' or "
            "'answer'. If not set, such rollouts are not trained on."
        },
    )
    teacher_prompt_template: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompt of the teacher, in place of the wording that comes with `teacher_context`. Placeholders: "
            "{prompt}, {solution}, {answer}, {sibling}, {privileged_context}; a literal brace is written twice. With "
            "`teacher_gate` several, in order of preference."
        },
    )
    teacher_gate: float | None = field(
        default=None,
        metadata={
            "help": "Pass rate of the teacher from which on it is competent: on each prompt it sees the first context in "
            "which it is, and the plain prompt where it is in none. If not set, the context is used on every prompt."
        },
    )
    teacher_gate_rollouts: int | None = field(
        default=None,
        metadata={
            "help": "Rollouts that its pass rate in a context is measured by, the first time that a prompt of which it is "
            "not known is trained on. Defaults to 4, and to 0 if the data has pass rates (column `teacher_pass_rates`)."
        },
    )
    max_teacher_prompt_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of the teacher's prompt. In one that is longer the privileged text is cut, never the "
            "problem. Defaults to what the teacher's positions leave beside the longest completion of the batch."
        },
    )
    teacher_chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the chat template on the teacher's side. Defaults to "
            "`chat_template_kwargs`, the student's."
        },
    )

    # Parameters that control the rollouts and the gate
    num_generations: int = field(
        default=1,
        metadata={"help": "Number of rollouts per prompt. The global batch must be divisible by it."},
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of the batches whose completions the student writes. The others take those of the data "
            "set's column `completion_ids`. 0.0 is off-policy distillation."
        },
    )
    off_policy_steps: int = field(
        default=0,
        metadata={
            "help": "Updates at the start that take all their completions from the data set's column `completion_ids`, as "
            "if `lmbda` were 0.0; `lmbda` holds after them."
        },
    )
    num_iterations: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps that are made on each batch of rollouts, with the loss of the student as it is in each."
        },
    )
    completion_limit_quantile: float | None = field(
        default=None,
        metadata={
            "help": "Limits what the student writes to `completion_limit_headroom` times this quantile of the lengths of "
            "recent correct rollouts, 1.0 for the longest; never above `max_completion_length`. None is no such limit."
        },
    )
    completion_limit_headroom: float = field(
        default=1.5, metadata={"help": "Factor on the quantile of `completion_limit_quantile`."}
    )
    gate: str | None = field(
        default=None,
        metadata={
            "help": "Which rollouts are trained on, decided before any forward pass: 'correct', 'incorrect' or 'all'. "
            "Defaults to 'correct' if reward functions are given and to 'all' if not.",
            "choices": ["correct", "incorrect", "all"],
        },
    )
    gate_threshold: float = field(
        default=1.0,
        metadata={"help": "Reward from which on a finished rollout is correct."},
    )
    keep_shortest: int | None = field(
        default=None,
        metadata={
            "help": "Of the rollouts of one prompt that pass the gate, train on this many only, the shortest ones."
        },
    )
    max_generation_rounds: int = field(
        default=1,
        metadata={
            "help": "How many times a batch is generated at most: from the second round on the prompts of the rollouts "
            "that the gate rejected are asked again, and a new rollout that passes takes the place of the rejected one."
        },
    )
    min_pass_rate: float | None = field(
        default=None,
        metadata={
            "help": "Prompts whose pass rate is below this are not asked any more, and others of the training set in "
            "their place. 0.01 skips those that are never solved."
        },
    )
    max_pass_rate: float | None = field(
        default=None,
        metadata={
            "help": "Prompts whose pass rate is above this are not asked any more, and others of the training set in "
            "their place. 0.99 skips those that are always solved."
        },
    )
    pass_rate_rollouts: int = field(
        default=8, metadata={"help": "Rollouts of a prompt from which on its pass rate is known."}
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward function in the reward. Defaults to 1.0 for each."},
    )

    # Parameters that control the loss
    kl_clip: float | None = field(
        default=None,
        metadata={
            "help": "Upper bound, in nats, on what one vocabulary entry adds to the divergence of one token. None is "
            "the exact divergence."
        },
    )

    # Parameters that control the micro-batches
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward pass, padding included, of the longer of the student's and the "
            "teacher's input. The kept rollouts of all processes are dealt out again in micro-batches of similar "
            "length. None is one forward pass for each accumulation step, padded to its longest rollout."
        },
    )

    # Parameters that control what is logged
    log_engine_mismatch: bool = field(
        default=False,
        metadata={
            "help": "Log, over the trained tokens, how far the log-probabilities of vLLM are from the student's: mean and "
            "largest difference, and the KL divergence `sampling/kl`."
        },
    )

    def __post_init__(self):
        super().__post_init__()

        if self.max_completion_length is None:
            raise ValueError(
                "`max_completion_length` is None, and what the teacher may see is counted from it: give a number."
            )
        if self.teacher_weights is not None and self.teacher_weights not in TEACHER_WEIGHTS:
            raise ValueError(f"`teacher_weights` must be one of {TEACHER_WEIGHTS}, and is {self.teacher_weights!r}.")
        if self.teacher_weights not in (None, "external") and self.teacher_model_name_or_path is not None:
            raise ValueError(
                f"`teacher_weights={self.teacher_weights!r}` and `teacher_model_name_or_path` contradict each other: "
                "drop the teacher model, or set `teacher_weights='external'`."
            )
        if not 0 < self.teacher_update_rate <= 1:
            raise ValueError(
                f"`teacher_update_rate` must be above 0 and at most 1, and is {self.teacher_update_rate}."
            )
        if self.teacher_sync_steps is not None and self.teacher_sync_steps < 1:
            raise ValueError(f"`teacher_sync_steps` must be at least 1, and is {self.teacher_sync_steps}.")
        for name in ("max_teacher_prompt_length", "keep_shortest", "max_tokens_per_microbatch"):
            value = self.__dict__[name]
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {value}: use None for no limit.")
        for name in ("teacher_context", "teacher_prompt_template"):
            value = vars(self)[name]
            if isinstance(value, list) and len(value) < 2:  # as the command line gives a single one
                setattr(self, name, value[0] if value else None)
        # The command line has no other way to take back what a recipe sets
        if self.teacher_context == "none":
            self.teacher_context = None
        for name in as_list(self.teacher_context):
            if name not in TEACHER_PROMPT_TEMPLATES:
                raise ValueError(
                    f"`teacher_context` must be one of {list(TEACHER_PROMPT_TEMPLATES)} or None, and is "
                    f"{name!r}: for wording of your own set `teacher_prompt_template`."
                )
        check_preference(self)
        contexts = self.build_teacher_contexts()
        if self.teacher_prompt_template is not None and self.teacher_context is not None:
            own = TeacherContext(TEACHER_PROMPT_TEMPLATES[self.teacher_context]).fields
            if not own or not own <= contexts[0].fields:
                instead = f", or put {{{sorted(own)[0]}}} into the template" if own else ""
                raise ValueError(
                    f"`teacher_prompt_template` takes the place of the wording of `teacher_context="
                    f"{self.teacher_context!r}`, and has nothing of that context: drop one of the two{instead}."
                )
        uses_sibling = any("sibling" in context.fields for context in contexts)
        if uses_sibling and self.num_generations < 2:
            raise ValueError(
                f"The sibling context needs other rollouts of the same prompt, and `num_generations` is "
                f"{self.num_generations}: raise it."
            )
        fallbacks = [name for name in TEACHER_PROMPT_TEMPLATES if name != "sibling"]
        if self.sibling_fallback is not None and (not uses_sibling or self.sibling_fallback not in fallbacks):
            raise ValueError(
                f"`sibling_fallback` is for the sibling context and one of {fallbacks}, and is "
                f"{self.sibling_fallback!r}."
            )
        if self.sibling_fallback is not None and self.teacher_gate is not None:
            raise ValueError(
                f"With `teacher_gate` a rollout without a sibling has the next context, or the plain prompt: drop "
                f"`sibling_fallback`, and set `teacher_context: [sibling, {self.sibling_fallback}]`."
            )

        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"`lmbda` must be from 0 to 1, and is {self.lmbda}.")
        if self.off_policy_steps < 0:
            raise ValueError(f"`off_policy_steps` must be at least 0, and is {self.off_policy_steps}.")
        if self.off_policy_steps and self.lmbda == 0:
            raise ValueError(
                f"`lmbda=0.0` takes every completion from the data set, so `off_policy_steps={self.off_policy_steps}` has "
                "nothing to change: drop it, or raise `lmbda` to what holds after those steps."
            )
        if self.given is not None and self.num_generations > 1:
            raise ValueError(
                f"`{self.given}` takes the one completion of a row, and `num_generations={self.num_generations}` "
                "would repeat it: set `num_generations=1`, and give several completions of a prompt as several rows."
            )
        if self.completion_limit_quantile is not None:
            if not 0 < self.completion_limit_quantile <= 1:
                raise ValueError(
                    f"`completion_limit_quantile` must be above 0 and at most 1, and is {self.completion_limit_quantile}: "
                    "use None for no limit but `max_completion_length`."
                )
            if self.lmbda == 0:
                raise ValueError(
                    "`lmbda=0.0` generates nothing, so `completion_limit_quantile` has nothing to limit: drop it."
                )
            for name in {"max_new_tokens", "max_length", "max_tokens"} & (self.generation_kwargs or {}).keys():
                raise ValueError(
                    f"`generation_kwargs` has `{name}`, which overrides `completion_limit_quantile`: drop one of the two."
                )
        if not self.completion_limit_headroom >= 1:
            raise ValueError(
                f"`completion_limit_headroom` must be at least 1, and is {self.completion_limit_headroom}."
            )
        if self.num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, and is {self.num_iterations}.")
        if self.off_policy_steps % self.num_iterations:
            raise ValueError(
                f"`off_policy_steps={self.off_policy_steps}` ends within a batch, of which each takes `num_iterations="
                f"{self.num_iterations}` updates: give a multiple."
            )
        if self.num_generations < 1:
            raise ValueError(f"`num_generations` must be at least 1, and is {self.num_generations}.")
        if self.keep_shortest is not None and self.keep_shortest > self.num_generations:
            raise ValueError(
                f"`keep_shortest={self.keep_shortest}` is more than there are rollouts of a prompt (`num_generations="
                f"{self.num_generations}`), so all would be kept: lower it, or drop it."
            )
        for name in ("stop", "stop_strings", "stop_token_ids"):
            if (self.generation_kwargs or {}).get(name):
                raise ValueError(
                    f"`generation_kwargs` has `{name}`, and a rollout that it ends does not end in EOS, so that it would "
                    "count as truncated: make it an `eos_token_id` of the model's generation config, or drop it."
                )
        if (self.generation_kwargs or {}).get("seed") is not None:
            raise ValueError(
                "`generation_kwargs` has `seed`, and with it an engine writes the rollouts of a prompt all alike, in every "
                "step: set `seed` of the training instead."
            )
        global_batch = self.global_batch_size
        if global_batch % self.num_generations != 0:
            raise ValueError(
                f"The global batch of {global_batch} rollouts (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} × {self.world_size} processes × gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}) is not divisible by num_generations {self.num_generations}: "
                "change one of them, so that every prompt gets all its rollouts in one batch."
            )
        for name in ("max_generation_rounds", "pass_rate_rollouts"):
            if self.__dict__[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {self.__dict__[name]}.")
        if self.min_pass_rate is not None and not 0 < self.min_pass_rate <= 1:
            raise ValueError(
                f"`min_pass_rate` must be above 0 and at most 1, and is {self.min_pass_rate}: use None to skip nothing."
            )
        if self.max_pass_rate is not None and not 0 <= self.max_pass_rate < 1:
            raise ValueError(
                f"`max_pass_rate` must be at least 0 and below 1, and is {self.max_pass_rate}: use None to skip nothing."
            )
        if None not in (self.min_pass_rate, self.max_pass_rate) and self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"`min_pass_rate={self.min_pass_rate}` is above `max_pass_rate={self.max_pass_rate}`, so every prompt "
                "would be skipped: swap them, or drop one."
            )
        skips = self.min_pass_rate is not None or self.max_pass_rate is not None
        if self.lmbda == 0 and (skips or self.max_generation_rounds > 1):
            raise ValueError(
                "`lmbda=0.0` generates nothing, so `max_generation_rounds`, `min_pass_rate` and `max_pass_rate` have nothing "
                "to act on: drop them, or raise `lmbda`."
            )
        if self.gate not in (None, "correct", "incorrect", "all"):
            raise ValueError(f"`gate` must be 'correct', 'incorrect' or 'all', and is {self.gate!r}.")
        if self.log_engine_mismatch and not self.use_vllm:
            raise ValueError(
                "`log_engine_mismatch` compares vLLM's log-probabilities with the student's: set `use_vllm: true`, or drop it."
            )
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ValueError(f"`kl_clip` must be positive, and is {self.kl_clip}: use None for no clip.")
        if self.max_tokens_per_microbatch is not None and self.pad_to_multiple_of is not None:
            raise ValueError(
                "`max_tokens_per_microbatch` pads as little as it can and `pad_to_multiple_of` pads to a fixed shape: "
                "leave one of them at None."
            )
        # Rewards and contexts read the other columns of a row. With reward functions see `check_arguments`
        if self.remove_unused_columns and (self.gate in ("correct", "incorrect") or contexts or skips):
            raise ValueError(
                "`remove_unused_columns=True` drops the columns that the gate and the teacher context read: leave it "
                "at False."
            )

    @property
    def given(self) -> str | None:
        """The setting by which completions are taken from the data set, or `None` where all are the student's."""
        for name, is_set in (("off_policy_steps", self.off_policy_steps > 0), ("lmbda", self.lmbda < 1)):
            if is_set:
                return f"{name}={vars(self)[name]}"
        return None

    @property
    def uses_fsdp(self) -> bool:
        """Whether the arguments or `accelerate launch` ask for FSDP."""
        return self.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")

    @property
    def global_batch_size(self) -> int:
        """Rollouts of an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    def resolve_teacher_weights(self, teacher_model: str | PreTrainedModel | None) -> str:
        """
        Args:
            teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
                External teacher.

        Returns:
            `str`: `teacher_weights`, or what it is where it is not set.
        """
        return self.teacher_weights or ("initial" if teacher_model is None else "external")

    def resolve_teacher_sync_steps(self, weights: str) -> int:
        """
        Args:
            weights (`str`):
                Weights of the teacher.

        Returns:
            `int`: `teacher_sync_steps`, or what it is where it is not set.
        """
        return self.teacher_sync_steps or (50 if weights == "snapshot" else 1)

    def resolve_gate(self, has_verifier: bool) -> str:
        """
        Args:
            has_verifier (`bool`):
                Whether there are reward functions.

        Returns:
            `str`: `gate`, or what it is where it is not set.
        """
        return self.gate or ("correct" if has_verifier else "all")

    def resolve_teacher_gate_rollouts(self, columns: list[str] | None) -> int:
        """
        Args:
            columns (`list[str]` or `None`):
                Columns of the training data, as far as they are known.

        Returns:
            `int`: `teacher_gate_rollouts`, or what it is where it is not set. `0` without `teacher_gate`.
        """
        if self.teacher_gate is None:
            return 0
        if self.teacher_gate_rollouts is not None:
            return self.teacher_gate_rollouts
        return 0 if "teacher_pass_rates" in (columns or ()) else 4

    def build_teacher_contexts(self) -> list[TeacherContext]:
        """
        The contexts that `teacher_context` and `teacher_prompt_template` describe.

        Returns:
            `list[~trl_opsd.opsd.context.TeacherContext]`: In order of preference. One, unless a gate chooses; none if the
            teacher sees the plain prompt.
        """
        templates = as_list(self.teacher_prompt_template)
        templates = templates or [TEACHER_PROMPT_TEMPLATES[name] for name in as_list(self.teacher_context)]
        return [TeacherContext(template) for template in templates]

    def build_sibling_fallback(self) -> TeacherContext | None:
        """
        The context that `sibling_fallback` describes.

        Returns:
            [`~trl_opsd.opsd.context.TeacherContext`] or `None`: `None` if there is none.
        """
        if self.sibling_fallback is None:
            return None
        return TeacherContext(TEACHER_PROMPT_TEMPLATES[self.sibling_fallback])


def check_arguments(
    args: OPSDConfig,
    model: str | PreTrainedModel,
    teacher_model: str | PreTrainedModel | None = None,
    train_dataset: Dataset | IterableDataset | None = None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
    reward_funcs: list[Callable] | None = None,
    tools: list[Callable] | None = None,
) -> None:
    """
    Checks what the arguments of [`OPSDTrainer`] say together, before any model is loaded.

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            External teacher.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            Training data.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Data of the evaluation.
        reward_funcs (`list[Callable]`, *optional*):
            Verifiers.
        tools (`list[Callable]`, *optional*):
            Tools.

    Raises:
        ValueError: If teacher and student are the same in weights and context, if a gate needs a verifier and there is
            none, if a column is missing, if the data does not fill a batch, or if two of the arguments exclude each other.
    """
    if not isinstance(args, OPSDConfig):
        raise ValueError(
            f"`args` is a {type(args).__name__}, and OPSDTrainer takes an OPSDConfig, which has all of its fields and its "
            "own: change the name of the class."
        )
    _check_teacher(args, model, teacher_model)
    _check_gate(args, reward_funcs or [])
    if args.remove_unused_columns and reward_funcs:
        raise ValueError("`remove_unused_columns=True` drops the columns that `reward_funcs` read: leave it at False.")
    _check_datasets(args, train_dataset, eval_dataset)
    if train_dataset is not None:
        check_pass_rates(args, train_dataset, eval_dataset, tools)
    if args.given is not None and tools:
        raise ValueError(
            f"`{args.given}` takes whole completions from the data set, and with `tools` one is written turn by turn: leave "
            "it as it is by default, or drop the tools."
        )
    if args.completion_limit_quantile is not None and tools:
        raise ValueError(
            f"`completion_limit_quantile={args.completion_limit_quantile}` limits a completion, and `tools` make several "
            "turns of one: leave it at None, or drop the tools."
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


def _check_teacher(
    args: OPSDConfig, model: str | PreTrainedModel, teacher_model: str | PreTrainedModel | None
) -> None:
    weights = args.resolve_teacher_weights(teacher_model)
    if weights == "external" and teacher_model is None:
        raise ValueError(
            "`teacher_weights='external'` needs a teacher model: set `teacher_model_name_or_path` (in Python "
            "`teacher_model`), or use `teacher_weights='initial'`."
        )
    if weights != "external" and teacher_model is not None:
        raise ValueError(
            f"`teacher_weights={weights!r}` and a teacher model contradict each other: drop the teacher model, or set "
            "`teacher_weights='external'`."
        )
    if weights != "external" and args.teacher_model_init_kwargs is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` are for an external teacher, and this one is loaded as the student is: set "
            "`model_init_kwargs` instead."
        )
    same_weights = weights != "external" or teacher_model is model
    same_weights = same_weights or (isinstance(model, str) and model == teacher_model)
    own_template_kwargs = args.teacher_chat_template_kwargs not in (None, args.chat_template_kwargs or {})
    if same_weights and not args.build_teacher_contexts() and not own_template_kwargs:
        raise ValueError(
            "Teacher and student are the same in weights and context, so the divergence is zero and nothing would be "
            "learned: set `teacher_context`, or `teacher_model_name_or_path` to another model."
        )


def _check_gate(args: OPSDConfig, reward_funcs: list[Callable]) -> None:
    gate = args.resolve_gate(bool(reward_funcs))
    if gate != "all" and not reward_funcs:
        raise ValueError(
            f"`gate='{gate}'` needs a verifier to decide it, and there is none: set `reward_funcs`, or `gate='all'`."
        )
    if not reward_funcs and args.teacher_gate is not None:
        raise ValueError(
            f"`teacher_gate={args.teacher_gate}` needs a verifier to say where the teacher is right, and there is none: set "
            "`reward_funcs`."
        )
    takes_sibling = any("sibling" in context.fields for context in args.build_teacher_contexts())
    if not reward_funcs and takes_sibling:
        raise ValueError(
            "The sibling context needs a verifier to find correct siblings, and there is none: set `reward_funcs`."
        )
    if not reward_funcs and args.keep_shortest is not None:
        raise ValueError(
            f"`keep_shortest={args.keep_shortest}` chooses among rollouts that pass the gate, and there is no verifier: "
            "set `reward_funcs`."
        )
    if args.max_generation_rounds > 1 and gate == "all":
        raise ValueError(
            f"`max_generation_rounds={args.max_generation_rounds}` asks again for the rollouts that the gate rejects, and "
            "`gate='all'` rejects none: leave it at 1, or set `reward_funcs` and another gate."
        )
    if args.max_generation_rounds > 1 and gate == "incorrect" and takes_sibling:
        raise ValueError(
            f"`max_generation_rounds={args.max_generation_rounds}` with `gate='incorrect'` replaces the correct rollouts "
            "that the sibling context lives on: leave it at 1, or take another context."
        )
    if args.completion_limit_quantile is not None and gate != "correct":
        raise ValueError(
            f"`completion_limit_quantile={args.completion_limit_quantile}` cuts off what would not be trained on, and "
            f"`gate='{gate}'` trains on it: set `reward_funcs` and `gate='correct'`, or leave it at None."
        )
    bounds = [name for name in ("min_pass_rate", "max_pass_rate") if vars(args)[name] is not None]
    if bounds and not reward_funcs:
        raise ValueError(f"`{bounds[0]}` needs a verifier to measure it, and there is none: set `reward_funcs`.")
    for func in reward_funcs:
        if isinstance(func, torch.nn.Module) or not callable(func):
            raise ValueError(
                f"A verifier must be a function, and `reward_funcs` holds {func!r}: reward models are not verifiers."
            )
    if args.reward_weights is not None and len(args.reward_weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(args.reward_weights)} entries and `reward_funcs` {len(reward_funcs)}: give one "
            "weight for each function."
        )


def _check_datasets(args: OPSDConfig, train_dataset: Any, eval_dataset: Any) -> None:
    contexts = args.build_teacher_contexts()
    for dataset in [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]:
        if dataset is not None and dataset.column_names is not None:
            for context in contexts:
                context.check_columns(dataset.column_names)
                if isinstance(dataset, Dataset):
                    context.check_rows(dataset)
    if train_dataset is None:
        return
    columns = train_dataset.column_names
    if args.given is not None and columns is not None and "completion_ids" not in columns:
        raise ValueError(
            f"`{args.given}` takes completions from the column `completion_ids`, and the columns found are "
            f"{', '.join(f'`{name}`' for name in columns)}: give a data set that has it, such as the bank of an RLVR run "
            "(on the command line `--rollout_bank` adds it to the prompts), or leave the setting as it is by default."
        )
    if args.given is not None and isinstance(train_dataset, Dataset):
        _check_given(train_dataset, args.max_completion_length)
    if isinstance(train_dataset, IterableDataset):
        for name, value, needed in (
            ("num_generations", args.num_generations, args.num_generations > 1),
            ("num_iterations", args.num_iterations, args.num_iterations > 1),
            ("min_pass_rate", args.min_pass_rate, args.min_pass_rate is not None),
            ("max_pass_rate", args.max_pass_rate, args.max_pass_rate is not None),
        ):
            if needed:
                raise ValueError(
                    f"`{name}={value}` needs a dataset that can be indexed, and `train_dataset` is an IterableDataset: "
                    f"load it without streaming, or leave `{name}` as it is by default."
                )
        return
    # The sampler leaves out what does not fill a batch
    batch = args.global_batch_size // args.num_generations
    if len(train_dataset) < batch:
        raise ValueError(
            f"The training data has {len(train_dataset)} prompts and a batch takes {batch}, so there would be no step at "
            "all: give more prompts, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`."
        )


def _check_given(dataset: Dataset, max_completion_length: int) -> None:
    """Checks the completions of a data set, by their lengths alone."""
    lengths = completion_lengths(dataset)
    empty = next((row for row, length in enumerate(lengths) if length == 0), None)
    if empty is not None:
        raise ValueError(
            f"`lmbda` and `off_policy_steps` take completions from the column `completion_ids`, and it is empty in row "
            f"{empty}: filter such rows out."
        )
    lengths = [length for length in lengths if length is not None]
    if not lengths:
        raise ValueError(
            "`lmbda` and `off_policy_steps` take completions from the column `completion_ids`, and no row has one: take a "
            "data set, or a rollout bank, that has some of these prompts."
        )
    if max(lengths) > max_completion_length:
        number = sum(length > max_completion_length for length in lengths)
        raise ValueError(
            f"{number} of {len(lengths)} completions of the data set are longer than `max_completion_length="
            f"{max_completion_length}`, the longest has {max(lengths)} tokens: raise it, or filter such rows out."
        )


def completion_lengths(dataset: Dataset) -> list[int | None]:
    """
    Lengths of the completions that a data set holds, read without the completions.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set with the column `completion_ids`.

    Returns:
        `list[int | None]`: Tokens of each row's, `None` where a row has none.
    """
    column = dataset.select_columns("completion_ids").with_format("arrow")
    return [
        length
        for table in column.iter(batch_size=10_000)
        for length in pyarrow.compute.list_value_length(table["completion_ids"]).to_pylist()
    ]


def check_text_only(args: OPSDConfig) -> None:
    """
    Checks that a processing class of several modalities meets nothing that works on text.

    Args:
        args ([`OPSDConfig`]):
            Configuration.

    Raises:
        ValueError: If it does.
    """
    if args.teacher_chat_template_kwargs not in (None, args.chat_template_kwargs or {}):
        raise ValueError(
            "`teacher_chat_template_kwargs` give the teacher a prompt of its own, which is text, and the processing class "
            "is a multimodal processor: leave it at None."
        )
    if args.build_teacher_contexts():
        raise ValueError(
            "`teacher_context` and `teacher_prompt_template` work on text, and the processing class is a multimodal "
            "processor: use an external teacher without a context."
        )
    if args.max_generation_rounds > 1 or args.min_pass_rate is not None or args.max_pass_rate is not None:
        raise ValueError(
            "`max_generation_rounds`, `min_pass_rate` and `max_pass_rate` work on text, and the processing class is a "
            "multimodal processor: leave them as they are by default."
        )
    if args.max_tokens_per_microbatch is not None:
        raise ValueError(
            "`max_tokens_per_microbatch` divides a batch by the length of its text, and the processing class is a "
            "multimodal processor: leave it at None."
        )
