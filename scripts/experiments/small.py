"""
The small reasoner, made long-winded by its warm start, accurate by RLVR and short by OPSD, beside what one would do otherwise.

    OMP_NUM_THREADS=1 python -m scripts.experiments.small --seeds 0 1 2

Five million parameters; to be concise was taught for some families of problems only. Warm start, RLVR and their problems, of
five families at two difficulties, are those of recipes/small; with `--hard` all seven at three are asked, of which the warm
start has not learned enough. From the RLVR checkpoint each arm makes as many updates of
as many rollouts, by its recipe:

| arm | what is done |
|---|---|
| warm start, RLVR | measured as they are |
| prompt-only | RLVR, asked to be concise |
| OPSD, concise / solution / sibling | the teacher is asked to be concise / shown the reference solution / shown the shortest correct of eight rollouts |
| OPSD, concise, where it is competent | the teacher is asked to be concise where it is then right in half of four rollouts, and else is asked plainly |
| OPSD, concise, solution, where it is competent, three times the updates | 120 by default; also where all four rollouts are right |
| OPSD, sibling, second round | the same again from what the first round has left, which is the teacher too |
| GRPO, length penalty | recipes/small/rlvr.yaml with `length_reward` beside the verifier; also with three times the updates |
| OPSD after GRPO, GRPO after OPSD | the one from what the other has left |
| GRPO, truncated | recipes/small/rlvr.yaml with half of the tokens that RLVR needs as the limit (https://huggingface.co/papers/2510.15110) |
| SFT on the shortest | TRL's SFT on the shortest correct rollout of each prompt that RLVR has kept |

A run that the alarm ends is measured as it was then. Accuracy is sampled at temperature 1 on held-out problems, 200 of each
family. The command goes on where it was, with what is in `--runs`. One results file for each seed,
recipes/results/small/seed-<seed>.json (with `--hard` in small_hard), with the arms that are there, another one with what training
logged of its own rollouts on the way, and table and plot from whatever files there are (`--report`: only those).
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

from datasets import Dataset, load_dataset

from scripts.harness.plots import plt, save
from scripts.harness.results import RESULTS, ROOT, read, read_all, write_results, write_text
from scripts.harness.stages import MEASURED, evaluate, log_of, train_arm, train_stage
from scripts.harness.tables import markdown, spread
from trl_opsd.small.families import FAMILIES
from trl_opsd.small.task import CONCISE_TEMPLATE, SmallConfig


RECIPES = "recipes/small"
PROMPT_ONLY = "RLVR, asked to be concise (prompt-only)"
COMPETENT = "OPSD, concise, where it is competent, three times the updates"
#: What arms have in common: a teacher's gate, and a reward of being short
GATED = ("opsd", "opsd_concise", {"teacher_gate": 0.5, "teacher_gate_rollouts": 4})
PENALISED = ("rlvr", "rlvr", {"reward_funcs": ["math_reward", "length_reward"]})
#: Stage and recipe of each arm that is trained from the RLVR checkpoint, and its further options
ARMS = {
    "warm start": None,
    "RLVR": None,
    PROMPT_ONLY: None,
    "OPSD, concise": ("opsd", "opsd_concise", {}),
    "OPSD, solution": ("opsd", "opsd_solution", {}),
    "OPSD, sibling": ("opsd", "opsd_sibling", {}),
    "OPSD, concise, where it is competent": GATED,
    "OPSD, concise, three times the updates": ("opsd", "opsd_concise", {}),
    "OPSD, solution, three times the updates": ("opsd", "opsd_solution", {}),
    COMPETENT: GATED,
    "OPSD, concise, where it is always right, three times the updates": (
        "opsd",
        "opsd_concise",
        {"teacher_gate": 1.0, "teacher_gate_rollouts": 4},
    ),
    "OPSD, sibling, second round": ("opsd", "opsd_sibling", {}),
    "GRPO, length penalty": PENALISED,
    "GRPO, length penalty, three times the updates": PENALISED,
    "OPSD after GRPO with the length penalty, three times the updates": GATED,
    "GRPO with the length penalty after OPSD": PENALISED,
    "GRPO, truncated": ("rlvr", "rlvr", {}),
    "SFT on the shortest": ("sft", "", {}),
}
CONFIG = SmallConfig()
#: Arms that the plot shows
SHOWN = (
    "RLVR",
    PROMPT_ONLY,
    COMPETENT,
    "OPSD, concise, where it is always right, three times the updates",
    "OPSD, sibling",
    "SFT on the shortest",
    "GRPO, truncated",
    "GRPO, length penalty",
    "GRPO, length penalty, three times the updates",
    "OPSD after GRPO with the length penalty, three times the updates",
    "GRPO with the length penalty after OPSD",
)
#: Updates over which a curve of the plot is averaged
SMOOTHED = 8
#: Families that are asked, and the options of the warm start that say so
POSED = (tuple(CONFIG.posed), {})
HARD = (tuple(FAMILIES), {"posed": list(FAMILIES), "posed_difficulty": 3})


def name_of(arm: str) -> str:
    """The folder and the file of an arm."""
    return "".join(letter if letter.isalnum() else "_" for letter in arm)


def shortest(rlvr: Path, output: Path) -> Path:
    """Writes the shortest of the correct rollouts of each prompt in the bank that RLVR has filled."""
    rows = {}
    for row in load_dataset("parquet", data_dir=str(rlvr / "bank" / "rollouts"), split="train"):
        key = json.dumps(row["prompt"])
        if key not in rows or len(row["completion_ids"]) < len(rows[key]["completion_ids"]):
            rows[key] = row
    kept = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows.values()]
    output.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(kept).to_json(output / "train.jsonl")
    return output


def checkpoint_of(arm: str, seed: int, folder: Path, max_steps: int, problems: tuple) -> Path:
    """The checkpoint of an arm, trained unless it is there."""
    own = {"seed": seed, "resume_from_checkpoint": "true"}
    families, asked = problems
    sft = train_stage("trl_opsd.small", f"{RECIPES}/sft.yaml", folder / "sft", **own, **asked)
    if arm == "warm start":
        return sft
    data = {"dataset_name": sft / "data"}
    rlvr = train_stage("trl_opsd.rlvr", f"{RECIPES}/rlvr.yaml", folder / "rlvr", model_name_or_path=sft, **data, **own)
    if ARMS[arm] is None:
        return rlvr
    stage, recipe, options = ARMS[arm]
    options = {"model_name_or_path": rlvr, "max_steps": max_steps, **data, **own, **options}
    if stage == "sft":
        # The rows that fill an update of the others; their rate is that of the warm start at its end, on the way down
        options |= {"dataset_name": shortest(rlvr, folder / "shortest"), "learning_rate": 2e-4, "bf16": True}
        options |= {"per_device_train_batch_size": 96, "warmup_steps": 2, "resume_from_checkpoint": None}
        return train_stage(
            "trl.scripts.sft",
            "recipes/tiny/size_sft.yaml",
            folder / name_of(arm),
            **{name: value for name, value in options.items() if value is not None},
        )
    if arm == "OPSD, sibling, second round":
        options["model_name_or_path"] = checkpoint_of("OPSD, sibling", seed, folder, max_steps, problems)
    if arm.startswith("OPSD after GRPO"):
        options["model_name_or_path"] = checkpoint_of("GRPO, length penalty", seed, folder, max_steps, problems)
    if arm.endswith("after OPSD"):
        options["model_name_or_path"] = checkpoint_of(COMPETENT, seed, folder, max_steps, problems)
    if arm.endswith("three times the updates"):
        options["max_steps"] = 3 * max_steps
    if arm == "GRPO, truncated":
        lengths = [row["mean_tokens"] for row in measure("RLVR", rlvr, sft, folder, families)]
        options["max_completion_length"] = round(statistics.mean(lengths) / 2)
    if stage == "opsd":
        options |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 1}
    return train_arm(f"trl_opsd.{stage}", f"{RECIPES}/{recipe}.yaml", folder / name_of(arm), **options)


def measure(arm: str, checkpoint: Path, sft: Path, folder: Path, families: tuple[str, ...]) -> list[dict]:
    """A row for each family, kept beside the checkpoints."""
    kept = folder / "measured" / f"{name_of(arm)}.json"
    if not kept.is_file():
        rows = []
        for family in families:
            options = {"decoding": "sampled", "task": "small", "max_completion_length": 384, "batch_size": 128}
            if arm == PROMPT_ONLY:
                options["prompt_template"] = CONCISE_TEMPLATE
            (row,) = evaluate(checkpoint, sft / "data" / "by_task" / f"{family}.jsonl", 42, 200, **options)
            rows.append({"arm": arm, "family": family, **{field: row[field] for field in MEASURED}})
        write_results(kept, rows, {})
    return read(kept)


def run(arm: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """The rows of an arm, with what its training took."""
    folder, problems = Path(args.runs) / f"seed-{seed}", HARD if args.hard else POSED
    checkpoint = checkpoint_of(arm, seed, folder, args.max_steps, problems)
    rows = measure(arm, checkpoint, folder / "sft", folder, problems[0])
    trained = {}
    if ARMS[arm] is not None and ARMS[arm][0] != "sft":
        log = log_of(checkpoint, ARMS[arm][0])
        stopped = (folder / name_of(arm) / "stopped").is_file()
        trained = {"steps": log[-1]["step"], "stopped": stopped, "num_tokens": log[-1]["num_tokens"]}
    return [{**row, **trained} for row in rows]


def curve(arm: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """What an arm logged of the rollouts that it was trained on: a row for each logged update."""
    if ARMS[arm] is None or ARMS[arm][0] == "sft":
        return []
    folder, stage = Path(args.runs) / f"seed-{seed}", ARMS[arm][0]
    checkpoint = checkpoint_of(arm, seed, folder, args.max_steps, HARD if args.hard else POSED)
    return [
        {
            "arm": arm,
            "step": row["step"],
            "correct": row["rewards/math_reward/mean"],
            "mean_tokens": row["completions/mean_length"],
        }
        for row in log_of(checkpoint, stage)
    ]


def plot() -> None:
    """Writes accuracy_tokens.svg: the arms by family, a mark for each seed, and what training logged on the way."""
    folder = RESULTS / "small"
    seeds = read_all(folder)
    families = tuple(dict.fromkeys(row["family"] for row in seeds[0]))
    figure, axes = plt.subplots(2, 4, figsize=(17, 8))
    panels = dict(zip(("all", *families), axes.flat, strict=False))
    colors = dict(zip(SHOWN, [f"C{index}" for index in range(10)] + ["black"], strict=True))
    for title, axis in panels.items():
        for rows, marker in zip(seeds, itertools.cycle("os^D"), strict=False):
            for arm in SHOWN:
                found = [row for row in rows if row["arm"] == arm and title in ("all", row["family"])]
                if found:
                    # Every family is asked as often, so their mean has the mean of their variances, by their number
                    accuracy = statistics.mean(row["accuracy"] for row in found)
                    variance = statistics.mean(row["accuracy"] * (1 - row["accuracy"]) / row["n"] for row in found)
                    error = 1.96 * math.sqrt(variance / len(found))
                    tokens = statistics.mean(row["mean_tokens"] for row in found)
                    axis.errorbar(tokens, 100 * accuracy, 100 * error, fmt=marker, color=colors[arm], capsize=2)
        taught = "" if title == "all" else ", short way taught" if title in CONFIG.taught else ", not taught"
        axis.set(title=f"{title}{taught}", xlabel="tokens, sampled", ylabel="accuracy, sampled, %")
    on_the_way, legend = axes.flat[-2:]
    for rows in map(read, sorted(folder.glob("curves-seed-*.json"))):  # of the seeds that have some
        for arm in SHOWN:
            found = [row for row in rows if row["arm"] == arm]
            # The first rollouts are those of RLVR, and a batch alone says little
            parts = [[row for row in found if (row["step"] - 1) // SMOOTHED == part] for part in range(len(found))]
            means = [
                [statistics.mean(row[field] for row in part) for field in ("mean_tokens", "correct")]
                for part in parts
                if part
            ]
            if means:
                tokens, correct = zip(*means, strict=True)
                on_the_way.plot(tokens, [100 * share for share in correct], ".-", color=colors[arm])
    title = f"on the way: rollouts of {SMOOTHED} updates"
    on_the_way.set(title=title, xlabel="tokens of training rollouts", ylabel="right, %")
    legend.axis("off")
    for arm in SHOWN:
        legend.plot([], [], "o-", color=colors[arm], label=arm.replace(", three times", ",\nthree times"))
    legend.legend(loc="center", fontsize=9)
    save(figure, folder / "accuracy_tokens.svg", dpi=100)


def table(folder: str = "small") -> str:
    """Every arm's mean over the seeds, with the lowest and the highest, on the families of each group."""
    seeds = read_all(RESULTS / folder)
    asked = tuple(dict.fromkeys(row["family"] for row in seeds[0]))
    groups = (asked, *(tuple(name for name in asked if (name in CONFIG.taught) is taught) for taught in (True, False)))
    lines = []
    for arm in ARMS:
        found = [[row for row in rows if row["arm"] == arm] for rows in seeds]
        found = [rows for rows in found if rows]
        if not found:
            continue
        cells = []
        for families in groups:
            chosen = [[row for row in rows if row["family"] in families] for rows in found]
            cells.append(spread(100 * statistics.mean(row["accuracy"] for row in rows) for rows in chosen))
            cells.append(spread(statistics.mean(row["mean_tokens"] for row in rows) for rows in chosen))
        first = [rows[0] for rows in found]
        steps = ", ".join(f"{row['steps']}{' (alarm)' if row['stopped'] else ''}" for row in first if "steps" in row)
        lines.append([arm, str(len(found)), *cells, steps])
    number = seeds[0][0]["n"]
    heading = ["arm", "seeds", "accuracy %", "tokens", "concise taught: accuracy %", "tokens"]
    heading += ["not taught: accuracy %", "tokens", "updates"]
    return (
        f"The small reasoner, sampled, on {number} held-out problems of each of {len(asked)} families: mean over the seeds, lowest "
        f"and highest. Made by `python -m scripts.experiments.small{' --hard' if folder.endswith('hard') else ''}`.\n\n"
        + markdown(heading, lines)
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--max_steps", type=int, default=40, help="optimizer steps of an arm")
    parser.add_argument("--hard", action="store_true", help="ask all families at all difficulties")
    parser.add_argument("--runs", help="folder for the runs")
    parser.add_argument("--report", action="store_true", help="only make table and plot")
    args = parser.parse_args(argv)
    folder = "small_hard" if args.hard else "small"
    args.runs = args.runs or str(ROOT / "runs" / folder)
    if not args.report:
        for seed in args.seeds:
            rows, on_the_way = [], []
            for arm in args.arms:
                rows += run(arm, seed, args)
                on_the_way += curve(arm, seed, args)
                found = [row for row in rows if row["arm"] == arm]
                means = (statistics.mean(row[field] for row in found) for field in ("accuracy", "mean_tokens"))
                print(seed, arm, found[0].get("steps"), *means, flush=True)
                config = {"seed": seed, "max_steps": args.max_steps}
                write_results(RESULTS / folder / f"seed-{seed}.json", rows, config)
                write_results(RESULTS / folder / f"curves-seed-{seed}.json", on_the_way, config)
    write_text(RESULTS / folder / "table.md", table(folder))
    if not args.hard:  # of which there are more families than panels
        plot()
    print(table(folder))


if __name__ == "__main__":
    main()
