"""
Times the distillation objective, forward and backward, and takes its peak memory: dense torch against every backend.

    python scripts/benchmark_divergence.py                 # CPU: N=2048 H=576 V=49152 float32
    python scripts/benchmark_divergence.py --device cuda   # GPU: N=8192 H=4096 V=151936 bfloat16

Every case has a process of its own, and the cases take turns (A B C, A B C, ...), so that whatever else the machine
does meets them all alike. Results go to recipes/results/divergence/<device>.json, the plot beside it. Without a GPU its
target is listed there as not measured.
"""

import argparse
import ctypes
import os
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from trl_opsd.opsd.divergence import linear_divergence
from trl_opsd.results import write_results


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from divergence_reference import dense_linear_divergence  # noqa: E402


DEFAULTS = {
    "cpu": {"tokens": 2048, "hidden_size": 576, "vocab_size": 49152, "dtype": "float32", "repeats": 3},
    "cuda": {"tokens": 8192, "hidden_size": 4096, "vocab_size": 151936, "dtype": "bfloat16", "repeats": 20},
}
MIB = 1 << 20


class Meter:
    """Seconds by the clock and of the processor, and the most memory in use above what was in use before."""

    def __init__(self, device):
        self.cuda = device == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # hands pages that were freed back, so that they count again when used
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            self.before = self._resident("VmRSS")
        self.start, self.start_cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds, self.cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.start_cpu
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._resident("VmHWM")
        self.peak_mib = (peak - self.before) / MIB

    def _resident(self, name):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields[name].split()[0]) * 1024


def work(pipe, case, args):
    """One case: tells when it is ready, then measures once per word that arrives."""
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

    def step(n):
        if case["backend"] == "products":
            return products(n)
        inputs = student_hidden[:n], student_head, teacher_hidden[:n], teacher_head
        if case["backend"] == "dense":
            value = dense_linear_divergence(*inputs, **objective)
        else:
            value, _ = linear_divergence(*inputs, backend=case["backend"], **objective)
        value.mean().backward()
        student_hidden.grad = student_head.grad = None

    step(args.tokens if args.device == "cuda" else 8)  # kernels are compiled for the sizes they run at
    pipe.send("ready")
    while pipe.recv():
        try:
            with Meter(args.device) as meter:
                step(N)
            pipe.send({name: getattr(meter, name) for name in ("seconds", "cpu_seconds", "peak_mib")})
        except torch.OutOfMemoryError:
            pipe.send(None)


def measure(cases, args):
    """Rounds of all cases, one measurement of each case per round."""
    context = get_context("spawn")
    # A GPU is nobody else's, and has no room for the inputs of all cases at once
    groups = [cases] if args.device == "cpu" else [[case] for case in cases]
    for group in groups:
        workers = []
        for case in group:
            pipe, far_end = context.Pipe()
            process = context.Process(target=work, args=(far_end, case, args), daemon=True)
            process.start()
            far_end.close()
            workers.append((case, pipe, process))
            case["runs"] = []
            if pipe.recv() != "ready":
                raise RuntimeError(f"case {case} did not start")
        for repeat in range(args.repeats):
            for case, pipe, _ in workers:
                pipe.send(True)
                run = pipe.recv()
                case["runs"].append(run)
                label = f"{case['backend']} beta={case['beta']} kl_clip={case['kl_clip']}"
                text = (
                    "out of memory"
                    if run is None
                    else f"{run['seconds']:.3f} s ({run['cpu_seconds']:.3f} s CPU), {run['peak_mib']:.0f} MiB"
                )
                print(f"[{repeat + 1}/{args.repeats}] {label}: {text}", flush=True)
        for _, pipe, process in workers:
            pipe.send(False)
            process.join()


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
            ordered = sorted(run[name] for run in runs)
            for label, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8)):
                row[f"{name}_{label}"] = _quantile(ordered, share)
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


def _quantile(ordered, share):
    position = share * (len(ordered) - 1)
    lower, upper = ordered[int(position)], ordered[min(int(position) + 1, len(ordered) - 1)]
    return lower + (upper - lower) * (position - int(position))


def plot(rows, path, title, time_name):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
    figure.tight_layout()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def main():
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
    parser.add_argument("--output_dir", type=Path, default=ROOT / "recipes" / "results" / "divergence")
    args = parser.parse_args()
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    cases = [{"backend": "products", "beta": None, "kl_clip": None}]
    for beta in args.betas:
        for kl_clip in (args.kl_clip, None):
            for backend in args.backends:
                if kl_clip is None or backend in ("dense", "fused"):
                    cases.append({"backend": backend, "beta": beta, "kl_clip": kl_clip})
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
