"""
Command line of stage 1: `accelerate launch -m trl_opsd.rlvr --config recipes/rlvr.yaml`.

Every field of [`RLVRScriptArguments`], [`RLVRConfig`] and [`~trl.ModelConfig`] is a key of the YAML file and an option
of the command line, which overrides the file.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = (
    "trl_opsd.rlvr.run.RLVRScriptArguments",
    "trl_opsd.rlvr.config.RLVRConfig",
    "trl.ModelConfig",
)
REQUIRED = {
    "model_name_or_path": "the folder of a checkpoint or a model id",
    "dataset_name": "a dataset, a file or a named source",
    "reward_funcs": "at least one verifier, such as `math_reward`,",
}


def main(args: list[str] | None = None) -> None:
    with user_errors():
        parsed = parse(ARGUMENTS, args, prog="trl_opsd.rlvr", required=REQUIRED)
    from ..resuming import engine_errors
    from .run import run

    with engine_errors(parsed[1].output_dir):
        run(*parsed)


if __name__ == "__main__":
    silence()
    main()
