"""The chain of stages: what runs, what is finished already, and how long is left."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..cli import UserError
from ..results import write_text


# What every progress bar of a stage prints: `3/30 [00:12<...`
_STEP = re.compile(r"(\d+)/(\d+) \[")


@dataclass
class Stage:
    """
    One command of the chain.

    Args:
        name (`str`):
            Name in the report and of its folder.
        what (`str`):
            What it does, for the progress display.
        module (`str`):
            Module that runs as `python -m`.
        recipe (`str`):
            YAML file with its configuration.
        arguments (`dict[str, Any]`):
            Options that override the recipe.
        output (`Path`):
            What it leaves: the folder of a checkpoint, or the JSON file of an evaluation.
        minutes (`float`, *optional*, defaults to `1.0`):
            How long it is expected to take, for the time left.
        after (`list[Stage]`, *optional*):
            Stages that it depends on, where the chain branches. Defaults to the one before it.
        launched (`bool`, *optional*, defaults to `True`):
            Whether the launcher starts it, if it is no evaluation.
    """

    name: str
    what: str
    module: str
    recipe: str
    arguments: dict[str, Any]
    output: Path
    minutes: float = field(default=1.0)
    after: "list[Stage] | None" = field(default=None)
    launched: bool = field(default=True)

    @property
    def is_training(self) -> bool:
        return self.output.suffix != ".json"

    def command(self, launcher: list[str]) -> list[str]:
        options = []
        for name, value in self.arguments.items():
            values = value if isinstance(value, list) else [value]
            options += [f"--{name}", *map(str, values)]
        return [
            *(launcher if self.is_training and self.launched else [sys.executable]),
            "-m",
            self.module,
            "--config",
            self.recipe,
            *options,
        ]

    @property
    def marker(self) -> Path:
        return self.output.parent / f".{self.output.name}.done"

    def fingerprint(self, previous: str) -> str:
        """Changes whenever the recipe, an option or a stage that it depends on does."""
        what = json.dumps([previous, self.module, Path(self.recipe).read_text(), self.arguments], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()

    def is_finished(self, fingerprint: str) -> bool:
        """Whether its output is there, whole, and from this very configuration."""
        whole = (self.output / "config.json").is_file() if self.is_training else self.output.is_file()
        return whole and self.marker.is_file() and self.marker.read_text() == fingerprint


def run_chain(
    stages: list[Stage], logs: Path, launcher: list[str], on_progress: Callable[[Stage, int, int, float], None]
) -> None:
    """
    Runs the stages that are not finished yet, one after the other.

    A training stage that was interrupted goes on from its last checkpoint if it left one, and begins anew if not.

    Args:
        stages (`list[Stage]`):
            The chain.
        logs (`Path`):
            Folder for what the stages print.
        launcher (`list[str]`):
            Command that stands before `-m` for the training stages.
        on_progress (`Callable`):
            Called with the stage, the steps done, the steps in all (0 while unknown) and the seconds left in the
            chain, as far as known.

    Raises:
        UserError: If a stage fails. The message has its last lines and names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    fingerprints, expected_done, seconds_done = {}, 0.0, 0.0
    for index, stage in enumerate(stages):
        after = stages[max(index - 1, 0) : index] if stage.after is None else stage.after
        fingerprint = stage.fingerprint(" ".join(fingerprints[id(other)] for other in after))
        fingerprints[id(stage)] = fingerprint
        later = sum(other.minutes for other in stages[index + 1 :]) * 60
        if stage.is_finished(fingerprint):
            on_progress(stage, 1, 1, later)
            continue
        stage.marker.unlink(missing_ok=True)
        command = stage.command(launcher)
        if stage.is_training and stage.output.is_dir():
            checkpoint = get_last_checkpoint(str(stage.output))
            if checkpoint is None:
                shutil.rmtree(stage.output)
            else:
                command += ["--resume_from_checkpoint", checkpoint]
        stage.output.parent.mkdir(parents=True, exist_ok=True)

        start = time.monotonic()
        # How much slower or faster than expected this machine has been
        pace = seconds_done / (60 * expected_done) if expected_done else 1.0

        def report(done: int, total: int, stage=stage, start=start, pace=pace, later=later) -> None:
            passed = time.monotonic() - start
            share = done / total if total else 0.0
            left = passed * (1 / share - 1) if share > 0.1 else max(60 * stage.minutes * pace - passed, 0.0)
            on_progress(stage, done, total, left + later * pace)

        kind = "train" if stage.is_training else "evaluate"
        _run(stage, command, logs / f"{kind}-{stage.name}.log", report)
        seconds_done, expected_done = seconds_done + time.monotonic() - start, expected_done + stage.minutes
        write_text(stage.marker, fingerprint)


def _run(stage: Stage, command: list[str], log: Path, report: Callable[[int, int], None]) -> None:
    report(0, 0)
    with log.open("w") as file:
        file.write(f"$ {shlex.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        try:
            # Text mode turns the carriage returns of a progress bar into line ends
            for line in process.stdout:
                file.write(line)
                file.flush()
                steps = _STEP.findall(line)
                if steps:
                    report(*map(int, steps[-1]))
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code != 0:
        text = log.read_text()
        reasons = re.findall(r"\berror: (.+)", text) or [line for line in text.splitlines() if line.strip()]
        raise UserError(f"The stage `{stage.name}` failed: {reasons[-1]} (its output is in {log})")
