"""
Command line of stage 3: `accelerate launch -m trl_opsd.opsd --config recipes/opsd.yaml`.

Every field of [`OPSDScriptArguments`], [`OPSDConfig`] and [`~trl.ModelConfig`] is a key of the YAML file and an option
of the command line, which overrides the file.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = (
    "trl_opsd.opsd.run.OPSDScriptArguments",
    "trl_opsd.opsd.config.OPSDConfig",
    "trl.ModelConfig",
)


def main(args: list[str] | None = None) -> None:
    with user_errors():
        parsed = parse(ARGUMENTS, args, prog="trl_opsd.opsd")
    from ..rollout_engine import engine_errors
    from .run import run

    with engine_errors(parsed[1].output_dir):
        run(*parsed)


if __name__ == "__main__":
    silence()
    main()
