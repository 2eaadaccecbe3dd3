"""
Evaluation by several processes, as `accelerate launch` starts them: each has the whole model in an engine of its own and
generates its share of the completions; the first one scores all of them and writes the results.
"""

from array import array
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from .plan import Job


Found = dict[int, tuple[list[int], float]]


class Processes:
    """
    The processes that evaluate together: all that were started, or this one alone if the model was given loaded, since
    then nothing says what the others do.

    Args:
        jobs (`Sequence[Job]`):
            What there is to do.

    Attributes:
        index (`int`):
            Number of this process.
        number (`int`):
            How many there are.
    """

    def __init__(self, jobs: Sequence[Job]):
        self.index, self.number = 0, 1
        if all(job.checkpoint.model is None for job in jobs):
            # shares take different times, and none of them is late for it
            cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
            state = PartialState(cpu=cpu, timeout=timedelta(days=7))
            self.index, self.number = state.process_index, state.num_processes

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def mine(self, number: int) -> range:
        """Positions, of `number` requests, that are this process's to generate."""
        return range(self.index, number, self.number)

    def wait(self) -> None:
        """Waits for all processes."""
        if self.number > 1:
            PartialState().wait_for_everyone()

    def join(self, found: Found, cached: int, peak: int | None) -> tuple[Found, int, int | None]:
        """
        Puts the shares of all processes together.

        Args:
            found (`dict`):
                Token ids and seconds by position: of this process's share all, of others what it happens to have.
            cached (`int`):
                Number of its own that an earlier run had generated.
            peak (`int`, *optional*):
                Most memory that it held.

        Returns:
            `tuple`: The same of all processes: the sum of the second, and the largest of the last.
        """
        if self.number == 1:
            return found, cached, peak
        # four bytes for a token on the way, where a list has eight and more
        own = {i: (array("i", ids), s) for i, (ids, s) in found.items() if i % self.number == self.index}
        shares, counts, peaks = zip(*gather_object([(own, cached, peak)]), strict=True)
        joined = {i: (list(ids), seconds) for share in shares for i, (ids, seconds) in share.items()}
        return joined, sum(counts), None if None in peaks else max(peaks)

    def tell(self, values: list[Any]) -> list[Any]:
        """Gives every process what the first one has."""
        return values if self.number == 1 else broadcast_object_list(values if self.is_first else [None])
