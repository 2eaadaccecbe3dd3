"""
Command line of stage 2: `python -m trl_opsd.prune --config recipes/prune.yaml`.

Every field of [`PruneConfig`] is a key of the YAML file and an option of the command line, which overrides it.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.prune.config.PruneConfig",)


def main(args: list[str] | None = None) -> None:
    with user_errors():
        parsed = parse(ARGUMENTS, args, prog="trl_opsd.prune")
    from .run import run

    run(*parsed)


if __name__ == "__main__":
    silence()
    main()
