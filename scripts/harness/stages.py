"""The stages of the small chains as experiments use them: run by their commands, kept when finished, measured in place."""

import json
import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedModel

from scripts.harness.results import ROOT, write_text
from trl_opsd.adapters import merged
from trl_opsd.cli import parse
from trl_opsd.evaluate import EvaluateConfig
from trl_opsd.evaluate import evaluate as evaluate_config
from trl_opsd.evaluate.backends.transformers import load_model


# Recipes, in a folder named after the stage of the warm start, its options, and whether RLVR follows it. The weak one stops while the chain is only partly
# learned, and teaches no slips
TEACHERS = {
    "strong": ("recipes/tiny/", {}, True),
    "weak": ("recipes/tiny/", {"target_accuracy": 0.35, "accuracy_steps": 10, "slip_steps": 0}, False),
    "long": ("recipes/tiny/long_", {}, True),
    "competence": ("recipes/tiny/competence_", {}, True),
    "smollm2": ("recipes/small/smollm2_cpu_", {}, True),
}
# What is kept of a measured checkpoint
MEASURED = ("decoding", "n", "accuracy", "accuracy_low", "accuracy_high", "mean_tokens", "p90_tokens", "truncated")


def run_stage(module: str, recipe: str, **options) -> None:
    """Runs a command of the package, quietly."""
    command = [sys.executable, "-m", module, "--config", str(ROOT / recipe)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train_stage(module: str, recipe: str, output: Path, **options) -> Path:
    """Trains a stage, unless its checkpoint or adapter is there. Returns it."""
    if not any((output / name).is_file() for name in ("config.json", "adapter_config.json")):
        run_stage(module, recipe, output_dir=output, **options)
    return output


def train_arm(module: str, recipe: str, folder: Path, **options) -> Path:
    """
    Trains an arm of an experiment, unless that has been done, and returns its checkpoint: of a run that the alarm has ended
    the last one. An option that is `None` is taken out of the recipe.
    """
    stopped = folder / "stopped"
    if not (folder / "config.json").is_file() and not stopped.is_file():
        own = folder.with_suffix(".yaml")
        own.parent.mkdir(parents=True, exist_ok=True)
        left_out = tuple(f"{name}:" for name, value in options.items() if value is None)
        lines = [line for line in (ROOT / recipe).read_text().splitlines() if not line.startswith(left_out or "\0")]
        write_text(own, "\n".join([*lines, ""]))
        command = [sys.executable, "-m", module, "--config", str(own), "--output_dir", str(folder)]
        for name, value in options.items():
            if value is not None:
                command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if ended.returncode == 3:
            stopped.touch()
        elif ended.returncode != 0:
            raise SystemExit(f"{folder.name} has failed: {' '.join(command)}")
    if not stopped.is_file():
        return folder
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def log_of(checkpoint: Path, stage: str) -> list[dict]:
    """What was logged of the steps of a run of a stage."""
    if (checkpoint / f"{stage}.json").is_file():
        rows = json.loads((checkpoint / f"{stage}.json").read_text())["rows"]
    else:
        rows = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "loss" in row]


def warm_start(kind: str, seed: int, runs: Path) -> Path:
    """Makes a warm start of `TEACHERS`. Returns the checkpoint, which has its problems in `data`."""
    recipes, options, _ = TEACHERS[kind]
    stage = f"trl_opsd.{recipes.split('/')[1]}"
    return train_stage(stage, f"{recipes}sft.yaml", runs / f"{kind}-{seed}" / "sft", seed=seed, **options)


def make_teacher(kind: str, seed: int, runs: Path) -> tuple[Path, Path]:
    """Makes a teacher of `TEACHERS`. Returns its checkpoint, an adapter merged, and the folder of the problems."""
    sft = warm_start(kind, seed, runs)
    recipes, _, has_rlvr = TEACHERS[kind]
    if not has_rlvr:
        return sft, sft / "data"
    options = {"seed": seed, "model_name_or_path": sft, "dataset_name": sft / "data"}
    folder = runs / f"{kind}-{seed}"
    rlvr = train_stage("trl_opsd.rlvr", f"{recipes}rlvr.yaml", folder / "rlvr", **options)
    whole = folder / "merged"  # written once: other runs may be reading it
    return whole if whole.is_dir() else Path(merged(str(rlvr), str(whole))), sft / "data"


def evaluate(
    path: Path, data: Path, seed: int, max_samples: int, model: PreTrainedModel | None = None, **options
) -> list[dict]:
    """
    Measures a reasoner on held-out problems, greedy and sampled unless the options say otherwise.

    Args:
        path (`Path`):
            Checkpoint; of a model that is given, the one whose tokenizer it has.
        data (`Path`):
            Folder of the problems.
        seed (`int`):
            Seed of the sampling.
        max_samples (`int`):
            How many problems.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model in memory. Defaults to the checkpoint's.
        options:
            Of [`~trl_opsd.evaluate.EvaluateConfig`], in place of recipes/tiny/evaluate.yaml.

    Returns:
        `list[dict]`: A row for each way of decoding.
    """
    options = {"model_name_or_path": path, "dataset_name": data, "seed": seed, "max_samples": max_samples, **options}
    arguments = ["--config", str(ROOT / "recipes/tiny/evaluate.yaml")]
    arguments += [item for name, value in options.items() for item in (f"--{name}", str(value))]
    (config,) = parse((EvaluateConfig,), arguments)
    model = load_model(config) if model is None else model
    return evaluate_config(config, model, progress=lambda done, total: None)


def evaluate_checkpoint(path: Path, data: Path, seed: int, max_samples: int) -> list[dict]:
    """The rows of [`evaluate`] with the numbers in `MEASURED` alone."""
    return [{field: row[field] for field in MEASURED} for row in evaluate(path, data, seed, max_samples)]
