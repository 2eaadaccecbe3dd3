"""What the command line of the data sources does once it is parsed."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..cli import UserError, make_folder, user_errors
from .contamination import decontaminate
from .gym import REASONING_GYM
from .prompts import load_prompts
from .sources import MATH_PROMPT, SOURCES


@dataclass
class DataArguments:
    """
    Arguments of the command line of the data sources.

    Args:
        train (`str`, *optional*):
            Training set: a named source, a file, a folder or an id on the Hub.
        train_split (`str`, *optional*, defaults to `"train"`):
            Its split.
        evaluation (`str`, *optional*):
            Evaluation set, in the same ways.
        evaluation_split (`str`, *optional*, defaults to `"test"`):
            Its split.
        output (`str`, *optional*):
            File for the training set without the overlap, `.jsonl` or `.parquet`.
    """

    train: str | None = field(
        default=None, metadata={"help": "Training set: a named source, a file, a folder or an id on the Hub."}
    )
    train_split: str = field(default="train", metadata={"help": "Its split."})
    evaluation: str | None = field(default=None, metadata={"help": "Evaluation set, in the same ways."})
    evaluation_split: str = field(default="test", metadata={"help": "Its split."})
    output: str | None = field(
        default=None, metadata={"help": "File for the training set without the overlap: .jsonl or .parquet."}
    )


def table() -> str:
    """Returns the named sources as a Markdown table."""
    rows = [
        ("name", "splits", "licence", "verifier", "answer from", "Hub", "wording"),
        *(
            (
                *(name, ", ".join(source.splits), source.licence, source.verifier, ", ".join(source.needed)),
                *(source.hub_id, source.prompt),
            )
            for name, source in SOURCES.items()
        ),
        (f"{REASONING_GYM}:TASK", "train, test", "Apache-2.0", "reasoning_gym_reward", "the task", "-", MATH_PROMPT),
    ]
    lines = ["| " + " | ".join(cell.replace("\n", " ").replace("  ", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def run(options: DataArguments) -> None:
    """Prints the named sources, or counts the overlap of two sets and writes what is left of the first."""
    with user_errors():
        if options.train is None and options.evaluation is None:
            print(table())
            return
        if options.train is None or options.evaluation is None:
            raise UserError("`--train` and `--evaluation` belong together: give both.")
        output = Path(options.output) if options.output else None
        if output is not None and output.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"`--output` must end in .jsonl or .parquet, and is `{output}`.")
        train = load_prompts(options.train, options.train_split)
        evaluation = load_prompts(options.evaluation, options.evaluation_split)
        if output is not None:
            make_folder(output.parent, "output")
    kept, counts = decontaminate(train, evaluation)
    for name, count in counts.items():
        print(f"{name.replace('_', ' ')}: {count}")
    if output is not None:
        with user_errors():
            if not len(kept):
                raise UserError(
                    f"All rows of `{options.train}` are also in `{options.evaluation}`, so there is nothing to write."
                )
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            kept.to_parquet(temporary) if output.suffix == ".parquet" else kept.to_json(temporary, force_ascii=False)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
