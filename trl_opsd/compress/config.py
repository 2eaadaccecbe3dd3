from dataclasses import dataclass, field
from pathlib import Path

from ..cli import UserError
from .chain import Stage


@dataclass
class CompressConfig:
    r"""
    Configuration of the whole chain. Which stages run is said by which recipes are given.

    Parameters:
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
            Recipe of [`trl_opsd.opsd`].
        evaluate (`str`):
            Recipe of [`trl_opsd.evaluate`], run for every stage.
        prompt_only_template (`str`, *optional*):
            Instruction, with the placeholder `{prompt}`, for the baseline that costs nothing: the checkpoint before
            OPSD, asked with this prompt.
        launcher (`str`, *optional*):
            Command for the training stages, such as `accelerate launch --config_file FILE`. Defaults to one process.
        seed (`int`, *optional*, defaults to `0`):
            Seed of every stage.
        minutes (`dict[str, float]`, *optional*):
            How long each stage is expected to take, for the time left.
        smoke (`bool`, *optional*, defaults to `False`):
            Whether to run the same chain with `smoke_overrides`, to see that everything works and nothing else.
        smoke_overrides (`dict[str, dict]`, *optional*):
            Options for each stage under `smoke`.
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

    def __post_init__(self):
        for name in ("opsd", "evaluate"):
            if getattr(self, name) is None:
                raise UserError(f"`{name}` is missing: give its recipe, a YAML file.")
        for name in ("sft", "rlvr", "opsd", "evaluate"):
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
            chain.append(Stage(name, what, module, recipe, arguments, root / name, minutes.get(name, 1.0)))
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
        model = train("opsd", "trl_opsd.opsd", self.opsd, "on-policy self-distillation")
        evaluate("opsd")
        return chain
