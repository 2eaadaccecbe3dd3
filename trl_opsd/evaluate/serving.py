"""Latency and throughput of any [`~trl_opsd.evaluate.backends.Engine`]."""

import time
from collections.abc import Callable

import numpy as np

from .backends import Engine, Request, Sampling
from .schema import Serving


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
