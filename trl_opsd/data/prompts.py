"""Loads prompts, from a named source, the Hub or a local file, and checks them before anything costly starts."""

import difflib
import json
import logging
import math
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..cli import UserError
from .gym import REASONING_GYM, generate_prompts
from .sources import SOURCES, Source, Unusable


logger = logging.getLogger(__name__)

_SUFFIXES = (".jsonl", ".json", ".parquet")
_OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip")
# What a tool has answered: Llama 3.1 calls it `ipython`, and Granite `tool_response`
_TOOLS = ("tool", "ipython", "function", "tool_response")
# The first two for what comes before a conversation. Whether a template knows one, a tokenizer can say: `check_fit`
_ROLES = ("system", "developer", "user", "assistant", *_TOOLS)


class NoSplit(UserError):
    """A data set that is there, without the split that was asked for."""


def load_prompts(name_or_path: str, split: str = "train", columns: Iterable[str] = ()) -> Dataset:
    """
    Loads one split of a data set in the project's schema.

    Args:
        name_or_path (`str`):
            One of:

            - a file: JSON Lines, a JSON list of objects, or Parquet;
            - a folder written by `save_to_disk`, or one with a file per split (`train.jsonl`, `test.parquet`, ...), or one
              of numbered Parquet parts, as the rollouts of a bank are;
            - the name of a source (see [`SOURCES`]), which is taken from the Hub and mapped to the schema;
            - `NAME:PATH`, a local copy of a named source's raw rows, mapped in the same way (`gsm8k:test.jsonl`);
            - `NAME:TASK`, one task of a source that has several (`bbh:word_sorting`);
            - `reasoning-gym:TASK` or `reasoning-gym:TASK:NAME=VALUE,...`, generated (see [`generate_prompts`]);
            - the id of any other data set on the Hub, whose columns are already in the schema.
        split (`str`, *optional*, defaults to `"train"`):
            Split to load. A single file, a single `Dataset` and numbered parts are loaded whole, whatever the split.
        columns (`Iterable[str]`, *optional*, defaults to `()`):
            Columns that must be there beside `prompt`.

    Returns:
        [`~datasets.Dataset`]: Rows with at least `prompt` and the given columns.

    Raises:
        UserError: If there is nothing at that name, it cannot be read, the split is missing ([`NoSplit`]) or empty, or a
            column is missing.
    """
    name, _, path = name_or_path.partition(":")
    source = SOURCES.get(name)
    if not path and Path(name).exists():
        source = None
    if name == REASONING_GYM:
        dataset = generate_prompts(path, split)
    elif source is None:
        local = Path(name_or_path).exists() or name_or_path.startswith((".", "/", "~"))
        # A Hub id has at most one slash, and is not called as files are
        local = local or name_or_path.count("/") > 1 or name_or_path.endswith((*_SUFFIXES, *_OTHER_SUFFIXES))
        dataset = _read_local(Path(name_or_path), split) if local else _read_hub(name_or_path, None, split)
    else:
        if split not in source.splits and not Path(path).is_file():
            raise NoSplit(f"`{name}` has no split `{split}`: choose from {', '.join(source.splits)}.")
        parts = _read_source(source, path, split)
        for dataset in parts.values():
            check_columns(dataset, (source.problem, *source.needed), f"The source `{name}`")
        rows, left_out = [], {}
        for task, part in parts.items():
            for number, row in enumerate(part, start=1):
                try:
                    row = _to_row(source, row, f"`{name_or_path}`, row {number}")
                except Unusable as error:
                    left_out[number] = str(error)
                else:
                    rows.append({**row, **({"task": task} if source.tasks else {})})
        if left_out:
            number, reason = next(iter(left_out.items()))
            logger.warning(f"{len(left_out)} rows of `{name_or_path}` are left out, such as row {number}: {reason}.")
        dataset = Dataset.from_list(rows)
    if len(dataset) == 0:
        raise UserError(f"`{name_or_path}` (split `{split}`) has no rows: check that it is the right file and split.")
    check_columns(dataset, ("prompt", *columns), f"The data set `{name_or_path}`")
    check_values(dataset, name_or_path)
    return dataset


def check_columns(dataset: Dataset, needed: Iterable[str], what_for: str) -> None:
    """
    Checks that a data set has the columns that something needs.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set to look at.
        needed (`Iterable[str]`):
            Names of the columns that must be there.
        what_for (`str`):
            What needs them: the subject of the message.

    Raises:
        UserError: If one is missing, naming it and the columns found.
    """
    missing = [f"`{column}`" for column in dict.fromkeys(needed) if column not in dataset.column_names]
    if not missing:
        return
    found = set(dataset.column_names)
    raw = [name for name, source in SOURCES.items() if {source.problem, *source.needed} <= found]
    # Raw rows of a named source are the likely cause, and the prefix is the whole fix.
    hint = f" (if these are raw `{raw[0]}` rows, write `{raw[0]}:PATH`)" if raw and "`prompt`" in missing else ""
    raise UserError(
        f"{what_for} needs the column {', '.join(missing)}; the columns found are "
        f"{', '.join(f'`{column}`' for column in dataset.column_names)}: add or rename one{hint}."
    )


def check_values(dataset: Dataset, name: str) -> None:
    """
    Checks that the columns of the schema hold what they should, where a wrong type would only show as a wrong score.

    Args:
        dataset ([`~datasets.Dataset`]):
            Data set to look at.
        name (`str`):
            Its name, for the message.

    Raises:
        UserError: If a value is of the wrong type or holds a null byte, or the roles of a prompt are none or out of order,
            naming the row.
    """
    for column, (fits, what) in _VALUES.items():
        if column not in dataset.column_names:
            continue
        for number, value in enumerate(dataset[column], start=1):
            if not fits(value):
                shown = repr(value)
                shown = shown if len(shown) <= 80 else shown[:77] + "..."
                raise UserError(f"`{name}`, row {number}: `{column}` must be {what}, and is {shown}: correct the row.")
            if column == "prompt" and not isinstance(value, str):
                _check_roles([message["role"] for message in value], f"`{name}`, row {number}")


def _check_roles(roles: list[str], where: str) -> None:
    """What a chat template would write all the same: a turn of nobody's, or an answer that is there before it is asked for."""
    unknown = [role for role in roles if role not in _ROLES]
    if unknown:
        raise UserError(
            f"{where}: `prompt` has the role {unknown[0]!r}, which is none of {', '.join(_ROLES)}: correct the row."
        )
    # A system message may come later too: whether a template writes one there is the template's to say
    if roles[-1] not in ("user", *_TOOLS):
        raise UserError(
            f"{where}: the roles of `prompt` are {', '.join(roles)}, and the last message is what is to be answered, by `user` "
            "or `tool`: correct the row."
        )


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip()) and _is_text(value)
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(message.get("content"), str) and _is_text(message["content"]) for message in value)
        and any(message["content"].strip() for message in value)
    )


def _is_text(value: Any) -> bool:
    # A null byte is in no text, and what is written in C reads up to it
    return value is None or (isinstance(value, str) and "\x00" not in value)


def _is_answer(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return _is_text(value) or number


_VALUES = {
    "prompt": (_is_prompt, "a text, or messages with `role` and `content`, without null bytes"),
    "answer": (_is_answer, "a text without null bytes or a number"),
    **dict.fromkeys(
        ("tests", "entry_point", "setup", "solution", "privileged_context", "instructions", "metadata"),
        (_is_text, "a text without null bytes"),
    ),
}


def _to_row(source: Source, row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return source.to_row(row)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, zlib.error, pickle.UnpicklingError) as error:
        raise UserError(f"{where}: not a row of this source ({error}); correct or remove it.") from None


def _read_source(source: Source, path: str, split: str) -> dict[str | None, Dataset]:
    """Reads the raw rows of a named source, by task."""
    if not path or (path in source.tasks and not Path(path).exists()):
        tasks = [path] if path else source.tasks or [source.config]
        return {task: _read_hub(source.hub_id, task, split) for task in tasks}
    folder = Path(path).expanduser()
    if not source.tasks or not folder.is_dir():
        return {folder.stem: _read_local(folder, split)}
    files = {task: folder / f"{task}.json" for task in source.tasks if (folder / f"{task}.json").is_file()}
    if not files:
        raise UserError(f"The folder `{folder}` has no file named after a task, such as {source.tasks[0]}.json.")
    return {task: _read_file(file) for task, file in files.items()}


def _read_local(path: Path, split: str) -> Dataset:
    path = path.expanduser()
    if not path.exists():
        raise UserError(f"There is no data at `{path}`: check the path.")
    if path.is_file():
        return _read_file(path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            dataset = load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise UserError(f"`{path}` is a damaged data set ({' '.join(str(error).split()):.200}).") from None
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise NoSplit(f"`{path}` has no split `{split}`: choose from {', '.join(dataset)}.")
            dataset = dataset[split]
        return dataset
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise UserError(f"The folder `{path}` holds neither a saved Dataset nor {', '.join(_SUFFIXES)} files.")
    if all(file.suffix == ".parquet" and file.stem.isdigit() for file in files):
        return _read_file(path)
    found = [file for file in files if file.stem == split]
    if not found:
        raise NoSplit(f"`{path}` has no file for the split `{split}`: it has {', '.join(f.name for f in files)}.")
    if len(found) > 1:
        raise UserError(f"`{path}` has several files for the split `{split}`: give one of them as the path.")
    return _read_file(found[0])


def _read_file(path: Path) -> Dataset:
    if path.suffix not in _SUFFIXES and not path.is_dir():
        raise UserError(f"`{path}` is none of {', '.join(_SUFFIXES)}: convert it, or rename it if it is one of them.")
    try:
        if path.suffix == ".parquet" or path.is_dir():
            return Dataset(pyarrow.parquet.read_table(path, page_checksum_verification=True))
        return Dataset.from_list(_read_json(path))
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, OverflowError, TypeError, ValueError) as error:
        reason = f"{' '.join(str(error).split()):.200}"
        raise UserError(f"`{path}` cannot be read as a table with one type per column: {reason}.") from None


def _read_json(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(_parse(text), start=1))
        except (ValueError, RecursionError) as error:
            raise UserError(f"`{path}` is not valid JSON: {error}.") from None
    else:
        rows = []
        # not splitlines(), which also breaks at the U+2028 that JSON strings may hold
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append((number, _parse(line)))
                except (ValueError, RecursionError) as error:
                    raise UserError(f"`{path}`, line {number}: not valid JSON ({error}); fix the line.") from None
    if len(rows) == 1 and isinstance(rows[0][1], dict) and isinstance(rows[0][1].get("examples"), list):
        rows = list(enumerate(rows[0][1]["examples"], start=1))  # a task file of BIG-Bench
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"`{path}`, row {number}: a row must be a JSON object, and this is a {type(row).__name__}."
            )
    columns = dict.fromkeys(key for _, row in rows for key in row)
    return [{column: row.get(column) for column in columns} for _, row in rows]


def _parse(text: str) -> Any:
    """Parses JSON, and nothing else: no NaN, and no object with the same name twice, of which one would be lost."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not a number that JSON has")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
            raise ValueError(f"{twice!r:.80} is there twice in one object")
        return values

    return json.loads(text, parse_constant=constant, object_pairs_hook=unique)


def _read_hub(hub_id: str, config: str | None, split: str) -> Dataset:
    try:
        return load_dataset(hub_id, config, split=split)
    except (OSError, ValueError) as error:  # not found, not reachable, no such split or configuration
        reason = str(error).splitlines()[0].rstrip(".")
        kind = NoSplit if reason.startswith("Unknown split") else UserError
        near = difflib.get_close_matches(hub_id, SOURCES, n=1)
        raise kind(
            f"The split `{split}` of `{hub_id}` cannot be loaded from the Hub ({reason}): check the name"
            f"{f' (did you mean `{near[0]}`?)' if near else ''} and the connection, or give the path of a local file."
        ) from None
