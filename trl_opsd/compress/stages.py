"""From a configuration to the stages of its chain."""

from pathlib import Path

from .chain import Stage
from .config import METHODS, RECIPES, CompressConfig


EVALUATION = "trl_opsd.evaluate"


def plan_stages(config: CompressConfig) -> list[Stage]:
    """
    The chain: training stages, each followed by the evaluation of what it made.

    Args:
        config ([`CompressConfig`]):
            Which recipes there are.

    Returns:
        `list[Stage]`: In the order in which they run.
    """
    root = Path(config.output_dir)
    minutes = config.minutes or {}
    overrides = (config.smoke_overrides or {}) if config.smoke else {}
    data = config.dataset_name or str(root / "sft" / "data")
    model, chain = config.model_name_or_path, []

    def train(name, module, recipe, what):
        arguments = {"output_dir": str(root / name), "seed": config.seed}
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
        arguments |= {"seed": config.seed, **changes, **overrides.get("evaluate", {})}
        what = f"measuring {stage}: accuracy and tokens"
        chain.append(Stage(stage, what, EVALUATION, config.evaluate, arguments, output, minutes.get("evaluate", 1.0)))

    if config.sft is not None:
        model = train("sft", "trl_opsd.tiny", config.sft, "making the tiny reasoner: supervised warm start")
        evaluate("sft")
    if config.rlvr is not None:
        model = train("rlvr", "trl_opsd.rlvr", config.rlvr, "reinforcement learning with verifiable rewards")
    if config.compressed_from != "sft":
        evaluate(config.compressed_from)
    if config.prompt_only_template is not None:
        evaluate("prompt-only", prompt_template=config.prompt_only_template)
    if config.ratios:
        return chain + _sweep_stages(config, model, data, root, [stage for stage in chain if stage.is_training])
    model = train("opsd", "trl_opsd.opsd", config.opsd, "on-policy self-distillation")
    evaluate("opsd")
    return chain


def label(method: str, ratio: float) -> str:
    """Name of a stage: `opsd-90` is OPSD on a model of which 90% were removed."""
    return f"{method}-{100 * ratio:g}"


def _sweep_stages(config: CompressConfig, teacher: str, data: str, root: Path, after: list[Stage]) -> list[Stage]:
    """
    The stages of a sweep: for each ratio pruning, a cold start by supervised fine-tuning, and from there each method.

    Args:
        config ([`CompressConfig`]):
            Configuration with `ratios`.
        teacher (`str`):
            Checkpoint to prune and to learn from.
        data (`str`):
            Prompts.
        root (`Path`):
            Folder for all stages.
        after (`list[Stage]`):
            Stages that the teacher depends on.

    Returns:
        `list[Stage]`: For each ratio the training stages, and then one that measures what they made.
    """
    bank = config.bank or str(root / "bank")
    minutes = config.minutes or {}
    overrides = (config.smoke_overrides or {}) if config.smoke else {}
    rollouts = str(Path(bank) / "rollouts")
    distill = {"teacher_model_name_or_path": teacher}
    arguments = {
        "sft": {"dataset_name": rollouts},
        "offline": {"dataset_name": bank, "lmbda": 0.0, "gate": "all", **distill},
        "rlvr": {"dataset_name": data},
        "opsd": {"dataset_name": data, **distill},
        "opsd-concise": {
            "dataset_name": data,
            "teacher_prompt_template": config.prompt_only_template,
            **distill,
        },
    }
    modules = {"student_sft": "trl.scripts.sft", "student_rlvr": "trl_opsd.rlvr", "opsd": "trl_opsd.opsd"}
    stages = []

    def add(kind, name, what, module, recipe, options, output, after, **kwargs) -> Stage:
        options |= overrides.get(kind, {})
        stages.append(Stage(name, what, module, recipe, options, output, minutes.get(kind, 1.0), after, **kwargs))
        return stages[-1]

    def make(kind, method, ratio, what, module, recipe, options, after, **kwargs) -> Stage:
        name = label(method, ratio)
        options = {"output_dir": str(root / name), "seed": config.seed, **options}
        what = f"{100 * ratio:g}% removed: {what}"
        return add(kind, name, what, module, recipe, options, root / name, after, **kwargs)

    if config.bank is None:
        output = root / "bank.json"
        options = {"model_name_or_path": teacher, "dataset_name": data, "dataset_split": "train", "seed": config.seed}
        options |= {"bank": bank, "rollouts_per_prompt": config.bank_rollouts_per_prompt, "output": str(output)}
        what, module = "the teacher fills its rollout bank", "trl_opsd.compress.bank"
        after = [add("bank", "bank", what, module, config.evaluate, options, output, after)]
    for ratio in config.ratios:
        rates = (config.learning_rates or {}).get(ratio, {})
        options = {"model_name_or_path": teacher, "calibration_dataset": bank}
        options |= (config.sizes or {}).get(ratio, {"target_ratio": ratio})
        module = "trl_opsd.prune"
        pruned = make("prune", "pruned", ratio, "pruning", module, config.prune, options, after, launched=False)
        options = {"model_name_or_path": str(pruned.output), "dataset_name": rollouts}
        options |= {"max_steps": config.cold_start_steps}
        module = modules["student_sft"]
        cold = make("sweep", "cold", ratio, "cold start", module, config.student_sft, options, [pruned])
        made = [pruned, cold]
        for method in config.methods:
            recipe = RECIPES[method]
            options = {"model_name_or_path": str(cold.output), "max_steps": config.updates, **arguments[method]}
            if recipe in rates:
                options["learning_rate"] = rates[recipe]
            what, file = METHODS[method], vars(config)[recipe]
            made.append(make("sweep", method, ratio, what, modules[recipe], file, options, [cold]))
        # All of a ratio in one process: their latencies are those of one time
        output = root / "evaluation" / f"{label('sweep', ratio)}.json"
        options = {"checkpoints": [f"{stage.name}={stage.output}" for stage in made], "prompt_only": False}
        options |= {"dataset_name": data, "seed": config.seed, "output": str(output)}
        what = f"{100 * ratio:g}% removed: measuring all of them"
        add("evaluate", label("evaluate", ratio), what, EVALUATION, config.evaluate, options, output, made)
    return stages
