"""
OPSD on the tiny reasoner with solutions from the rollout bank, against OPSD with gold solutions, several seeds.

    OMP_NUM_THREADS=1 python -m scripts.experiments.bank --seeds 0 1 2

Takes the RLVR runs that scripts.experiments.rlvr_curves leaves (and makes those it does not find) with their banks, trains each
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
from pathlib import Path

from scripts.harness.results import RESULTS, ROOT, read_all, write_results, write_text
from scripts.harness.stages import evaluate_checkpoint, run_stage, train_stage, warm_start
from scripts.harness.tables import markdown, spread
from trl_opsd.data import load_prompts
from trl_opsd.rlvr.bank import prompt_id, read_rollouts
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


def concise_bank(model: Path, data: Path, seed: int, folder: Path) -> Path:
    """A bank of rollouts that were asked to be concise; they are filed under the plain prompts."""
    output = folder.with_suffix(".json")  # beside the bank, whose own `bank.json` says who wrote it
    if not output.is_file():
        options = {"model_name_or_path": model, "dataset_name": data, "dataset_split": "train", "seed": seed}
        options |= {"prompt_template": CONCISE_TEMPLATE, "decoding": "sampled", "rollouts_per_prompt": 4}
        options |= {"bank": folder, "output": output}
        run_stage("trl_opsd.compress.bank", "recipes/tiny/evaluate.yaml", **options)
    return folder


def run(seed: int, args: argparse.Namespace) -> None:
    output = RESULTS / "tiny_bank" / f"seed-{seed}.json"
    if output.is_file():
        return
    runs, sft = Path(args.runs), warm_start("strong", seed, Path(args.starts))
    data, rlvr = sft / "data", runs / f"1_to_6_operations-{seed}"
    options = {"seed": seed, "model_name_or_path": sft, "dataset_name": data, "max_steps": 60, "logging_steps": 1}
    train_stage("trl_opsd.rlvr", "recipes/tiny/rlvr.yaml", rlvr, **options)
    banks = {
        "gold": None,
        "gold, prompts of the bank": None,
        "bank": rlvr / "bank",
        "bank, asked to be concise": concise_bank(rlvr, data, seed, runs / f"concise_bank-{seed}"),
    }
    banked = runs / f"banked-{seed}.jsonl"
    ids = set(read_rollouts(banks["bank"])["prompt_id"])
    load_prompts(str(data)).filter(lambda row: prompt_id(row["prompt"]) in ids).to_json(banked)
    rows = [{"arm": "RLVR", **row} for row in evaluate_checkpoint(rlvr, data, seed, args.max_samples)]
    for arm, bank in banks.items():
        folder = runs / f"opsd-{'_'.join(arm.replace(',', '').split())}-{seed}"
        prompts, tokens = banked if "prompts of" in arm else data, None
        options = {"model_name_or_path": rlvr, "dataset_name": prompts, "seed": seed, "max_steps": args.max_steps}
        # An arm that falls is a result, and is trained to its end
        options |= {"teacher_prompt_template": SOLUTION_TEMPLATE, "probe_prompts": 0, "alarm_correct_drop": 1.0}
        options |= {"solution": "bank", "rollout_bank": bank} if bank else {}
        train_stage("trl_opsd.opsd", "recipes/tiny/opsd.yaml", folder, **options)
        prompts = len(load_prompts(str(prompts)))
        if bank:
            shortest = {}
            for row in read_rollouts(bank):
                shortest.setdefault(row["prompt_id"], row["num_tokens"])
            prompts, tokens = len(shortest), sum(shortest.values()) / len(shortest)
        for row in evaluate_checkpoint(folder, data, seed, args.max_samples):
            rows.append({"arm": arm, "prompts": prompts, "solution_tokens": tokens, **row})
        print(seed, arm, [(row["decoding"], row["accuracy"], row["mean_tokens"]) for row in rows[-2:]], flush=True)
    write_results(output, rows, {"seed": seed, "max_steps": args.max_steps, "max_samples": args.max_samples})


def table() -> str:
    """Every arm's mean over the seeds, with the lowest and the highest."""
    seeds = read_all(RESULTS / "tiny_bank")
    rows = [row for rows in seeds for row in rows]
    columns = {
        "sampled accuracy, %": ("sampled", "accuracy", 100),
        "greedy accuracy, %": ("greedy", "accuracy", 100),
        "tokens, sampled": ("sampled", "mean_tokens", 1),
        "tokens, greedy": ("greedy", "mean_tokens", 1),
    }
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        chosen = [row for row in rows if row["arm"] == arm]
        given = [chosen[0].get(name) for name in ("prompts", "solution_tokens")]
        given = ["" if value is None else f"{value:,.0f}" for value in given]
        cells = [
            spread(scale * row[field] for row in chosen if row["decoding"] == decoding)
            for decoding, field, scale in columns.values()
        ]
        lines.append([arm if arm != "RLVR" else "*RLVR, before OPSD*", *given, *cells])
    return (
        f"OPSD of the tiny reasoner with a solution in the teacher's context, over {len(seeds)} seeds: mean, lowest and "
        "highest. Made by `python -m scripts.experiments.bank`.\n\n"
        + markdown(["solution", "prompts", "its tokens", *columns], lines)
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", default=str(ROOT / "runs" / "rlvr_curves"), help="folder for the runs")
    parser.add_argument("--starts", default=str(ROOT / "runs" / "ablation"), help="folder for the warm starts")
    parser.add_argument("--max_steps", type=int, default=60, help="optimizer steps of an arm")
    parser.add_argument("--max_samples", type=int, default=2048, help="held-out problems for each decoding")
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    if not args.report:
        for seed in args.seeds:
            run(seed, args)
    write_text(RESULTS / "tiny_bank" / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
