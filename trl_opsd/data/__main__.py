"""
Command line of the data sources.

`python -m trl_opsd.data` prints the named sources; `python -m trl_opsd.data --train A --evaluation B` counts the
training problems that are also in the evaluation set, and with `--output FILE` writes the training set without them.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.data.run.DataArguments",)


def main(args: list[str] | None = None) -> None:
    with user_errors():
        parsed = parse(ARGUMENTS, args, prog="trl_opsd.data")
    from .run import run

    run(*parsed)


if __name__ == "__main__":
    silence()
    main()
