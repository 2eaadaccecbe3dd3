"""
Command line of evaluation: `python -m trl_opsd.evaluate --config recipes/evaluate.yaml`.

`--compare A B`, `--report A B …` and `--card A B …` take results that are there (each has a `--help`). Otherwise every
field of [`EvaluateConfig`] is a key of the YAML file and an option of the command line, which overrides it.
Interrupted and run again, it goes on where it was. Under `accelerate launch` each process has a model of its own.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import UserError, make_folder, parse, silence, user_errors


if TYPE_CHECKING:
    from .schema import ResultRow, Serving


ARGUMENTS = ("trl_opsd.evaluate.config.EvaluateConfig",)
COMMANDS = ("compare", "report", "card")


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    for name in COMMANDS:
        if f"--{name}" in args:
            from . import commands

            raise SystemExit(vars(commands)[f"{name}_command"](args))
    with user_errors():
        (config,) = parse(ARGUMENTS, args, prog="trl_opsd.evaluate")
        # What takes seconds to import comes after the answer to a wrong option
        from accelerate import PartialState

        from .pipeline import evaluate_jobs
        from .plan import plan
        from .results_file import write_rows

        jobs = plan(config)
        if config.output is not None:
            make_folder(Path(config.output).parent, "output")
    try:
        rows = evaluate_jobs(jobs)
    except UserError as error:  # such as weights that do not load, or a server that stops
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not PartialState().is_main_process:
        return
    if config.output is not None:
        write_rows(config.output, rows, config)
    for row in rows:
        print(line(row))
        for level in row.serving:
            print(f"  {serving_line(level)}")


def line(row: "ResultRow") -> str:
    """One row of results in a line."""
    name = f"{row.stage}, " if row.stage else ""
    flexible = f", flexible {row.accuracy_flexible:.1%}" if row.accuracy_flexible is not None else ""
    unverified = f", {row.unverified} not verifiable" if row.unverified else ""
    unverified += f", {row.too_long} prompts too long" if row.too_long else ""
    skipped = f", {row.cache_lines_skipped} damaged lines of the cache skipped" if row.cache_lines_skipped else ""

    def at_least(quantile: float) -> str:
        return "≥ " if row.is_cut(quantile) else ""

    return (
        f"{name}{row.task}, {row.decoding}: {row.estimator} {row.accuracy:.1%} "
        f"({row.accuracy_low:.1%} to {row.accuracy_high:.1%}, n = {row.n}{flexible}{unverified}), "
        f"tokens mean {at_least(1)}{row.mean_tokens:.1f}, p90 {at_least(0.9)}{row.p90_tokens:.0f}, truncated {row.truncated:.1%}, "
        f"{row.wall_s:.0f} s{skipped}"
    )


def serving_line(level: "Serving") -> str:
    """What was measured at one level of concurrency, in a line."""
    p95 = "" if level.total_p95_s is None else f", p95 {level.total_p95_s:.3g} s"
    first = "" if level.first_token_p50_s is None else f"first token p50 {level.first_token_p50_s:.3g} s, "
    answers = "" if level.requests_per_s is None else f", {level.requests_per_s:.3g} answers/s"
    if level.correct_per_s is not None:
        answers += f" ({level.correct_per_s:.3g} correct)"
    return (
        f"{level.concurrency} at a time: {first}answer p50 {level.total_p50_s:.3g} s{p95}, "
        f"{level.tokens_per_s:,.0f} tokens/s{answers}"
    )


if __name__ == "__main__":
    silence()
    main()
