"""
SmolLM2-135M-Instruct on GSM8K, HumanEval, BBH and MATH-500 through transformers and through vLLM, side by side.

    .venv-vllm/bin/python -m scripts.experiments.backends --backends vllm        # bash scripts/setup.sh vllm makes it
    .venv/bin/python -m scripts.experiments.backends --backends transformers     # hours on a CPU

vLLM has an environment of its own, hence a command for each. Makes the checkpoint that it does not find (scripts/smollm2.py),
evaluates it greedily with at most 200 tokens in bfloat16, and once more through vLLM with the answer in the prompt, which
says whether the scorer could find a right one. Interrupted, it goes on where it was. Results are copied to
recipes/results/smollm2, with the report once both backends are there. The problems are read from `--data`, which has
gsm8k/test.jsonl, humaneval/test.jsonl, bbh/ and math500/test.jsonl.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from scripts import smollm2
from scripts.harness.results import RESULTS


CHECKPOINT, RUNS = Path("runs/smollm2"), Path("runs/smollm2-evaluation")
GSM8K = ["gsm8k:{data}/gsm8k/test.jsonl"]
REST = ["humaneval:{data}/humaneval/test.jsonl", "bbh:{data}/bbh[:135]", "math-500:{data}/math500/test.jsonl[:100]"]
SERVING = ["--concurrency", "1", "4", "16", "--serving_requests", "16"]
PROMPT_ONLY = ["--prompt_only", "true"]
# Of each file: the backend, how the model is called in it, the tasks, and further options
FILES = {
    "vllm-gsm8k": ("vllm", "SmolLM2-vLLM", GSM8K, [*PROMPT_ONLY, *SERVING]),
    "vllm-rest": ("vllm", "SmolLM2-vLLM", REST, PROMPT_ONLY),
    "vllm-told": (
        "vllm",
        "SmolLM2-told",
        ["gsm8k:{data}/gsm8k/test.jsonl[:200]", "math-500:{data}/math500/test.jsonl[:100]"],
        ["--prompt_template", "answer"],
    ),
    "transformers-gsm8k": ("transformers", "SmolLM2-transformers", GSM8K, SERVING),
    "transformers-rest": ("transformers", "SmolLM2-transformers", REST, []),
}
COMPARED = [name for name in FILES if name != "vllm-told"]


def arguments(name: str, data: str) -> list[str]:
    """What `python -m trl_opsd.evaluate` is given."""
    backend, label, tasks, options = FILES[name]
    settings = {
        "vllm": ["--batch_size", "64", "--vllm_kwargs", '{"enforce_eager": true, "max_model_len": 2048}'],
        "transformers": ["--batch_size", "32"],
    }
    return [
        *("--checkpoints", f"{label}={CHECKPOINT}", "--tasks", *(task.format(data=data) for task in tasks)),
        *("--decoding", "greedy", "--max_completion_length", "200", "--dtype", "bfloat16", "--backend", backend),
        *("--output", str(RUNS / f"{name}.json"), "--cache_dir", "runs/generations"),
        *settings[backend],
        *options,
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=["vllm", "transformers"], default=["vllm", "transformers"])
    parser.add_argument("--data", default="../shared/data", help="folder of the problems")
    args = parser.parse_args(argv)
    if not (CHECKPOINT / "config.json").is_file():
        smollm2.main(["--output_dir", str(CHECKPOINT)])
    evaluate, results = [sys.executable, "-m", "trl_opsd.evaluate"], RESULTS / "smollm2"
    results.mkdir(parents=True, exist_ok=True)
    for name, (backend, *_) in FILES.items():
        if backend in args.backends:
            subprocess.run([*evaluate, *arguments(name, args.data)], check=True)
            shutil.copy(RUNS / f"{name}.json", results)
    compared = [RUNS / f"{name}.json" for name in COMPARED]
    if all(path.is_file() for path in compared):
        options = ["--before", "SmolLM2-vLLM", "--output_dir", str(results)]
        subprocess.run([*evaluate, "--report", *map(str, compared), *options], check=True)


if __name__ == "__main__":
    main()
