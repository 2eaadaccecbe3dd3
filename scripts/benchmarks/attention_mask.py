"""
Times attention over rows of up to 4k tokens by how their padding is kept apart: masks, no mask, or packed into one row.

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.attention_mask

Forward and backward of a model without its head, on rows of log-normal lengths that are padded on the right, as the trainer
has them. `mask` gives the attention mask, `no mask` none, which is what the trainer does, and `packed` puts all rows into
one, without padding, by `position_ids`, which SDPA turns into a block-diagonal mask of (L, L). The ways take turns, each in
a process of its own. Each reports how far its hidden states are from those with the mask. Results go to
recipes/results/attention_mask/<device>.json.
"""

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import Qwen3Model

from scripts.harness.meter import Meter
from scripts.harness.processes import process
from scripts.harness.results import RESULTS, read, write_results
from scripts.harness.shapes import small
from scripts.harness.tables import markdown


WAYS = ("mask", "no mask", "packed")

# What a process of a way measures: set by `prepare`, in that process
model: Qwen3Model
ids: torch.Tensor
lengths: torch.Tensor


def states(way: str, model: Qwen3Model, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Hidden states of the tokens that count, row by row, of shape `(N, H)`."""
    valid = torch.arange(ids.size(1), device=ids.device) < lengths.unsqueeze(1)
    if way == "packed":
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)[valid]
        return model(ids[valid].unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)[0][0]
    return model(ids, attention_mask=valid.long() if way == "mask" else None, use_cache=False)[0][valid]


def prepare(args: argparse.Namespace) -> None:
    """Makes model and rows, in the process of a way."""
    global model, ids, lengths
    torch.manual_seed(args.seed)
    model = Qwen3Model(small(args.hidden_size, args.layers, 512).config(max_position_embeddings=2 * args.length))
    model = model.to(args.device)
    spread = torch.randn(args.rows).mul(0.5).exp()
    lengths = (spread / spread.max() * args.length).int().clamp(min=16).to(args.device)
    ids = torch.randint(512, (args.rows, args.length), device=args.device)


def error(way: str) -> float:
    """The largest difference to the states with the mask, as a share of the largest state."""
    with torch.no_grad():
        found, expected = (states(name, model, ids, lengths) for name in (way, "mask"))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def measure_once(way: str, device: str) -> dict[str, float]:
    with Meter(device) as meter:
        states(way, model, ids, lengths).square().mean().backward()
    model.zero_grad(set_to_none=True)
    return {name: getattr(meter, name) for name in ("seconds", "cpu_seconds", "peak_mib")}


def table() -> str:
    """Time and memory on a CPU."""
    rows = read(RESULTS / "attention_mask" / "cpu.json")
    lines = [
        [row["way"], f"{row['cpu_seconds']:.2f}", f"{row['cpu_seconds_to_mask']:.2f}", f"{row['peak_mib']:.0f}"]
        + [f"{row['error']:.0e}"]
        for row in rows
    ]
    heading = ["", "processor seconds", "to the mask", "peak extra memory, MiB", "difference to the mask"]
    return markdown(heading, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the longest row")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=RESULTS / "attention_mask")
    args = parser.parse_args(argv)
    runs, errors = {way: [] for way in WAYS}, {}
    with ExitStack() as stack:
        calls = {way: stack.enter_context(process()) for way in WAYS}
        for way, call in calls.items():
            call(prepare, args)
            errors[way] = call(error, way)
        for _ in range(args.repeats):
            for way, call in calls.items():
                runs[way].append(call(measure_once, way, args.device))
                print(way, runs[way][-1], flush=True)
    rows = []
    for way in WAYS:
        row = {
            "way": way,
            "error": errors[way],
            "peak_mib": max(run["peak_mib"] for run in runs[way]),
            "runs": runs[way],
        }
        for name in ("seconds", "cpu_seconds"):
            row[name] = statistics.median(run[name] for run in runs[way])
            ratios = [run[name] / base[name] for run, base in zip(runs[way], runs["mask"], strict=True)]
            row[f"{name}_to_mask"] = statistics.median(ratios)
        rows.append(row)
    config = {name: value for name, value in vars(args).items() if name != "output_dir"}
    write_results(args.output_dir / f"{args.device}.json", rows, config)


if __name__ == "__main__":
    main()
