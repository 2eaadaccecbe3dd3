"""
Command line of the whole chain: `python -m trl_opsd.compress --config recipes/tiny/compress.yaml`.

Interrupted and run again, it goes on with the first stage that is not finished. With `ratios` in the configuration it
ends in a sweep of smaller students (`recipes/tiny/size.yaml`).
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.compress.config.CompressConfig",)


def main(args: list[str] | None = None) -> None:
    with user_errors():
        (config,) = parse(ARGUMENTS, args, prog="trl_opsd.compress")
    from .run import run

    run(config)


if __name__ == "__main__":
    silence()
    main()
