"""
Command line of the small reasoner: `python -m trl_opsd.small --config recipes/small/sft.yaml`.

Every field of [`SmallConfig`], [`~trl.SFTConfig`] and [`~trl.ModelConfig`] is a key of the YAML file and an option of the
command line, which overrides the file. With `--model_name_or_path` it is that model which is taught.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.small.task.SmallConfig", "trl.SFTConfig", "trl.ModelConfig")
REQUIRED = {"max_steps": "the number of steps of the warm start,"}


def main(args: list[str] | None = None) -> None:
    with user_errors():
        config, training_args, model_args = parse(ARGUMENTS, args, prog="trl_opsd.small", required=REQUIRED)
    from .sft import check, line_of, warm_start

    with user_errors():
        resume_from = check(config, training_args, model_args)
    for result in warm_start(config, training_args, model_args, resume_from):
        if result["phase"] == "final":
            print(line_of(result))


if __name__ == "__main__":
    silence()
    main()
