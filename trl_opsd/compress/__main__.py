"""
Command line of the whole chain: `python -m trl_opsd.compress --config recipes/tiny/compress.yaml`.

Interrupted and run again, it goes on with the first stage that is not finished. With `ratios` in the configuration it
ends in a sweep of smaller students (`recipes/tiny/size.yaml`).
"""

import time

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.compress.config.CompressConfig", "trl_opsd.compress.auto_config.AutoConfig")


def main(args: list[str] | None = None) -> None:
    began = time.monotonic()  # before what takes seconds is imported
    with user_errors():
        config, arguments = parse(ARGUMENTS, args, prog="trl_opsd.compress")
        if not config.is_automatic:
            arguments.check_unused()
    if config.is_automatic:
        from .auto.run import run as run_automatic

        run_automatic(config, arguments, began)
        return
    from .run import run

    run(config)


if __name__ == "__main__":
    silence()
    main()
