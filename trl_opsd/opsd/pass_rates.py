"""Pass rates of the prompts, so that those which are always or never solved can be left out."""

import hashlib
import json
import random
from collections.abc import Iterable
from typing import Any

import torch

from .saved import Saved


def prompt_key(prompt: list[dict[str, Any]] | str) -> str:
    """
    Name of a prompt that does not depend on its place in the dataset.

    Args:
        prompt (`list[dict[str, Any]]` or `str`):
            Prompt.

    Returns:
        `str`: Start of its hash.
    """
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16]


class PassRates(Saved):
    """
    How often the student solves each prompt, and which prompts stand in for those that are not worth asking. Fed with
    the gathered batch it is the same on every process.

    A rollout counts if it was not sampled because another one had failed: what is rolled out until it passes would
    make every prompt look easier.

    Args:
        prompts (`Iterable[list[dict[str, Any]] | str]`):
            Prompts of the training set, in its order.
        min_rate (`float`, *optional*):
            A prompt is skipped when its pass rate is below this.
        max_rate (`float`, *optional*):
            A prompt is skipped when its pass rate is above this.
        num_rollouts (`int`):
            Rollouts of a prompt from which on its pass rate is known.
        seed (`int`):
            Seed of the order in which prompts are taken as substitutes.
    """

    file = "pass_rates.json"
    missing = (
        "it is not known which prompts were skipped: resume from a checkpoint that was written with `min_pass_rate` or "
        "`max_pass_rate`, or resume without them"
    )

    def __init__(
        self,
        prompts: Iterable[list[dict[str, Any]] | str],
        min_rate: float | None,
        max_rate: float | None,
        num_rollouts: int,
        seed: int,
    ):
        self.keys = [prompt_key(prompt) for prompt in prompts]
        self.min_rate = min_rate
        self.max_rate = max_rate
        self.num_rollouts = num_rollouts
        self.seed = seed
        self.counts: dict[str, list[int]] = {}  # solved rollouts and rollouts, by prompt
        self.position = 0  # how many prompts of the substitutes' order have been passed
        self._cycle, self._order = -1, []
        self._asked: list[str] = []
        self._known: list[float | None] = []

    def skipped_rate(self, key: str) -> float | None:
        """
        Whether a prompt is skipped.

        Args:
            key (`str`):
                Name of the prompt.

        Returns:
            `float` or `None`: Its pass rate if it is, `None` if it is to be asked.
        """
        solved, rollouts = self.counts.get(key, (0, 0))
        if rollouts < self.num_rollouts:
            return None
        rate = solved / rollouts
        too_hard = self.min_rate is not None and rate < self.min_rate
        too_easy = self.max_rate is not None and rate > self.max_rate
        return rate if too_hard or too_easy else None

    def substitute(self) -> int:
        """
        Takes the next prompt that is not skipped, in an order that is shuffled anew for each pass over the dataset.

        Returns:
            `int`: Its place in the dataset.

        Raises:
            RuntimeError: If every prompt is skipped.
        """
        size = len(self.keys)
        for _ in range(2 * size):  # wherever it starts, this holds one whole pass
            cycle, place = divmod(self.position, size)
            if cycle != self._cycle:
                self._cycle = cycle
                self._order = random.Random(f"substitutes {self.seed} {cycle}").sample(range(size), size)
            self.position += 1
            if self.skipped_rate(self.keys[self._order[place]]) is None:
                return self._order[place]
        raise RuntimeError(
            f"No prompt is left to ask: all {size} of the training set have a pass rate below "
            f"`min_pass_rate={self.min_rate}` or above `max_pass_rate={self.max_rate}`. Widen the two, or give prompts "
            "that the student solves sometimes. The last checkpoint is as it was."
        )

    def start_batch(self, keys: list[str], group_size: int) -> dict[int, int]:
        """
        Decides which prompts of a batch are not asked.

        Args:
            keys (`list[str]`):
                Names of the prompts of the global batch, groups side by side.
            group_size (`int`):
                Rollouts of one prompt.

        Returns:
            `dict[int, int]`: For each place of the batch that is taken, the place in the dataset of the substitute.
        """
        self._asked, self._known = list(keys), [None] * len(keys)
        taken = {}
        for start in range(0, len(keys), group_size):
            rate = self.skipped_rate(keys[start])
            if rate is not None:
                index = self.substitute()
                for slot in range(start, start + group_size):
                    taken[slot], self._asked[slot], self._known[slot] = index, self.keys[index], rate
        return taken

    def end_batch(self, correct: torch.Tensor, verified: torch.Tensor) -> torch.Tensor:
        """
        Counts the rollouts of the batch.

        Args:
            correct (`torch.Tensor`):
                Which rollouts of the global batch are correct, of shape `(N,)`.
            verified (`torch.Tensor`):
                Which of them a verifier has judged, of shape `(N,)`. The others do not count.

        Returns:
            `torch.Tensor`: What each place of the batch as the sampler drew it has been solved by, of shape `(N,)`: 0
            or 1 where its prompt was asked, the pass rate where it was skipped. So the mean speaks of the whole
            training set, whatever is skipped of it.
        """
        for key, solved, counts in zip(self._asked, correct.tolist(), verified.tolist(), strict=True):
            if counts:
                count = self.counts.setdefault(key, [0, 0])
                count[0] += solved
                count[1] += 1
        shares = zip(self._known, correct.tolist(), strict=True)
        return torch.tensor([solved if rate is None else rate for rate, solved in shares], dtype=torch.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.counts = state["position"], state["counts"]
