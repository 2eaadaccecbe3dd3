"""
What `python -m trl_opsd.evaluate` does with results that are there: `--compare A B`, `--report A B …`, `--card A B …`.
"""

import argparse
from pathlib import Path

from rich.console import Console

from ..cli import UserError, user_errors
from .card import write_card
from .compare import Conclusion, compare_files, margins_of, results_file_of, warnings_of
from .decide import decide
from .report import report_results


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        with user_errors():
            raise UserError(f"{message}: see --help.")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser("trl_opsd.evaluate", description=description, allow_abbrev=False)
    parser.add_argument(
        "--margin",
        nargs="+",
        default=[],
        metavar="[TASK=]SHARE",
        help="Loss of accuracy that still counts as none, as a share (0.01, the default, is one percentage point), and "
        "that of single tasks, as in `0.01 gsm8k=0.005`.",
    )
    return parser


def _say(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def compare_command(args: list[str]) -> int:
    """
    Says whether B is as good as A, and how much shorter or smaller.

    Args:
        args (`list[str]`):
            `--compare A B`, each a results file or `FILE:STAGE`, `--margin`, and to draw more samples until it is decided
            `--decide` and `--output`.

    Returns:
        `int`: Exit status: 0 if it is as good, 1 if it is worse, 3 if that is undecided. (A mistake exits with 2.)
    """
    parser = _parser(
        "Is B as good as A, and how much shorter or smaller? Exit status 0: as good, 1: worse, 3: undecided, 2: an error."
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), required=True, help="Results files, or FILE:STAGE.")
    parser.add_argument(
        "--decide",
        type=int,
        metavar="TIMES",
        help="Draw more samples of the same problems until it is decided, at most so many times those there are.",
    )
    parser.add_argument("--output", help="Results file for what `--decide` draws; by default B's name and `-decided`.")
    options = parser.parse_args(args)
    with user_errors():
        margins = margins_of(options.margin)
        if options.decide is None:
            conclusion = Conclusion(compare_files(*options.compare, margins))
        else:
            output = options.output or f"{Path(results_file_of(options.compare[1])).with_suffix('')}-decided.json"
            conclusion = decide(*options.compare, options.decide, output, margins, _say)
    for sentence in conclusion.sentences():
        _say(sentence)
    for what, places in warnings_of(conclusion.singles):
        _say(f"! {what}: {'; '.join(places)}.")
    return conclusion.answer.status


def report_command(args: list[str]) -> int:
    """
    Writes the report of results files.

    Args:
        args (`list[str]`):
            `--report A B …`, `--output_dir`, and optionally `--before STAGE`, `--margin`, `--title` and
            `--price`.

    Returns:
        `int`: Exit status, 0. (A mistake exits with 2.)
    """
    parser = _parser("Writes report.md, report.html and accuracy_tokens.svg from results files.")
    parser.add_argument("--report", nargs="+", metavar="FILE", required=True, help="Results files.")
    parser.add_argument("--output_dir", required=True, help="Folder for the report.")
    parser.add_argument("--before", help="Stage that the others are compared with; by default the first one.")
    parser.add_argument("--title", default="trl-opsd", help="Heading.")
    parser.add_argument("--price", type=float, help="Price of a million completion tokens, for the cost of answers.")
    options = parser.parse_args(args)
    with user_errors():
        margins = margins_of(options.margin)
        report_results(options.report, options.output_dir, options.before, margins, options.title, options.price)
    folder = Path(options.output_dir)
    _say(f"{folder / 'report.html'}, {folder / 'report.md'} and {folder / 'accuracy_tokens.svg'}")
    return 0


def card_command(args: list[str]) -> int:
    """
    Writes the model card of a checkpoint.

    Args:
        args (`list[str]`):
            `--card A B …` (results files), `--output_dir` (the checkpoint), and optionally `--stage`, `--before`,
            `--margin`, `--licence`.

    Returns:
        `int`: Exit status, 0. (A mistake exits with 2.)
    """
    parser = _parser("Writes the model card, README.md, of a checkpoint from results files.")
    parser.add_argument("--card", nargs="+", metavar="FILE", required=True, help="Results files.")
    parser.add_argument("--output_dir", required=True, help="Folder of the checkpoint.")
    parser.add_argument("--stage", help="Stage in the results that the checkpoint is; by default the last one.")
    parser.add_argument("--before", help="Stage that it is compared with; by default the first one.")
    parser.add_argument(
        "--licence", help="Licence as the Hub calls it; by default what the card of a model it was made from says."
    )
    options = parser.parse_args(args)
    with user_errors():
        path = write_card(
            options.card,
            options.output_dir,
            options.stage,
            options.before,
            margins_of(options.margin),
            options.licence,
        )
    _say(str(path))
    return 0
