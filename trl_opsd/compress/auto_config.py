"""Arguments of the chain that chooses for itself."""

from dataclasses import dataclass, field, fields

from ..cli import UserError
from ..export.formats import parse_formats
from ..hub import check_hub


#: Has the chain choose, where a number would say it.
AUTO = "auto"


@dataclass
class AutoConfig:
    r"""
    Arguments of the chain where no recipes are given: from a checkpoint and prompts to a model that is as good in fewer
    tokens. What it takes of [`CompressConfig`] is `model_name_or_path`, `dataset_name`, `output_dir`, `launcher` and `seed`.

    Args:
        max_accuracy_drop (`float`, *optional*, defaults to `0.01`):
            Loss of accuracy that still counts as none.
        contexts (`list[str]`, *optional*):
            What the teacher may see beside the prompt: names (`concise`, `concise_by_difficulty`, `solution`, `answer`) or
            templates with `{prompt}`. All are measured, and one is chosen. Defaults to the first two, and `solution` where
            the data have one.
        reward_funcs (`list[str]`, *optional*):
            Verifiers. Defaults to `math_reward` where the data have an `answer`, and `code_reward` where they have `tests`.
        max_completion_length (`int`, *optional*):
            Longest reply, in training and evaluation. One that is cut counts as wrong. Defaults to 2,048, or to three quarters
            of the model's positions where that is less.
        guard_problems (`int`, *optional*, defaults to `256`):
            Problems, kept out of training, on which contexts are chosen and rounds are watched.
        final_problems (`int`, *optional*, defaults to `1024`):
            Most problems of the verdict, which nothing else sees: the split `test`, or where there is none a share of `train`.
        samples (`int`, *optional*, defaults to `2`):
            Completions of each of them, at temperature 1.
        decide (`int`, *optional*, defaults to `4`):
            How many times as many completions the verdict may draw while it is undecided.
        round_steps (`int`, *optional*, defaults to `20`):
            Updates between two looks.
        max_rounds (`int`, *optional*, defaults to `6`):
            Most rounds.
        rollouts (`int`, *optional*, defaults to `64`):
            Rollouts of an update, over all processes.
        min_saving (`float`, *optional*, defaults to `0.1`):
            Share of the tokens that a context has to promise for training to begin.
        learning_rate (`float`, *optional*):
            Defaults to one by the number of parameters.
        ratio (`str`, *optional*):
            Share of the parameters to remove after the rounds, such as `0.5`; or `auto`: a quarter, a half and so on, until a
            student is no longer as good, and the smallest that is. Nothing is removed if it is left out.
        export_formats (`list[str]`, *optional*):
            What to make of the result for engines, each checked in its engine: the `formats` of [`trl_opsd.export`].
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload the result if it is as good, and its artefacts, each to a repository of its own.
        hub_model_id (`str`, *optional*):
            Repository of the result, as `NAME` or `OWNER/NAME`; those of artefacts add their name to it.
        gpu_memory (`float`, *optional*):
            GiB of a GPU. Defaults to those of the one that is there.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to end after the plan, for which no weights are loaded.
    """

    max_accuracy_drop: float = field(default=0.01, metadata={"help": "Loss of accuracy that still counts as none."})
    contexts: list[str] | None = field(
        default=None,
        metadata={
            "help": "What the teacher may see beside the prompt: names, or templates with {prompt}. All are measured, and "
            "one is chosen. Defaults to concise, concise_by_difficulty, and solution where the data have one."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Verifiers. Defaults to math_reward, or code_reward where the data have `tests`."},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest reply, in training and evaluation. One that is cut counts as wrong. Defaults to 2048, or three "
            "quarters of the model's positions where that is less."
        },
    )
    guard_problems: int = field(
        default=256,
        metadata={"help": "Problems, kept out of training, on which contexts are chosen and rounds are watched."},
    )
    final_problems: int = field(
        default=1024, metadata={"help": "Most problems of the verdict, which nothing else sees."}
    )
    samples: int = field(default=2, metadata={"help": "Completions of each of them, at temperature 1."})
    decide: int = field(
        default=4,
        metadata={"help": "How many times as many completions the verdict may draw while it is undecided."},
    )
    round_steps: int = field(default=20, metadata={"help": "Updates between two looks."})
    max_rounds: int = field(default=6, metadata={"help": "Most rounds."})
    rollouts: int = field(default=64, metadata={"help": "Rollouts of an update, over all processes."})
    min_saving: float = field(
        default=0.1, metadata={"help": "Share of the tokens that a context has to promise for training to begin."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Defaults to one by the number of parameters."}
    )
    ratio: str | None = field(
        default=None,
        metadata={
            "help": "Share of the parameters to remove after the rounds, or auto: more and more, until a student is no longer "
            "as good, and the smallest that is."
        },
    )
    export_formats: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to make of the result for engines, checked in each: the `formats` of trl_opsd.export."
        },
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the result if it is as good, and its artefacts."}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Repository of the result, NAME or OWNER/NAME; those of artefacts add their name to it."},
    )
    gpu_memory: float | None = field(
        default=None, metadata={"help": "GiB of a GPU. Defaults to those of the one that is there."}
    )
    dry_run: bool = field(default=False, metadata={"help": "End after the plan, for which no weights are loaded."})

    def __post_init__(self):
        for name in ("max_accuracy_drop", "min_saving"):
            if not 0 <= vars(self)[name] < 1:
                raise UserError(f"`{name}` is a share from 0 to below 1, and is {vars(self)[name]}.")
        for name in ("guard_problems", "final_problems", "samples", "round_steps", "max_rounds", "rollouts"):
            if vars(self)[name] < 1:
                raise UserError(f"`{name}` must be at least 1, and is {vars(self)[name]}.")
        if self.ratio is not None and self.ratio != AUTO:
            try:
                is_share = 0 < float(self.ratio) < 1
            except ValueError:
                is_share = False
            if not is_share:
                raise UserError(
                    f"`ratio` is the share of the parameters to remove, above 0 and below 1, or `{AUTO}`, and is {self.ratio!r}."
                )
        check_hub(self.push_to_hub, self.hub_model_id)
        if self.export_formats is not None:
            try:
                parse_formats(self.export_formats)
            except UserError as error:
                raise UserError(str(error).replace("`formats", "`export_formats")) from None
        if self.decide < 2:
            raise UserError(f"`decide` must be at least 2, and is {self.decide}.")

    def check_unused(self) -> None:
        """
        Checks that none of these is given to a chain of recipes, which would not look at it.

        Raises:
            UserError: If one is.
        """
        for declared in fields(self):
            if vars(self)[declared.name] != declared.default:
                raise UserError(
                    f"`{declared.name}` is of the chain that chooses for itself, and recipes are given: leave it out and set "
                    "what you mean in the recipes, or leave all recipes out."
                )
