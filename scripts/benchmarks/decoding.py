"""
Times the generation of a batch whose rows end at very different times: transformers' `generate`, and the same with finished rows
dropped from the cache (`trl_opsd.decoding`).

    OMP_NUM_THREADS=1 python -m scripts.benchmarks.decoding

The model has random weights and the size of the tiny reasoner. How long each row gets is given: log-normal lengths with a mean
of 130 and a longest of 440 tokens, as the long traces of the tiny reasoner have, which a head that is the same for all tokens
and a hook that lets a row end at its length see to. Both ways see the same lengths, prompts padded on the left, and greedy
decoding, and their tokens are compared. They take turns, in a process of their own each, and the ratio is that of the medians of
processor seconds. Results go to recipes/results/decoding/cpu.json.
"""

import argparse
import statistics
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from scripts.harness.meter import Meter
from scripts.harness.processes import run_alone
from scripts.harness.results import RESULTS, read, write_results
from scripts.harness.shapes import Shape
from scripts.harness.tables import markdown
from trl_opsd.decoding import finished_rows_dropped


MODELS = {"tiny, 0.2M": Shape(64, 3, 4, 2, 16, 192, 65)}
WAYS = {"generate": False, "finished rows dropped": True}
PAD, END, FIRST = 0, 1, 2


def draw_lengths(rows: int, mean: int, longest: int, seed: int) -> list[int]:
    """Log-normal lengths with this mean and this longest one."""
    draws = torch.randn(rows, generator=torch.Generator().manual_seed(seed)).double()
    low, high = 0.0, 5.0
    while high - low > 1e-9:  # how wide the distribution has to be
        width = (low + high) / 2
        shape = (draws * width).exp()
        low, high = (width, high) if shape.max() / shape.mean() < longest / mean else (low, width)
    return [max(1, round(length)) for length in (shape * mean / shape.mean()).tolist()]


def work(model_name: str, is_dropped: bool, args: argparse.Namespace) -> dict:
    """One generation, in a process of its own: seconds, memory, and the tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    shape = MODELS[model_name]
    model = Qwen3ForCausalLM(shape.config(eos_token_id=END, pad_token_id=PAD, bos_token_id=None)).eval()
    lengths = draw_lengths(args.rows, args.mean, args.longest, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    prompt_lengths = torch.randint(args.prompt // 2, args.prompt + 1, (args.rows,), generator=generator)
    prompt_lengths[0] = args.prompt
    # The first token of a prompt is one of its own, so that the hook knows the row whatever has been dropped
    mask = (torch.arange(args.prompt) >= args.prompt - prompt_lengths.unsqueeze(1)).long()
    ids = torch.randint(FIRST, shape.vocab, (args.rows, args.prompt), generator=generator) * mask
    state = {"rows": torch.arange(args.rows), "step": 0}

    def end_on_time(module, inputs, logits):
        """Of the rows that are there, in their order, those that have been written whole may only end."""
        if len(logits) < len(state["rows"]):
            kept = [row for row in state["rows"].tolist() if lengths[row] > state["step"]]
            assert len(kept) == len(logits)
            state["rows"] = torch.tensor(kept)
        state["step"] += 1
        is_last = torch.tensor([lengths[row] <= state["step"] for row in state["rows"].tolist()])
        logits = logits.clone()
        logits[:, :, :FIRST] = -1e9
        logits[is_last, :, END] = 1e9
        return logits

    model.lm_head.register_forward_hook(end_on_time)
    options = {"do_sample": False, "max_new_tokens": args.longest, "eos_token_id": END, "pad_token_id": PAD}
    with Meter("cpu") as meter:
        if is_dropped:
            with finished_rows_dropped(model):
                found = model.generate(input_ids=ids, attention_mask=mask, **options)
        else:
            found = model.generate(input_ids=ids, attention_mask=mask, **options)
    found = found[:, args.prompt :]
    written = [int((row == END).int().argmax()) + 1 for row in found]
    assert written == lengths
    return {
        "cpu_s": meter.cpu_seconds,
        "wall_s": meter.seconds,
        "peak_mib": meter.peak_mib,
        "tokens": sum(lengths),
        "mean": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "completions": [row[:length] for row, length in zip(found.tolist(), lengths, strict=True)],
    }


def table() -> str:
    """Both ways, and what the second is of the first."""
    rows = read(RESULTS / "decoding" / "cpu.json")
    lines = []
    for row in rows:
        plain = next(other for other in rows if (other["model"], other["way"]) == (row["model"], "generate"))
        lines.append(
            [
                row["model"],
                row["way"],
                f"{row['cpu_s']:.1f}",
                f"{row['tokens'] / row['cpu_s']:,.0f}",
                f"{plain['cpu_s'] / row['cpu_s']:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['peak_mib'] / plain['peak_mib']:.2f}",
            ]
        )
    heading = ["model", "way", "processor seconds", "tokens/s", "times as fast", "peak memory, MiB", "of generate's"]
    sentence = (
        f"{rows[0]['rows']} rows with a mean of {rows[0]['mean']:.0f} and a longest of {rows[0]['longest']} tokens, greedy, "
        f"float32, one core; median of {rows[0]['repeats']}."
    )
    return f"{sentence}\n\n{markdown(heading, lines)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, default=96, help="rollouts in a batch")
    parser.add_argument("--mean", type=int, default=130, help="their mean length")
    parser.add_argument("--longest", type=int, default=440, help="the longest of them")
    parser.add_argument("--prompt", type=int, default=40, help="tokens of the longest prompt")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "decoding" / "cpu.json")
    args = parser.parse_args(argv)
    rows = []
    for model in args.models:
        found = {way: [] for way in WAYS}
        for _ in range(args.repeats):
            for way, is_dropped in WAYS.items():
                found[way].append(run_alone(work, model, is_dropped, args))
                last = found[way][-1]
                print(f"{last['cpu_s']:.1f} s, {last['peak_mib']:.0f} MiB [{model}, {way}]", flush=True)
        completions = [one.pop("completions") for runs in found.values() for one in runs]
        assert all(other == completions[0] for other in completions), "the tokens differ"
        for way, runs in found.items():
            row = {name: statistics.median(one[name] for one in runs) for name in ("cpu_s", "wall_s", "peak_mib")}
            fixed = {name: runs[0][name] for name in ("tokens", "mean", "longest")}
            rows.append({"model": model, "way": way, "rows": args.rows, "repeats": args.repeats, **row, **fixed})
    write_results(args.output, rows, {name: value for name, value in vars(args).items() if name != "output"})
    print(args.output)


if __name__ == "__main__":
    main()
