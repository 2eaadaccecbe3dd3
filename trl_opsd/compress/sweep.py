"""The size sweep: which stages it has, and what they come to, by ratio and method."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..cli import UserError
from ..rlvr.bank import read_rollouts
from .chain import Stage


if TYPE_CHECKING:
    from .config import CompressConfig


#: What can be done with a model that was pruned: how it is trained after the cold start, and the recipe for it.
METHODS = {
    "sft": "supervised fine-tuning on the teacher's verified rollouts",
    "offline": "distillation of the teacher's logits on its own rollouts",
    "rlvr": "reinforcement learning with verifiable rewards",
    "opsd": "on-policy distillation from the teacher",
    "opsd-concise": "on-policy distillation from the teacher, asked to be concise",
}

#: Those of them in which the student writes the rollouts.
WRITES = ("rlvr", "opsd", "opsd-concise")

EVALUATION = "trl_opsd.evaluate"

_RECIPES = {
    "sft": "student_sft",
    "offline": "opsd",
    "rlvr": "student_rlvr",
    "opsd": "opsd",
    "opsd-concise": "opsd",
}


def check_sweep(config: "CompressConfig") -> None:
    """
    Checks what a sweep needs beyond the chain.

    Args:
        config ([`CompressConfig`]):
            Configuration with `ratios`.

    Raises:
        UserError: If a ratio, a method, a recipe or the bank is missing or wrong, or if the methods would not train on
            as many rollouts in an update.
    """
    for ratio in config.ratios:
        if not 0 < ratio < 1:
            raise UserError(
                f"`ratios` are shares of the parameters to remove, above 0 and below 1, and one is {ratio}."
            )
    for name, known in (("ratios", config.ratios), ("methods", config.methods)):
        if len(set(known)) < len(known):
            raise UserError(f"`{name}` holds something twice: {known}.")
    for name, by_ratio in (("sizes", config.sizes or {}), ("learning_rates", config.learning_rates or {})):
        for ratio in by_ratio:
            if ratio not in config.ratios:
                raise UserError(f"`{name}` has the ratio {ratio}, and `ratios` are {config.ratios}: make them agree.")
    for ratio, rates in (config.learning_rates or {}).items():
        for recipe, rate in rates.items():
            if recipe not in _RECIPES.values():
                known = ", ".join(dict.fromkeys(_RECIPES.values()))
                raise UserError(f"`learning_rates` has `{recipe}` at {ratio}, and the recipes are {known}.")
            if not isinstance(rate, float) or rate <= 0:
                raise UserError(f"`learning_rates` must be numbers above 0, such as 2.0e-3, and one is {rate!r}.")
    if not config.methods:
        raise UserError(f"`methods` is empty: name at least one of {', '.join(METHODS)}.")
    for method in config.methods:
        if method not in METHODS:
            raise UserError(f"`methods` holds `{method}`, and the methods are {', '.join(METHODS)}.")
    for name in ("prune", "student_sft", *dict.fromkeys(_RECIPES[method] for method in config.methods)):
        if config.__dict__[name] is None:
            raise UserError(f"`{name}` is missing: with `ratios`, give its recipe, a YAML file.")
    for name in ("cold_start_steps", "updates"):
        if config.__dict__[name] < 1:
            raise UserError(f"`{name}` must be at least 1, and is {config.__dict__[name]}.")
    if "opsd-concise" in config.methods and config.prompt_only_template is None:
        raise UserError("The method `opsd-concise` needs `prompt_only_template`: it is what the teacher is asked.")
    if config.bank is not None:
        read_rollouts(config.bank)
    recipes = {"cold start": "student_sft"} | {method: _RECIPES[method] for method in config.methods}
    sizes = {name: rollouts_per_update(config.__dict__[recipe]) for name, recipe in recipes.items()}
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


def label(method: str, ratio: float) -> str:
    """Name of a stage: `opsd-90` is OPSD on a model of which 90% were removed."""
    return f"{method}-{100 * ratio:g}"


def sweep_stages(config: "CompressConfig", teacher: str, data: str, root: Path, after: list[Stage]) -> list[Stage]:
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
            recipe = _RECIPES[method]
            options = {"model_name_or_path": str(cold.output), "max_steps": config.updates, **arguments[method]}
            if recipe in rates:
                options["learning_rate"] = rates[recipe]
            what, file = METHODS[method], config.__dict__[recipe]
            made.append(make("sweep", method, ratio, what, modules[recipe], file, options, [cold]))
        # All of a ratio in one process: their latencies are those of one time
        output = root / "evaluation" / f"{label('sweep', ratio)}.json"
        options = {"checkpoints": [f"{stage.name}={stage.output}" for stage in made], "prompt_only": False}
        options |= {"dataset_name": data, "seed": config.seed, "output": str(output)}
        what = f"{100 * ratio:g}% removed: measuring all of them"
        add("evaluate", label("evaluate", ratio), what, EVALUATION, config.evaluate, options, output, made)
    return stages


def sweep_rows(config: "CompressConfig", stages: list[Stage]) -> list[dict[str, Any]]:
    """
    What a sweep came to.

    Args:
        config ([`CompressConfig`]):
            Configuration with `ratios`.
        stages (`list[Stage]`):
            Its chain, all of which has run.

    Returns:
        `list[dict]`: The rows of the evaluation, the teacher's first, with `method`, `ratio` (share of the parameters
        that was to be removed), `kept` (accuracy as a share of the teacher's), `answer_flops` (two for each parameter
        and token of a mean answer), `updates` (optimizer steps since pruning), `rollouts` (completions that the
        method's own updates were given) and `generated_tokens` (those of them that the student wrote).
    """
    measured = {}
    for stage in stages:
        if stage.module == EVALUATION:
            for row in json.loads(stage.output.read_text())["rows"]:
                measured.setdefault(row["stage"], []).append(row)
    models = [("rlvr" if config.rlvr else "base" if config.sft is None else "sft", "teacher", 0.0)]
    models += [
        (label(method, ratio), method, ratio)
        for ratio in config.ratios
        for method in ("pruned", "cold", *config.methods)
    ]
    accuracy = {row["decoding"]: row["accuracy"] for row in measured[models[0][0]]}
    rows = []
    for name, method, ratio in models:
        trained = method in METHODS
        rollouts = config.updates * rollouts_per_update(config.student_sft) if trained else 0
        log = Path(config.output_dir) / name / ("rlvr.json" if method == "rlvr" else "opsd.json")
        what = {
            "method": method,
            "ratio": ratio,
            "updates": (config.cold_start_steps if trained or method == "cold" else 0) + config.updates * trained,
            "rollouts": rollouts,
            "generated_tokens": _generated_tokens(log, rollouts) if method in WRITES else 0,
        }
        for row in measured[name]:
            flops = 2 * row["parameters"] * row["mean_tokens"]
            rows.append({**row, **what, "kept": row["accuracy"] / accuracy[row["decoding"]], "answer_flops": flops})
    return rows


def conditions(config: "CompressConfig") -> str:
    """Says what the methods of a sweep had in common."""
    size = rollouts_per_update(config.student_sft)
    return (
        f"Every method starts from the same pruned model after {config.cold_start_steps} updates of supervised "
        f"fine-tuning on the teacher's verified rollouts (`cold`), and makes {config.updates} more, of {size} rollouts "
        f"each: {config.updates * size:,} rollouts that the student writes (`rlvr`, `opsd`, `opsd-concise`) or the "
        "teacher wrote (`sft`, `offline`)."
    )


def _generated_tokens(log: Path, rollouts: int) -> int:
    """Tokens that the student of a run wrote, from the mean lengths in its log."""
    logs = json.loads(log.read_text())["rows"]
    total, last = 0.0, 0
    for log in logs:
        if "completions/mean_length" in log:
            total, last = total + log["completions/mean_length"] * (log["step"] - last), log["step"]
    return round(total * rollouts / last)
