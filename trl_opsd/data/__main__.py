"""
Command line of the data sources.

`python -m trl_opsd.data` prints the named sources; `python -m trl_opsd.data --train A --evaluation B` counts the
training problems that are also in the evaluation set, and with `--output FILE` writes the training set without them.
"""

import argparse
import os
from pathlib import Path

from ..cli import UserError, user_errors
from .decontaminate import decontaminate
from .gym import REASONING_GYM
from .prompts import load_prompts
from .sources import MATH_PROMPT, SOURCES


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


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="trl_opsd.data", description=__doc__, allow_abbrev=False)
    parser.add_argument("--train", help="training set: a named source, a file, a folder or a Hub id")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--evaluation", help="evaluation set, in the same ways")
    parser.add_argument("--evaluation_split", default="test")
    parser.add_argument("--output", help="file for the training set without the overlap: .jsonl or .parquet")
    options = parser.parse_args(args)
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
    kept, counts = decontaminate(train, evaluation)
    for name, count in counts.items():
        print(f"{name.replace('_', ' ')}: {count}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
        try:
            kept.to_parquet(temporary) if output.suffix == ".parquet" else kept.to_json(temporary, force_ascii=False)
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
