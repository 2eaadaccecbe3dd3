"""The data of a run, divided: problems to train on, to watch by, and for the verdict."""

import json
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset

from ...cli import UserError
from ...data import SOURCES, check_columns, load_prompts
from ...data.contamination import normalize, problem_text
from ...data.gym import REASONING_GYM
from ...data.prompts import NoSplit
from ...rewards import load_reward_funcs, required_columns
from ..auto_config import AutoConfig


def load(name: str, arguments: AutoConfig) -> tuple[list[Dataset], list[str]]:
    """
    Loads a data set.

    Args:
        name (`str`):
            Data set.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            The verifiers.

    Returns:
        `tuple[list[Dataset], list[str]]`: The splits `train` and, if there is one, `test`, and the names of the verifiers.

    Raises:
        UserError: If nothing says which verifier the problems are for, or a column is missing.
    """
    train = load_prompts(name, "train")
    verifiers = arguments.reward_funcs or [verifier_of(name, train)]
    for verifier, func in zip(verifiers, load_reward_funcs(verifiers), strict=True):
        check_columns(train, required_columns(func), f"The verifier `{verifier}`")
    try:
        final = load_prompts(name, "test")
    except NoSplit:
        final = None
    if final is None or list(final["prompt"]) == list(train["prompt"]):
        return [train], verifiers  # a single file is there whole whatever the split
    return [train, final], verifiers


def divide(name: str, splits: list[Dataset], arguments: AutoConfig) -> dict[str, Dataset]:
    """
    Divides a data set into problems to train on, to watch by, and for the verdict, none of which is in two, nor twice in one.

    Args:
        name (`str`):
            Data set, for the message.
        splits (`list[Dataset]`):
            What [`load`] has loaded.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            How many problems each takes.

    Returns:
        `dict[str, Dataset]`: The parts `train`, `guard` and `final`.

    Raises:
        UserError: If there are too few problems.
    """
    train, final = splits[0], splits[1] if len(splits) > 1 else None
    seen = set()

    def first_of_each(rows: Dataset) -> Dataset:
        kept = []
        for row, prompt in enumerate(rows["prompt"]):
            problem = normalize(problem_text(prompt)) or json.dumps(prompt)
            if problem not in seen:
                seen.add(problem)
                kept.append(row)
        return rows.select(kept)

    # Shuffled by the division's own seed, whatever the run's. What is in both is kept for the verdict
    final = None if final is None else first_of_each(final.shuffle(seed=0))
    train = first_of_each(train.shuffle(seed=0))
    if final is None:
        share = min(arguments.final_problems, len(train) // 5)
        final, train = train.select(range(share)), train.select(range(share, len(train)))
    final = final.select(range(min(arguments.final_problems, len(final))))
    guard = min(arguments.guard_problems, len(train) // 4)
    guard, train = train.select(range(guard)), train.select(range(guard, len(train)))
    if len(train) < arguments.rollouts or min(len(guard), len(final)) < 30:
        raise UserError(
            f"`{name}` leaves {len(train)} problems to train on, {len(guard)} to watch by and {len(final)} for the "
            f"verdict, each counted once, and {arguments.rollouts}, 30 and 30 are the least: give more data, raise "
            "`guard_problems` and `final_problems` where they are below, or lower `rollouts`."
        )
    return {"train": train, "guard": guard, "final": final}


def verifier_of(name: str, rows: Dataset) -> str:
    """
    Returns the verifier that the data are made for: that of the source, else by the columns.

    Args:
        name (`str`):
            Data set.
        rows ([`~datasets.Dataset`]):
            Its rows.

    Raises:
        UserError: If neither says it.
    """
    source = name.partition(":")[0]
    if source == REASONING_GYM:
        return "reasoning_gym_reward"
    if source in SOURCES and not Path(source).exists():
        return SOURCES[source].verifier
    for column, verifier in (("answer", "math_reward"), ("tests", "code_reward")):
        if column in rows.column_names:
            return verifier
    raise UserError(
        f"`{name}` has neither `answer` nor `tests`, so nothing says which verifier it is for: name it with `--reward_funcs`."
    )


def write_parquet(rows: Dataset, path: Path) -> None:
    """Writes rows with their types, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(rows.with_format("arrow")[:].replace_schema_metadata(None), temporary)
    temporary.replace(path)
