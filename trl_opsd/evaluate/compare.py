"""
Is one checkpoint as good as another, and how much shorter or smaller? As good, worse or undecided, with the intervals
that say so.

It is a test of non-inferiority: *as good* where the interval of the difference in accuracy lies above −margin, *worse*
where it lies below, and *undecided* where −margin is inside it. At 95% either is said wrongly in about 2.5% of the cases at most
(recipes/results/coverage).
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..cli import UserError
from .estimate import (
    mcnemar,
    normal_quantile,
    paired_difference,
    paired_ratio,
    share_interval,
    tokens_where_both_solve,
    unpaired_difference,
)
from .results_file import Measurement, load_results
from .schema import ResultRow, percent


MARGIN = 0.01
# What must be the same on both sides for their difference to be about the checkpoints
_SETTINGS = {
    declared.name: declared.metadata["setting"]
    for declared in dataclasses.fields(ResultRow)
    if "setting" in declared.metadata
}
# A loss can be seen where there is something to lose: a margin is at most half of it, as the FDA's guidance on trials of
# non-inferiority (2016) has it of a drug's effect
_KEPT = 2
# From which share on a reader is warned: of truncated completions, and of problems solved by next to none or by nearly all
_TRUNCATED, _LOW, _HIGH = 0.05, 0.05, 0.98
_CUT = "Completions cut at the limit, which count as wrong and have no length"
_APART = "The strict and the flexible scorer disagree on more completions than the margin"
_HARD = "Next to none solved, so there is little to lose"
_EASY = "Nearly all solved, so these problems cannot tell models apart"
_OUT_OF_REACH = 1000  # times as many problems, or samples, as there are


class Answer(enum.Enum):
    """The three answers, each with its sign and the exit status of `--compare`."""

    AS_GOOD = ("as good", "✓", 0)
    WORSE = ("worse", "✗", 1)
    UNDECIDED = ("undecided", "?", 3)  # 2 is a mistake in what was asked

    def __init__(self, text: str, sign: str, status: int):
        self.text, self.sign, self.status = text, sign, status

    @classmethod
    def of(cls, difference: tuple[float, float, float], margin: float, floor: bool = False) -> "Answer":
        """
        Returns what an interval says.

        Args:
            difference (`tuple[float, float, float]`):
                Accuracy after − before, with its interval.
            margin (`float`):
                Loss of accuracy that still counts as none.
            floor (`bool`, *optional*, defaults to `False`):
                Whether there was too little to lose for a loss to be seen.

        Returns:
            [`Answer`]: As good if the interval lies above −margin, worse if it lies below, undecided otherwise.
        """
        _, low, high = difference
        if high < -margin:
            return cls.WORSE
        return cls.AS_GOOD if low > -margin and not floor else cls.UNDECIDED


@dataclass
class Comparison:
    """
    Two checkpoints on the same problems, of one task or of several together, in which case every problem counts the same.

    Args:
        pairs (`list[tuple[Measurement, Measurement]]`):
            Before and after, one pair for each task. Where the samples of one are not there, problems are not paired.
        margins (`list[float]`):
            Loss of accuracy that still counts as none, on each.
        level (`float`, *optional*, defaults to `0.95`):
            Of the intervals.

    Attributes:
        n (`int`):
            Number of problems that both have a verdict on.
        margin (`float`):
            Mean of the margins over problems.
        difference (`tuple[float, float, float]`):
            Accuracy after − before, with its interval.
        ratio (`tuple`, *optional*):
            Mean tokens after / before, with its interval, of correct samples on the problems that both solve; `None` if
            there is no such problem. Where problems are not paired, of all completions, without an interval, and `None`
            if some were cut.
        solved (`int`, *optional*):
            Number of problems that both solve; `None` where problems are not paired.
        p_value (`float`, *optional*):
            Of McNemar's exact test, where there is one sample per problem.
    """

    pairs: list[tuple[Measurement, Measurement]]
    margins: list[float]
    level: float = 0.95

    def __post_init__(self):
        self.paired = all(item.samples is not None for pair in self.pairs for item in pair)
        self.solved = self.p_value = self.ratio = None
        (self._compare_samples if self.paired else self._compare_rows)()

    def _compare_samples(self) -> None:
        shares, tokens, single, weights, within = [], [], True, [], []
        for before, after in self.pairs:
            position = {name: index for index, name in enumerate(after.samples.ids)}
            both = [(index, position[name]) for index, name in enumerate(before.samples.ids) if name in position]
            if not both:
                raise UserError(f"{_cannot(before, after)}: no problem has a verdict in both.")
            old, new = (
                side.samples.correct[list(rows)]
                for side, rows in zip((before, after), zip(*both, strict=True), strict=True)
            )
            shares.append(np.stack([old.mean(axis=1), new.mean(axis=1)], axis=1))
            tokens.append(tokens_where_both_solve(before.samples, after.samples, both))
            weights.append(len(both))
            single = single and old.shape[1] == new.shape[1] == 1
            within += [side.var(axis=1) / max(side.shape[1] - 1, 1) for side in (old, new)]
        self.counts, shares, tokens = weights, np.concatenate(shares), np.concatenate(tokens)
        self.n, self.solved = len(shares), len(tokens)
        self.margin = float(np.average(self.margins, weights=weights))
        self.difference = paired_difference(*shares.T, self.level)
        self.ratio = paired_ratio(*tokens.T, self.level) if len(tokens) else None
        self.accuracy = [share_interval(side, self._width(index), self.level) for index, side in enumerate(shares.T)]
        if single:
            self.p_value = mcnemar(*shares.T.astype(bool))
        # how much of the variance is in the samples of a problem, and would go with more of them; one sample does not say
        between = float(np.var(shares[:, 1] - shares[:, 0]))
        many = all(side.samples.correct.shape[1] > 1 for pair in self.pairs for side in pair)
        self.within = min(float(sum(map(np.sum, within))) / self.n / between, 1.0) if many and between > 0 else None

    def _width(self, side: int) -> int:
        return max(pair[side].samples.correct.shape[1] for pair in self.pairs)

    def _compare_rows(self) -> None:
        rows = [(before.row, after.row) for before, after in self.pairs]
        self.counts = [min(old.n, new.n) for old, new in rows]
        shares = np.array(self.counts) / sum(self.counts)
        self.n, self.margin = sum(self.counts), float(np.dot(shares, self.margins))
        self.within = None
        self.accuracy = []
        for side in range(2):
            # the bounds of independent shares, joined as those of their difference are (MOVER)
            values = np.array(
                [[pair[side].accuracy, pair[side].accuracy_low, pair[side].accuracy_high] for pair in rows]
            )
            mean = float(shares @ values[:, 0])
            low, high = (float(np.linalg.norm(shares * (values[:, k] - values[:, 0]))) for k in (1, 2))
            self.accuracy.append((mean, mean - low, mean + high))
        # the rows have bounds at 95%
        wider = normal_quantile(self.level) / normal_quantile()
        self.accuracy = [(x, x - wider * (x - low), x + wider * (high - x)) for x, low, high in self.accuracy]
        self.difference = unpaired_difference(*self.accuracy)
        if not any(row.truncated for pair in rows for row in pair):
            old, new = (
                sum(n * pair[side].mean_tokens for n, pair in zip(self.counts, rows, strict=True)) for side in range(2)
            )
            self.ratio = (new / old, None, None)

    @property
    def before(self) -> Measurement:
        """What is compared with; of several tasks, on the first."""
        return self.pairs[0][0]

    @property
    def after(self) -> Measurement:
        """What is judged."""
        return self.pairs[0][1]

    @property
    def where(self) -> str:
        """On what they are compared."""
        if len(self.pairs) == 1:
            return ", ".join(self.before.key)
        return f"{len(self.pairs)} tasks together"

    @property
    def floor(self) -> str | None:
        """Why a loss could not be seen, if it could not."""
        share, low, high = self.accuracy[0]
        if low > _KEPT * self.margin:
            return None
        rows, total = [before.row for before, _ in self.pairs], sum(self.counts)
        cut = sum(row.truncated * n for row, n in zip(rows, self.counts, strict=True)) / total
        truncated = f", with {100 * cut:.0f}% of its completions cut at the limit" if cut > _TRUNCATED else ""
        return (
            f"{self.before.label} itself solves {100 * share:.1f}% ({100 * low:.1f} to {100 * high:.1f}%){truncated}, so "
            f"there is too little to lose for a loss of {100 * self.margin:g} points to be seen"
        )

    @property
    def answer(self) -> Answer:
        """What the interval says against the margin."""
        return Answer.of(self.difference, self.margin, self.floor is not None)

    def needed(self) -> tuple[float | None, float | None]:
        """
        Returns how many problems, and how many times as many samples of each of these, would decide if the difference
        stayed as it is.

        Returns:
            `tuple`: Problems, `None` if they are out of reach; samples, as a factor, `None` if no number would do or one
            sample of a problem does not say.
        """
        value, low, high = self.difference
        distance = abs(value + self.margin)
        width = value - low if value > -self.margin else high - value
        if distance**2 * _OUT_OF_REACH < width**2:
            return None, None
        problems = self.n * (width / distance) ** 2
        if self.within is None:
            return problems, None
        left = distance**2 - width**2 * (1 - self.within)
        factor = width**2 * self.within / left if left > 0 else math.inf
        return problems, factor if factor < _OUT_OF_REACH else None

    def open(self) -> str:
        """Says what would decide, where it is undecided."""
        if self.floor is not None:
            return f"{self.floor}: easier problems, or a higher limit, would tell"
        problems, factor = self.needed()
        # what is inside the interval
        lower = "less accurate, by more than the margin or not; " if self.difference[2] < 0 else ""
        if problems is None:
            return f"{lower}the difference is on the margin itself, and no number of problems is in reach"
        more = f"{lower}if the difference stayed, about {_rounded(problems)} problems"
        greedy = all(before.row.decoding == "greedy" for before, _ in self.pairs)
        if factor is not None:
            return f"{more}, or {factor:.2g} times as many samples of these, would decide"
        if greedy or self.within is None:
            return f"{more} would decide"
        return f"{more} would decide, and more samples of these would not"

    def sentence(self) -> str:
        """The answer, with the numbers that it rests on."""
        old, new = self.before, self.after
        points, low, high = (_signed(100 * value) for value in self.difference)
        test = ""
        if self.p_value is not None:
            test = f", McNemar p = {self.p_value:.2g}" if self.p_value >= 1e-4 else ", McNemar p < 0.0001"
        if not self.paired:
            test = ", not paired: the completions were not saved"
        size, old_size = new.row.parameters, old.row.parameters
        parameters = "as many parameters" if size == old_size else f"{size / old_size:.2f} times the parameters"
        undecided = f"; {self.open()}" if self.answer is Answer.UNDECIDED else ""
        return (
            f"{self.answer.sign} {self.answer.text}: {new.label} against {old.label} on {self.where}: {points} points "
            f"({100 * self.level:.4g}% interval {low} to {high}, margin {100 * self.margin:.3g}, {self.n:,} "
            f"problems{test}), {self._tokens()}, {parameters}{undecided}."
        )

    def _tokens(self) -> str:
        if self.ratio is None:
            return (
                "no problem that both solve to compare tokens on"
                if self.paired
                else "tokens not compared, for some were cut"
            )
        ratio, *bounds = self.ratio
        interval = "" if None in bounds else f" ({100 * self.level:.4g}% interval {bounds[0]:.3f} to {bounds[1]:.3f})"
        where = f" on the {self.solved:,} that both solve" if self.paired else ""
        return f"{ratio:.3f} times the tokens{where}{interval}"

    def headline(self) -> str:
        """The answer in a line for who has five seconds."""
        return f"{self.after.label} against {self.before.label}: {self.short()}"

    def short(self) -> str:
        """What the headline says of the two."""
        points, low, high = (_signed(100 * value, 1).replace("-", "−") for value in self.difference)
        words = {Answer.AS_GOOD: "as accurate", Answer.WORSE: "less accurate", Answer.UNDECIDED: "undecided"}
        said = f"{words[self.answer]} ({points}, {low} to {high})"
        if self.answer is Answer.UNDECIDED and self.floor is not None:
            said = f"undecided, {self.before.label} itself solves {percent(self.accuracy[0][0])}"
        parts = [said]
        if self.ratio is not None:
            parts.append(_change(self.ratio[0], "tokens"))
        size = self.after.row.parameters / self.before.row.parameters
        parts.append("same size" if size == 1 else _change(size, "parameters"))
        speed = [_speedup(before.row, after.row) for before, after in self.pairs]
        if None not in speed:
            parts.append(f"×{np.exp(np.mean(np.log(speed))):.2g} answers per second")
        return " · ".join(parts)

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """What makes the answer worth less than it looks, on either side: what, and where."""
        found = []
        for pair, margin in zip(self.pairs, self.margins, strict=True):
            for item in pair:
                row = item.row
                apart = ((row.strict_only or 0) + (row.flexible_only or 0)) / (row.n * (row.samples or 1))
                for applies, what, share in (
                    (row.truncated > _TRUNCATED, _CUT, row.truncated),
                    (row.accuracy < _LOW, _HARD, row.accuracy),
                    (row.accuracy > _HIGH, _EASY, row.accuracy),
                    (apart > margin, _APART, apart),
                ):
                    if applies:
                        found.append((what, f"{item.label} on {', '.join(item.key)} {percent(share)}"))
        return found


def warnings_of(comparisons: Sequence[Comparison]) -> list[tuple[str, list[str]]]:
    """
    Returns what makes answers worth less than they look.

    Args:
        comparisons (`Sequence[Comparison]`):
            The answers.

    Returns:
        `list[tuple[str, list[str]]]`: Each kind of warning, and where it is so.
    """
    places: dict[str, list[str]] = {}
    for what, where in dict.fromkeys(warning for comparison in comparisons for warning in comparison.warnings):
        places.setdefault(what, []).append(where)
    return [(what, places[what]) for what in (_CUT, _APART, _HARD, _EASY) if what in places]


@dataclass
class Conclusion:
    """
    One checkpoint against another on all tasks.

    Args:
        singles (`list[Comparison]`):
            One for each task and way of decoding.
        level (`float`, *optional*, defaults to `0.95`):
            Of the intervals.

    Attributes:
        pooled ([`Comparison`]):
            All tasks together: every problem counts once, so that a task weighs what it has of problems, and by sampling
            where a task was decoded both ways.
    """

    singles: list[Comparison]
    level: float = 0.95

    def __post_init__(self):
        chosen = {single.before.row.task: single for single in self.singles if single.before.row.decoding == "greedy"}
        chosen |= {single.before.row.task: single for single in self.singles if single.before.row.decoding != "greedy"}
        parts = list(chosen.values())
        self.pooled = parts[0]
        if len(parts) > 1:
            pairs, margins = zip(*((part.pairs[0], part.margin) for part in parts), strict=True)
            self.pooled = Comparison(list(pairs), list(margins), self.level)

    @cached_property
    def alone(self) -> list[Comparison]:
        """The tasks that are worse by themselves, even when looking at each of them is paid for (Bonferroni)."""
        level = 1 - (1 - self.level) / len(self.singles)
        again = [Comparison(single.pairs, single.margins, level) for single in self.singles]
        return [single for single, strict in zip(self.singles, again, strict=True) if strict.answer is Answer.WORSE]

    @property
    def answer(self) -> Answer:
        """That of all tasks together, and worse if one of them is worse by itself."""
        return Answer.WORSE if self.alone else self.pooled.answer

    @property
    def is_pooled(self) -> bool:
        """Whether all together say more than one of the comparisons does."""
        return len(self.pooled.pairs) > 1 or self.answer is not self.pooled.answer

    def sentences(self) -> list[str]:
        """The answer, and those of single tasks."""
        singles = [single.sentence() for single in self.singles]
        if self.answer is not self.pooled.answer:
            where = " and on ".join(", ".join(single.before.key) for single in self.alone)
            what = f"{self.answer.sign} {self.answer.text} on {where}, whatever the rest says"
            return [f"{what}: {self.pooled.sentence()}", *singles]
        return [self.pooled.sentence(), *singles] if self.is_pooled else singles

    def headline(self) -> str:
        """The answer in a line for who has five seconds."""
        pooled = self.pooled
        if self.answer is pooled.answer:
            return pooled.headline()
        where = " and ".join(dict.fromkeys(single.before.row.task for single in self.alone))
        who = f"{pooled.after.label} against {pooled.before.label}"
        return f"{who}: less accurate on {where} · {pooled.where}: {pooled.short()}"


def _signed(value: float, digits: int = 2) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # no "-0.00"


def _rounded(value: float) -> str:
    """A number of which two digits are worth saying."""
    power = 10 ** max(math.floor(math.log10(value)) - 1, 0)
    return f"{math.ceil(value / power) * power:,}"


def _change(ratio: float, what: str) -> str:
    change = round(100 * abs(ratio - 1))
    return f"same {what}" if change == 0 else f"{change}% {'fewer' if ratio < 1 else 'more'} {what}"


def _speedup(before: ResultRow, after: ResultRow) -> float | None:
    """How many times the answers per second, at the most requests at a time that both were measured at."""
    old, new = ({level.concurrency: level.requests_per_s for level in row.serving} for row in (before, after))
    shared = [level for level in old.keys() & new.keys() if old[level] and new[level]]
    return new[max(shared)] / old[max(shared)] if shared else None


def _cannot(before: Measurement, after: Measurement) -> str:
    return f"{before.label} and {after.label} cannot be compared on {', '.join(before.key)}"


def margins_of(values: Sequence[str]) -> dict[str | None, float]:
    """
    Reads margins as they stand on a command line.

    Args:
        values (`Sequence[str]`):
            `0.01` for all tasks, `gsm8k=0.005` for one.

    Returns:
        `dict[str or None, float]`: By task; under `None` that of the others.

    Raises:
        UserError: If one is no share.
    """
    margins = {}
    for text in values:
        task, _, number = text.rpartition("=")
        try:
            margin = float(number)
        except ValueError:
            margin = math.nan
        if not 0 <= margin < 1:
            raise UserError(
                f"`margin` is a share of the problems, at least 0 and below 1, as in `0.01` or `gsm8k=0.005`, and is {text}."
            )
        margins[task or None] = margin
    return {None: MARGIN, **margins}


def compare_measurements(
    before: Measurement, after: Measurement, margin: float = MARGIN, level: float = 0.95, unpaired: bool = False
) -> Comparison:
    """
    Compares two checkpoints on one task, problem by problem.

    Args:
        before ([`Measurement`]):
            What is compared with.
        after ([`Measurement`]):
            What is judged.
        margin (`float`, *optional*, defaults to `0.01`):
            Loss of accuracy that still counts as none.
        level (`float`, *optional*, defaults to `0.95`):
            Of the intervals.
        unpaired (`bool`, *optional*, defaults to `False`):
            Whether to compare without pairing the problems where completions were not saved.

    Returns:
        [`Comparison`]: Differences with their intervals.

    Raises:
        UserError: If they were not measured on the same problems, in the same way.
    """
    what = _cannot(before, after)
    for name, kind in _SETTINGS.items():
        old, new = before.setting(name), after.setting(name)
        if old != new and not (name in ("top_p", "top_k") and before.row.decoding == "greedy"):
            raise UserError(f"{what}: their {kind} differs, `{name}` is {old!r} and {new!r}.")
    saved = [measurement.samples is not None for measurement in (before, after)]
    if not all(saved) and not unpaired:
        file = (after if saved[0] else before).file
        raise UserError(
            f"{what}: there are no completions beside `{file}` to pair the problems by; evaluate with "
            "`save_completions: true`."
        )
    if all(saved) and before.questions != after.questions:
        problems = [before.questions.keys(), after.questions.keys()]
        differ = sorted(
            map(
                str, problems[0] ^ problems[1] or [i for i in problems[0] if before.questions[i] != after.questions[i]]
            )
        )
        raise UserError(f"{what}: their problems differ, {len(differ)} of them, the first is {differ[0]!r}.")
    return Comparison([(before, after)], [margin], level)


def compare_files(
    before: str, after: str, margins: Mapping[str | None, float] | None = None, level: float = 0.95
) -> list[Comparison]:
    """
    Compares two results files on every task and way of decoding.

    Args:
        before (`str`):
            Results file to compare with, or `FILE:STAGE` for one of several checkpoints in it.
        after (`str`):
            The same of what is judged.
        margins (`Mapping`, *optional*):
            Loss of accuracy that still counts as none, by task, as [`margins_of`] reads it. Defaults to 0.01 for all.
        level (`float`, *optional*, defaults to `0.95`):
            Of the intervals.

    Returns:
        `list[Comparison]`: One for each task and way of decoding.

    Raises:
        UserError: If a file is missing or damaged, holds several checkpoints and none is named, or was not measured on
            the same problems, in the same way.
    """
    old, new = _select(before), _select(after)
    if old.keys() != new.keys():
        (task, decoding) = sorted(old.keys() ^ new.keys())[0]
        raise UserError(
            f"Only one of `{before}` and `{after}` has {task}, {decoding}: evaluate both on the same tasks."
        )
    find_margin = margin_finder(margins, [task for task, _ in old])
    return [compare_measurements(old[key], new[key], find_margin(key[0]), level) for key in old]


def margin_finder(margins: Mapping[str | None, float] | None, tasks: Sequence[str]) -> Callable[[str], float]:
    """
    Returns what gives the margin of a task.

    Args:
        margins (`Mapping`, *optional*):
            As [`margins_of`] reads them.
        tasks (`Sequence[str]`):
            The tasks that there are.

    Returns:
        `Callable[[str], float]`: Function of a task.

    Raises:
        UserError: If a margin is for a task that there is not.
    """
    margins = {None: MARGIN} if margins is None else margins
    unknown = [task for task in margins if task is not None and task not in tasks]
    if unknown:
        raise UserError(
            f"`margin` names the task `{unknown[0]}`, and there are only {', '.join(dict.fromkeys(tasks))}."
        )
    return lambda task: margins.get(task, margins[None])


def results_file_of(name: str) -> str:
    """Returns the file that `FILE` or `FILE:STAGE` names."""
    path, _, _ = name.rpartition(":")
    return name if not path or Path(name).exists() or Path(f"{name}.json").exists() else path


def _select(name: str) -> dict[tuple[str, str], Measurement]:
    path = results_file_of(name)
    stage = None if path == name else name[len(path) + 1 :]
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
