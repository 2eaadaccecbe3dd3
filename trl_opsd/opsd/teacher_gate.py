"""
The teacher's gate: in which context the teacher scores the rollouts of a prompt.

The gate on rollouts asks whether the student was right. This one asks whether the teacher would be, in its context: where it
would not, its context teaches the student to be as wrong.
"""

import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerState

from ..decoding import generate
from .context import TeacherContext, takes_sibling
from .gate import Verdicts
from .pass_rates import prompt_key
from .saved import Saved


if TYPE_CHECKING:
    from peft import PeftModel

    from .config import OPSDConfig
    from .teacher import Teacher


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


@torch.no_grad()
def generate_as(
    teacher: "Teacher", student: "PreTrainedModel | PeftModel", accelerator: Accelerator, **inputs: Any
) -> torch.LongTensor:
    """
    Writes by a teacher's weights as they are now. Not under FSDP or ZeRO-3, where no process has all of them.

    Args:
        teacher ([`Teacher`]):
            Teacher.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Student.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        **inputs:
            As `generate` of transformers takes them.

    Returns:
        `torch.LongTensor`: Prompts and completions, of shape `(B, P + C)`.
    """
    if teacher.model is not None:
        teacher.model.eval()
        return generate(accelerator.unwrap_model(teacher.model), **inputs)
    student = accelerator.unwrap_model(student)
    with teacher.in_student(student):
        return generate(student, **inputs)


def as_list(value: str | list[str] | None) -> list[str]:
    """A field that is one text, several or none, as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def check_preference(args: "OPSDConfig") -> None:
    """
    Checks several contexts, and the gate that chooses among them.

    Args:
        args ([`OPSDConfig`]):
            Configuration.

    Raises:
        ValueError: If the contexts are no order of preference, or the gate has nothing to choose.
    """
    both = as_list(args.teacher_context), as_list(args.teacher_prompt_template)
    preference = max(both, key=len)
    if len(preference) > 1:
        name = "teacher_context" if preference is both[0] else "teacher_prompt_template"
        if args.teacher_gate is None:
            raise ValueError(
                f"`{name}` has {len(preference)} contexts, and which of them a prompt has is what `teacher_gate` decides: "
                "set it, for instance to 0.5, or give one context."
            )
        if all(both):
            raise ValueError(
                "`teacher_context` and `teacher_prompt_template` are both set, and one of them is an order of preference: "
                "give all contexts in `teacher_prompt_template`, or all in `teacher_context`."
            )
        if len(set(preference)) < len(preference):
            raise ValueError(f"`{name}` has a context twice: name each once.")
    if args.teacher_gate is None:
        if args.teacher_gate_rollouts is not None:
            raise ValueError(
                f"`teacher_gate_rollouts={args.teacher_gate_rollouts}` measures what `teacher_gate` decides by, and that "
                "is not set: set it, for instance to 0.5, or drop the rollouts."
            )
        return
    if not 0 < args.teacher_gate <= 1:
        raise ValueError(
            f"`teacher_gate` is a pass rate above 0 and at most 1, and is {args.teacher_gate}: use None to use the "
            "context on every prompt."
        )
    if not preference:
        raise ValueError(
            f"`teacher_gate={args.teacher_gate}` decides on which prompts the teacher's context is used, and it has none: "
            "set `teacher_context`, or drop the gate."
        )
    if args.teacher_gate_rollouts is not None and args.teacher_gate_rollouts < 0:
        raise ValueError(f"`teacher_gate_rollouts` must be at least 0, and is {args.teacher_gate_rollouts}.")


def check_pass_rates(
    args: "OPSDConfig",
    dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    tools: list[Callable] | None,
) -> None:
    """
    Checks what the gate decides by.

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training data.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Data of the evaluation.
        tools (`list[Callable]`, *optional*):
            Tools.

    Raises:
        ValueError: If there are no pass rates, and none can be measured, or some are no shares.
    """
    if args.teacher_gate is None:
        return
    columns, number = dataset.column_names or [], len(args.build_teacher_contexts())
    held_out = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    held_out = [data for data in held_out if data is not None]
    measures_nothing = args.resolve_teacher_gate_rollouts(columns) == 0
    if measures_nothing and "teacher_pass_rates" not in columns:
        raise ValueError(
            "`teacher_gate_rollouts=0` measures nothing, and the training data has no pass rates of the teacher (column "
            "`teacher_pass_rates`; on the command line `--teacher_bank` adds it): give them, or let it write rollouts."
        )
    for data in held_out:
        # All of it would be on the plain prompt, where the teacher is what the student was: lowest loss, no training
        if measures_nothing and "teacher_pass_rates" not in (data.column_names or ["teacher_pass_rates"]):
            raise ValueError(
                "The training data has pass rates of the teacher and nothing is measured, but the evaluation data has no "
                "column `teacher_pass_rates`, so its loss would say only how far the student is from its own start: give "
                "them there too, set `teacher_gate_rollouts`, for instance to 4, or drop the evaluation."
            )
    for data in (dataset, *held_out):
        if not isinstance(data, Dataset) or "teacher_pass_rates" not in data.column_names:
            continue
        for row, rates in enumerate(data["teacher_pass_rates"]):
            if rates is not None and (
                len(rates) != number or not all(rate is None or 0 <= rate <= 1 for rate in rates)
            ):
                raise ValueError(
                    f"`teacher_pass_rates` of row {row} is {rates}: it must have a share from 0 to 1, or None, for each of "
                    f"the teacher's {number} contexts."
                )
    if measures_nothing:
        return
    for name, is_set in (
        ("use_vllm", args.use_vllm),
        ("tools", bool(tools)),
        ("FSDP", args.uses_fsdp),
        ("DeepSpeed", args.deepspeed_plugin is not None),
    ):
        if is_set:
            raise ValueError(
                f"`teacher_gate_rollouts` are written in one turn by transformers' `generate` from whole weights, which "
                f"`{name}` excludes: fill a rollout bank in the teacher's context before (`python -m "
                "trl_opsd.compress.bank --prompt_template ...`), give it with `--teacher_bank`, and set "
                "`teacher_gate_rollouts: 0`."
            )
