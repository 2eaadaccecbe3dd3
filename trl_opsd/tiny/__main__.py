"""
Command line of the embedded default: `python -m trl_opsd.tiny --config recipes/tiny/sft.yaml`.

Every field of [`TinyConfig`] and [`~trl.SFTConfig`] is a key of the YAML file and an option of the command line, which
overrides the file.
"""

import sys

from ..cli import UserError, parse, silence, user_errors


ARGUMENTS = ("trl_opsd.tiny.task.TinyConfig", "trl.SFTConfig")
REQUIRED = {"max_steps": "the most steps that learning the chain may take,"}


def main(args: list[str] | None = None) -> None:
    with user_errors():
        config, training_args = parse(ARGUMENTS, args, prog="trl_opsd.tiny", required=REQUIRED)
    from .sft import check, warm_start

    with user_errors():
        check(config, training_args)
    try:
        rows = warm_start(config, training_args)
    except UserError as error:  # the target was not reached
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for result in rows:
        if result["phase"] == "final":
            print(
                f"{result['mode']:>10} {result['decoding']:>8}: {result['accuracy']:6.1%} in "
                f"{result['mean_tokens']:.1f} tokens"
            )


if __name__ == "__main__":
    silence()
    main()
