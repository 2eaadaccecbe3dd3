"""What travels with an artefact: the files that its engine does not need and people do, and where it comes from."""

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapters import merged
from ..cli import UserError
from ..evaluate.card import RECIPE, STAGES, find_origin, read_record
from ..evaluate.checkpoint import Checkpoint, load_weights
from ..evaluate.plan import eos_token_ids
from ..opsd.ends import turn_without_end
from ..results import commit, write_text
from .environments import PINS
from .formats import FAMILIES, Artefact


PROVENANCE = "provenance.json"
# Of tokenizers in whatever form they are, and what says how to use them
_TRAVELS = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
_TRAVELS += ("generation_config.json",)
_LICENCES = ("LICEN[CS]E*", "NOTICE*")


def check_checkpoint_ends(checkpoint: Checkpoint, tokenizer) -> None:
    """
    Checks that what ends a completion is what the chat template ends an answer in, and nothing that begins one: any other
    checkpoint is served as a model that never ends, or never begins.

    Args:
        checkpoint ([`~trl_opsd.evaluate.checkpoint.Checkpoint`]):
            Checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Raises:
        UserError: If it is otherwise.
    """
    reason = turn_without_end(eos_token_ids(checkpoint.generation_config, tokenizer), tokenizer)
    if reason is not None:
        raise UserError(
            f"`{checkpoint.path}` cannot be served as it is: {reason}. Mend `eos_token` in tokenizer_config.json and "
            "`eos_token_id` in generation_config.json."
        )


def plain_checkpoint(checkpoint: Checkpoint, tokenizer, dtype: str | None, folder: Path) -> Path:
    """
    Returns a folder with the checkpoint in float32, adapters merged: what converters are given.

    Args:
        checkpoint ([`~trl_opsd.evaluate.checkpoint.Checkpoint`]):
            Checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        dtype (`str`, *optional*):
            Precision of its weights.
        folder (`Path`):
            Where it is written to, if it is not that already, or comes with code of its own, which is left behind.
    """
    path = Path(checkpoint.path)
    if checkpoint.base is not None:
        return Path(merged(checkpoint.path, str(folder)))
    # Converters trust what lies in a folder: llama.cpp's runs the code of a tokenizer, for some architectures
    has_code = any(path.rglob("*.py")) if path.is_dir() else False
    if path.is_dir() and dtype == "float32" and any(path.glob("model*.safetensors")) and not has_code:
        return path
    save_as(checkpoint.path, tokenizer, "float32", folder)
    return folder


def save_as(path: str, tokenizer, dtype: str, folder: Path) -> None:
    """Writes a checkpoint in a precision into a folder, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    model = load_weights(path, dtype=dtype, device_map={"": "cpu"})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def travel(checkpoint: Checkpoint, plain: Path, folder: Path) -> None:
    """
    Copies into the folder of an artefact what its converter has not put there.

    Args:
        checkpoint ([`~trl_opsd.evaluate.checkpoint.Checkpoint`]):
            What it is made of.
        plain (`Path`):
            The same in float32.
        folder (`Path`):
            Folder of the artefact.
    """
    own = [Path(part.path) for part in (checkpoint, checkpoint.base) if part is not None]
    files = [file for pattern in _TRAVELS for file in plain.glob(pattern)]
    files += [file for part in own for pattern in _LICENCES for file in part.glob(pattern)]
    files += [own[0] / f"{stage}.json" for stage in STAGES]
    for file in files:
        if file.is_file() and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)


def provenance(
    artefact: Artefact,
    checkpoint: Checkpoint,
    licence: str | None,
    row: dict[str, Any],
    folders: Mapping[str, Path],
) -> dict[str, Any]:
    """
    Says what an artefact was made of, by what, and what it was checked with.

    Args:
        artefact ([`Artefact`]):
            What it is.
        checkpoint ([`~trl_opsd.evaluate.checkpoint.Checkpoint`]):
            What it was made of.
        licence (`str`, *optional*):
            Licence, if the user has said it.
        row (`dict`):
            What came out of its check.
        folders (`Mapping[str, Path]`):
            Environments that the user has given, whose versions are not ours to say.
    """
    folder = Path(checkpoint.path)
    origin, stages, seen = find_origin(folder), [], set()
    while folder.is_dir() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        stage = next((name for name in STAGES if (folder / f"{name}.json").is_file()), None)
        if stage is None:
            break
        record = read_record(folder / f"{stage}.json")
        recipe = {
            name: record["run"]["config"][name] for name in RECIPE if record["run"]["config"].get(name) is not None
        }
        stages.append(
            {
                "stage": stage,
                "checkpoint": str(folder),
                "commit": record["run"]["commit"],
                "versions": record["environment"]["versions"],
                "recipe": recipe,
                "metrics": record["rows"][-1] if record.get("rows") else None,
            }
        )
        folder = Path(recipe.get("model_name_or_path", ""))
    family = FAMILIES[artefact.family]
    return {
        "artefact": artefact.name,
        "checkpoint": checkpoint.path,
        "checkpoint_hash": checkpoint.hash,
        "base_model": origin.base_model,
        "licence": licence or origin.licence,
        "teacher": next(
            (
                {name: stage["recipe"].get(name) for name in RECIPE if name.startswith("teacher_")}
                for stage in stages
                if stage["stage"] == "opsd"
            ),
            None,
        ),
        "data": origin.datasets,
        "stages": stages,
        "exported_by": {
            "trl-opsd": __version__,
            "commit": commit(),
            "transformers": importlib.metadata.version("transformers"),
            **{
                name: str(folders[name]) if name in folders else list(PINS[name])
                for name in (family.converter, family.engine)
                if name is not None
            },
        },
        "check": row,
    }


def write_provenance(folder: Path, content: dict[str, Any]) -> None:
    """Writes the provenance of an artefact into its folder."""
    write_text(folder / PROVENANCE, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_provenance(folder: Path) -> dict[str, Any]:
    """
    Reads the provenance of an artefact.

    Args:
        folder (`Path`):
            Its folder.

    Raises:
        UserError: If it has none that can be read.
    """
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        _ = content["checkpoint_hash"], content["check"]["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"`{folder}` has no {PROVENANCE} of an export: move it away, or give another `output_dir`."
        ) from None
    return content


def size_of(folder: Path) -> int:
    """Returns the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def hash_of(folder: Path) -> str:
    """Returns the SHA-256 of the files in a folder, with their names, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
