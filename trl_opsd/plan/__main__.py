"""
Command line of the plan: `python -m trl_opsd.plan --config recipes/opsd.yaml`.

It takes every option of `trl_opsd.opsd`, and those of [`PlanArguments`].
"""

import sys

from ..cli import parse, silence, user_errors


ARGUMENTS = (
    "trl_opsd.plan.config.PlanArguments",
    "trl_opsd.opsd.run.OPSDScriptArguments",
    "trl_opsd.opsd.config.OPSDConfig",
    "trl.ModelConfig",
)


def main(args: list[str] | None = None) -> None:
    # Nothing is put on a device, and without this a recipe for GPUs is refused where there is none
    args = [*(sys.argv[1:] if args is None else args), "--use_cpu", "true"]
    with user_errors():
        arguments, _, training_args, model_args = parse(ARGUMENTS, args, prog="trl_opsd.plan")
    from .run import run

    run(arguments, training_args, model_args)


if __name__ == "__main__":
    silence()
    main()
