"""How long the student may write: no longer than correct rollouts get, with head-room."""

import math
from collections import deque
from typing import Any

import torch

from .saved import Saved


# Rollouts that the limit looks back on, and fewest that it acts on
WINDOW, FEWEST = 512, 64
# How much larger than at the start the share of truncated rollouts may be. What never ends is truncated under any limit
MORE_TRUNCATED = 0.02


class CompletionLimit(Saved):
    """
    An adaptive limit on the length of rollouts. A truncated rollout is never correct, so what is written beyond the length at
    which correct ones still end is waste.

    After `WINDOW` rollouts at `max_length` the limit is `headroom` times a quantile of the lengths of the last correct ones.
    What it cuts off it does not see, so it is not left to the quantile alone: as soon as more rollouts are truncated than at
    the start (by `MORE_TRUNCATED`), the limit is raised by `headroom`, and stays there for `WINDOW` rollouts. Fed with the
    gathered batch it is the same on every process.

    Args:
        max_length (`int`):
            Where it starts, and what it never exceeds, in tokens.
        quantile (`float`):
            Quantile of the lengths of correct rollouts, 1 for the longest.
        headroom (`float`):
            Factor on it.

    Attributes:
        value (`int`):
            The limit, in tokens.
    """

    file = "completion_limit.json"
    missing = (
        "it is not known how long rollouts may be: resume from a checkpoint that was written with "
        "`completion_limit_quantile`, or resume without it"
    )

    def __init__(self, max_length: int, quantile: float, headroom: float):
        self.max_length, self.quantile, self.headroom = max_length, quantile, headroom
        self.value = max_length
        self._lengths: deque[int] = deque(maxlen=WINDOW)  # of correct rollouts
        self._truncated: deque[bool] = deque(maxlen=WINDOW)  # of all, since the limit was last raised
        self._at_start: float | None = None  # share of truncated rollouts under `max_length`

    def update(self, lengths: torch.Tensor, correct: torch.Tensor, finished: torch.Tensor) -> None:
        """
        Takes up rollouts that were written under the limit.

        Args:
            lengths (`torch.Tensor`):
                Their tokens, of shape `(N,)`.
            correct (`torch.Tensor`):
                Which are correct, `bool`, of shape `(N,)`.
            finished (`torch.Tensor`):
                Which have come to an end, `bool`, of shape `(N,)`.
        """
        self._lengths.extend(lengths[correct].tolist())
        self._truncated.extend((~finished).tolist())
        is_full = len(self._truncated) == WINDOW
        if self._at_start is None:
            if not is_full:
                return
            self._at_start = sum(self._truncated) / WINDOW
        share = sum(self._truncated) / len(self._truncated)
        if len(self._truncated) >= FEWEST and share > self._at_start + MORE_TRUNCATED:
            self.value = min(math.ceil(self.headroom * self.value), self.max_length)
            self._truncated.clear()
        elif is_full and len(self._lengths) >= FEWEST:
            longest = torch.tensor(list(self._lengths), dtype=torch.float64).quantile(self.quantile).item()
            self.value = min(math.ceil(self.headroom * longest), self.max_length)

    def state_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "lengths": list(self._lengths),
            "truncated": list(self._truncated),
            "at_start": self._at_start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._at_start = state["value"], state["at_start"]
        self._lengths.extend(state["lengths"])
        self._truncated.extend(state["truncated"])
