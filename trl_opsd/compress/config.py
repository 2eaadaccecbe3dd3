from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import yaml

from ..cli import UserError
from ..rlvr.bank import read_rollouts


#: What can be done with a model that was pruned: how it is trained after the cold start, and the recipe for it.
METHODS = {
    "sft": "supervised fine-tuning on the teacher's verified rollouts",
    "offline": "distillation of the teacher's logits on its own rollouts",
    "rlvr": "reinforcement learning with verifiable rewards",
    "opsd": "on-policy distillation from the teacher",
    "opsd-concise": "on-policy distillation from the teacher, asked to be concise",
}

#: The recipe of each.
RECIPES = {
    "sft": "student_sft",
    "offline": "opsd",
    "rlvr": "student_rlvr",
    "opsd": "opsd",
    "opsd-concise": "opsd",
}

#: What the chain that chooses for itself takes of [`CompressConfig`].
AUTOMATIC = ("output_dir", "model_name_or_path", "dataset_name", "launcher", "seed")


@dataclass
class CompressConfig:
    r"""
    Configuration of the whole chain. Which stages run is said by which recipes are given, and by `ratios` whether the
    chain ends in one student as large as its teacher, or in a sweep of smaller ones.

    Parameters:
        > Parameters that control the chain

        output_dir (`str`, *optional*, defaults to `"runs/compress"`):
            Folder for all stages, the results and the report.
        model_name_or_path (`str`, *optional*):
            Checkpoint to start from. Left out, the chain starts with the tiny reasoner of `sft`.
        dataset_name (`str`, *optional*):
            Prompts of RLVR, OPSD and evaluation. Left out, the data that `sft` writes.
        sft (`str`, *optional*):
            Recipe of [`trl_opsd.tiny`].
        rlvr (`str`, *optional*):
            Recipe of [`trl_opsd.rlvr`]. Left out, the checkpoint to start from is the one that RL has trained.
        opsd (`str`):
            Recipe of [`trl_opsd.opsd`]. In a sweep it is that of the methods `opsd`, `opsd-concise` and `offline`.
        evaluate (`str`):
            Recipe of [`trl_opsd.evaluate`], run for every stage.
        prompt_only_template (`str`, *optional*):
            Instruction, with the placeholder `{prompt}`, for the baseline that costs nothing: the checkpoint before
            OPSD, asked with this prompt. In a sweep it is also what the teacher of `opsd-concise` is asked.
        launcher (`str`, *optional*):
            Command for the training stages, such as `accelerate launch --config_file FILE`. Defaults to one process.
        seed (`int`, *optional*, defaults to `0`):
            Seed of every stage.
        minutes (`dict[str, float]`, *optional*):
            How long each stage is expected to take, for the time left. Those of a sweep are `bank`, `prune`, `sweep`
            (each of the others that train) and `evaluate`.
        smoke (`bool`, *optional*, defaults to `False`):
            Whether to run the same chain with `smoke_overrides`, to see that everything works and nothing else.
        smoke_overrides (`dict[str, dict]`, *optional*):
            Options for each stage under `smoke`; those of a sweep are named as in `minutes`.

        > Parameters that control the size sweep

        ratios (`list[float]`, *optional*):
            Shares of the parameters to remove. With them the chain ends in a sweep: for each ratio the teacher (the
            model that the chain has come to) is pruned, warmed up again on its rollouts, and from there trained by
            each method.
        sizes (`dict[float, dict[str, int]]`, *optional*):
            Sizes of the pruned model by ratio, such as `{0.9: {num_layers: 2, hidden_size: 48}}`, for a ratio at which
            not [`trl_opsd.prune`] is to choose them.
        learning_rates (`dict[float, dict[str, float]]`, *optional*):
            Learning rates of the methods by ratio and recipe, such as `{0.9: {opsd: 2.0e-3}}`, where not the recipe's
            own is to hold: a smaller model takes a larger one. Methods that share a recipe share it.
        methods (`list[str]`, *optional*, defaults to all):
            What to train the pruned models by: `"sft"`, `"offline"`, `"rlvr"`, `"opsd"`, `"opsd-concise"`.
        prune (`str`, *optional*):
            Recipe of [`trl_opsd.prune`].
        student_sft (`str`, *optional*):
            Recipe of [`trl.scripts.sft`](https://huggingface.co/docs/trl/sft_trainer), for the cold start and for the
            method `sft`.
        student_rlvr (`str`, *optional*):
            Recipe of [`trl_opsd.rlvr`], for the method `rlvr`.
        cold_start_steps (`int`, *optional*, defaults to `100`):
            Updates of the cold start, the same for all methods of a ratio.
        updates (`int`, *optional*, defaults to `100`):
            Updates of each method.
        bank (`str`, *optional*):
            Rollout bank with the teacher's verified rollouts. Left out, the teacher fills one.
        bank_rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            Rollouts that it then samples for each training prompt.
    """

    output_dir: str = field(default="runs/compress", metadata={"help": "Folder for all stages and the report."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Checkpoint to start from."})
    dataset_name: str | None = field(default=None, metadata={"help": "Prompts of RLVR, OPSD and evaluation."})
    sft: str | None = field(default=None, metadata={"help": "Recipe of trl_opsd.tiny."})
    rlvr: str | None = field(default=None, metadata={"help": "Recipe of trl_opsd.rlvr."})
    opsd: str | None = field(default=None, metadata={"help": "Recipe of trl_opsd.opsd."})
    evaluate: str | None = field(default=None, metadata={"help": "Recipe of trl_opsd.evaluate."})
    prompt_only_template: str | None = field(
        default=None, metadata={"help": "Instruction, with {prompt}, for the baseline that costs nothing."}
    )
    launcher: str | None = field(default=None, metadata={"help": "Command for the training stages."})
    seed: int = field(default=0, metadata={"help": "Seed of every stage."})
    minutes: dict | None = field(default=None, metadata={"help": "How long each stage is expected to take."})
    smoke: bool = field(default=False, metadata={"help": "Run the same chain with `smoke_overrides`."})
    smoke_overrides: dict | None = field(default=None, metadata={"help": "Options for each stage under `smoke`."})
    ratios: list[float] | None = field(
        default=None, metadata={"help": "Shares of the parameters to remove, for a sweep of smaller students."}
    )
    sizes: dict | None = field(default=None, metadata={"help": "Sizes of the pruned model by ratio, if not chosen."})
    learning_rates: dict | None = field(
        default=None, metadata={"help": "Learning rates by ratio and recipe, where not the recipe's own is to hold."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "What to train the pruned models by."}
    )
    prune: str | None = field(default=None, metadata={"help": "Recipe of trl_opsd.prune."})
    student_sft: str | None = field(
        default=None, metadata={"help": "Recipe of trl.scripts.sft, for the cold start and the method `sft`."}
    )
    student_rlvr: str | None = field(
        default=None, metadata={"help": "Recipe of trl_opsd.rlvr, for the method `rlvr`."}
    )
    cold_start_steps: int = field(default=100, metadata={"help": "Updates of the cold start."})
    updates: int = field(default=100, metadata={"help": "Updates of each method."})
    bank: str | None = field(
        default=None, metadata={"help": "Rollout bank of the teacher. Left out, the teacher fills one."}
    )
    bank_rollouts_per_prompt: int = field(
        default=1, metadata={"help": "Rollouts that it then samples for each training prompt."}
    )

    def __post_init__(self):
        if self.is_automatic:
            for name in ("model_name_or_path", "dataset_name"):
                if vars(self)[name] is None:
                    raise UserError(
                        f"`{name}` is missing: give a checkpoint and prompts, or the recipes of a chain of your own (`opsd` "
                        "and `evaluate`)."
                    )
            for declared in fields(self):
                default = declared.default_factory() if declared.default is MISSING else declared.default
                if declared.name not in AUTOMATIC and vars(self)[declared.name] != default:
                    raise UserError(
                        f"`{declared.name}` is of a chain of recipes, and none is given: leave it out, or give `opsd` and "
                        "`evaluate`."
                    )
            return
        for name in ("opsd", "evaluate"):
            if getattr(self, name) is None:
                raise UserError(f"`{name}` is missing: give its recipe, a YAML file.")
        for name in ("sft", "rlvr", "opsd", "evaluate", "prune", "student_sft", "student_rlvr"):
            recipe = getattr(self, name)
            if recipe is not None and not Path(recipe).is_file():
                raise UserError(f"There is no recipe at `{recipe}` for `{name}`: check the path.")
        if (self.sft is None) == (self.model_name_or_path is None):
            raise UserError(
                "Give exactly one of `sft` (start with the tiny reasoner) and `model_name_or_path` (start from a "
                "checkpoint)."
            )
        if self.sft is None and self.dataset_name is None:
            raise UserError("`dataset_name` is missing: give the prompts for the stages.")
        if self.ratios:
            self._check_sweep()
        if self.smoke:
            self.output_dir += "-smoke"
            # What a stage takes to start, and hardly more
            self.minutes = dict.fromkeys(self.minutes or (), 0.2)

    @property
    def is_automatic(self) -> bool:
        """Whether no recipe of a stage is given, so that the chain chooses for itself."""
        recipes = (self.sft, self.rlvr, self.opsd, self.evaluate, self.prune, self.student_sft, self.student_rlvr)
        return not any(recipes)

    @property
    def compressed_from(self) -> str:
        """Name of the checkpoint that is compressed, which all that follow from it are compared with."""
        return "rlvr" if self.rlvr is not None else "base" if self.sft is None else "sft"

    def _check_sweep(self) -> None:
        """Checks what a sweep needs beyond the chain, and that all methods train on as many rollouts in an update."""
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise UserError(
                    f"`ratios` are shares of the parameters to remove, above 0 and below 1, and one is {ratio}."
                )
        for name, known in (("ratios", self.ratios), ("methods", self.methods)):
            if len(set(known)) < len(known):
                raise UserError(f"`{name}` holds something twice: {known}.")
        for name, by_ratio in (("sizes", self.sizes or {}), ("learning_rates", self.learning_rates or {})):
            for ratio in by_ratio:
                if ratio not in self.ratios:
                    raise UserError(
                        f"`{name}` has the ratio {ratio}, and `ratios` are {self.ratios}: make them agree."
                    )
        for ratio, rates in (self.learning_rates or {}).items():
            for recipe, rate in rates.items():
                if recipe not in RECIPES.values():
                    known = ", ".join(dict.fromkeys(RECIPES.values()))
                    raise UserError(f"`learning_rates` has `{recipe}` at {ratio}, and the recipes are {known}.")
                if not isinstance(rate, float) or rate <= 0:
                    raise UserError(f"`learning_rates` must be numbers above 0, such as 2.0e-3, and one is {rate!r}.")
        if not self.methods:
            raise UserError(f"`methods` is empty: name at least one of {', '.join(METHODS)}.")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"`methods` holds `{method}`, and the methods are {', '.join(METHODS)}.")
        for name in ("prune", "student_sft", *dict.fromkeys(RECIPES[method] for method in self.methods)):
            if vars(self)[name] is None:
                raise UserError(f"`{name}` is missing: with `ratios`, give its recipe, a YAML file.")
        for name in ("cold_start_steps", "updates"):
            if vars(self)[name] < 1:
                raise UserError(f"`{name}` must be at least 1, and is {vars(self)[name]}.")
        if "opsd-concise" in self.methods and self.prompt_only_template is None:
            raise UserError("The method `opsd-concise` needs `prompt_only_template`: it is what the teacher is asked.")
        if self.bank is not None:
            read_rollouts(self.bank)
        recipes = {"cold start": "student_sft"} | {method: RECIPES[method] for method in self.methods}
        sizes = {name: rollouts_per_update(vars(self)[recipe]) for name, recipe in recipes.items()}
        if len(set(sizes.values())) > 1:
            raise UserError(
                "The methods can be compared only if an update of each has as many rollouts, and they have "
                + ", ".join(f"{method} {size}" for method, size in sizes.items())
                + ": change `per_device_train_batch_size` or `gradient_accumulation_steps` in the recipes."
            )


def rollouts_per_update(recipe: str) -> int:
    """Rollouts in an update of one process, as a recipe says or as [`~transformers.TrainingArguments`] would have it."""
    options = yaml.safe_load(Path(recipe).read_text())
    return options.get("per_device_train_batch_size", 8) * options.get("gradient_accumulation_steps", 1)
