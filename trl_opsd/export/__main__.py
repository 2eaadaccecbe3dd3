"""
Command line of the export: `python -m trl_opsd.export --formats gguf openvino --output_dir DIR --model_name_or_path X`.

Every field of [`ExportConfig`] and of [`~trl_opsd.evaluate.EvaluateConfig`], which says on what artefacts are judged, is a
key of the YAML file and an option of the command line, which overrides it. Exit status 0: all that was asked for is there,
1: something failed its check, 3: something is undecided, 2: a mistake. Run again, it goes on with what is not there.
"""

from ..cli import parse, silence, user_errors


ARGUMENTS = ("trl_opsd.export.config.ExportConfig", "trl_opsd.evaluate.config.EvaluateConfig")


def main(args: list[str] | None = None) -> None:
    with user_errors():
        parsed = parse(ARGUMENTS, args, prog="trl_opsd.export")
    from .run import run

    raise SystemExit(run(*parsed))


if __name__ == "__main__":
    silence()
    main()
