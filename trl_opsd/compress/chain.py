"""The chain of stages: what runs, what is finished already, and how long is left."""

import functools
import hashlib
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..children import start
from ..cli import UserError
from ..results import write_text
from ..resuming import find_checkpoint


# What every progress bar of a stage prints: `3/30 [00:12<...`
_STEP = re.compile(r"(\d+)/(\d+) \[")
# Options that name what a stage reads: data sets, and checkpoints
_DATA = ("dataset_name", "calibration_dataset", "tasks")
_MODELS = ("model_name_or_path", "teacher_model_name_or_path")

# Exit status of a training stage that an alarm has ended; a launcher of several processes has one of its own, and prints it
_ALARM = 3
_STATUS = re.compile(r"\bexit(?:code| status)\s*:?\s*(\d+)")

logger = logging.getLogger(__name__)


class StageError(UserError):
    """
    A stage that ended before it was done.

    Args:
        message (`str`):
            Sentence.
        status (`int`):
            Exit status: 2 of what a user can mend, 3 of an alarm, anything else of a crash.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


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
        """The fingerprint that it was finished with."""
        return self.output.parent / f".{self.output.name}.done"

    @property
    def started(self) -> Path:
        """The fingerprint that it was started with: whose work lies in its folder, finished or not."""
        return self.output.parent / f".{self.output.name}.started"

    def fingerprint(self, previous: str, made: Iterable[Path] = ()) -> str:
        """
        Changes whenever the recipe, an option, a stage that it depends on, a local data set or a local checkpoint does.

        Args:
            previous (`str`):
                Fingerprints of the stages that it depends on.
            made (`Iterable[Path]`, *optional*):
                Checkpoints that stages of the chain make, which `previous` speaks for.

        Returns:
            `str`: 64 hexadecimal digits.
        """
        recipe = Path(self.recipe).read_text()
        options = {**(yaml.safe_load(recipe) or {}), **self.arguments}
        read = []
        for name in (*_DATA, *_MODELS):
            values = options.get(name) or []
            for value in [values] if isinstance(values, str) else values:
                path = _local(value)
                if path is not None and not (name in _MODELS and path in map(Path, made)):
                    read.append([value, _content(path, "README.md" if name in _MODELS else None)])
        what = json.dumps([previous, self.module, recipe, self.arguments, read], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()

    def is_finished(self, fingerprint: str) -> bool:
        """Whether its output is there, whole, and from this very configuration."""
        markers = ("config.json", "adapter_config.json")
        whole = any((self.output / n).is_file() for n in markers) if self.is_training else self.output.is_file()
        return whole and self.marker.is_file() and self.marker.read_text() == fingerprint


def _local(value: str) -> Path | None:
    """What an option names on this disk: `PATH`, or `NAME:PATH`, with or without `[:N]`; `None` for anything else."""
    value = re.sub(r"\[:\d+\]$", "", value)
    for text in (value, value.partition(":")[2]):
        path = Path(text).expanduser()
        if text and path.exists():
            return path
    return None


def _content(path: Path, but: str | None = None) -> str:
    """
    Hash of a file, or of all in a folder but what `datasets` keeps there for itself, and of a model its card, which is written
    again with the memory and the seconds of another run.
    """
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and file.name != but and not re.match(r"cache-.*\.arrow$|tmp", file.name):
            status = file.stat()
            name = file.relative_to(path).as_posix()
            digest.update(f"{name} {_file_hash(file, status.st_size, status.st_mtime_ns)} ".encode())
    return digest.hexdigest()


@functools.cache
def _file_hash(file: Path, size: int, changed: int) -> str:
    """Hash of a file, read once in a process as long as its size and time stay."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def run_chain(
    stages: list[Stage], logs: Path, launcher: list[str], on_progress: Callable[[Stage, int, int, float], None]
) -> None:
    """
    Runs the stages that are not finished yet, one after the other.

    A training stage that was interrupted goes on from its last whole checkpoint if it left one, and begins anew if not. What
    another configuration has left in its folder is moved aside, to `NAME-old-1` and so on.

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
        StageError: If a stage fails. The message has its last lines and names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    fingerprints, expected_done, seconds_done = {}, 0.0, 0.0
    for index, stage in enumerate(stages):
        after = stages[max(index - 1, 0) : index] if stage.after is None else stage.after
        made = [other.output for other in stages[:index]]
        fingerprint = stage.fingerprint(" ".join(fingerprints[id(other)] for other in after), made)
        fingerprints[id(stage)] = fingerprint
        later = sum(other.minutes for other in stages[index + 1 :]) * 60
        if stage.is_finished(fingerprint):
            on_progress(stage, 1, 1, later)
            continue
        stage.marker.unlink(missing_ok=True)
        command = stage.command(launcher)
        if stage.is_training and stage.output.is_dir():
            if not stage.started.is_file() or stage.started.read_text() != fingerprint:
                move_aside(stage.output)
            elif (checkpoint := find_checkpoint(True, str(stage.output))) is not None:
                command += ["--resume_from_checkpoint", checkpoint]
            else:
                shutil.rmtree(stage.output)
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(stage.started, fingerprint)  # before there is anything that a later run could take for its own

        began = time.monotonic()
        # How much slower or faster than expected this machine has been
        pace = seconds_done / (60 * expected_done) if expected_done else 1.0

        def report(done: int, total: int, stage=stage, began=began, pace=pace, later=later) -> None:
            passed = time.monotonic() - began
            share = done / total if total else 0.0
            left = passed * (1 / share - 1) if share > 0.1 else max(60 * stage.minutes * pace - passed, 0.0)
            on_progress(stage, done, total, left + later * pace)

        kind = "train" if stage.is_training else "evaluate"
        _run(stage, command, logs / f"{kind}-{stage.name}.log", report)
        seconds_done, expected_done = seconds_done + time.monotonic() - began, expected_done + stage.minutes
        write_text(stage.marker, fingerprint)


def move_aside(folder: Path) -> None:
    """Renames a folder to `NAME-old-1`, or the next number that is free."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-old-{number}")).exists():
        number += 1
    folder.rename(aside)
    logger.warning("`%s` was made by another configuration, data or checkpoint: it is now `%s`.", folder, aside)


def _run(stage: Stage, command: list[str], log: Path, report: Callable[[int, int], None]) -> None:
    report(0, 0)
    with log.open("w") as file:
        file.write(f"$ {shlex.join(command)}\n")
        process = start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
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
        found = [int(number) for number in _STATUS.findall(text)]
        is_alarm = _ALARM in (code, *found) or "OPSDAlarm" in reasons[-1]
        raise StageError(
            f"The stage `{stage.name}` failed: {reasons[-1]} (its output is in {log})", _ALARM if is_alarm else code
        )
