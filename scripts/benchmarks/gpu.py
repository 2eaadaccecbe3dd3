"""
What one GPU says, in minutes: the loss beside TRL's and Liger's, and a training step beside TRL's trainers.

    python -m scripts.benchmarks.gpu                  # N=8192 H=4096 V=151936; Qwen3-0.6B and 1.7B, 4k-token completions
    python -m scripts.benchmarks.gpu --device cpu     # the same code, small: says that it runs, and nothing of speed

The weights are random, nothing is fetched, and no engine takes part. The pieces are scripts/benchmarks/divergence.py and
step.py, which measure more. What is not begun within `--seconds` is listed as out of time, and what does not fit, as out
of memory. Results go to recipes/results/gpu/loss-<device>.json and step-<model>-<device>.json, with device and versions.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from scripts.benchmarks import divergence, step
from scripts.harness.processes import run_alone
from scripts.harness.results import RESULTS, write_results
from scripts.harness.tables import markdown


# Beside TRL's trainer of each kind of teacher; what is left out first, when time is short, comes last
ARMS = [
    "TRL Distillation",
    "ours, external teacher, correct",
    "TRL SDFT, full logits",
    "ours, context, correct",
    "ours, external teacher, all",
]
ROLLOUTS = {"rollouts": 16, "median_length": 2500, "max_length": 4096, "budget": 16384, "steps": 2}
SIZES = {
    "cuda": {
        "loss": {"tokens": 8192, "hidden_size": 4096, "vocab_size": 151936, "dtype": "bfloat16", "repeats": 7},
        "step": {model: {"model": model, **ROLLOUTS} for model in ("0.6B", "1.7B")},
    },
    "cpu": {
        "loss": {"tokens": 64, "hidden_size": 32, "vocab_size": 512, "dtype": "float32", "repeats": 2},
        "step": {
            "tiny": {"hidden_size": 128, "num_layers": 2, "vocab_size": 512}
            | {"rollouts": 4, "median_length": 48, "max_length": 320, "budget": 1024, "steps": 1}
        },
    },
}
# With the clip, times of the faster of TRL's and Liger's, and what it may hold beside inputs and gradients
TIME_TARGET, MEMORY_TARGET_MIB = 1.1, 2048


def measure_loss(args: argparse.Namespace, size: dict) -> list[dict]:
    """Rows of [`divergence`], of one objective with the clip and without."""
    options = {"device": args.device, "betas": [1.0], "kl_clip": 1e-4, "seed": 0, **size}
    options["backends"] = ["fused", "chunked", "liger"]
    options = argparse.Namespace(**options)
    cases = divergence.cases_of(options)
    divergence.measure(cases, options)
    rows = divergence.rows_of(cases, options)
    # Both gradients are returned, whoever computes them
    item = getattr(torch, size["dtype"]).itemsize
    gradients = (size["tokens"] + size["vocab_size"]) * size["hidden_size"] * item / (1 << 20)
    peers = [row["seconds_median"] for row in rows if row["backend"] in ("chunked", "liger") and "runs" in row]
    for row in rows:
        if "runs" in row:
            row["extra_mib"] = row["peak_extra_mib"] - gradients
            row["seconds_to_faster_peer"] = row["seconds_median"] / min(peers) if peers else None
    return rows


def measure_step(args: argparse.Namespace, name: str, size: dict, deadline: float) -> list[dict]:
    """Rows of [`step`], of one size."""
    with tempfile.TemporaryDirectory() as folder:
        if time.monotonic() < deadline:
            run_alone(step.checkpoints, size, args.device, folder)
        rows = step.measure(ARMS, size, args.device, args.per_device, 0, folder=folder, deadline=deadline)
    return [{"size": name, **row} for row in rows]


def loss_table(rows: list[dict]) -> str:
    names = {"products": "the four products", "fused": "ours", "chunked": "TRL", "liger": "Liger"}
    lines = []
    for row in rows:
        cells = [names[row["backend"]], "yes" if row["kl_clip"] else "no"]
        if "runs" not in row:
            lines.append([*cells, "out of memory", "", ""])
            continue
        cells += [f"{1000 * row['seconds_median']:.1f}", f"{row['seconds_to_faster_peer']:.2f}"]
        lines.append([*cells, f"{row['extra_mib']:.0f}" if row["backend"] != "products" else ""])
    return markdown(["", "clip", "ms", "to the faster of TRL's and Liger's", "extra memory, MiB"], lines)


def step_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "seconds" not in row:
            why = next(name for name in ("out_of_memory", "out_of_time") if name in row)
            lines.append([row["size"], row["arm"], why.replace("_", " "), "", "", "", ""])
            continue
        share = f"{100 * row['mfu']:.0f}" if "mfu" in row else ""
        cells = [row["size"], row["arm"], f"{row['useful_per_s']:.0f}"]
        cells += [f"{row[name]:.2f}" if name in row else "" for name in ("speed_to_peer",)]
        cells += [f"{row['peak_mib']:.0f}", f"{row['memory_to_peer']:.2f}" if "memory_to_peer" in row else "", share]
        lines.append(cells)
    heading = ["", "", "useful tokens/s", "to the peer", "peak memory, MiB", "to the peer", "share of peak FLOPs, %"]
    return markdown(heading, lines)


def table() -> str:
    """What a GPU has said, if one has."""
    blocks = []
    for path in sorted((RESULTS / "gpu").glob("loss-*.json")):
        device = path.stem.removeprefix("loss-")
        blocks.append(f"On {device}:\n\n{loss_table(json.loads(path.read_text())['rows'])}")
        steps = sorted(path.parent.glob(f"step-*-{device}.json"))
        blocks.append(
            step_table([row for step_path in steps for row in json.loads(step_path.read_text())["rows"]])
            if steps
            else "The step beside TRL's trainers was not measured: the time on that machine was up."
        )
    return "\n\n".join(blocks) or (
        "Nothing has been measured: no GPU was at hand. `python -m scripts.benchmarks.gpu` takes minutes on one and makes "
        f"this table. The targets of the loss, with the clip: at most {TIME_TARGET} times the faster of TRL's and Liger's, "
        f"in at most {MEMORY_TARGET_MIB:,} MiB beside inputs and gradients."
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument(
        "--parts", nargs="+", choices=["loss", "step"], default=["loss", "step"], help="what to measure"
    )
    parser.add_argument(
        "--models", nargs="+", help="whose step to measure (on a GPU of 0.6B and 1.7B, all by default)"
    )
    parser.add_argument("--per_device", type=int, default=2, help="rollouts of a micro-batch without a budget")
    parser.add_argument("--seconds", type=float, default=330, help="after these nothing more is begun")
    parser.add_argument("--output_dir", type=Path, default=RESULTS / "gpu")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU: run it on one, or with `--device cpu` to see that it runs.")
    size = SIZES[args.device]
    models = list(size["step"]) if args.models is None else args.models
    if missing := set(models) - set(size["step"]):
        parser.error(f"--models: there is no {', '.join(sorted(missing))}, take of {', '.join(size['step'])}.")
    deadline = time.monotonic() + args.seconds
    device = "cpu" if args.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    common = {"device": args.device, "seed": 0}

    if "loss" in args.parts:
        rows = measure_loss(args, size["loss"])
        write_results(args.output_dir / f"loss-{device}.json", rows, common | size["loss"])
        print(f"\n{loss_table(rows)}\n", flush=True)
        clipped = next((row for row in rows if row["backend"] == "fused" and row["kl_clip"] and "runs" in row), None)
        if clipped is not None and clipped["seconds_to_faster_peer"] is not None:
            met = clipped["seconds_to_faster_peer"] <= TIME_TARGET, clipped["extra_mib"] <= MEMORY_TARGET_MIB
            print(
                f"Targets with the clip: time {'met' if met[0] else 'MISSED'}, memory {'met' if met[1] else 'MISSED'}\n"
            )

    if "step" in args.parts:
        for name in models:
            rows = measure_step(args, name, size["step"][name], deadline)
            # Beside the share of the peak, what the peak was taken to be
            config = common | {"per_device": args.per_device, "sizes": {name: size["step"][name]}}
            config["peak_flops"] = step.ASSUMED["peak"]
            write_results(args.output_dir / f"step-{name}-{device}.json", rows, config)
            print(f"\n{step_table(rows)}\n", flush=True)
    print(args.output_dir)


if __name__ == "__main__":
    main()
