"""
Measures how many tokens of rollouts training writes per second, through each way of generating, and what new weights cost.

    .venv-vllm/bin/python -m scripts.benchmarks.generation      # bash scripts/setup.sh vllm makes it

Every way is a trainer of its own in a process of its own, which is started once and then takes turns with the others:
each writes the same number of batches, sampled at temperature 1, by the call that a training step makes. Starting it and a
first batch are not counted. Processor time is that of all threads of the process. The first way is what training did before
rows that had ended were dropped: TRL's own generation, by which every row is computed until the longest one ends. A way
that needs vLLM is not measured where there is none, and the table says so.

How long a rollout gets is up to the model: lengths are those of the real rollouts of two real models, the tiny reasoner
after RLVR on its own problems, and SmolLM2-135M-Instruct on sums of three numbers. Both checkpoints are made where they are
not given. Results go to recipes/results/generation, a file for each model.
"""

import argparse
import importlib.metadata
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from datasets import Dataset
from trl import DistillationTrainer
from trl.import_utils import is_vllm_available

from scripts.harness.meter import Meter, peak
from scripts.harness.processes import process
from scripts.harness.results import RESULTS, ROOT, read_all, write_results
from scripts.harness.stages import make_teacher
from scripts.harness.tables import markdown
from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny import TinyConfig, problems, row


# What the configuration of the trainer has in each. The first is TRL's own generation, whose rows stay to the end
BEFORE = "transformers, before"
WAYS = {
    BEFORE: {},
    "transformers, finished rows dropped": {},
    "vLLM, float32": {"use_vllm": True},
    "vLLM, bfloat16": {"use_vllm": True, "bf16": True},
}
NO_VLLM = "vLLM is not installed in this environment (bash scripts/setup.sh vllm makes one that has it)"
# Rollouts of a batch, and tokens of one at most
SIZES = {"tiny": (96, 128), "smollm2": (8, 128)}


def prompts(model: str, number: int, seed: int) -> list:
    """Prompts of a model: chains of operations, or sums of three numbers."""
    if model == "tiny":
        return [row(problem)["prompt"] for problem in problems(TinyConfig(), "train", number, seed=seed)]
    draw = random.Random(seed)
    sums = [[draw.randint(10, 99) for _ in range(3)] for _ in range(number)]
    return [[{"role": "user", "content": f"What is {a} + {b} + {c}? Think step by step."}] for a, b, c in sums]


_trainer: OPSDTrainer | None = None  # of this process


def start(way: str, checkpoint: str, rows: list, length: int, seed: int) -> float:
    """Builds the trainer of this process and has it write a batch. Returns the seconds of the processor that took."""
    global _trainer
    # Of the machine, vLLM takes what it is told, and no core for itself
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    begin = time.process_time()
    args = OPSDConfig(
        output_dir=tempfile.mkdtemp(),
        teacher_prompt_template="{prompt} concise",
        teacher_weights="live",  # it is not asked here, and would be a second copy in memory
        per_device_train_batch_size=len(rows),
        max_completion_length=length,
        vllm_max_model_length=512,
        use_cpu=True,
        report_to="none",
        seed=seed,
        **{"bf16": False, **WAYS[way]},
    )
    _trainer = OPSDTrainer(model=checkpoint, args=args, train_dataset=Dataset.from_dict({"prompt": rows}))
    write(way, rows)
    return time.process_time() - begin


def write(way: str, rows: list) -> dict:
    """Has the trainer of this process write a rollout of each prompt."""
    prompt_ids = _trainer._tokenize_prompts(rows)[0]
    method = DistillationTrainer if way == BEFORE else OPSDTrainer
    with Meter("cpu") as meter:
        completions = method._generate_single_turn(_trainer, prompt_ids, None, {})
    return {
        "lengths": [len(ids) for ids in completions],
        "seconds": meter.seconds,
        "cpu_seconds": meter.cpu_seconds,
        "peak_mib": peak(),
        "extra_mib": meter.peak_mib,
    }


def sync() -> dict | None:
    """Has the engine of this process take the weights of its trainer, as it does after every update."""
    if not _trainer.use_vllm:
        return None
    with Meter("cpu") as meter:
        _trainer.vllm_generation.sync_weights()
    return {"seconds": meter.seconds, "cpu_seconds": meter.cpu_seconds}


def summary(model: str, way: str, batches: list[dict], syncs: list[dict | None], start_cpu_seconds: float) -> dict:
    """The row of a way: medians over its batches, and over the times that its engine was given the weights."""
    lengths = sorted(number for batch in batches for number in batch["lengths"])
    limit = SIZES[model][1]

    def median(rows: list[dict], name: str, digits: int) -> float:
        return round(statistics.median(row[name] for row in rows), digits)

    rates = [sum(batch["lengths"]) / batch["cpu_seconds"] for batch in batches]
    return {
        "model": model,
        "way": way,
        "rollouts": len(batches[0]["lengths"]),
        "batches": len(batches),
        "tokens_per_cpu_second": round(statistics.median(rates), 1),
        "lowest": round(min(rates), 1),
        "highest": round(max(rates), 1),
        "tokens_per_second": round(
            statistics.median(sum(batch["lengths"]) / batch["seconds"] for batch in batches), 1
        ),
        "cpu_seconds": median(batches, "cpu_seconds", 2),
        "seconds": median(batches, "seconds", 2),
        "mean_length": round(statistics.mean(lengths), 1),
        "median_length": statistics.median(lengths),
        "p90_length": lengths[int(0.9 * (len(lengths) - 1))],
        "longest": lengths[-1],
        "at_limit": round(sum(number >= limit for number in lengths) / len(lengths), 3),
        "sync_cpu_seconds": None if syncs[0] is None else median(syncs, "cpu_seconds", 3),
        "sync_seconds": None if syncs[0] is None else median(syncs, "seconds", 3),
        "start_cpu_seconds": round(start_cpu_seconds, 1),
        "peak_mib": round(max(batch["peak_mib"] for batch in batches)),
        "extra_mib": round(max(batch["extra_mib"] for batch in batches)),
        "load_average": round(os.getloadavg()[0], 1),
    }


def table(rows: list[dict] | None = None) -> str:
    """
    Tokens per second of the processor and of the clock, beside those of the first way.

    Args:
        rows (`list[dict]`, *optional*):
            Rows of results. Defaults to those that are kept.
    """
    if rows is None:
        rows = [found for file in read_all(RESULTS / "generation", "*.json") for found in file]
    lines = []
    for measured in rows:
        if "not_measured" in measured:
            cells = [measured["model"], measured["way"], f"not measured: {measured['not_measured']}"]
            lines.append([*cells, *[""] * 7])
            continue
        first = next((o for o in rows if (o["model"], o["way"]) == (measured["model"], BEFORE)), None)
        times = "" if first is None else f"{measured['tokens_per_cpu_second'] / first['tokens_per_cpu_second']:.2f}"
        sync = (
            "none"
            if measured["sync_seconds"] is None
            else f"{measured['sync_cpu_seconds']:.2f} ({measured['sync_seconds']:.2f})"
        )
        lines.append(
            [
                measured["model"],
                measured["way"],
                f"{measured['tokens_per_cpu_second']:,.0f} ({measured['lowest']:,.0f} to {measured['highest']:,.0f})",
                times,
                f"{measured['tokens_per_second']:,.0f}",
                f"{measured['cpu_seconds']:.1f} ({measured['seconds']:.1f})",
                f"{measured['mean_length']:.0f}, {measured['longest']}",
                sync,
                f"{measured['start_cpu_seconds']:.0f}",
                f"{measured['peak_mib']:,.0f} ({measured['extra_mib']:,.0f})",
            ]
        )
    heading = ["model", "way", "tokens per CPU second, median (lowest to highest)", "of before", "tokens per second"]
    heading += [
        "CPU seconds of a batch (by the clock)",
        "length, mean and longest",
        "CPU seconds of a sync (by the clock)",
    ]
    return markdown([*heading, "CPU seconds to start", "peak of the process, MiB (above what it held before)"], lines)


def measure(model: str, checkpoint: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of a model: one for each way, which take turns."""
    number, length = SIZES[model]
    rows = prompts(model, number, args.seed)
    ways = [way for way in args.ways if not WAYS[way].get("use_vllm") or is_vllm_available()]
    starts, batches, syncs = {}, {way: [] for way in ways}, {way: [] for way in ways}
    for group in (ways[first : first + args.at_once] for first in range(0, len(ways), args.at_once)):
        with ExitStack() as stack:
            calls = {way: stack.enter_context(process()) for way in group}
            with ThreadPoolExecutor() as pool:  # they start together, and only then take turns
                futures = {
                    way: pool.submit(call, start, way, str(checkpoint), rows, length, args.seed)
                    for way, call in calls.items()
                }
            starts |= {way: future.result() for way, future in futures.items()}
            for _ in range(args.repeats):
                for way, call in calls.items():
                    syncs[way].append(call(sync))
                    batches[way].append(call(write, way, rows))
    measured = []
    for way in args.ways:
        if way in ways:
            measured.append(summary(model, way, batches[way], syncs[way], starts[way]))
        else:
            measured.append({"model": model, "way": way, "not_measured": NO_VLLM})
        print(measured[-1])
    return measured


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what to measure")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES), help="what it writes with")
    parser.add_argument("--tiny", type=Path, help="checkpoint of the tiny reasoner; made if not given")
    parser.add_argument("--smollm2", type=Path, help="checkpoint of SmolLM2; made if not given")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"), help="where what is made is kept")
    parser.add_argument(
        "--at_once", type=int, default=len(WAYS), help="ways that are in memory at a time, and take turns"
    )
    parser.add_argument("--repeats", type=int, default=5, help="batches that each way writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "generation", help="folder of the results")
    args = parser.parse_args(argv)

    checkpoints = {"tiny": args.tiny, "smollm2": args.smollm2}
    if "tiny" in args.models and args.tiny is None:
        checkpoints["tiny"], _ = make_teacher("strong", args.seed, args.runs)
    if "smollm2" in args.models and args.smollm2 is None:
        checkpoints["smollm2"] = args.runs / "smollm2"
        if not (checkpoints["smollm2"] / "config.json").is_file():
            command = [sys.executable, "scripts/smollm2.py", "--output_dir", str(checkpoints["smollm2"].resolve())]
            subprocess.run(command, check=True, cwd=ROOT)
    if not is_vllm_available() and any(WAYS[way].get("use_vllm") for way in args.ways):
        print(f"Not measured: vLLM, because {NO_VLLM}.")
    # It is named otherwise where it is the one for CPUs
    names = importlib.metadata.packages_distributions().get("vllm", [])
    engine = {name: importlib.metadata.version(name) for name in sorted(set(names))}
    config = {"engine": engine, "ways": args.ways, "at_once": args.at_once, "repeats": args.repeats, "seed": args.seed}
    for model in args.models:
        sizes = dict(zip(("rollouts", "max_completion_length"), SIZES[model], strict=True))
        rows = measure(model, checkpoints[model], args)
        write_results(args.output / f"{model}.json", rows, config | sizes)
        print(table(rows))


if __name__ == "__main__":
    main()
