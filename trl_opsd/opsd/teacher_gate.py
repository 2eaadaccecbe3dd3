"""
The teacher's gate: in which context the teacher scores the rollouts of a prompt.

The gate on rollouts asks whether the student was right. This one asks whether the teacher would be, in its context: where it
would not, its context teaches the student to be as wrong.
"""

import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerState

from .context import TeacherContext, takes_sibling
from .gate import Verdicts
from .pass_rates import prompt_key
from .saved import Saved


class TeacherGate(Saved):
    """
    Chooses the context of each prompt by the pass rates of the teacher in it: the first one, in order of preference, in which
    the share of its rollouts that are correct reaches the threshold; the plain prompt where there is none.

    A pass rate comes from the data (column `teacher_pass_rates`), or is measured: the teacher writes some rollouts, by its
    weights as they are then, and the verifiers of the training judge them. That happens once for each prompt and context, the
    first time that a rollout of the prompt is trained on, and a weaker context is measured only where no stronger one has
    passed. A context with a sibling is measured with the sibling of that time in its place, and is not chosen for a rollout
    that has none.

    Args:
        contexts (`list[TeacherContext]`):
            Contexts in order of preference.
        threshold (`float`):
            Pass rate from which on the teacher is competent.
        num_rollouts (`int`):
            Rollouts that a pass rate is measured by. `0` measures nothing.
        write (`Callable`):
            The teacher's rollouts of a list of rows with their siblings in a context, as token ids.
        verify (`Callable`):
            Verdicts on rollouts of all processes, given rows and token ids of this one's and the state of the training.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        seed (`int`):
            Seed of the teacher's rollouts, which take no random numbers from the student's.

    Attributes:
        counts (`dict[str, list[list[int] | None]]`):
            By prompt, for each context the teacher's correct rollouts and all of them, `None` where it was not measured.
        tokens (`int`):
            Tokens that the teacher has written, on all processes.
        seconds (`float`):
            How long that took, with their verification.
    """

    file = "teacher_gate.json"
    missing = (
        "it is not known where the teacher was competent: resume from a checkpoint that was written with `teacher_gate`, or "
        "resume without it"
    )

    def __init__(
        self,
        contexts: list[TeacherContext],
        threshold: float,
        num_rollouts: int,
        write: Callable[[list[dict[str, Any]], list[str | None], TeacherContext], list[list[int]]],
        verify: Callable[[list[dict[str, Any]], list[list[int]], TrainerState], Verdicts],
        accelerator: Accelerator,
        seed: int,
    ):
        self.contexts, self.threshold, self.num_rollouts = contexts, threshold, num_rollouts
        self.counts: dict[str, list[list[int] | None]] = {}
        self.tokens, self.seconds = 0, 0.0
        self._write, self._verify, self._accelerator, self._seed = write, verify, accelerator, seed

    def pass_rate(self, row: dict[str, Any], place: int) -> float | None:
        """
        Args:
            row (`dict[str, Any]`):
                Row of the dataset.
            place (`int`):
                Place of a context in the order of preference.

        Returns:
            `float` or `None`: Pass rate of the teacher in it, `None` where it is not known.
        """
        given = (row.get("teacher_pass_rates") or [None] * len(self.contexts))[place]
        if given is not None:
            return given
        count = self.counts.get(prompt_key(row["prompt"]), [None] * len(self.contexts))[place]
        return None if count is None else count[0] / count[1]

    def choice(self, row: dict[str, Any], sibling: str | None) -> int | None:
        """
        Args:
            row (`dict[str, Any]`):
                Row of the dataset.
            sibling (`str`, *optional*):
                Shortest correct rollout of the same prompt.

        Returns:
            `int` or `None`: Place of the context, `None` for the plain prompt.
        """
        for place, context in enumerate(self.contexts):
            if takes_sibling(context) and sibling is None:
                continue
            rate = self.pass_rate(row, place)
            if rate is not None and rate >= self.threshold:
                return place
        return None

    def choose(
        self, rows: list[dict[str, Any]], siblings: list[str | None], kept: list[bool], state: TrainerState
    ) -> tuple[list[TeacherContext | None], dict[str, float]]:
        """
        Chooses the contexts of a batch, and measures first what is not known of them. Called on every process.

        Args:
            rows (`list[dict[str, Any]]`):
                Row of the dataset of each rollout of this process.
            siblings (`list[str | None]`):
                Shortest correct rollout of the same prompt, for each of them.
            kept (`list[bool]`):
                Which of them are trained on. Of the others nothing is measured.
            state ([`~transformers.TrainerState`]):
                State of the training.

        Returns:
            `tuple[list[TeacherContext | None], dict[str, float]]`: Context of each rollout, `None` for the plain prompt. And
            of the rollouts of all processes that are trained on, the share in each context and on the plain prompt.
        """
        if self.num_rollouts > 0:
            for place in range(len(self.contexts)):
                self._measure(place, rows, siblings, kept, state)
        places = [self.choice(row, sibling) for row, sibling in zip(rows, siblings, strict=True)]
        trained_on = gather_object([place for place, keep in zip(places, kept, strict=True) if keep])
        metrics = {}
        if trained_on:
            for place in range(len(self.contexts)):
                metrics[f"opsd/context_{place + 1}"] = trained_on.count(place) / len(trained_on)
            metrics["opsd/anchored"] = trained_on.count(None) / len(trained_on)
        return [None if place is None else self.contexts[place] for place in places], metrics

    def _measure(
        self,
        place: int,
        rows: list[dict[str, Any]],
        siblings: list[str | None],
        kept: list[bool],
        state: TrainerState,
    ) -> None:
        """Has the teacher write in one context on the prompts that have none yet and of which it is not known there."""
        is_open = [
            keep
            and self.choice(row, sibling) is None
            and self.pass_rate(row, place) is None
            and not (takes_sibling(self.contexts[place]) and sibling is None)
            for row, sibling, keep in zip(rows, siblings, kept, strict=True)
        ]
        asked = {}
        for row, sibling in gather_object(
            [pair for pair, ask in zip(zip(rows, siblings, strict=True), is_open, strict=True) if ask]
        ):
            asked.setdefault(prompt_key(row["prompt"]), (row, sibling))
        if not asked:
            return
        start = time.perf_counter()
        slots = [key for key in asked for _ in range(self.num_rollouts)]
        # As many for each process, because judging takes all of them: what is missing to that is asked twice, and dropped
        process, num_processes = self._accelerator.process_index, self._accelerator.num_processes
        share = -(-len(slots) // num_processes)
        own = [asked[slots[slot % len(slots)]] for slot in range(process * share, (process + 1) * share)]
        own_rows, own_siblings = [row for row, _ in own], [sibling for _, sibling in own]
        device = self._accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            text = f"{self._seed} {state.global_step} {place} {process} {next(iter(asked))}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
            completion_ids = self._write(own_rows, own_siblings, self.contexts[place])
        verdicts = self._verify(own_rows, completion_ids, state)
        for key, correct in zip(slots, verdicts.correct.tolist(), strict=False):
            count = self.counts.setdefault(key, [None] * len(self.contexts))
            count[place] = count[place] or [0, 0]
            count[place][0] += correct
            count[place][1] += 1
        self.tokens += int(verdicts.lengths.sum())
        self.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        return {
            "contexts": [context.template for context in self.contexts],
            "counts": self.counts,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: If other contexts were measured.
        """
        own = [context.template for context in self.contexts]
        if state["contexts"] != own:
            raise ValueError(
                f"The checkpoint has measured the teacher in the contexts {state['contexts']}, and this run has {own}: "
                "resume with the same ones."
            )
        self.counts, self.tokens, self.seconds = state["counts"], state["tokens"], state["seconds"]
