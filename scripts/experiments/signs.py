"""
What the log of a good run and of a bad one look like, side by side.

    OMP_NUM_THREADS=1 python -m scripts.experiments.signs

Both start from the RLVR checkpoint that `bash scripts/quickstart.sh` leaves, and make 30 steps of recipes/tiny/opsd.yaml. The
good run is that recipe. The bad one has what has been seen to collapse: a teacher with the student's weights as they are,
asked for the answer without its steps, on every rollout, with the alarm off. Writes recipes/results/signs/runs.json,
rollouts.svg and divergence.svg (`--report`: only the pictures).
"""

import argparse
import json
from pathlib import Path

from scripts.harness.results import RESULTS, ROOT, read, write_results, write_text
from scripts.harness.stages import run_stage
from trl_opsd.evaluate import svg


STEPS = 30
ARMS = {
    "good: asked to be concise, initial weights, correct rollouts": {},
    "bad: asked for the answer alone, live weights, all rollouts": {
        "teacher_weights": "live",
        "teacher_prompt_template": "{prompt} brief",
        "gate": "all",
        "alarm_correct_drop": 1.0,
    },
}
PICTURES = {
    "rollouts": {
        "opsd/correct": "correct rollouts, share",
        "completions/mean_length": "mean length, tokens",
        "opsd/kept": "rollouts trained on, share",
        "grad_norm": "norm of the gradient",
    },
    "divergence": {
        "opsd/kl": "divergence, nats a token",
        "opsd/student_entropy": "entropy of the student, nats",
        "opsd/teacher_entropy": "entropy of the teacher, nats",
        "opsd/top1_agreement": "same likeliest token, share",
    },
}
METRICS = [name for metrics in PICTURES.values() for name in metrics]


def measure(model: Path, data: Path, runs: Path) -> list[dict]:
    """Trains both, and returns what each has logged: one row for each step."""
    rows = []
    for number, (arm, options) in enumerate(ARMS.items()):
        output = runs / str(number)
        common = {"max_steps": STEPS, "logging_steps": 1, "probe_prompts": 0, "output_dir": output}
        where = {"model_name_or_path": model, "dataset_name": data}
        run_stage("trl_opsd.opsd", "recipes/tiny/opsd.yaml", **where, **common, **options)
        log = json.loads((output / "opsd.json").read_text())["rows"]
        rows += [
            {"arm": arm, "step": row["step"], **{name: row[name] for name in METRICS}}
            for row in log
            if "opsd/correct" in row
        ]
    return rows


def picture(metrics: dict[str, str]) -> str:
    """Metrics of both runs, a chart for each, with the steps on the horizontal axis."""
    rows = read(RESULTS / "signs" / "runs.json")
    charts = []
    for index, (name, label) in enumerate(metrics.items()):
        series = []
        for number, arm in enumerate(ARMS):
            mine = [row for row in rows if row["arm"] == arm and row[name] is not None]
            series.append(
                svg.Series(arm, number, [row["step"] for row in mine], [row[name] for row in mine], kind="line")
            )
        charts.append(svg.chart(series, "step", label, y_from=0.0, left=index * svg.WIDTH))
    return str(svg.picture(charts, list(metrics), list(ARMS)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "runs" / "tiny" / "rlvr"), help="where both start")
    parser.add_argument("--dataset_name", default=str(ROOT / "runs" / "tiny" / "sft" / "data"), help="its problems")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "signs"), help="folder for the runs")
    parser.add_argument("--report", action="store_true", help="only make the pictures")
    args = parser.parse_args(argv)
    folder = RESULTS / "signs"
    if not args.report:
        rows = measure(Path(args.model_name_or_path), Path(args.dataset_name), Path(args.runs))
        write_results(folder / "runs.json", rows, {"steps": STEPS, "arms": ARMS})
    for name, metrics in PICTURES.items():
        write_text(folder / f"{name}.svg", picture(metrics))
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
