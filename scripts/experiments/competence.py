"""
OPSD where the teacher is competent in its context on easy problems only, with and without the teacher's gate, several seeds.

    OMP_NUM_THREADS=1 python -m scripts.experiments.competence --seeds 0 1 2

The tiny reasoner of recipes/tiny/competence_sft.yaml was taught the short ways on problems of up to three operations. It goes
through RLVR, and from there each arm is trained with recipes/tiny/competence_opsd.yaml and one thing changed:

| arm | what differs |
|---|---|
| RLVR | not trained |
| prompt-only | not trained, asked to be concise |
| concise | no gate of the teacher's |
| concise, gate | the teacher's rollouts in the run |
| concise, gate from a bank | the teacher's rollouts before the run |
| sibling | the shortest correct rollout of eight in place of the instruction, no gate of the teacher's |
| sibling, gate | the same, the teacher's rollouts in the run |
| concise, gate, second round | the same again from what `concise, gate` has left, which is the teacher too |

A run that the alarm ends is measured as it was then. Accuracy is sampled at temperature 1 on held-out problems, by their
numbers of operations. Every training keeps its checkpoint in `--runs`, and every measurement its row: the command goes on
where it was. One results file for each seed, recipes/results/tiny_competence/seed-<seed>.json, with the arms that are there,
and the table from whatever files there are (`--report`: only that).
"""

import argparse
import json
from pathlib import Path

from scripts.experiments.bank import concise_bank
from scripts.harness.results import RESULTS, ROOT, read_all, write_results, write_text
from scripts.harness.stages import MEASURED, evaluate, log_of, make_teacher, train_arm
from scripts.harness.tables import markdown, spread
from trl_opsd.data import load_prompts
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


RECIPE = "recipes/tiny/competence_opsd.yaml"
SIBLING = {
    "teacher_prompt_template": SOLUTION_TEMPLATE.replace("{solution}", "{sibling}"),
    "num_generations": 8,
}
NO_GATE = {"teacher_gate": None, "teacher_gate_rollouts": None}
ARMS = {
    "RLVR": None,
    "prompt-only": None,
    "concise": NO_GATE,
    "concise, gate": {},
    "concise, gate from a bank": {"teacher_gate_rollouts": None},
    "sibling": SIBLING | NO_GATE,
    "sibling, gate": SIBLING,
    "concise, gate, second round": {},
}
PROBLEMS = {"1 to 3": (1, 3), "4 to 6": (4, 6)}


def measure(arm: str, checkpoint: Path, data: Path, seed: int, folder: Path, max_samples: int) -> list[dict]:
    """A row for each group of problems."""
    rows, options = [], {"decoding": "sampled"}
    if arm == "prompt-only":
        options["prompt_template"] = CONCISE_TEMPLATE
    for name, (fewest, most) in PROBLEMS.items():
        problems = folder / f"{fewest}_to_{most}.jsonl"
        if not problems.is_file():
            test = load_prompts(str(data), "test")
            test.filter(lambda row, few=fewest, many=most: few <= row["num_ops"] <= many).to_json(problems)
        (row,) = evaluate(checkpoint, problems, seed, max_samples, **options)
        rows.append({"arm": arm, "problems": name, **{field: row[field] for field in MEASURED}})
    return rows


def run(arm: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """The rows of an arm, which are made unless they are there."""
    runs = Path(args.runs)
    folder = runs / f"competence-{seed}"
    name = "".join(letter if letter.isalnum() else "_" for letter in arm)
    kept = folder / f"{name}.json"
    config = {"max_steps": args.max_steps, "max_samples": args.max_samples}
    if kept.is_file() and json.loads(kept.read_text())["run"]["config"] == config:
        return json.loads(kept.read_text())["rows"]
    rlvr, data = make_teacher("competence", seed, runs)
    checkpoint, trained = rlvr, {}
    if ARMS[arm] is not None:
        options = {"model_name_or_path": rlvr, "dataset_name": data, "seed": seed, "max_steps": args.max_steps}
        # A checkpoint of every step, so that there is one of the step at which the alarm ends a run
        options |= {"probe_prompts": 0, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
        options |= {"save_total_limit": 1, "save_only_model": True}
        if arm == "concise, gate from a bank":
            options["teacher_bank"] = concise_bank(rlvr, data, seed, folder / "bank")
        if arm == "concise, gate, second round":
            run("concise, gate", seed, args)
            options["model_name_or_path"] = folder / "concise__gate"
        checkpoint = train_arm("trl_opsd.opsd", RECIPE, folder / name, **options | ARMS[arm])
        log = log_of(checkpoint, "opsd")
        trained = {
            "steps": len(log),
            "stopped": (folder / name / "stopped").is_file(),
            "correct": [row["opsd/correct"] for row in log],
            "num_tokens": log[-1]["num_tokens"],
            "anchored": [row.get("opsd/anchored") for row in log],
            "teacher_gate_tokens": log[-1].get("opsd/teacher_gate_tokens"),
            "teacher_gate_seconds": log[-1].get("opsd/teacher_gate_seconds"),
        }
    rows = [{**row, **trained} for row in measure(arm, checkpoint, data, seed, folder, args.max_samples)]
    write_results(kept, rows, config)
    return rows


def table() -> str:
    """Every arm's mean over the seeds, with the lowest and the highest."""
    seeds = read_all(RESULTS / "tiny_competence")
    rows = [row for rows in seeds for row in rows]
    lines = []
    for arm in ARMS:
        chosen = {name: [row for row in rows if (row["arm"], row["problems"]) == (arm, name)] for name in PROBLEMS}
        if not any(chosen.values()):
            continue
        hard, cells = chosen["4 to 6"], []
        for found in chosen.values():
            cells += [spread(100 * row["accuracy"] for row in found), spread(row["mean_tokens"] for row in found)]
        steps, written = "", ""
        if "steps" in hard[0]:
            number = sum(row["stopped"] for row in hard)
            steps = ", ".join(str(row["steps"]) for row in hard)
            steps += f"; {number} of {len(hard)} ended by the alarm" if number else ""
        if hard[0].get("teacher_gate_tokens"):
            written = f"{sum(row['teacher_gate_tokens'] for row in hard) / len(hard):,.0f}"
        anchored = [share for row in hard for share in row.get("anchored", []) if share is not None]
        cells += [steps, f"{100 * sum(anchored) / len(anchored):.0f}" if anchored else "", written]
        lines.append([arm, str(len(hard)), *cells])
    heading = ["arm", "seeds", "1 to 3 operations, accuracy %", "tokens", "4 to 6, accuracy %", "tokens"]
    heading += ["updates", "rollouts on anchors, %", "tokens written by the teacher"]
    return (
        "The tiny reasoner whose short ways were taught on problems of up to three operations, sampled: mean over the seeds, "
        "lowest and highest. Made by `python -m scripts.experiments.competence`.\n\n" + markdown(heading, lines) + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--max_steps", type=int, default=60, help="optimizer steps of an arm")
    parser.add_argument("--max_samples", type=int, default=1024, help="held-out problems of each group")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "competence"), help="folder for the runs")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    if not args.report:
        for seed in args.seeds:
            rows = []
            for arm in args.arms:
                rows += run(arm, seed, args)
                found = {row["problems"]: (row["accuracy"], row["mean_tokens"]) for row in rows if row["arm"] == arm}
                print(seed, arm, rows[-1].get("steps"), found, flush=True)
                config = {"seed": seed, "max_steps": args.max_steps, "max_samples": args.max_samples}
                write_results(RESULTS / "tiny_competence" / f"seed-{seed}.json", rows, config)
    write_text(RESULTS / "tiny_competence" / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
