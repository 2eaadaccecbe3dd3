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
REQUIRED = {
    "model_name_or_path": "the folder of a checkpoint or a model id",
    "dataset_name": "a dataset, a file or a named source",
}


def main(args: list[str] | None = None) -> None:
    with user_errors():
        parsed = parse(ARGUMENTS, args, prog="trl_opsd.opsd", required=REQUIRED)
    from ..resuming import engine_errors
    from .run import run

    with engine_errors(parsed[1].output_dir):
        run(*parsed)


if __name__ == "__main__":
    silence()
    main()
