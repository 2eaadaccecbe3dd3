"""
Measures how many tokens of rollouts training writes per second of the processor, through each backend.

    .venv-vllm/bin/python -m scripts.benchmarks.generation      # bash scripts/setup.sh vllm makes it

Every backend is a trainer of its own in a process of its own, which is started once and then takes turns with the others:
each writes the same number of batches, sampled at temperature 1, by the call that a training step makes. Starting it and a
first batch are not counted. Processor time is that of all threads of the process. Makes the checkpoints that are not given:
the tiny reasoner after RLVR, and SmolLM2-135M-Instruct. Results go to
recipes/results/generation, a file for each model.
"""

import argparse
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

from scripts.harness.meter import peak
from scripts.harness.processes import process
from scripts.harness.results import RESULTS, ROOT, read_all, write_results
from scripts.harness.stages import make_teacher
from scripts.harness.tables import markdown
from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny import TinyConfig, problems, row


# What the configuration of the trainer has in each
BACKENDS = {
    "transformers": {},
    "vLLM, float32": {"use_vllm": True},
    "vLLM, bfloat16": {"use_vllm": True, "bf16": True},
}
# Rollouts of a batch, and tokens of one at most
SIZES = {"tiny": (96, 128), "smollm2": (8, 96)}


def prompts(model: str, number: int, seed: int) -> list:
    """Prompts of a model: chains of operations, or sums of three numbers."""
    if model == "tiny":
        return [row(problem)["prompt"] for problem in problems(TinyConfig(), "train", number, seed=seed)]
    draw = random.Random(seed)
    sums = [[draw.randint(10, 99) for _ in range(3)] for _ in range(number)]
    return [[{"role": "user", "content": f"What is {a} + {b} + {c}? Think step by step."}] for a, b, c in sums]


_trainer: OPSDTrainer | None = None  # of this process


def start(backend: str, checkpoint: str, rows: list, length: int, seed: int) -> float:
    """Builds the trainer of this process and has it write a batch. Returns the seconds of the processor that took."""
    global _trainer
    # Of the machine, vLLM takes what it is told, and no core for itself
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    begin = time.process_time()
    args = OPSDConfig(
        output_dir=tempfile.mkdtemp(),
        teacher_prompt_template="{prompt} concise",
        per_device_train_batch_size=len(rows),
        max_completion_length=length,
        vllm_max_model_length=512,
        use_cpu=True,
        report_to="none",
        seed=seed,
        **{"bf16": False, **BACKENDS[backend]},
    )
    _trainer = OPSDTrainer(model=checkpoint, args=args, train_dataset=Dataset.from_dict({"prompt": rows}))
    write(rows)
    return time.process_time() - begin


def write(rows: list) -> dict:
    """Has the trainer of this process write a rollout of each prompt."""
    prompt_ids = _trainer._tokenize_prompts(rows)[0]
    begin, begin_cpu = time.perf_counter(), time.process_time()
    lengths = [len(ids) for ids in _trainer._generate_single_turn(prompt_ids, None, {})]
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    return {"lengths": lengths, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak()}


def table() -> str:
    """Tokens per second of the processor, beside those of transformers."""
    rows = [row for rows in read_all(RESULTS / "generation", "*.json") for row in rows]
    first = {row["model"]: row["tokens_per_cpu_second"] for row in rows if row["backend"] == "transformers"}
    lines = [
        [
            row["model"],
            row["backend"],
            f"{row['tokens_per_cpu_second']:,.0f} ({row['lowest']:,.0f} to {row['highest']:,.0f})",
            f"{row['tokens_per_cpu_second'] / first[row['model']]:.2f}",
            f"{row['mean_length']:.0f}, {row['longest']}",
            f"{row['start_cpu_seconds']:.0f}",
            f"{row['peak_mib']:,.0f}",
        ]
        for row in rows
    ]
    heading = ["model", "backend", "tokens per CPU second, median (lowest to highest)", "of transformers"]
    return markdown([*heading, "length, mean and longest", "CPU seconds to start", "peak of the process, MiB"], lines)


def measure(model: str, checkpoint: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of a model: one for each backend, which take turns."""
    number, length = SIZES[model]
    rows = prompts(model, number, args.seed)
    with ExitStack() as stack:
        calls = {backend: stack.enter_context(process()) for backend in args.backends}
        with ThreadPoolExecutor() as pool:  # they start together, and only then take turns
            futures = {
                backend: pool.submit(call, start, backend, str(checkpoint), rows, length, args.seed)
                for backend, call in calls.items()
            }
        starts = {backend: future.result() for backend, future in futures.items()}
        batches = {backend: [] for backend in calls}
        for _ in range(args.repeats):
            for backend, call in calls.items():
                batches[backend].append(call(write, rows))
    measured = []
    for backend, found in batches.items():
        rates = [sum(batch["lengths"]) / batch["cpu_seconds"] for batch in found]
        lengths = [number for batch in found for number in batch["lengths"]]
        measured.append(
            {
                "model": model,
                "backend": backend,
                "rollouts": number,
                "batches": len(found),
                "tokens_per_cpu_second": round(statistics.median(rates), 1),
                "lowest": round(min(rates), 1),
                "highest": round(max(rates), 1),
                "tokens_per_second": round(
                    statistics.median(sum(batch["lengths"]) / batch["seconds"] for batch in found), 1
                ),
                "mean_length": round(statistics.mean(lengths), 1),
                "longest": max(lengths),
                "start_cpu_seconds": round(starts[backend], 1),
                "peak_mib": round(max(batch["peak_mib"] for batch in found)),
                "load_average": round(os.getloadavg()[0], 1),
            }
        )
        print(measured[-1])
    return measured


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backends", nargs="+", choices=list(BACKENDS), default=list(BACKENDS), help="what to measure"
    )
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES), help="what it writes with")
    parser.add_argument("--tiny", type=Path, help="checkpoint of the tiny reasoner; made if not given")
    parser.add_argument("--smollm2", type=Path, help="checkpoint of SmolLM2; made if not given")
    parser.add_argument("--runs", type=Path, default=Path("runs/generation"), help="where what is made is kept")
    parser.add_argument("--repeats", type=int, default=5, help="batches that each backend writes")
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
    config = {"backends": args.backends, "repeats": args.repeats, "seed": args.seed}
    for model in args.models:
        write_results(args.output / f"{model}.json", measure(model, checkpoints[model], args), config)


if __name__ == "__main__":
    main()
