"""Is one checkpoint as accurate as another, and how much shorter or smaller? With the interval that says so."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..cli import UserError
from .estimate import mcnemar, paired_difference, paired_ratio
from .results_file import Measurement, load_results
from .schema import ResultRow


# What must be the same on both sides for their difference to be about the checkpoints
_SETTINGS = {
    declared.name: declared.metadata["setting"]
    for declared in dataclasses.fields(ResultRow)
    if "setting" in declared.metadata
}


@dataclass
class Comparison:
    """
    Two checkpoints on the same problems.

    Args:
        before ([`Measurement`]):
            What is compared with.
        after ([`Measurement`]):
            What is judged.
        n (`int`):
            Number of problems that both have a verdict on.
        margin (`float`):
            Loss of accuracy that still counts as none.
        difference (`tuple[float, float, float]`):
            Accuracy after − before, with its 95% interval.
        ratio (`tuple`):
            Mean tokens after / before, with its 95% interval.
        p_value (`float`, *optional*):
            Of McNemar's exact test, where there is one sample per problem.
    """

    before: Measurement
    after: Measurement
    n: int
    margin: float
    difference: tuple[float, float, float]
    ratio: tuple[float, float | None, float | None]
    p_value: float | None

    @property
    def as_accurate(self) -> bool:
        """Whether a loss of `margin` or more is ruled out."""
        return self.difference[1] > -self.margin

    def sentence(self) -> str:
        """The answer, with the numbers that it rests on."""
        old, new = self.before, self.after
        if self.as_accurate:
            answer = f"yes: {new.label} is as accurate as {old.label}"
        elif self.difference[2] < 0:
            answer = f"no: {new.label} is less accurate than {old.label}"
        else:
            answer = f"no: {new.label} is not shown to be as accurate as {old.label}"
        points, low, high = (_signed(100 * value) for value in self.difference)
        test = ""
        if self.p_value is not None:
            test = f", McNemar p = {self.p_value:.2g}" if self.p_value >= 1e-4 else ", McNemar p < 0.0001"
        ratio, *bounds = self.ratio
        interval = "" if None in bounds else f" (95% interval {bounds[0]:.3f} to {bounds[1]:.3f})"
        size, old_size = new.row.parameters, old.row.parameters
        parameters = "as many parameters" if size == old_size else f"{size / old_size:.2f} times the parameters"
        return (
            f"{answer} on {', '.join(old.key)}: {points} points (95% interval {low} to {high}, margin "
            f"{100 * self.margin:g}, {self.n:,} problems{test}), {ratio:.3f} times the tokens{interval}, {parameters}."
        )


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no "-0.00"


def compare_measurements(before: Measurement, after: Measurement, margin: float = 0.01) -> Comparison:
    """
    Compares two checkpoints, problem by problem.

    Args:
        before ([`Measurement`]):
            What is compared with, with samples.
        after ([`Measurement`]):
            What is judged, with samples.
        margin (`float`, *optional*, defaults to `0.01`):
            Loss of accuracy that still counts as none.

    Returns:
        [`Comparison`]: Differences with their intervals.

    Raises:
        UserError: If they were not measured on the same problems, in the same way.
    """
    what = f"{before.label} and {after.label} cannot be compared on {', '.join(before.key)}"
    for name, kind in _SETTINGS.items():
        old, new = before.setting(name), after.setting(name)
        if old != new and not (name in ("top_p", "top_k") and before.row.decoding == "greedy"):
            raise UserError(f"{what}: their {kind} differs, `{name}` is {old!r} and {new!r}.")
    for measurement in (before, after):
        if measurement.samples is None:
            raise UserError(
                f"{what}: there are no completions beside `{measurement.file}` to pair the problems by; evaluate with "
                "`save_completions: true`."
            )
    if before.questions != after.questions:
        problems = [before.questions.keys(), after.questions.keys()]
        differ = sorted(
            map(
                str, problems[0] ^ problems[1] or [i for i in problems[0] if before.questions[i] != after.questions[i]]
            )
        )
        raise UserError(f"{what}: their problems differ, {len(differ)} of them, the first is {differ[0]!r}.")
    position = {name: index for index, name in enumerate(after.samples.ids)}
    both = [(index, position[name]) for index, name in enumerate(before.samples.ids) if name in position]
    if not both:
        raise UserError(f"{what}: no problem has a verdict in both.")
    rows, other_rows = map(list, zip(*both, strict=True))
    old, new = before.samples.correct[rows], after.samples.correct[other_rows]
    single = old.shape[1] == new.shape[1] == 1
    return Comparison(
        before=before,
        after=after,
        n=len(both),
        margin=margin,
        difference=paired_difference(old.mean(axis=1), new.mean(axis=1), old.shape[1], new.shape[1]),
        ratio=paired_ratio(before.samples.tokens[rows].mean(axis=1), after.samples.tokens[other_rows].mean(axis=1)),
        p_value=mcnemar(old[:, 0], new[:, 0]) if single else None,
    )


def compare_files(before: str, after: str, margin: float = 0.01) -> list[Comparison]:
    """
    Compares two results files on every task and way of decoding.

    Args:
        before (`str`):
            Results file to compare with, or `FILE:STAGE` for one of several checkpoints in it.
        after (`str`):
            The same of what is judged.
        margin (`float`, *optional*, defaults to `0.01`):
            Loss of accuracy that still counts as none.

    Returns:
        `list[Comparison]`: One for each task and way of decoding.

    Raises:
        UserError: If a file is missing or damaged, holds several checkpoints and none is named, or was not measured on
            the same problems, in the same way.
    """
    if not 0 <= margin < 1:
        raise UserError(f"`margin` is a share of the problems, at least 0 and below 1, and is {margin}.")
    old, new = _select(before), _select(after)
    if old.keys() != new.keys():
        (task, decoding) = sorted(old.keys() ^ new.keys())[0]
        raise UserError(
            f"Only one of `{before}` and `{after}` has {task}, {decoding}: evaluate both on the same tasks."
        )
    return [compare_measurements(old[key], new[key], margin) for key in old]


def _select(name: str) -> dict[tuple[str, str], Measurement]:
    path, _, stage = name.rpartition(":")
    if not path or Path(name).exists() or Path(f"{name}.json").exists():
        path, stage = name, None
    measurements = load_results(path)
    labels = list(dict.fromkeys(measurement.label for measurement in measurements))
    if stage is None and len(labels) > 1:
        raise UserError(f"`{path}` holds {', '.join(labels)}: say which one, as in `{path}:{labels[-1]}`.")
    if stage is not None and stage not in labels:
        raise UserError(f"`{path}` holds {', '.join(labels)} and no `{stage}`.")
    chosen = {}
    for measurement in measurements:
        if stage in (None, measurement.label):
            if measurement.key in chosen:
                raise UserError(
                    f"`{path}` holds {measurement.label} on {', '.join(measurement.key)} twice: give the runs different "
                    "values of `stage`."
                )
            chosen[measurement.key] = measurement
    return chosen
