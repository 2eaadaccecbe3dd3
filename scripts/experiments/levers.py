"""
What each way of generating less costs and gives on the tiny reasoner: OPSD with the recipe's settings and one thing changed, the
same number of updates, several seeds.

    OMP_NUM_THREADS=1 python -m scripts.experiments.levers --seeds 0 1 2
    OMP_NUM_THREADS=1 python -m scripts.experiments.levers --world short --seeds 0 1 2

| arm | what differs |
|---|---|
| start | not trained |
| on-policy | nothing |
| transformers' generate | every row is computed until the longest ends |
| limit | rollouts may be half as long again as the longest of the recent correct ones (`completion_limit_quantile: 1.0`) |
| limit, 95% | the same of the 95% quantile |
| bank, N | the first N updates are on RLVR's rollout bank (`off_policy_steps: N`) |
| N updates a batch | each batch of rollouts is trained on N times (`num_iterations: N`) |
| first N tokens | the student writes N tokens, and all are trained on: nobody can say which would have been right |

Every run has a process of its own, which keeps its row in `--runs`: the command goes on where it was. Accuracy is sampled at
temperature 1 on held-out problems; the hardest fifth are those with the most operations. Seconds are the processor's, of
training alone. One results file for each seed, recipes/results/levers/<world>-<seed>.json, and the table from what there is
(`--report`: only that).
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import yaml

from scripts.experiments.time_to_goal import WORLDS, Clock
from scripts.harness.processes import run_alone
from scripts.harness.results import RESULTS, ROOT, read_all, write_results, write_text
from scripts.harness.stages import TEACHERS, evaluate, make_teacher
from scripts.harness.tables import markdown, spread
from trl_opsd import decoding
from trl_opsd.data import load_prompts
from trl_opsd.opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.run import OPSDScriptArguments, apply_bank
from trl_opsd.rewards import math_reward


ARMS = {
    "start": None,
    "on-policy": {},
    "transformers' generate": {"plain": True},
    "limit": {"completion_limit_quantile": 1.0},
    "limit, 95%": {"completion_limit_quantile": 0.95},
    "bank, 5": {"off_policy_steps": 5},
    "bank, 10": {"off_policy_steps": 10},
    "bank, 20": {"off_policy_steps": 20},
    "2 updates a batch": {"num_iterations": 2},
    "4 updates a batch": {"num_iterations": 4},
    "first 32 tokens": {"max_completion_length": 32, "gate": "all"},
    "first 64 tokens": {"max_completion_length": 64, "gate": "all"},
}
MEASURED = ("accuracy", "accuracy_low", "accuracy_high", "mean_tokens", "truncated", "n")


class Timer(Clock):
    """Seconds of training, and nothing measured on the way."""

    def __init__(self):
        super().__init__(None, {}, {})

    def on_step_end(self, args, state, control, **kwargs):
        self.cpu += time.process_time() - self.begin[0]
        self.wall += time.perf_counter() - self.begin[1]
        self.go()


def hardest(data: Path, folder: Path) -> Path:
    """A file of the fifth of the held-out problems that have the most operations."""
    rows = load_prompts(str(data), "test")
    order = sorted(range(len(rows)), key=lambda row: -rows[row]["num_ops"])
    path = folder / "hardest.jsonl"
    rows.select(sorted(order[: len(rows) // 5])).to_json(path)
    return path


def work(world: str, arm: str, seed: int, runs: str, args: dict) -> dict:
    """One run, in a process of its own: its row."""
    torch.set_num_threads(1)
    path, data = make_teacher(WORLDS[world]["start"], seed, Path(runs))
    recipe = yaml.safe_load((ROOT / f"{TEACHERS[WORLDS[world]['start']][0]}opsd.yaml").read_text())
    options = {"decoding": "sampled", "max_completion_length": WORLDS[world]["limit"]}

    def measure(model=None) -> dict:
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, problems in (("all", data), ("hardest fifth", hardest(data, Path(folder)))):
                row = evaluate(path, problems, seed, args["max_samples"], model=model, **options)[0]
                found[name] = {field: row[field] for field in MEASURED}
        return found

    made = {"world": world, "arm": arm, "seed": seed, "setting": ARMS[arm]}
    if ARMS[arm] is None:
        return {**made, "cpu_s": 0.0, "generation_cpu_s": 0.0, "after": measure(), "log": []}
    setting = dict(ARMS[arm])
    is_plain = setting.pop("plain", False)
    fields = {name: value for name, value in recipe.items() if name in OPSDConfig.__dataclass_fields__}
    fields |= {"output_dir": tempfile.mkdtemp(), "seed": seed, "disable_tqdm": True, "logging_steps": 1}
    config = OPSDConfig(**fields | {"max_steps": args["max_steps"], "learning_rate": args["learning_rate"]} | setting)
    rows = load_prompts(str(data))
    if config.given is not None:
        rows, _ = apply_bank(rows, OPSDScriptArguments(rollout_bank=str(path / "bank")), config)

    with mock.patch.object(decoding, "can_call", lambda *args, **kwargs: False) if is_plain else nullcontext():
        clock = Timer()
        trainer = OPSDTrainer(
            model=str(path), args=config, train_dataset=rows, reward_funcs=math_reward, callbacks=[clock]
        )
        clock.time_generation()
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = ("opsd/completion_limit", "completions/mean_length", "completions/clipped_ratio", "opsd/correct", "loss")
    return {
        **made,
        "cpu_s": clock.cpu,
        "generation_cpu_s": clock.generation,
        "after": measure(trainer.model),
        "log": [{name: entry[name] for name in kept if name in entry} for entry in log],
    }


def run(world: str, arm: str, seed: int, args: argparse.Namespace) -> dict:
    """The row of a run, which is made unless it is there."""
    name = f"{world}-{seed}-{''.join(letter if letter.isalnum() else '_' for letter in arm)}.json"
    kept = Path(args.runs) / "levers" / name
    options = {name: vars(args)[name] for name in ("max_steps", "learning_rate", "max_samples")}
    if not kept.is_file() or json.loads(kept.read_text())["run"]["config"] != options:
        write_results(kept, [run_alone(work, world, arm, seed, args.runs, options)], options)
    (row,) = json.loads(kept.read_text())["rows"]
    after = row["after"]["all"]
    print(
        f"{world} {seed} {arm}: {after['accuracy']:.3f} / {after['mean_tokens']:.1f}, hardest fifth "
        f"{row['after']['hardest fifth']['accuracy']:.3f}; {row['cpu_s']:.0f} s, of it {row['generation_cpu_s']:.0f} s generation",
        flush=True,
    )
    return row


def table() -> str:
    """Each arm's mean over the seeds, with the lowest and the highest."""
    rows = [row for rows in read_all(RESULTS / "levers", "*.json") for row in rows]
    parts = []
    for world in dict.fromkeys(row["world"] for row in rows):
        found = [row for row in rows if row["world"] == world]
        lines = []
        for arm in dict.fromkeys(row["arm"] for row in found):
            chosen = [row for row in found if row["arm"] == arm]
            lines.append(
                [
                    arm,
                    str(len(chosen)),
                    spread(100 * row["after"]["all"]["accuracy"] for row in chosen),
                    spread(100 * row["after"]["hardest fifth"]["accuracy"] for row in chosen),
                    spread(row["after"]["all"]["mean_tokens"] for row in chosen),
                    spread(row["cpu_s"] for row in chosen),
                    spread(row["generation_cpu_s"] for row in chosen),
                ]
            )
        heading = ["arm", "seeds", "accuracy, %", "hardest fifth, %", "tokens", "processor seconds", "generation"]
        parts.append(f"{world} traces\n\n{markdown(heading, lines)}")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=["short", "long"], default="long")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--max_steps", type=int, default=40, help="updates of a run")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--max_samples", type=int, default=2048, help="held-out problems of an evaluation")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "ablation"), help="folder for the starts and the rows")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    if not args.report:
        for seed in args.seeds:
            rows = [run(args.world, arm, seed, args) for arm in args.arms]
            config = {name: vars(args)[name] for name in ("world", "max_steps", "learning_rate", "max_samples")}
            write_results(RESULTS / "levers" / f"{args.world}-{seed}.json", rows, {"seed": seed, **config})
    write_text(RESULTS / "levers" / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
