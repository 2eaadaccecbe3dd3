from dataclasses import dataclass, field

from trl import DistillationConfig

from .teacher import TEACHER_PROMPT_TEMPLATES, TeacherContext


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
            they are the base model with the adapter disabled, and cost no second copy. `"external"` is the model given
            as `teacher_model`. Defaults to `"external"` if a teacher model is given and to `"initial"` if not.
        teacher_context (`str`, *optional*):
            What the teacher sees and the student does not. One of `"solution"` (column `solution`), `"answer"` (column
            `answer`), `"concise"` (an instruction to leave out what the result does not depend on), or `None` (on the
            command line `none`) for the plain prompt. A column `privileged_context` stands in for `solution` and `answer` where a row has it.
        teacher_prompt_template (`str`, *optional*):
            Prompt of the teacher, in place of the wording that comes with `teacher_context`. Placeholders: `{prompt}`,
            `{solution}`, `{answer}`, `{privileged_context}`; a literal brace is written twice.
        teacher_chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for the chat template on the teacher's side. Defaults to `chat_template_kwargs`, the
            student's.

        > Parameters that control the rollouts and the gate

        num_generations (`int`, *optional*, defaults to `1`):
            Number of rollouts per prompt. The global batch (`per_device_train_batch_size` × processes ×
            `gradient_accumulation_steps`) counts rollouts, and must be divisible by it.
        gate (`str`, *optional*):
            Which rollouts are trained on: `"correct"`, `"incorrect"` or `"all"`. A rollout is correct if it has
            finished and its reward reaches `gate_threshold`. Decided before any forward pass, so that a rollout that
            is not trained on costs none. Defaults to `"correct"` if reward functions are given and to `"all"` if not.
        gate_threshold (`float`, *optional*, defaults to `1.0`):
            Reward from which on a finished rollout is correct.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in the reward. Defaults to a weight of `1.0` for each.

        > Parameters that control the loss

        kl_clip (`float`, *optional*):
            Upper bound, in nats, on what one vocabulary entry adds to the divergence of one token. Each entry's term
            is written so that it is never negative (see [`~trl_opsd.opsd.divergence.divergence`]), so neither is the
            clipped loss. `None` is the exact divergence.
    """

    _VALID_DICT_FIELDS = DistillationConfig._VALID_DICT_FIELDS + ["teacher_chat_template_kwargs"]

    # Parameters that control the teacher
    teacher_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the teacher: 'initial' (the student's own starting weights, frozen; with PEFT the "
            "adapter disabled) or 'external' (the teacher model). Defaults to 'external' if a teacher model is given "
            "and to 'initial' if not.",
            "choices": ["initial", "external"],
        },
    )
    teacher_context: str | None = field(
        default=None,
        metadata={
            "help": "What the teacher sees and the student does not: 'solution', 'answer', 'concise', or 'none'.",
            "choices": [*TEACHER_PROMPT_TEMPLATES, "none"],
        },
    )
    teacher_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt of the teacher, in place of the wording that comes with `teacher_context`. Placeholders: "
            "{prompt}, {solution}, {answer}, {privileged_context}; a literal brace is written twice."
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

    def __post_init__(self):
        super().__post_init__()

        if self.teacher_weights not in (None, "initial", "external"):
            raise ValueError(f"`teacher_weights` must be 'initial' or 'external', and is {self.teacher_weights!r}.")
        if self.teacher_weights == "initial" and self.teacher_model_name_or_path is not None:
            raise ValueError(
                "`teacher_weights='initial'` and `teacher_model_name_or_path` contradict each other: drop the teacher "
                "model, or set `teacher_weights='external'`."
            )
        # The command line has no other way to take back what a recipe sets
        if self.teacher_context == "none":
            self.teacher_context = None
        if self.teacher_context is not None and self.teacher_context not in TEACHER_PROMPT_TEMPLATES:
            raise ValueError(
                f"`teacher_context` must be one of {list(TEACHER_PROMPT_TEMPLATES)} or None, and is "
                f"{self.teacher_context!r}: for wording of your own set `teacher_prompt_template`."
            )
        self.build_teacher_context()

        if self.num_generations < 1:
            raise ValueError(f"`num_generations` must be at least 1, and is {self.num_generations}.")
        global_batch = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        if global_batch % self.num_generations != 0:
            raise ValueError(
                f"The global batch of {global_batch} rollouts (per_device_train_batch_size "
                f"{self.per_device_train_batch_size} × {self.world_size} processes × gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}) is not divisible by num_generations {self.num_generations}: "
                "change one of them, so that every prompt gets all its rollouts in one batch."
            )
        if self.gate not in (None, "correct", "incorrect", "all"):
            raise ValueError(f"`gate` must be 'correct', 'incorrect' or 'all', and is {self.gate!r}.")
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ValueError(f"`kl_clip` must be positive, and is {self.kl_clip}: use None for no clip.")
        # Rewards and contexts read the other columns of a row
        if self.remove_unused_columns and (self.gate in ("correct", "incorrect") or self.build_teacher_context()):
            raise ValueError(
                "`remove_unused_columns=True` drops the columns that the gate and the teacher context read: leave it "
                "at False."
            )

    def build_teacher_context(self) -> TeacherContext | None:
        """
        The context that `teacher_context` and `teacher_prompt_template` describe.

        Returns:
            [`~trl_opsd.opsd.teacher.TeacherContext`] or `None`: `None` if the teacher sees the plain prompt.
        """
        template = self.teacher_prompt_template
        if template is None and self.teacher_context is not None:
            template = TEACHER_PROMPT_TEMPLATES[self.teacher_context]
        return None if template is None else TeacherContext(template)
