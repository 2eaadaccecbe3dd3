"""
What the command lines of all stages share.

A user's mistake ends in one sentence that names the thing and the fix, with exit status 2 and no traceback, and it
does so before any model is loaded. Everything else keeps its traceback.
"""

import argparse
import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, Trainer
from trl import TrlParser


class UserError(ValueError):
    """A mistake in what the user asked for: the message is one sentence that names the thing and the fix."""


@contextmanager
def user_errors() -> Iterator[None]:
    """
    Turns a [`UserError`] or [`ValueError`] raised inside the block into `error: <sentence>` and exit status 2.

    The block is the part of a command line that checks: arguments, files, columns and configurations. Models are
    loaded after it, so a `ValueError` of a forward pass still shows where it came from.
    """
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(
    dataclass_types: tuple[type, ...], args: list[str] | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """
    Parses `--config file.yaml` and the command line, which overrides it, into the given dataclasses.

    The only changes with respect to [`~trl.TrlParser`] are that a missing file, a file that is not YAML and an
    unknown key are errors of one sentence, the last one with the closest known key.

    Args:
        dataclass_types (`tuple[type, ...]`):
            Dataclasses to fill, as in [`~trl.TrlParser`].
        args (`list[str]`, *optional*):
            Arguments to parse. Defaults to those of the process.
        prog (`str`, *optional*):
            Name of the program in the help text.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        UserError: If the file is missing or not a YAML mapping, or holds a key that no dataclass knows.
    """
    args = list(sys.argv[1:] if args is None else args)
    parser = TrlParser(dataclass_types, prog=prog, allow_abbrev=False)
    if "--config" in args:
        index = args.index("--config") + 1
        if index == len(args):
            raise UserError("`--config` needs the path of a YAML file after it.")
        path = Path(args[index])
        if not path.is_file():
            raise UserError(f"There is no config file at `{path}`: check the path given to `--config`.")
        try:
            config = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"`{path}` is not valid YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(config, dict):
            raise UserError(f"`{path}` must hold `key: value` lines, and holds {type(config).__name__}.")
        known = {action.dest for action in parser._actions if action.dest != argparse.SUPPRESS} | {"env"}
        unknown = [key for key in config if key not in known]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "remove it, or see --help for the keys there are."
            raise UserError(f"Unknown key `{unknown[0]}` in {path}: {hint}")
    return parser.parse_args_and_config(args=args)


def check_checkpoint(name_or_path: str | None, field: str, trust_remote_code: bool = False) -> None:
    """
    Checks that a checkpoint is there by reading its configuration, which loads no weights.

    Args:
        name_or_path (`str` or `None`):
            Folder of a checkpoint, or a model id on the Hub.
        field (`str`):
            Name of the argument that holds it, for the message.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the configuration may run code of its own.

    Raises:
        UserError: If there is no readable configuration, or a folder without weights.
    """
    if not name_or_path:
        raise UserError(f"`{field}` is missing: give the folder of a checkpoint or a model id with `--{field}`.")
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"`{field}`: the folder `{folder}` has no config.json, so it is not a checkpoint.")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise UserError(f"`{field}`: the folder `{folder}` has no weights (*.safetensors or *.bin).")
    try:
        AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{field}`: there is no checkpoint at `{name_or_path}`: it is neither a folder with a config.json nor a "
            f"model that the Hub returns ({str(error).splitlines()[0]})."
        ) from None


def save_final(trainer: Trainer) -> None:
    """
    Saves the trained model, or adapter, and its tokenizer into `output_dir`, whole or not at all.

    The files are written into a folder beside and then moved, the configuration last: a folder that an interruption
    leaves behind has no configuration, so no later stage takes it for a checkpoint.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer after training. Called on every process, because gathering sharded weights takes them all.
    """
    folder = Path(trainer.args.output_dir)
    staging = folder / ".saving"
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        publish(staging, folder)
    trainer.accelerator.wait_for_everyone()


def publish(staging: Path, folder: Path) -> None:
    """
    Moves the files of a checkpoint to where they belong, the configuration last.

    Args:
        staging (`Path`):
            Folder that holds them, which is removed.
        folder (`Path`):
            Where they belong.
    """
    markers = ("config.json", "adapter_config.json")
    for name in markers:
        (folder / name).unlink(missing_ok=True)
    for file in sorted(staging.iterdir(), key=lambda file: file.name in markers):
        file.replace(folder / file.name)
    staging.rmdir()
