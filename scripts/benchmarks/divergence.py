"""
Times the distillation objective, forward and backward, and takes its peak memory: dense torch against every backend.

    python -m scripts.benchmarks.divergence                 # CPU: N=2048 H=576 V=49152 float32
    python -m scripts.benchmarks.divergence --device cuda   # GPU: N=8192 H=4096 V=151936 bfloat16

Every case has a process of its own, and the cases take turns (A B C, A B C, ...), so that whatever else the machine
does meets them all alike. Results go to recipes/results/divergence/<device>.json, the plot beside it. Without a GPU its
target is listed there as not measured.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from scripts.harness.meter import Meter
from scripts.harness.plots import plt, save
from scripts.harness.processes import process
from scripts.harness.results import RESULTS, write_results
from scripts.harness.tables import markdown
from tests.divergence_reference import dense_linear_divergence
from trl_opsd.opsd.divergence import linear_divergence


DEFAULTS = {
    "cpu": {"tokens": 2048, "hidden_size": 576, "vocab_size": 49152, "dtype": "float32", "repeats": 3},
    "cuda": {"tokens": 8192, "hidden_size": 4096, "vocab_size": 151936, "dtype": "bfloat16", "repeats": 20},
}

# What a process of a case measures, with everything that it needs: set by `prepare`, in that process
step: Callable[[int], None]


def prepare(case: dict, args: argparse.Namespace) -> None:
    """Makes the inputs of a case."""
    global step
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)

    def tensor(*shape, std=1.0, grad=False):
        values = torch.empty(shape, dtype=dtype, device=args.device).normal_(std=std)
        return values.requires_grad_(grad)

    N, H, V = args.tokens, args.hidden_size, args.vocab_size
    std = 2 / H**0.5  # logits with a standard deviation of 2: probabilities from 1e-8 to 1e-1 or so
    student_hidden, teacher_hidden = tensor(N, H, grad=True), tensor(N, H)
    student_head, teacher_head = tensor(V, H, std=std, grad=True), tensor(V, H, std=std)
    objective = {"beta": case["beta"], "kl_clip": case["kl_clip"]}

    def products(n):
        # The floor: both projections and both gradients, at the sizes of the whole problem
        logits = torch.empty((n, V), dtype=dtype, device=args.device)
        with torch.no_grad():
            torch.mm(teacher_hidden[:n], teacher_head.t(), out=logits)
            torch.mm(student_hidden[:n], student_head.t(), out=logits)
            return logits @ student_head, logits.t() @ student_hidden[:n]

    def run(n):
        if case["backend"] == "products":
            return products(n)
        inputs = student_hidden[:n], student_head, teacher_hidden[:n], teacher_head
        if case["backend"] == "dense":
            value = dense_linear_divergence(*inputs, **objective)
        else:
            value, _ = linear_divergence(*inputs, backend=case["backend"], **objective)
        value.mean().backward()
        student_hidden.grad = student_head.grad = None

    run(args.tokens if args.device == "cuda" else 8)  # kernels are compiled for the sizes they run at
    step = run


def measure_once(args: argparse.Namespace) -> dict[str, float] | None:
    """Measures the case of this process; `None` if it ran out of memory."""
    try:
        with Meter(args.device) as meter:
            step(args.tokens)
    except torch.OutOfMemoryError:
        return None
    return {name: getattr(meter, name) for name in ("seconds", "cpu_seconds", "peak_mib")}


def measure(cases: list[dict], args: argparse.Namespace) -> None:
    """Rounds of all cases, one measurement of each case per round."""
    # A GPU is nobody else's, and has no room for the inputs of all cases at once
    groups = [cases] if args.device == "cpu" else [[case] for case in cases]
    for group in groups:
        with ExitStack() as stack:
            calls = []
            for case in group:
                calls.append(stack.enter_context(process()))
                calls[-1](prepare, case, args)
                case["runs"] = []
            for repeat in range(args.repeats):
                for case, call in zip(group, calls, strict=True):
                    run = call(measure_once, args)
                    case["runs"].append(run)
                    label = f"{case['backend']} beta={case['beta']} kl_clip={case['kl_clip']}"
                    text = (
                        "out of memory"
                        if run is None
                        else f"{run['seconds']:.3f} s ({run['cpu_seconds']:.3f} s CPU), {run['peak_mib']:.0f} MiB"
                    )
                    print(f"[{repeat + 1}/{args.repeats}] {label}: {text}", flush=True)


def rows_of(cases, args):
    """
    One row per case: quantiles, and medians of the ratios, taken within each round, to dense torch with the same
    objective and to the four matrix products. Where others use the processor too, its seconds say more than the clock's.
    """
    rows = []
    for case in cases:
        row = {name: case[name] for name in ("backend", "beta", "kl_clip")}
        runs = case["runs"]
        if None in runs:
            rows.append(row | {"out_of_memory": True})
            continue
        times = ["seconds", "cpu_seconds"] if args.device == "cpu" else ["seconds"]
        for name in times:
            for label, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8)):
                row[f"{name}_{label}"] = float(np.quantile([run[name] for run in runs], share))
        row["peak_extra_mib"] = max(run["peak_mib"] for run in runs)
        for reference, other in _references(case, cases).items():
            if None in other["runs"]:
                continue
            for name in times:
                ratios = [run[name] / base[name] for run, base in zip(runs, other["runs"], strict=True)]
                row[f"{name}_to_{reference}"] = statistics.median(ratios)
            if reference == "dense":
                row["memory_to_dense"] = row["peak_extra_mib"] / max(run["peak_mib"] for run in other["runs"])
        row["runs"] = runs
        rows.append(row)
    return rows


def _references(case, cases):
    found = {}
    for other in cases:
        if other["backend"] == "products":
            found["products"] = other
        elif other["backend"] == "dense" and (other["beta"], other["kl_clip"]) == (case["beta"], case["kl_clip"]):
            found["dense"] = other
    return found


def cases_of(args: argparse.Namespace) -> list[dict]:
    """What is measured: the products, and each objective by each backend that has it."""
    cases = [{"backend": "products", "beta": None, "kl_clip": None}]
    for beta in args.betas:
        for kl_clip in (args.kl_clip, None):
            for backend in args.backends:
                if kl_clip is None or backend in ("dense", "fused"):
                    cases.append({"backend": backend, "beta": beta, "kl_clip": kl_clip})
    return cases


def plot(rows, path, title, time_name):
    betas = sorted({row["beta"] for row in rows if row["beta"] is not None})
    figure, axes = plt.subplots(2, len(betas), figsize=(5.2 * len(betas), 5.6), squeeze=False)
    for column, beta in enumerate(betas):
        shown = [row for row in rows if row["beta"] in (beta, None) and "runs" in row][::-1]
        labels = [row["backend"] + (" + clip" if row["kl_clip"] else "") for row in shown]
        colors = ["tab:blue" if row["backend"] == "fused" else "lightgray" for row in shown]
        low, medians, high = ([row[f"{time_name}_{label}"] for row in shown] for label in ("p20", "median", "p80"))
        errors = [
            [m - x for m, x in zip(medians, low, strict=True)],
            [x - m for m, x in zip(medians, high, strict=True)],
        ]
        axes[0][column].barh(labels, medians, xerr=errors, color=colors)
        axes[0][column].set(title=f"beta = {beta}", xlabel=f"{time_name.replace('_', ' ')}, median with p20 and p80")
        held = [row for row in shown if row["backend"] != "products"]
        bars = axes[1][column].barh(
            [label for label, row in zip(labels, shown, strict=True) if row in held],
            [row["peak_extra_mib"] for row in held],
            color=[color for color, row in zip(colors, shown, strict=True) if row in held],
        )
        axes[1][column].bar_label(bars, fmt="%.0f", padding=3)
        axes[1][column].margins(x=0.15)
        axes[1][column].set(xlabel="peak extra memory, MiB, with the gradients returned")
    figure.suptitle(title)
    save(figure, path, dpi=110)


def table() -> str:
    """Time and memory on a CPU, against dense torch in the same run."""
    results = json.loads((RESULTS / "divergence" / "cpu.json").read_text())
    config = results["run"]["config"]
    names = {"fused": "ours", "chunked": "TRL", "liger": "Liger"}
    dense = {(row["beta"], row["kl_clip"]): row for row in results["rows"] if row["backend"] == "dense"}
    lines = []
    for row in results["rows"]:
        if row["backend"] in names:
            memory = row["peak_extra_mib"] / dense[row["beta"], row["kl_clip"]]["peak_extra_mib"]
            cells = [f"β = {row['beta']:g}, {names[row['backend']]}", "yes" if row["kl_clip"] else "no"]
            cells += [f"{row['cpu_seconds_to_dense']:.2f}", f"{row['peak_extra_mib']:.0f}", f"{memory:.2f}"]
            lines.append(cells)
    head = (
        f"Forward and backward of the loss on CPU, {config['dtype']}, {config['tokens']:,} tokens × "
        f"{config['hidden_size']} × {config['vocab_size']:,}; dense torch is the row each ratio is to, with the same "
        "clip. Time is processor time, because the machine was shared. Of a GPU: [below](#on-a-gpu)."
    )
    return f"{head}\n\n{markdown(['', 'clip', 'time / dense', 'extra memory, MiB', 'memory / dense'], lines)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="number of tokens N")
    parser.add_argument("--hidden_size", type=int, help="width H of both models")
    parser.add_argument("--vocab_size", type=int, help="number of vocabulary columns V")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, help="measurements of each case")
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--kl_clip", type=float, default=1e-4, help="entry clip, in nats")
    parser.add_argument("--backends", nargs="+", default=["dense", "fused", "chunked", "liger"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=RESULTS / "divergence")
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    cases = cases_of(args)
    measure(cases, args)

    rows = rows_of(cases, args)
    device = "cpu" if args.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    path = args.output_dir / f"{device}.json"
    config = {name: value for name, value in vars(args).items() if name != "output_dir"}
    config["measured"] = "forward + backward; peak memory above the inputs, gradients included"
    if args.device == "cpu":
        config["not_measured"] = "the H100/H200 target (N=8192 H=4096 V=151936 bfloat16): no GPU here"
    write_results(path, rows, config)
    size = f"N={args.tokens} H={args.hidden_size} V={args.vocab_size} {args.dtype}"
    time_name = "cpu_seconds" if args.device == "cpu" else "seconds"
    plot(rows, path.with_suffix(".png"), f"Divergence, forward + backward, {device}, {size}", time_name)
    columns = (f"{time_name}_median", "peak_extra_mib", f"{time_name}_to_dense", "memory_to_dense")
    columns += (f"{time_name}_to_products",)
    print("\n" + " | ".join(["case".ljust(37), *columns]))
    for row in rows:
        label = f"{row['backend']} beta={row['beta']} kl_clip={row['kl_clip']}"
        values = [f"{row[name]:.3g}" if name in row else "-" for name in columns]
        print(" | ".join([label.ljust(37), *(v.rjust(len(n)) for v, n in zip(values, columns, strict=True))]))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
