"""
OPSD on the tiny reasoner with solutions from the rollout bank, against OPSD with gold solutions, several seeds.

    OMP_NUM_THREADS=1 python scripts/tiny_bank.py --seeds 0 1 2

Takes the RLVR runs that scripts/rlvr_curves.py leaves (and makes those it does not find) with their banks, trains each
arm from them with recipes/tiny/opsd.yaml, and measures it on the held-out problems. One results file for each seed,
recipes/results/tiny_bank/seed-<seed>.json, and the table from whatever files there are (`--report`: only that).

| arm | what the teacher sees as the solution |
|---|---|
| gold | the data's |
| gold, prompts of the bank | the data's, of the prompts that the bank has a rollout for |
| bank | the shortest rollout that RLVR has banked: as wordy as the model that wrote it |
| bank, asked to be concise | the shortest of four rollouts of the RLVR model, asked to be concise |
"""

import argparse
import json
from pathlib import Path

from rlvr_curves import RESULTS, ROOT, evaluate, run_module, train

from trl_opsd.data import load_prompts
from trl_opsd.results import write_results, write_text
from trl_opsd.rlvr.bank import prompt_id, read_rollouts
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


def concise_bank(model: Path, data: Path, seed: int, folder: Path) -> Path:
    """A bank of rollouts that were asked to be concise; they are filed under the plain prompts."""
    if not (folder / "bank.json").is_file():
        options = {"model_name_or_path": model, "dataset_name": data, "dataset_split": "train", "seed": seed}
        options |= {"prompt_template": CONCISE_TEMPLATE, "decoding": "sampled", "rollouts_per_prompt": 4}
        options |= {"bank": folder, "output": folder / "bank.json"}
        run_module("trl_opsd.compress.bank", "recipes/tiny/evaluate.yaml", **options)
    return folder


def run(seed: int, args: argparse.Namespace) -> None:
    output = RESULTS / "tiny_bank" / f"seed-{seed}.json"
    if output.is_file():
        return
    runs, sft = Path(args.runs), Path(args.starts) / f"strong-{seed}" / "sft"
    train("trl_opsd.tiny", "recipes/tiny/sft.yaml", sft, seed=seed)
    data, rlvr = sft / "data", runs / f"1_to_6_operations-{seed}"
    options = {"seed": seed, "model_name_or_path": sft, "dataset_name": data, "max_steps": 60, "logging_steps": 1}
    train("trl_opsd.rlvr", "recipes/tiny/rlvr.yaml", rlvr, **options)
    banks = {
        "gold": None,
        "gold, prompts of the bank": None,
        "bank": rlvr / "bank",
        "bank, asked to be concise": concise_bank(rlvr, data, seed, runs / f"concise_bank-{seed}"),
    }
    banked = runs / f"banked-{seed}.jsonl"
    ids = set(read_rollouts(banks["bank"])["prompt_id"])
    load_prompts(str(data)).filter(lambda row: prompt_id(row["prompt"]) in ids).to_json(banked)
    rows = [{"arm": "RLVR", **row} for row in evaluate(rlvr, data, seed, args.max_samples)]
    for arm, bank in banks.items():
        folder = runs / f"opsd-{'_'.join(arm.replace(',', '').split())}-{seed}"
        prompts, tokens = banked if "prompts of" in arm else data, None
        options = {"model_name_or_path": rlvr, "dataset_name": prompts, "seed": seed, "max_steps": args.max_steps}
        # An arm that falls is a result, and is trained to its end
        options |= {"teacher_prompt_template": SOLUTION_TEMPLATE, "probe_prompts": 0, "alarm_correct_drop": 1.0}
        options |= {"solution": "bank", "rollout_bank": bank} if bank else {}
        train("trl_opsd.opsd", "recipes/tiny/opsd.yaml", folder, **options)
        prompts = len(load_prompts(str(prompts)))
        if bank:
            shortest = {}
            for row in read_rollouts(bank):
                shortest.setdefault(row["prompt_id"], row["num_tokens"])
            prompts, tokens = len(shortest), sum(shortest.values()) / len(shortest)
        for row in evaluate(folder, data, seed, args.max_samples):
            rows.append({"arm": arm, "prompts": prompts, "solution_tokens": tokens, **row})
        print(seed, arm, [(row["decoding"], row["accuracy"], row["mean_tokens"]) for row in rows[-2:]], flush=True)
    write_results(output, rows, {"seed": seed, "max_steps": args.max_steps, "max_samples": args.max_samples})


def report() -> None:
    """Writes table.md: every arm's mean over the seeds, with the lowest and the highest."""
    files = sorted((RESULTS / "tiny_bank").glob("seed-*.json"))
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]

    def cell(arm: str, decoding: str, field: str, scale: float) -> str:
        values = [scale * row[field] for row in rows if (row["arm"], row["decoding"]) == (arm, decoding)]
        return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    columns = {
        "sampled accuracy, %": ("sampled", "accuracy", 100),
        "greedy accuracy, %": ("greedy", "accuracy", 100),
        "tokens, sampled": ("sampled", "mean_tokens", 1),
        "tokens, greedy": ("greedy", "mean_tokens", 1),
    }
    lines = [f"| solution | prompts | its tokens | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        given = [
            next((row.get(name) for row in rows if row["arm"] == arm), None) for name in ("prompts", "solution_tokens")
        ]
        given = ["" if value is None else f"{value:,.0f}" for value in given]
        cells = [cell(arm, *column) for column in columns.values()]
        lines.append(f"| {' | '.join([arm if arm != 'RLVR' else '*RLVR, before OPSD*', *given, *cells])} |")
    text = (
        f"OPSD of the tiny reasoner with a solution in the teacher's context, over {len(files)} seeds: mean, lowest and "
        "highest. Made by `scripts/tiny_bank.py`."
    )
    write_text(RESULTS / "tiny_bank" / "table.md", "\n".join([text, "", *lines, ""]))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default=str(ROOT / "runs" / "rlvr_curves"), help="folder for the runs")
    parser.add_argument("--starts", default=str(ROOT / "runs" / "ablation"), help="folder for the warm starts")
    parser.add_argument("--max_steps", type=int, default=60, help="optimizer steps of an arm")
    parser.add_argument("--max_samples", type=int, default=2048, help="held-out problems for each decoding")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args()
    if not args.report:
        for seed in args.seeds:
            run(seed, args)
    report()


if __name__ == "__main__":
    main()
