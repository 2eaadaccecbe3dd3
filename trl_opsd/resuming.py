"""How the training stages go on where they were: which checkpoint is whole, whose folder it is, and a SIGTERM in time."""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .cli import make_folder
from .results import write_text
from .rollout_engine import EngineError


if TYPE_CHECKING:
    from transformers import TrainingArguments

# 128 + SIGTERM, as a shell reports a process that the signal has ended
INTERRUPTED = 143
# Hashes of the files of a checkpoint, in the checkpoint
CHECKSUMS = "checksums.json"
# What gloo says where a process waits for another that is no longer there
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
# Of accelerate, the first that loads the shards of an adapter on every process
_LOADS_ADAPTERS = Version("1.15")
# Output folders of this process, open for as long as it lives, which holds their locks
_claimed: dict[Path, int] = {}


def hash_files(folder: Path) -> dict[str, str]:
    """
    Args:
        folder (`Path`):
            Folder of a checkpoint.

    Returns:
        `dict[str, str]`: SHA-256 of each of its files, by its path in the folder.
    """
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS):
        with file.open("rb") as stream:
            found[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def why_broken(folder: Path) -> str | None:
    """
    Looks for what makes a training checkpoint useless. One with checksums is read whole.

    Args:
        folder (`Path`):
            Folder `checkpoint-N` of a trainer.

    Returns:
        `str` or `None`: What is wrong with it, or `None` if it is whole.
    """
    if not folder.is_dir():
        return "it is not a folder"
    try:
        # The main process writes it after everything else
        json.loads((folder / "trainer_state.json").read_text())
    except OSError:
        return "it has no trainer_state.json, so its writing was interrupted"
    except ValueError:
        return "its trainer_state.json is not whole"
    if (folder / CHECKSUMS).is_file():
        try:
            written = dict(json.loads((folder / CHECKSUMS).read_text()))
        except (ValueError, TypeError):
            return f"its {CHECKSUMS} is not whole"
        there = hash_files(folder)
        for name, digest in written.items():
            if there.get(name) != digest:
                return f"its {name} is {'damaged' if name in there else 'missing'}"
        return None
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError):
            return f"its {index.name} is not whole"
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            return f"its shard {missing[0]} is missing"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass  # compares the length of the file with what its header says
        except (SafetensorError, OSError) as error:
            return f"its {file.name} is damaged ({error})"
    return None


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Folder of a checkpoint, or `true` for the last whole one of `output_dir`.
        output_dir (`str`):
            Output folder of the run.

    Returns:
        `str` or `None`: The folder, or `None` to begin anew, which `true` means where there is no whole checkpoint.

    Raises:
        ValueError: If the folder that was named is not a whole checkpoint.
    """
    wish = str(resume_from_checkpoint).lower()
    if resume_from_checkpoint is None or wish == "false":
        return None
    if wish != "true":
        reason = why_broken(Path(resume_from_checkpoint))
        if reason is not None:
            raise ValueError(
                f"`resume_from_checkpoint`: `{resume_from_checkpoint}` cannot be resumed from, because {reason}: give "
                "another one, or `true` for the last whole checkpoint of `output_dir`."
            )
        return str(resume_from_checkpoint)
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdecimal():
            steps[int(number)] = folder
    for _, folder in sorted(steps.items(), reverse=True):
        reason = why_broken(folder)
        if reason is None:
            return str(folder)
        logging.getLogger("trl_opsd").warning(f"`{folder}` is left aside: {reason}.")
    return None


def agreed_checkpoint(training_args: "TrainingArguments") -> str | None:
    """
    The checkpoint that all processes go on from: the main process looks for it, and is the only one that reads it whole.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            Arguments. Called on every process.

    Returns:
        `str` or `None`: As of [`find_checkpoint`].

    Raises:
        ValueError: As of [`find_checkpoint`], if it cannot read a file, or if it is an adapter's, in shards of FSDP, and
            accelerate would load it on one process alone. On every process.
    """
    found = agreed(
        training_args, lambda: find_checkpoint(training_args.resume_from_checkpoint, training_args.output_dir)
    )
    is_fsdp = training_args.fsdp_plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if found is not None and is_fsdp and Path(found, "adapter_config.json").is_file():
        version = importlib.metadata.version("accelerate")
        if Version(version) < _LOADS_ADAPTERS:
            raise ValueError(
                f"`resume_from_checkpoint`: under FSDP accelerate {version} gives an adapter back to the first process alone, "
                f"and the others go on with a new one: install accelerate {_LOADS_ADAPTERS} or newer."
            )
    return found


def agreed(training_args: "TrainingArguments", find: Callable[[], Any]) -> Any:
    """
    What the main process finds, which alone has the work of it, on all of them.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            Arguments. Called on every process.
        find (`Callable`):
            Called on the main process, without arguments.

    Returns:
        What it returns.

    Raises:
        ValueError: If it raises one, or cannot read a file, on every process.
    """
    found = [None, None]
    if training_args.process_index == 0:
        try:
            found[0] = find()
        except (ValueError, OSError) as error:  # a file that cannot be read, too: the others wait for an answer
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]


def claim(training_args: "TrainingArguments") -> None:
    """
    Makes the output folder of a run and holds it until the process ends.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            Arguments. The main process acts, the others do nothing.

    Raises:
        ValueError: If it cannot be made or written, or if another run holds it.
    """
    if training_args.process_index != 0:
        return
    output_dir = training_args.output_dir
    folder = Path(output_dir)
    make_folder(folder, "output_dir")
    if folder.resolve() in _claimed:
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"`output_dir`: another run is writing into `{output_dir}`: wait for it, or choose another folder."
        ) from None
    _claimed[folder.resolve()] = lock


class Checksums(TrainerCallback):
    """
    Writes hashes of its files into every checkpoint, so that none is gone on from of which a byte has changed.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
    """

    def __init__(self, trainer: Trainer):
        self._accelerator = trainer.accelerator

    def on_save(self, args, state, control, **kwargs):
        self._accelerator.wait_for_everyone()  # each process writes its random numbers
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and folder.is_dir():
            write_text(folder / CHECKSUMS, json.dumps(hash_files(folder), indent=1))


class StopOnSignal(TrainerCallback):
    """
    Ends training after the step at hand when the process is sent SIGTERM, with a checkpoint.

    transformers' `enable_jit_checkpoint` writes one in the middle of a step, after its rollouts were drawn: a run
    resumed from there draws others, and its processes may not agree on the step. This one waits for the end of the
    step, and for all processes.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
    """

    def __init__(self, trainer: Trainer):
        self._accelerator = trainer.accelerator
        self._received = False
        self.stopped_at: int | None = None  # step whose checkpoint the run can go on from

    def on_train_begin(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, signum, frame):
        self._received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor([int(self._received)], device=args.device)
        if self._accelerator.gather(received).any() and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if self.stopped_at is not None:
            # The checkpoint knows which is best. Here it would cost this one: with `save_total_limit=1` transformers ends by
            # removing all others
            state.best_model_checkpoint = None

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end(self, output_dir: str) -> None:
        """
        Ends the process where training was ended, so that nothing is saved under the final name.

        Args:
            output_dir (`str`):
                Output folder of the run.

        Raises:
            SystemExit: With the status 143.
        """
        if self.stopped_at is None:
            return
        folder = os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.stopped_at}")
        self._accelerator.print(
            f"error: Ended by SIGTERM after step {self.stopped_at}, whose checkpoint is `{folder}`: the same command with "
            "`--resume_from_checkpoint true` goes on from there.",
            file=sys.stderr,
        )
        self._accelerator.end_training()
        raise SystemExit(INTERRUPTED)


def train(trainer: Trainer, resume_from: str | None) -> None:
    """
    Trains to the end, or until the process is sent SIGTERM. Every checkpoint gets the checksums of its files.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer.
        resume_from (`str`, *optional*):
            Checkpoint to go on from.

    Raises:
        SystemExit: With the status 143, after a checkpoint, if SIGTERM has ended it. With a sentence, and status 1, if another
            process of the run has died.
    """
    interruption = StopOnSignal(trainer)
    trainer.add_callback(interruption)
    trainer.add_callback(Checksums(trainer))
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except RuntimeError as error:
        if trainer.args.world_size == 1 or not any(words in str(error) for words in _PEER_IS_GONE):
            raise
        traceback.print_exc()
        raise SystemExit(
            "error: Another process of the run has died, and this one waits for it in vain: its own last words say of what, "
            f"and where there are none it was killed. {_how_to_go_on(trainer.args.output_dir)}"
        ) from None
    interruption.end(trainer.args.output_dir)


def _how_to_go_on(output_dir: str) -> str:
    """The end of the sentence of a run that has failed."""
    last = find_checkpoint(True, output_dir)
    way_on = "there is no checkpoint yet (`save_steps`)"
    if last is not None:
        way_on = f"go on from the last checkpoint with `--resume_from_checkpoint {last}`"
    return f"Nothing is saved under the final name; {way_on}."


@contextmanager
def engine_errors(output_dir: str) -> Iterator[None]:
    """
    Ends a command line whose engine has failed: with its traceback, one sentence, and exit status 1.

    Args:
        output_dir (`str`):
            Where the checkpoints are.
    """
    try:
        yield
    except EngineError as error:
        traceback.print_exception(error.__cause__)
        raise SystemExit(f"error: {error} {_how_to_go_on(output_dir)}") from None
