"""Latency, throughput and memory, of any [`~trl_opsd.evaluate.engines.Engine`]."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .engines import Engine, Request, Sampling


def measure_serving(
    engine: Engine,
    requests: list[Request],
    sampling: Sampling,
    concurrency: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float | int]:
    """
    Measures latency and throughput while `concurrency` requests are under way, after answering as many unmeasured.

    Args:
        engine ([`~trl_opsd.evaluate.engines.Engine`]):
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
        `dict`: `concurrency`, `requests` and `tokens` (numbers); seconds from handing a request over to its first token
        (`first_token_p50_s`, `first_token_p95_s`) and to its last (`total_p50_s`, `total_p95_s`), over requests; and
        `tokens_per_s` and `requests_per_s`, from the first request to the last token.
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
    return {
        "concurrency": concurrency,
        "requests": len(requests),
        "tokens": tokens,
        "first_token_p50_s": first[0],
        "first_token_p95_s": first[1],
        "total_p50_s": total[0],
        "total_p95_s": total[1],
        "tokens_per_s": tokens / wall,
        "requests_per_s": len(requests) / wall,
    }


def reset_peak_memory() -> None:
    """Starts a new measurement of [`peak_memory`]."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # in some containers: then it is the peak since the process began
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set


def peak_memory() -> int:
    """
    Returns the most memory held since [`reset_peak_memory`], in bytes: what tensors took on the GPU or, where there is
    none, the resident set of this process (off Linux since the process began). Files that it maps count in the latter.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
