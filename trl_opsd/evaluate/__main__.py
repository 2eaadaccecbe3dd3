"""
Command line of evaluation: `python -m trl_opsd.evaluate --config recipes/evaluate.yaml`.

Every field of [`EvaluateConfig`] is a key of the YAML file and an option of the command line, which overrides it.
"""

from ..cli import check_checkpoint, parse, user_errors
from ..results import write_results
from .config import EvaluateConfig
from .measure import load_model, load_task, load_tokenizer, measure


def main(args: list[str] | None = None) -> None:
    with user_errors():
        (config,) = parse((EvaluateConfig,), args, prog="trl_opsd.evaluate")
        check_checkpoint(config.model_name_or_path, "model_name_or_path", config.trust_remote_code)
        dataset, reward_funcs = load_task(config)
        tokenizer = load_tokenizer(config, dataset)
    rows = measure(config, dataset, reward_funcs, load_model(config), tokenizer)
    if config.output is not None:
        write_results(config.output, rows, config)
    for row in rows:
        flexible = row["accuracy_flexible"]
        print(
            f"{row['task']}, {row['decoding']}: accuracy {row['accuracy']:.1%} "
            f"({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}, n = {row['n']}"
            + (f", flexible {flexible:.1%}" if flexible is not None else "")
            + (f", {row['unverified']} not verifiable" if row["unverified"] else "")
            + f"), tokens mean {row['mean_tokens']:.1f}, p90 {row['p90_tokens']:.0f}, "
            f"truncated {row['truncated']:.1%}, {row['wall_s']:.0f} s"
        )


if __name__ == "__main__":
    main()
