from dataclasses import dataclass, field
from pathlib import Path

from ..cli import UserError
from .chain import Stage
from .sweep import METHODS, check_sweep, sweep_stages


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
            check_sweep(self)
        if self.smoke:
            self.output_dir += "-smoke"

    def stages(self) -> list[Stage]:
        """
        The chain: training stages, each followed by the evaluation of what it made.

        Returns:
            `list[Stage]`: In the order in which they run.
        """
        root = Path(self.output_dir)
        minutes = self.minutes or {}
        overrides = (self.smoke_overrides or {}) if self.smoke else {}
        data = self.dataset_name or str(root / "sft" / "data")
        model, chain = self.model_name_or_path, []

        def train(name, module, recipe, what):
            arguments = {"output_dir": str(root / name), "seed": self.seed}
            if name != "sft":
                arguments |= {"model_name_or_path": model, "dataset_name": data}
            arguments |= overrides.get(name, {})
            launched = name != "sft"  # the warm start runs in one process
            seconds = minutes.get(name, 1.0)
            chain.append(Stage(name, what, module, recipe, arguments, root / name, seconds, launched=launched))
            return str(root / name)

        def evaluate(stage, **changes):
            output = root / "evaluation" / f"{stage}.json"
            arguments = {"model_name_or_path": model, "dataset_name": data, "stage": stage, "output": str(output)}
            arguments |= {"seed": self.seed, **changes, **overrides.get("evaluate", {})}
            what = f"measuring {stage}: accuracy and tokens"
            module = "trl_opsd.evaluate"
            chain.append(Stage(stage, what, module, self.evaluate, arguments, output, minutes.get("evaluate", 1.0)))

        if self.sft is not None:
            model = train("sft", "trl_opsd.tiny", self.sft, "making the tiny reasoner: supervised warm start")
            evaluate("sft")
        if self.rlvr is not None:
            model = train("rlvr", "trl_opsd.rlvr", self.rlvr, "reinforcement learning with verifiable rewards")
        before = "rlvr" if self.rlvr is not None else "base" if self.sft is None else "sft"
        if before != "sft":
            evaluate(before)
        if self.prompt_only_template is not None:
            evaluate("prompt-only", prompt_template=self.prompt_only_template)
        if self.ratios:
            return chain + sweep_stages(self, model, data, root, [stage for stage in chain if stage.is_training])
        model = train("opsd", "trl_opsd.opsd", self.opsd, "on-policy self-distillation")
        evaluate("opsd")
        return chain
