"""
Command line of evaluation: `python -m trl_opsd.evaluate --config recipes/evaluate.yaml`.

`--compare A B`, `--report A B …` and `--card A B …` take results that are there (each has a `--help`). Otherwise every
field of [`EvaluateConfig`] is a key of the YAML file and an option of the command line, which overrides it.
Interrupted and run again, it goes on where it was.
"""

import sys

from ..cli import UserError, parse, user_errors
from .commands import card_command, compare_command, report_command
from .config import EvaluateConfig
from .pipeline import evaluate_jobs
from .plan import plan
from .results_file import write_rows
from .schema import ResultRow


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    for option, command in {"--compare": compare_command, "--report": report_command, "--card": card_command}.items():
        if option in args:
            raise SystemExit(command(args))
    with user_errors():
        (config,) = parse((EvaluateConfig,), args, prog="trl_opsd.evaluate")
        jobs = plan(config)
    try:
        rows = evaluate_jobs(jobs)
    except UserError as error:  # such as weights that do not load, or a server that stops
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if config.output is not None:
        write_rows(config.output, rows, config)
    for row in rows:
        print(line(row))


def line(row: ResultRow) -> str:
    """One row of results in a line."""
    name = f"{row.stage}, " if row.stage else ""
    flexible = f", flexible {row.accuracy_flexible:.1%}" if row.accuracy_flexible is not None else ""
    unverified = f", {row.unverified} not verifiable" if row.unverified else ""
    skipped = f", {row.cache_lines_skipped} damaged lines of the cache skipped" if row.cache_lines_skipped else ""
    return (
        f"{name}{row.task}, {row.decoding}: {row.estimator} {row.accuracy:.1%} "
        f"({row.accuracy_low:.1%} to {row.accuracy_high:.1%}, n = {row.n}{flexible}{unverified}), "
        f"tokens mean {row.mean_tokens:.1f}, p90 {row.p90_tokens:.0f}, truncated {row.truncated:.1%}, "
        f"{row.wall_s:.0f} s{skipped}"
    )


if __name__ == "__main__":
    main()
