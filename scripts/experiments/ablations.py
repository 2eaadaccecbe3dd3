"""
Ablations on the tiny reasoner: teacher (strong, weak) x context x gate x divergence, several seeds.

    OMP_NUM_THREADS=1 python -m scripts.experiments.ablations --seeds 0 1 2

Makes the teachers it does not find (strong: warm start and RLVR; weak: a warm start that stops early, no RLVR), trains
every arm of a `--table` from them with recipes/tiny/opsd.yaml, evaluates it on the held-out problems, and writes one results file for
each seed and teacher: recipes/results/<table>/<teacher>-<seed>.json. Finished files are kept. `--report` makes
the table and the plot from whatever files there are.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback
from trl import ModelConfig

from scripts.harness.results import RESULTS, ROOT, read_all, write_results, write_text
from scripts.harness.stages import evaluate, make_teacher
from scripts.harness.tables import markdown, spread
from trl_opsd.cli import parse
from trl_opsd.data import load_prompts
from trl_opsd.opsd import AlarmCallback, OPSDConfig, OPSDTrainer
from trl_opsd.opsd.run import OPSDScriptArguments
from trl_opsd.rewards import math_reward
from trl_opsd.tiny.task import ANSWER_TEMPLATE, BRIEF_TEMPLATE, CONCISE_TEMPLATE, SOLUTION_TEMPLATE


TEMPLATES = {
    "concise": CONCISE_TEMPLATE,
    "solution": SOLUTION_TEMPLATE,
    "brief": BRIEF_TEMPLATE,
    "answer": ANSWER_TEMPLATE,
}
DIVERGENCES = {"reverse KL": 1.0, "JSD": 0.5, "forward KL": 0.0}
ARM = {"context": "concise", "gate": "correct", "divergence": "reverse KL", "kl_clip": None, "weights": "initial"}
TABLES = {
    # What the teacher sees, which rollouts are trained on, and how far apart the two are counted
    "tiny_ablation": [
        ARM,
        ARM | {"gate": "incorrect"},
        ARM | {"gate": "all"},
        ARM | {"divergence": "JSD"},
        ARM | {"divergence": "forward KL"},
        ARM | {"kl_clip": 0.05},
        ARM | {"context": "solution"},
        ARM | {"context": "brief"},
        ARM | {"context": "brief", "gate": "incorrect"},
        ARM | {"context": "brief", "gate": "all"},
        ARM | {"context": "brief", "divergence": "forward KL"},
        ARM | {"context": "answer"},
    ],
    # Whose weights the teacher has: its own, or the student's sooner or later
    "tiny_teachers": [
        ARM,
        ARM | {"weights": "ema"},
        ARM | {"weights": "snapshot 50"},
        ARM | {"weights": "snapshot 10"},
        ARM | {"weights": "live"},
        ARM | {"weights": "snapshot 10", "divergence": "forward KL"},
        ARM | {"weights": "live", "divergence": "forward KL"},
    ],
    # All three at once
    "tiny_grid": [
        ARM | {"weights": weights, "context": context, "gate": gate}
        for weights in ("initial", "ema", "snapshot 10", "live")
        for context in ("concise", "brief")
        for gate in ("correct", "all")
    ],
}
# An arm is measured on the way too: what collapses may look well at first
HALFWAY = 25


class Halfway(TrainerCallback):
    """Measures the student, sampled, after `HALFWAY` steps."""

    def __init__(self, measure_model: Callable):
        self.measure_model, self.rows, self.seconds = measure_model, [], 0.0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == HALFWAY:
            start = time.process_time()
            self.rows = self.measure_model(model)
            self.seconds = time.process_time() - start


def train_arm(path: Path, data: Path, seed: int, steps: int | None, arm: dict, halfway: Halfway):
    """Trains one arm. Returns the trainer and the processor seconds it took, which other jobs do not lengthen."""
    weights, _, every = arm["weights"].partition(" ")
    options = ["--config", str(ROOT / "recipes/tiny/opsd.yaml"), "--output_dir", tempfile.mkdtemp()]
    options += [
        "--teacher_prompt_template",
        TEMPLATES[arm["context"]],
        "--gate",
        arm["gate"],
        "--beta",
        str(DIVERGENCES[arm["divergence"]]),
    ]
    options += ["--seed", str(seed), "--disable_tqdm", "true"]
    options += ["--teacher_weights", weights, *(["--teacher_sync_steps", every] if every else [])]
    options += ["--kl_clip", str(arm["kl_clip"])] if arm["kl_clip"] else []
    options += ["--max_steps", str(steps)] if steps else []
    _, config, _ = parse((OPSDScriptArguments, OPSDConfig, ModelConfig), options)
    start = time.process_time()
    trainer = OPSDTrainer(
        model=str(path),
        args=config,
        train_dataset=load_prompts(str(data)),
        reward_funcs=math_reward,
        callbacks=[halfway],
    )
    alarms = AlarmCallback(trainer)
    trainer.add_callback(alarms)
    trainer.train()
    return trainer, alarms.stopped_by, time.process_time() - start - halfway.seconds


def run(kind: str, seed: int, args: argparse.Namespace) -> None:
    output = RESULTS / args.table / f"{kind}-{seed}.json"
    if output.is_file():
        return
    path, data = make_teacher(kind, seed, Path(args.runs))
    rows = []
    for name, options in {"teacher": {}, "prompt-only": {"prompt_template": CONCISE_TEMPLATE}}.items():
        for row in evaluate(path, data, seed, args.max_samples, **options):
            rows.append({"teacher": kind, "arm": name, **row})
    for arm in TABLES[args.table]:
        halfway = Halfway(lambda model: evaluate(path, data, seed, 512, model=model, decoding="sampled"))
        trainer, stopped_by, seconds = train_arm(path, data, seed, args.max_steps, arm, halfway)
        final = evaluate(path, data, seed, args.max_samples, model=trainer.model)
        for steps, measured in ((HALFWAY, halfway.rows), (trainer.state.global_step, final)):
            for row in measured:
                row |= {"checkpoint": None, "stage": "opsd", "steps": steps, "train_cpu_s": seconds}
                rows.append({"teacher": kind, "arm": "opsd", **arm, "alarm": stopped_by, **row})
        print(
            f"{kind} {seed} {tuple(arm.values())}, {stopped_by}: "
            + ", ".join(f"{row['decoding']} {row['accuracy']:.3f} / {row['mean_tokens']:.1f}" for row in rows[-3:]),
            f"{seconds:.0f} s",
            flush=True,
        )
    write_results(output, rows, {"seed": seed, "teacher": kind, **vars(args)})


def table(name: str) -> str:
    """Every arm's mean over the seeds, with the lowest and the highest."""
    rows = [row for rows in read_all(RESULTS / name, "*-*.json") for row in rows]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["teacher"], row["arm"], *(row.get(field) for field in ARM))
        groups.setdefault(key, []).append(row)

    def cell(group: list[dict], decoding: str, field: str, scale: int, halfway: bool = False) -> str:
        chosen = [row for row in group if row["decoding"] == decoding and (row.get("steps") == HALFWAY) == halfway]
        values = [scale * row[field] for row in chosen if field in row]
        return spread(values) if values else ""

    columns = {
        f"sampled accuracy, step {HALFWAY}": ("sampled", "accuracy", 100, True),
        f"tokens, step {HALFWAY}": ("sampled", "mean_tokens", 1, True),
        "sampled accuracy": ("sampled", "accuracy", 100),
        "greedy accuracy": ("greedy", "accuracy", 100),
        "tokens, sampled": ("sampled", "mean_tokens", 1),
        "processor seconds": ("sampled", "train_cpu_s", 1),
    }
    # Files of earlier versions have neither seconds nor alarms
    columns = {heading: column for heading, column in columns.items() if any(column[1] in row for row in rows)}
    alarms = ["stopped by the alarm, at step"] if any("alarm" in row for row in rows) else []
    lines = []
    for (teacher, arm, context, gate, divergence, clip, weights), group in groups.items():
        what = [context, gate, divergence, str(clip or ""), weights or "initial"]
        what = [f"*{arm}*", *[""] * (len(what) - 1)] if arm != "opsd" else what
        lines.append([teacher, *what, *(cell(group, *column) for column in columns.values())])
        if alarms:
            stopped = {(row["seed"], row["steps"]) for row in group if row.get("alarm") and row["steps"] != HALFWAY}
            lines[-1].append(", ".join(str(steps) for _, steps in sorted(stopped)))
    heading = ["teacher", "context", "gate", "divergence", "clip", "weights", *columns]
    return (
        f"Means over the seeds {sorted({row['seed'] for row in rows})}, with the lowest and the highest. Made by "
        f"`python -m scripts.experiments.ablations --table {name} --report`.\n\n"
        + markdown([*heading, *alarms], lines)
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teachers", nargs="+", choices=["strong", "weak"], default=["strong", "weak"])
    parser.add_argument("--runs", default=str(ROOT / "runs" / "ablation"), help="folder for the teachers")
    parser.add_argument("--max_samples", type=int, default=1024, help="held-out problems for each decoding")
    parser.add_argument("--max_steps", type=int, help="optimizer steps of an arm, in place of the recipe's")
    parser.add_argument("--table", choices=list(TABLES), default="tiny_ablation", help="which arms")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    if not args.report:
        for seed in args.seeds:
            for kind in args.teachers:
                run(kind, seed, args)
    write_text(RESULTS / args.table / "table.md", table(args.table))
    print(table(args.table))


if __name__ == "__main__":
    main()
