"""Fewer tokens: which context to train from, and the rounds of training."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...evaluate.compare import Answer, Comparison, compare_measurements
from ...evaluate.results_file import Measurement
from ...opsd.context import TEACHER_PROMPT_TEMPLATES
from ..chain import Stage, StageError
from .plan import LEAST_GAIN
from .runner import Runner


# Share of the accuracy without it from which on a context is worth a gate that sorts out where it is wrong
USABLE = 0.8


@dataclass
class Promise:
    """
    What a context would give, measured on the guard's problems.

    Args:
        context (`str`):
            Name or template.
        comparison ([`~trl_opsd.evaluate.compare.Comparison`]):
            The checkpoint in this context against itself without.
        as_right, usable (`list[bool]`):
            For each third of the problems, by the length of its replies without: whether it is as right as without, within
            twice the error, and whether it is nearly so, at least `USABLE` times.
        saving (`float`):
            Share of the tokens that go if it is used in the thirds in which it is usable and nowhere else.
    """

    context: str
    comparison: Comparison
    as_right: list[bool]
    usable: list[bool]
    saving: float

    @classmethod
    def of(cls, context: str, before: Measurement, after: Measurement, margin: float) -> "Promise":
        place = {name: row for row, name in enumerate(after.samples.ids)}
        both = [(row, place[name]) for row, name in enumerate(before.samples.ids) if name in place]
        rows, others = (list(side) for side in zip(*both, strict=True))
        tokens = [m.samples.tokens[index].mean(axis=1) for m, index in ((before, rows), (after, others))]
        correct = [m.samples.correct[index].mean(axis=1) for m, index in ((before, rows), (after, others))]
        as_right, usable, left = [], [], 0.0
        for third in np.array_split(np.argsort(tokens[0], kind="stable"), 3):
            lost = correct[0][third] - correct[1][third]
            error = lost.std() / max(len(third), 1) ** 0.5
            as_right.append(bool(lost.mean() <= 2 * error))
            usable.append(as_right[-1] or bool(correct[1][third].mean() >= USABLE * correct[0][third].mean()))
            left += tokens[1 if usable[-1] else 0][third].sum()
        comparison = compare_measurements(before, after, margin)
        return cls(context, comparison, as_right, usable, float(1 - left / tokens[0].sum()))

    @property
    def needs_gate(self) -> bool:
        """Whether it is wrong where the student is right, so that a gate of the teacher's has to choose the problems."""
        return not all(self.as_right)


def choose(runner: Runner, base: Measurement) -> Promise | None:
    """The context that promises most, if any promises enough, measured beside the model without: `base`."""
    plan = runner.plan
    if base.row.accuracy == 0:
        runner.decide(
            "no training",
            f"of {base.row.n} problems none is answered right, so that there is no rollout to train on: is the answer where "
            f"the verifier ({', '.join(plan.reward_funcs)}) looks, and is `max_completion_length` enough?",
            accuracy=0.0,
            truncated=base.row.truncated,
        )
        return None
    promises = []
    for number, context in enumerate(plan.contexts, start=1):
        try:
            found = runner.measure(f"context-{number}", plan.config.model_name_or_path, "guard", context)
        except StageError as error:
            if error.status != 2:
                raise  # a crash says nothing of the context
            runner.decide("context left out", f"the context {context!r} cannot be measured: {error}", context=context)
            continue
        promise = Promise.of(context, base, found, plan.arguments.max_accuracy_drop)
        promises.append(promise)
        signs = zip(promise.as_right, promise.usable, strict=True)
        thirds = " ".join("✓" if right else "~" if usable else "✗" for right, usable in signs)
        runner.decide(
            "context measured",
            f"{context!r}: {100 * found.row.accuracy:.1f}% in {found.row.mean_tokens:.1f} tokens (plain "
            f"{100 * base.row.accuracy:.1f}% in {base.row.mean_tokens:.1f}); as right as plain from the third with the shortest replies to that with the longest {thirds}; "
            f"promises {promise.saving:.0%} of the tokens",
            context=context,
            accuracy=found.row.accuracy,
            mean_tokens=found.row.mean_tokens,
            as_right=promise.as_right,
            usable=promise.usable,
            saving=promise.saving,
        )
    best = max(promises, key=lambda promise: promise.saving, default=None)
    if best is None or best.saving < plan.arguments.min_saving:
        promised = "nothing" if best is None else f"{best.saving:.0%}"
        runner.decide(
            "no training",
            f"no context promises {plan.arguments.min_saving:.0%} of the tokens where it keeps the accuracy (the best: "
            f"{promised}): nothing is trained",
            saving=None if best is None else best.saving,
        )
        return None
    gate = "" if not best.needs_gate else ", used where the teacher is right in it (`teacher_gate`)"
    runner.decide("context", f"the teacher sees {best.context!r}{gate}", context=best.context, saving=best.saving)
    return best


def train(runner: Runner, promise: Promise, base: Measurement) -> str | None:
    """
    Rounds, until one is the last. Returns the folder of the round to take: of those that have not lost more than the
    margin the shortest, else the most accurate of those that are not worse for sure.
    """
    plan, arguments = runner.plan, runner.plan.arguments
    recipe = plan.recipe
    is_name = promise.context in TEACHER_PROMPT_TEMPLATES
    recipe["teacher_context" if is_name else "teacher_prompt_template"] = promise.context
    if promise.needs_gate:
        recipe["teacher_gate"] = 0.5
    path = runner.write_recipe("opsd", recipe)
    good, last, stages = [], base.row.mean_tokens, []
    level = 1 - 0.05 / arguments.max_rounds
    for number in range(1, arguments.max_rounds + 1):
        output, steps = runner.root / f"round-{number}", number * arguments.round_steps
        options = {"output_dir": str(output), "max_steps": steps, "seed": plan.config.seed}
        if number > 1:
            before = runner.root / f"round-{number - 1}" / f"checkpoint-{steps - arguments.round_steps}"
            options["resume_from_checkpoint"] = str(before)
        stage = Stage(f"round-{number}", f"training to update {steps}", "trl_opsd.opsd", path, options, output)
        try:
            runner.run(stage, *stages)
        except StageError as error:
            if error.status != 3:
                raise  # a crash says nothing of the model
            runner.decide("training stopped", f"an alarm ended round {number}: {error}", round=number)
            break
        stages.append(stage)
        found = runner.measure(f"round-{number}", str(output), "guard")
        comparison = compare_measurements(base, found, arguments.max_accuracy_drop, level)
        tokens, lost = found.row.mean_tokens, -comparison.difference[0]
        numbers = {"round": number, "accuracy": found.row.accuracy, "mean_tokens": tokens, "level": level}
        numbers["difference"] = comparison.difference
        runner.decide("look", f"round {number}: {comparison.short()}", answer=comparison.answer.text, **numbers)
        if comparison.answer is Answer.WORSE:
            runner.decide("stop", f"round {number} is worse than the start: it is not taken", **numbers)
            break
        good.append((max(lost, arguments.max_accuracy_drop), tokens, str(output)))
        if tokens > (1 - LEAST_GAIN) * last and lost <= arguments.max_accuracy_drop:
            runner.decide(
                "stop", f"round {number} saved {1 - tokens / last:.1%}: there is no more to be had", **numbers
            )
            break
        last = tokens
    else:
        runner.decide("stop", f"`max_rounds` {arguments.max_rounds} are done", max_rounds=arguments.max_rounds)
    if not good:
        runner.decide("end", "no round kept the accuracy: nothing is left, and nothing lost")
        return None
    lost, tokens, folder = min(good)
    runner.decide(
        "round", f"{Path(folder).name} is taken, in {tokens:.1f} tokens", mean_tokens=tokens, lost_at_most=lost
    )
    return folder
