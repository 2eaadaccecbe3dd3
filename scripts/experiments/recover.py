"""
Half of the tiny reasoner, and how it comes back: pruned, recovered in three ways, and shortened by OPSD.

    OMP_NUM_THREADS=1 python -m scripts.experiments.recover

The commands are those of recipes/tiny, in the order of recipes/README.md, each with its recipe's own seed; RLVR makes 40 steps
of its 60. Every arm makes 100 updates of 64 rollouts of the bank that RLVR has filled, from the same pruned model. OPSD goes
on from the forward KL, which is recipes/tiny/recover.yaml as it is. Writes recipes/results/tiny_recover/seed-0.json and
table.md (`--report`: only the table), arm by arm: run again, it goes on where it was.

| arm | how the pruned model learns from the bank |
|---|---|
| SFT | TRL's own command, with recipes/tiny/size_sft.yaml |
| forward KL | the teacher's logits: recipes/tiny/recover.yaml |
| reverse KL | the same with `beta: 1.0` |
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from scripts.harness.results import RESULTS, ROOT, read, read_all, write_results, write_text
from scripts.harness.stages import evaluate_checkpoint, train_stage, warm_start
from scripts.harness.tables import markdown


RLVR_STEPS, UPDATES = 40, 100


def checkpoints(runs: Path) -> Iterator[tuple[str, Path]]:
    """Runs the stages, keeping those that are finished. Yields the name and the checkpoint of each that is measured."""
    sft = warm_start("strong", 0, runs)
    data = {"dataset_name": sft / "data"}
    options = {"model_name_or_path": sft, "max_steps": RLVR_STEPS, **data}
    teacher = train_stage("trl_opsd.rlvr", "recipes/tiny/rlvr.yaml", runs / "rlvr", **options)
    yield "teacher", teacher
    options = {"model_name_or_path": teacher, "calibration_dataset": teacher / "bank"}
    pruned = train_stage("trl_opsd.prune", "recipes/tiny/prune.yaml", runs / "pruned", **options)
    yield "pruned", pruned
    student, taught = {"model_name_or_path": pruned}, {"teacher_model_name_or_path": teacher}
    recover = {**student, **taught, "dataset_name": teacher / "bank"}
    forward = train_stage("trl_opsd.opsd", "recipes/tiny/recover.yaml", runs / "forward", **recover)
    yield "forward KL", forward
    options = {**student, "dataset_name": teacher / "bank" / "rollouts", "max_steps": UPDATES}
    yield "SFT", train_stage("trl.scripts.sft", "recipes/tiny/size_sft.yaml", runs / "recovered_sft", **options)
    reverse = train_stage("trl_opsd.opsd", "recipes/tiny/recover.yaml", runs / "reverse", **recover, beta=1.0)
    yield "reverse KL", reverse
    options = {"model_name_or_path": forward, **taught, **data}
    opsd = train_stage("trl_opsd.opsd", "recipes/tiny/opsd_pruned.yaml", runs / "opsd_pruned", **options)
    yield "forward KL, then OPSD", opsd


def table() -> str:
    """Accuracy with its 95% interval, and tokens, of every checkpoint."""
    (rows,) = read_all(RESULTS / "tiny_recover")
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = {row["decoding"]: row for row in rows if row["arm"] == arm}
        cells = [
            "{:.1f} ({:.1f} to {:.1f})".format(
                *(100 * row[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
            )
            for row in (found["sampled"], found["greedy"])
        ]
        lines.append([arm, *cells, *(f"{found[decoding]['mean_tokens']:.1f}" for decoding in ("sampled", "greedy"))])
    return (
        f"Half of the tiny reasoner after {UPDATES} updates on the bank, one seed, on {rows[0]['n']:,} held-out problems: "
        "accuracy with its 95% interval, and mean tokens. Made by `python -m scripts.experiments.recover`.\n\n"
        + markdown(
            ["", "sampled accuracy, %", "greedy accuracy, %", "tokens, sampled", "tokens, greedy"],
            lines,
        )
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=str(ROOT / "runs" / "recover"), help="folder for the runs")
    parser.add_argument("--max_samples", type=int, default=400, help="held-out problems for each decoding")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    output = RESULTS / "tiny_recover" / "seed-0.json"
    if not args.report:
        rows = read(output) if output.is_file() else []
        for arm, checkpoint in checkpoints(Path(args.runs)):
            if all(row["arm"] != arm for row in rows):
                data = Path(args.runs) / "strong-0" / "sft" / "data"
                rows += [{"arm": arm, **row} for row in evaluate_checkpoint(checkpoint, data, 42, args.max_samples)]
                write_results(output, rows, {"rlvr_steps": RLVR_STEPS, "max_samples": args.max_samples})
    write_text(RESULTS / "tiny_recover" / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
