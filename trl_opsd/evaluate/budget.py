"""
Budget forcing: a thinking block that is still open after so many tokens is closed, and the answer is written from there
(https://huggingface.co/papers/2501.19393).
"""

import dataclasses
from collections.abc import Callable, Container, Iterator

from .backends import Engine, Request, Sampling


def generate_within_budget(
    engine: Engine,
    requests: list[Request],
    sampling: Sampling,
    budget: int,
    closing_ids: list[int],
    is_open: Callable[[int, list[int]], bool],
    has_ended: Callable[[list[int]], bool],
    done: Container[int] = (),
) -> Iterator[tuple[int, list[int]]]:
    """
    Generates completions, as [`~trl_opsd.evaluate.backends.Engine.generate`] does, in two rounds.

    Args:
        engine ([`~trl_opsd.evaluate.backends.Engine`]):
            What generates.
        requests (`list[Request]`):
            What to complete.
        sampling ([`~trl_opsd.evaluate.backends.Sampling`]):
            How.
        budget (`int`):
            Tokens of the first round, in which completions that think are not to be done thinking.
        closing_ids (`list[int]`):
            Token ids that close the block. They count as tokens of the completion.
        is_open (`Callable[[int, list[int]], bool]`):
            Says of a position in `requests` and the tokens so far whether a thinking block is open.
        has_ended (`Callable[[list[int]], bool]`):
            Says of tokens whether they end a completion.
        done (`Container[int]`, *optional*):
            Positions in `requests` that are not needed.

    Yields:
        `tuple[int, list[int]]`: Position in `requests` and token ids.
    """
    begun, goes_on = {}, []
    for index, ids in engine.generate(requests, dataclasses.replace(sampling, max_tokens=budget), done):
        limit = sampling.limit(requests[index])
        if has_ended(ids) or len(ids) >= limit:
            yield index, ids
            continue
        ids = (ids + closing_ids if is_open(index, ids) else ids)[:limit]
        if len(ids) == limit:
            yield index, ids
        else:
            begun[index] = ids
            request = requests[index]
            # other random numbers than those that are used up
            goes_on.append(Request(request.prompt_ids + ids, request.seed ^ 0x5DEECE66, limit - len(ids)))
    for (index, ids), (_, rest) in zip(begun.items(), sorted(engine.generate(goes_on, sampling)), strict=True):
        yield index, ids + rest
