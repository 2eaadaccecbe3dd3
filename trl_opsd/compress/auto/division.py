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


def divide(name: str, arguments: AutoConfig) -> tuple[dict[str, Dataset], list[str]]:
    """
    Divides a data set into problems to train on, to watch by, and for the verdict, none of which is in two, nor twice in one.

    Args:
        name (`str`):
            Data set.
        arguments ([`~trl_opsd.compress.auto_config.AutoConfig`]):
            How many problems each takes, and the verifiers.

    Returns:
        `tuple[dict[str, Dataset], list[str]]`: The parts `train`, `guard` and `final`, and the names of the verifiers.

    Raises:
        UserError: If there are too few problems, or nothing says which verifier they are for.
    """
    train = load_prompts(name, "train")
    verifiers = arguments.reward_funcs or [verifier_of(name, train)]
    for verifier, func in zip(verifiers, load_reward_funcs(verifiers), strict=True):
        check_columns(train, required_columns(func), f"The verifier `{verifier}`")
    try:
        final = load_prompts(name, "test")
    except NoSplit:
        final = None
    if final is not None and list(final["prompt"]) == list(train["prompt"]):
        final = None  # a single file, which is there whole whatever the split
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
    return {"train": train, "guard": guard, "final": final}, verifiers


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
