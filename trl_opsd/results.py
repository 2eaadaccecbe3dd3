"""
The one JSON schema of every measured result: what was run, where, and what came out.

Stages write their file with [`write_results`]; reports, plots and model cards are made from such files, never by hand.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from .cli import save_final


if TYPE_CHECKING:
    from transformers import Trainer
    from trl import ModelConfig, ScriptArguments


_PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "math-verify")


def environment() -> dict[str, Any]:
    """
    Returns where the numbers were measured.

    Returns:
        `dict`: `device` (name of the accelerator, or `"cpu"`), `machine` (platform, processor, number of cores and of
        torch threads) and `versions` of Python, of this package and of the libraries underneath.
    """
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
    return {
        "device": device,
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "trl-opsd": __version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


def commit() -> str | None:
    """
    Returns the commit of the checkout that this package runs from, with `-dirty` after it when files were changed.

    Returns:
        `str` or `None`: `None` when the package is not run from a checkout (then its version says what it is).
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside some other project's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def write_text(path: str | Path, text: str) -> None:
    """
    Writes a file whole or not at all: under a temporary name beside it, then renamed.

    Args:
        path (`str` or `Path`):
            Final name. Missing parent folders are made.
        text (`str`):
            What the file holds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_results(path: str | Path, rows: list[dict[str, Any]], config: Any) -> None:
    """
    Writes measured rows in the project's schema: `{"run": ..., "environment": ..., "rows": [...]}`.

    Args:
        path (`str` or `Path`):
            JSON file to write, whole or not at all.
        rows (`list[dict]`):
            What came out, one dictionary of numbers and labels per measurement.
        config (dataclass or `dict`):
            What was run. Its `seed`, if it has one, is repeated beside it.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot hold.
    """
    config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)
    run = {"config": config, "seed": config.get("seed"), "commit": commit()}
    results = {"run": run, "environment": environment(), "rows": rows}
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finish(trainer: "Trainer", stage: str, script_args: "ScriptArguments", model_args: "ModelConfig") -> None:
    """
    Ends a stage that has trained: its checkpoint, and beside it what was logged and what it was made of and with.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer after training. Called on every process.
        stage (`str`):
            Name of the stage, and of the JSON.
        script_args ([`~trl.ScriptArguments`]):
            Arguments of the command line.
        model_args ([`~trl.ModelConfig`]):
            What the model was made of.
    """
    args = trainer.args
    save_final(trainer)
    if trainer.accelerator.is_main_process:
        # Of what and on what it was trained too: model cards and the provenance of exports follow these back
        config = {**dataclasses.asdict(model_args), **dataclasses.asdict(script_args), **args.to_dict()}
        write_results(f"{args.output_dir}/{stage}.json", trainer.state.log_history, config)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if args.use_vllm:
        trainer.vllm_generation.close()  # and with it the process group of one of several
    trainer.accelerator.end_training()
