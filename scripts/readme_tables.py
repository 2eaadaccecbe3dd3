"""
Writes the tables of README.md from the files in recipes/results.

    python scripts/readme_tables.py            writes them
    python scripts/readme_tables.py --check    ends with status 1 if they are not what the files say
"""

import argparse
import json
import re
from pathlib import Path

from trl_opsd.results import write_text


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
STAGES = {
    "sft": "SFT warm start",
    "rlvr": "RLVR",
    "prompt-only": "RLVR, asked to be concise (prompt-only)",
    "opsd": "**OPSD**",
}

SIZE_METHODS = {
    "teacher": "teacher",
    "pruned": "pruned only",
    "cold": "cold start",
    "sft": "SFT on the teacher's rollouts",
    "offline": "logits, on the teacher's rollouts",
    "rlvr": "RLVR",
    "opsd": "**OPSD**",
    "opsd-concise": "**OPSD**, teacher asked to be concise",
}


def spread(values: list[float]) -> str:
    numbers = (sum(values) / len(values), min(values), max(values))
    return "{:.1f} ({:.1f} to {:.1f})".format(*(round(number, 1) + 0.0 for number in numbers))  # no "-0.0"


def chain_table() -> str:
    """The stages of the tiny chain: mean over the seeds, with the lowest and the highest."""
    runs = [json.loads(file.read_text())["rows"] for file in sorted(RESULTS.glob("tiny_chain/seed-*/results.json"))]
    lines = [
        "| | accuracy greedy, % | accuracy sampled, % | tokens greedy | tokens sampled |",
        "|---|---|---|---|---|",
    ]
    for stage, name in STAGES.items():
        cells = []
        for field, scale in (("accuracy", 100), ("mean_tokens", 1)):
            for decoding in ("greedy", "sampled"):
                chosen = [row for rows in runs for row in rows if (row["stage"], row["decoding"]) == (stage, decoding)]
                cells.append(spread([scale * row[field] for row in chosen]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    changes = []
    for rows in runs:
        by_key = {(row["stage"], row["decoding"]): row for row in rows}
        changes.append(
            [
                100 * (by_key["opsd", decoding]["mean_tokens"] / by_key["rlvr", decoding]["mean_tokens"] - 1)
                for decoding in ("greedy", "sampled")
            ]
            + [
                100 * (by_key["opsd", decoding]["accuracy"] - by_key["rlvr", decoding]["accuracy"])
                for decoding in ("greedy", "sampled")
            ]
        )
    greedy, sampled, greedy_points, sampled_points = (list(column) for column in zip(*changes, strict=True))
    sentence = (
        f"OPSD against RLVR, over {len(runs)} seeds: tokens {spread(greedy)}% greedy and {spread(sampled)}% sampled at "
        f"temperature 1; accuracy {spread(greedy_points)} and {spread(sampled_points)} percentage points."
    )
    return "\n".join([*lines, "", sentence])


def divergence_table() -> str:
    """Time and memory of the divergence, against dense torch in the same run."""
    results = json.loads((RESULTS / "divergence" / "cpu.json").read_text())
    config = results["run"]["config"]
    names = {"fused": "ours", "chunked": "TRL", "liger": "Liger"}
    lines = ["| | clip | time / dense | extra memory, MiB | memory / dense |", "|---|---|---|---|---|"]
    dense = {(row["beta"], row["kl_clip"]): row for row in results["rows"] if row["backend"] == "dense"}
    for row in results["rows"]:
        if row["backend"] in names:
            memory = row["peak_extra_mib"] / dense[row["beta"], row["kl_clip"]]["peak_extra_mib"]
            lines.append(
                f"| β = {row['beta']:g}, {names[row['backend']]} | {'yes' if row['kl_clip'] else 'no'} | "
                f"{row['cpu_seconds_to_dense']:.2f} | {row['peak_extra_mib']:.0f} | {memory:.2f} |"
            )
    head = (
        f"Forward and backward of the loss on CPU, {config['dtype']}, {config['tokens']:,} tokens × "
        f"{config['hidden_size']} × {config['vocab_size']:,}; dense torch is the row each ratio is to, with the same "
        "clip. Time is processor time, because the machine was shared. On a GPU it has not been measured."
    )
    return "\n".join([head, "", *lines])


def size_table() -> str:
    """The size sweep: for each ratio and method the mean over the seeds, with the lowest and the highest."""
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("tiny_size/seed-*/results.json"))]
    rows = [row for run in runs for row in run["rows"]]
    config = runs[0]["run"]["config"]
    lines = [
        "| removed | parameters | method | accuracy greedy, % | accuracy sampled, % | of the teacher's, sampled, % | "
        "tokens sampled | MFLOPs per answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ratio, method in dict.fromkeys((row["ratio"], row["method"]) for row in rows):
        chosen = {
            decoding: [
                row for row in rows if (row["ratio"], row["method"], row["decoding"]) == (ratio, method, decoding)
            ]
            for decoding in ("greedy", "sampled")
        }
        sampled = chosen["sampled"]
        cells = [f"{100 * ratio:g}%", f"{sampled[0]['parameters']:,}", SIZE_METHODS[method]]
        cells += [spread([100 * row["accuracy"] for row in chosen[decoding]]) for decoding in ("greedy", "sampled")]
        cells += [spread([100 * row["kept"] for row in sampled]), spread([row["mean_tokens"] for row in sampled])]
        cells.append(f"{sum(row['answer_flops'] for row in sampled) / len(sampled) / 1e6:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    offered = next(row["rollouts"] for row in rows if row["rollouts"])
    sentence = (
        f"{len(runs)} seeds. All methods of a ratio start from the same pruned model after {config['cold_start_steps']} "
        f"updates of supervised fine-tuning (the cold start) and make {config['updates']} more, on {offered:,} rollouts."
    )
    return "\n".join([*lines, "", sentence])


def step_table() -> str:
    """The train phase of an optimizer step, beside TRL's own trainers."""
    results = json.loads((RESULTS / "step" / "cpu.json").read_text())
    config, rows = results["run"]["config"], results["rows"]
    lines = [
        "| | useful tokens/s | to the peer | peak memory, MiB | to the peer | teacher / student / loss / backward, % |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = " / ".join(
            f"{100 * row['parts'][part] / row['seconds']:.0f}" for part in ("teacher", "student", "loss", "backward")
        )
        lines.append(
            f"| {row['arm']} | {row['useful_per_s']:.0f} | {row['speed_to_peer']:.2f} | {row['peak_mib']:.0f} | "
            f"{row['memory_to_peer']:.2f} | {shares} |"
        )
    head = (
        f"The same {config['rollouts']} rollouts (log-normal lengths, median {config['median_length']}, at most "
        f"{config['max_length']:,} tokens), half of them correct, {rows[0]['parameters'] / 1e6:.1f}M parameters on a CPU, "
        "generation left out. Useful tokens are those of correct rollouts. The peer of an external teacher is TRL's "
        "DistillationTrainer, that of a teacher in context its SDFTTrainer with full logits. Processor time, median of "
        f"{len(rows[0]['seconds_all'])} steps."
    )
    return "\n".join([head, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = old = path.read_text()
    tables = {"chain": chain_table, "divergence": divergence_table, "size": size_table, "step": step_table}
    for name, table in tables.items():
        if f"<!-- {name} -->" not in text:  # its results need not be there either
            continue
        block = f"<!-- {name} -->\n{table()}\n<!-- end of {name} -->"
        text = re.sub(
            rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
    if args.check:
        raise SystemExit(text != old)
    write_text(path, text)


if __name__ == "__main__":
    main()
