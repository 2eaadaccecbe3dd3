"""
RLVR on the tiny reasoner from several difficulties, with and without refilling, several seeds.

    OMP_NUM_THREADS=1 python -m scripts.experiments.rlvr_curves --seeds 0 1 2

Makes the warm starts that it does not find, trains every case with recipes/tiny/rlvr.yaml, measures it on held-out
problems of its difficulty, and writes one results file for each seed, recipes/results/rlvr_curves/seed-<seed>.json,
then the plot and the table from whatever files there are (`--report`: only those). Finished runs are kept, and with each
its rollout bank. About eight processor minutes for a seed.
"""

import argparse
from pathlib import Path

import numpy as np

from scripts.harness.plots import plt, save
from scripts.harness.results import RESULTS, ROOT, read, read_all, write_results, write_text
from scripts.harness.stages import evaluate_checkpoint, train_stage, warm_start
from scripts.harness.tables import markdown, spread
from trl_opsd.data import load_prompts


# Where it starts from, numbers of operations, generation rounds, optimizer steps
CASES = {
    "1 to 6 operations": ("strong", (1, 6), 1, 60),
    "1 to 6, refilled": ("strong", (1, 6), 3, 60),
    "1 to 6, refilled, fewer steps": ("strong", (1, 6), 3, 40),
    "1 to 2 operations": ("strong", (1, 2), 1, 40),
    "3 to 4 operations": ("strong", (3, 4), 1, 40),
    "5 to 6 operations": ("strong", (5, 6), 1, 40),
    "half-learned, 1 to 6": ("weak", (1, 6), 1, 40),
}
WINDOW = 5  # steps that a point of the plot is a mean of: one step is 24 prompts


def make_data(source: Path, ops: tuple[int, int], folder: Path) -> Path:
    """The problems of some numbers of operations; the source itself if that is all of them."""
    if ops == (1, 6):
        return source
    for split in ("train", "test"):
        if not (folder / f"{split}.jsonl").is_file():
            rows = load_prompts(str(source), split).filter(lambda row: ops[0] <= row["num_ops"] <= ops[1])
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_json(folder / f"{split}.jsonl")
    return folder


def run(name: str, seed: int, runs: Path, starts: Path) -> list[dict]:
    """Trains one case. Returns a row for every optimizer step, and one for the model at the end."""
    start, ops, rounds, steps = CASES[name]
    sft = warm_start(start, seed, starts)
    data = make_data(sft / "data", ops, runs / f"data-{start}-{seed}-{ops[0]}-{ops[1]}")
    output = runs / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    options = {"seed": seed, "model_name_or_path": sft, "dataset_name": data, "max_steps": steps, "logging_steps": 1}
    train_stage("trl_opsd.rlvr", "recipes/tiny/rlvr.yaml", output, max_generation_rounds=rounds, **options)
    case = {"case": name, "start": start, "ops": list(ops), "max_generation_rounds": rounds, "seed": seed}
    logs = [row for row in read(output / "rlvr.json") if "reward" in row]
    rows = [
        {
            **case,
            "step": step,
            "accuracy": log["rewards/math_reward/mean"],
            "mean_tokens": log["completions/mean_length"],
            "tokens_seen": log["num_tokens"],
            "generation_rounds": log.get("rlvr/generation_rounds", 1),
            "groups_without_variance": log.get("rlvr/groups_without_variance", log["frac_reward_zero_std"]),
        }
        for step, log in enumerate(logs, start=1)
    ]
    for row in evaluate_checkpoint(output, data, seed, 1024):
        rows.append({**case, "step": "end", "tokens_seen": logs[-1]["num_tokens"], **row})
    print(seed, name, f"{rows[0]['accuracy']:.3f} to {rows[-1]['accuracy']:.3f}", flush=True)
    return rows


def values(seeds: list[list[dict]], name: str, field: str, at_end: bool) -> np.ndarray:
    """A number of a case: of each seed, and each step unless at the end."""
    chosen = [
        [row for row in rows if row["case"] == name and row.get("decoding") == ("sampled" if at_end else None)]
        for rows in seeds
    ]
    return np.array([[row[field] for row in rows] for rows in chosen])


def plot() -> None:
    """Writes curves.png."""
    seeds = read_all(RESULTS / "rlvr_curves")
    figure, (by_step, by_token) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for name in CASES:
        accuracy = np.lib.stride_tricks.sliding_window_view(
            100 * values(seeds, name, "accuracy", False), WINDOW, 1
        ).mean(-1)
        steps = np.arange(WINDOW, WINDOW + accuracy.shape[1])
        tokens = values(seeds, name, "tokens_seen", False).mean(0)[WINDOW - 1 :] / 1000
        axes = [(by_step, steps)] if "refilled" not in name else []
        axes += [(by_token, tokens)] if name.startswith("1 to 6") else []
        for axis, x in axes:
            (line,) = axis.plot(x, accuracy.mean(0), label=name)
            axis.fill_between(x, accuracy.min(0), accuracy.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    by_step.set(xlabel="optimizer step", ylabel="correct, first round, %", title="by difficulty")
    by_token.set(xlabel="thousand tokens seen (prompts and every rollout)", title="with and without refilling")
    for axis in (by_step, by_token):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.suptitle(f"RLVR of the tiny reasoner, {len(seeds)} seeds: mean, lowest and highest", fontsize=11)
    save(figure, RESULTS / "rlvr_curves" / "curves.png", dpi=130)


def table() -> str:
    """Every case's mean over the seeds, with the lowest and the highest."""
    seeds = read_all(RESULTS / "rlvr_curves")
    lines = []
    for name, (_, _, _, steps) in CASES.items():
        accuracy, flat = (100 * values(seeds, name, field, False) for field in ("accuracy", "groups_without_variance"))
        ends = 100 * values(seeds, name, "accuracy", True), values(seeds, name, "tokens_seen", True) / 1000
        cells = [accuracy[:, :WINDOW].mean(1), accuracy[:, -WINDOW:].mean(1), *ends, flat[:, -WINDOW:].mean(1)]
        lines.append([name, str(steps), *(spread(cell.ravel()) for cell in cells)])
    heading = ["case", "steps", "accuracy, first 5 steps", "last 5 steps", "held-out, sampled", "thousand tokens seen"]
    return (
        f"Means over {len(seeds)} seeds, with the lowest and the highest. Accuracy by step is that of the first round of "
        "rollouts at temperature 1, on prompts that no earlier first round has asked. Where groups are refilled, those "
        "without variance are the ones left. Made by `python -m scripts.experiments.rlvr_curves`.\n\n"
        + markdown([*heading, "groups without variance, last 5 steps, %"], lines)
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default=str(ROOT / "runs" / "rlvr_curves"), help="folder for the runs")
    parser.add_argument("--starts", default=str(ROOT / "runs" / "ablation"), help="folder for the warm starts")
    parser.add_argument("--report", action="store_true", help="only make the plot and the table")
    args = parser.parse_args(argv)
    if not args.report:
        for seed in args.seeds:
            output = RESULTS / "rlvr_curves" / f"seed-{seed}.json"
            if not output.is_file():
                rows = [row for name in CASES for row in run(name, seed, Path(args.runs), Path(args.starts))]
                write_results(output, rows, {"seed": seed, "recipe": "recipes/tiny/rlvr.yaml"})
    plot()
    write_text(RESULTS / "rlvr_curves" / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
