"""
Command line of the small reasoner: `python -m trl_opsd.small --config recipes/small/sft.yaml`.

Every field of [`SmallConfig`] and [`~trl.SFTConfig`] is a key of the YAML file and an option of the command line, which
overrides the file.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.small.task.SmallConfig", "trl.SFTConfig")


def main(args: list[str] | None = None) -> None:
    with user_errors():
        config, training_args = parse(ARGUMENTS, args, prog="trl_opsd.small")
    from .sft import check, warm_start

    with user_errors():
        resume_from = check(training_args)
    for result in warm_start(config, training_args, resume_from):
        if result["phase"] == "final":
            print(
                f"{result['mode']:>10} {result['decoding']:>8} {result['task']:>18}: {result['accuracy']:6.1%} in "
                f"{result['mean_tokens']:.1f} tokens"
            )


if __name__ == "__main__":
    silence()
    main()
