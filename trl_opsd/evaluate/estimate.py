"""
From verdicts to numbers, and how surely: estimators on arrays of shape `(problems, samples per problem)`.

Intervals are 95% unless said otherwise, and about the problems: they cover what other problems of the same kind would
have given, so the problems are what is independent, and several samples of one problem are a cluster. All are in closed
form, so the same samples always give the same interval. How often they hold the truth is in recipes/results/coverage.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np

from .schema import CompletionRecord, Summary


# By how many problems' worth of agreement within problems what has been seen of it is moved towards all alike, and by how
# many of disagreement the size of a change towards a whole problem: a few samples at an edge say nothing about either
_ALIKE, _WHOLE = 2.0, 0.25

# Words that announce another check or another attempt; matched as whole words, in either case
MARKERS = (
    "wait",
    "hmm",
    "hold on",
    "alternatively",
    "actually",
    "let me check",
    "let me double-check",
    "let me verify",
    "let me re-check",
    "let me recheck",
    "let me think again",
    "on second thought",
)
_MARKER = re.compile(r"\b(?:" + "|".join(map(re.escape, MARKERS)) + r")\b", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?\d{1,30}(?:\.\d{1,30}|/0*[1-9]\d{0,29})?", re.ASCII)


@dataclass
class Samples:
    """
    The judged completions of one checkpoint on one task, each array of shape `(problems, samples per problem)`.

    Args:
        ids (`list`):
            Problem of each row.
        records (`list[list[CompletionRecord]]`):
            The records that the arrays were made of.
        correct (`np.ndarray`):
            Whether the sample is correct, `bool`.
        flexible (`np.ndarray`):
            The verdict of the flexible scorer, `float`: 0, 1, or NaN where it has none.
        tokens (`np.ndarray`):
            Completion tokens, with the one that ends it.
        thinking (`np.ndarray`):
            Those of them inside a thinking block.
        truncated (`np.ndarray`):
            Whether the completion had not ended at the limit, `bool`.
        unverified (`int`):
            Number of problems left out because a verifier gave no verdict for one of their samples.
    """

    ids: list
    records: list[list[CompletionRecord]]
    correct: np.ndarray
    flexible: np.ndarray
    tokens: np.ndarray
    thinking: np.ndarray
    truncated: np.ndarray
    unverified: int

    @classmethod
    def from_records(cls, records: Iterable[CompletionRecord]) -> "Samples":
        """
        Groups the records of one checkpoint, task and way of decoding by problem.

        Args:
            records (`Iterable[CompletionRecord]`):
                What the evaluation saves for each sample.

        Returns:
            [`Samples`]: Problems in the order in which they come.

        Raises:
            ValueError: If a sample is there twice, if problems have different numbers of samples, or if there is no
                verdict at all.
        """
        problems: dict[str | int, dict[int, CompletionRecord]] = {}
        for record in records:
            samples = problems.setdefault(record.id, {})
            if record.sample in samples:
                raise ValueError(f"Sample {record.sample} of problem {record.id!r} is there twice.")
            samples[record.sample] = record
        judged = {
            name: [samples[index] for index in sorted(samples)]
            for name, samples in problems.items()
            if all(sample.correct is not None for sample in samples.values())
        }
        if not judged:
            raise ValueError(f"None of the {len(problems)} problems can be verified: check the `answer` column.")
        width = len(next(iter(judged.values())))
        for name, samples in judged.items():
            if len(samples) != width:
                raise ValueError(f"Problem {name!r} has {len(samples)} samples, and others have {width}.")
        rows = list(judged.values())

        def array(value: Callable[[CompletionRecord], Any], dtype: type) -> np.ndarray:
            return np.array([[value(sample) for sample in samples] for samples in rows], dtype=dtype)

        return cls(
            ids=list(judged),
            records=rows,
            correct=array(lambda sample: sample.correct, bool),
            flexible=array(lambda sample: sample.correct_flexible, float),
            tokens=array(lambda sample: sample.tokens, np.int64),
            thinking=array(lambda sample: sample.thinking_tokens, np.int64),
            truncated=array(lambda sample: sample.truncated, bool),
            unverified=len(problems) - len(rows),
        )


def summarize(
    samples: Samples,
    same: Callable[[str, str, str], bool] | None = None,
    pass_at_k_of: Sequence[int] | None = None,
) -> Summary:
    """
    Turns samples into the numbers of a row of results.

    Args:
        samples ([`Samples`]):
            What was judged.
        same (`Callable[[str, str, str], bool]`, *optional*):
            Which answers are one, for [`majority`].
        pass_at_k_of (`Sequence[int]`, *optional*):
            The k of `pass@k`, at most the number n of samples of a problem. Defaults to powers of two.

    Returns:
        [`~trl_opsd.evaluate.schema.Summary`]: Numbers. With several samples of a problem, `at_k` has `pass@k`, and
        `maj@n` where answers were extracted.
    """
    n, width = samples.correct.shape
    accuracy, low, high = share_interval(samples.correct.mean(axis=1), width)
    judged = ~np.isnan(samples.flexible)
    strict, flexible = samples.correct[judged], samples.flexible[judged] == 1
    at_k, at_k_bounds = {}, {}
    if width > 1:
        counts = samples.correct.sum(axis=1)
        for k in pass_at_k_of or [2**power for power in range(1, width.bit_length())]:
            # n samples are n / k draws of k
            at_k[f"pass@{k}"], *bounds = share_interval(pass_at_k(counts, width, k), width // k)
            at_k_bounds[f"pass@{k}"] = bounds
        if any(record.answer is not None for row in samples.records for record in row):
            at_k[f"maj@{width}"] = majority(samples, same).mean().item()
    mean, mean_low, mean_high = mean_interval(samples.tokens.mean(axis=1))
    median, p90, p99 = np.percentile(samples.tokens, [50, 90, 99]).tolist()
    thinking = samples.thinking.mean().item()
    texts = [record.completion for row in samples.records for record in row]
    return Summary(
        n=n,
        samples=width,
        unverified=samples.unverified,
        estimator=f"mean@{width}",
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        accuracy_flexible=flexible.mean().item() if flexible.size else None,
        strict_only=int((strict & ~flexible).sum()) if flexible.size else None,
        flexible_only=int((flexible & ~strict).sum()) if flexible.size else None,
        at_k=at_k,
        at_k_bounds=at_k_bounds,
        mean_tokens=mean,
        mean_tokens_low=mean_low,
        mean_tokens_high=mean_high,
        median_tokens=median,
        p90_tokens=p90,
        p99_tokens=p99,
        mean_thinking_tokens=thinking,
        mean_answer_tokens=mean - thinking,
        truncated=samples.truncated.mean().item(),
        markers_per_1000_tokens=markers_per_1000_tokens(texts, samples.tokens),
    )


def normal_quantile(level: float = 0.95) -> float:
    """
    Returns what bounds the given share of a standard normal distribution on both sides: 1.96 for 95%.

    Args:
        level (`float`, *optional*, defaults to `0.95`):
            Share between the bounds, above 0 and below 1.

    Returns:
        `float`: Upper bound.
    """
    return NormalDist().inv_cdf((1 + level) / 2)


def student_quantile(degrees: int, level: float = 0.95) -> float:
    """
    Returns what bounds the given share of Student's t distribution on both sides: exactly for 1 and 2 degrees of freedom,
    and above by its expansion around the normal quantile (Abramowitz and Stegun, 26.7.5).

    Args:
        degrees (`int`):
            Degrees of freedom, at least 1.
        level (`float`, *optional*, defaults to `0.95`):
            Share between the bounds, above 0 and below 1.

    Returns:
        `float`: Upper bound.
    """
    if degrees == 1:
        return math.tan(math.pi * level / 2)
    if degrees == 2:
        return level * math.sqrt(2 / (1 - level**2))
    z = normal_quantile(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def wilson_interval(correct: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """
    Returns the Wilson score interval of a share, which unlike the normal approximation stays inside 0 to 1 and keeps a
    width when all or none are correct.

    Args:
        correct (`float`):
            Number of successes.
        n (`float`):
            Number of trials, above 0; an effective number need not be whole.
        level (`float`, *optional*, defaults to `0.95`):
            How often it should hold the truth.

    Returns:
        `tuple[float, float]`: Lower and upper bound.
    """
    share, z = correct / n, normal_quantile(level)
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    margin = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and 1 a bound is the share itself, but for rounding
    return max(0.0, min(share, center - margin)), min(1.0, max(share, center + margin))


def share_interval(values: np.ndarray, samples: int = 1, level: float = 0.95) -> tuple[float, float, float]:
    """
    Returns the mean over problems of shares, for instance mean@n, with a score interval that knows about clusters.

    It is the Wilson interval at the effective number of samples: between the number of problems (a problem's samples are
    all alike) and that of all samples (they are independent), by the variance between problems. Of two problems more the
    samples are taken to be all alike, so that the number of successes has to say that they are not: with none, the number
    of problems counts, and with one it hardly moves. With one sample per problem it is the Wilson interval exactly.

    Args:
        values (`np.ndarray` of shape `(problems,)`):
            Share of each problem, 0 to 1.
        samples (`int`, *optional*, defaults to `1`):
            Number of samples behind each.
        level (`float`, *optional*, defaults to `0.95`):
            How often it should hold the truth.

    Returns:
        `tuple[float, float, float]`: Mean, lower and upper bound.
    """
    n, mean, variance = len(values), float(np.mean(values)), float(np.var(values))
    alike = (n * variance + _ALIKE) / (n * mean * (1 - mean) + _ALIKE)
    effective = min(max(n, n / alike), n * samples)
    return mean, *wilson_interval(mean * effective, effective, level)


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float | None, float | None]:
    """
    Returns the mean over problems of numbers above 0 with an interval that allows for the long tail of lengths: Student's,
    with Hall's cubic transformation, which takes the skewness out of the statistic (Journal of the Royal Statistical
    Society B 54, 1992).

    Args:
        values (`np.ndarray` of shape `(problems,)`):
            Number of each problem, above 0.
        level (`float`, *optional*, defaults to `0.95`):
            How often it should hold the truth.

    Returns:
        `tuple`: Mean, lower and upper bound, the last two `None` for a single problem.
    """
    values = np.asarray(values, dtype=float)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, None, None
    spread = float(np.std(values))
    if spread == 0:
        return mean, mean, mean
    root, t = math.sqrt(n), student_quantile(n - 1, level)
    skewness = float(np.mean((values - mean) ** 3)) / spread**3 / 6

    def original(y: float) -> float:
        """Inverts t + 2 a t² / √n + 4 a² t³ / 3 n + a / √n, with a sixth of the skewness."""
        if abs(skewness) < 1e-6:
            return y
        return (np.cbrt(1 + 6 * skewness / root * (y - skewness / root)) - 1) * root / (2 * skewness)

    error = spread * math.sqrt(n / (n - 1)) / root
    return mean, max(mean - error * float(original(t)), 0.0), mean - error * float(original(-t))


def pass_at_k(correct: np.ndarray, n: int, k: int) -> np.ndarray:
    """
    Returns the unbiased estimate of the chance that one of k samples is correct, 1 − C(n − c, k) / C(n, k), of
    https://huggingface.co/papers/2107.03374.

    Args:
        correct (`np.ndarray` of shape `(problems,)`):
            Number of correct samples, c.
        n (`int`):
            Number of samples per problem.
        k (`int`):
            Number of samples that may be drawn, at most n.

    Returns:
        `np.ndarray` of shape `(problems,)`: Estimate of each problem.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k needs 1 ≤ k ≤ n, and has k = {k} and n = {n} samples per problem.")
    table = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return table[np.asarray(correct)]


def majority(samples: Samples, same: Callable[[str, str, str], bool] | None = None) -> np.ndarray:
    """
    Returns maj@n: whether the answer that most of a problem's n samples give is correct.

    Samples without an answer, or truncated, do not vote. A tie counts as what a fair draw among the tied answers is
    expected to give, and no vote at all as wrong. (Where a scorer judges samples with the same answer differently, the
    answer counts as the share of them it accepts.)

    Args:
        samples ([`Samples`]):
            With `answer` in its records, and `question` where there is a `same`.
        same (`Callable[[str, str, str], bool]`, *optional*):
            Says of a question and two texts whether they are one answer, such as `1/2` and `0.5`. Left out, only equal
            texts are.

    Returns:
        `np.ndarray` of shape `(problems,)`: 0 to 1 for each problem.
    """
    shares = []
    for row in samples.records:
        votes = [record for record in row if record.answer is not None and not record.truncated]
        groups = _same_answers(votes, same)
        most = max(map(len, groups), default=0)
        won = [record.correct for group in groups if len(group) == most for record in group]
        shares.append(sum(won) / len(won) if won else 0.0)
    return np.array(shares)


def _same_answers(
    votes: list[CompletionRecord], same: Callable[[str, str, str], bool] | None
) -> list[list[CompletionRecord]]:
    """Groups votes by answer. Equal texts and numbers are found by hashing, so that few pairs are left to ask about."""
    texts = defaultdict(list)
    for record in votes:
        answer = record.answer
        texts[Fraction(answer) if same is not None and _NUMBER.fullmatch(answer) else answer].append(record)
    if same is None:
        return list(texts.values())
    groups, left = [], len(votes)
    for key, group in sorted(texts.items(), key=lambda item: -len(item[1])):
        first, second = sorted([0, 0, *(len(other) for _, other in groups)])[:-3:-1]
        if first > second + left:  # whatever the rest is the same as, these have won
            break
        left -= len(group)
        question, answer = group[0].question, group[0].answer
        for other, members in groups:
            numbers = isinstance(key, Fraction) and isinstance(other, Fraction)
            if not numbers and same(question, members[0].answer, answer):
                members += group
                break
        else:
            groups.append((key, group))
    return [group for _, group in groups]


def paired_difference(before: np.ndarray, after: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """
    Returns the difference in accuracy of two checkpoints on the same problems, after − before, with its interval.

    It is the normal interval after z² problems more, half of them won and half lost, which is what Agresti and Coull (The
    American Statistician 52, 1998) do to a share, here of the problems on which the two differ. Without them intervals are
    too short where few problems differ: if one problem in a hundred is lost, 300 problems show none of it in 5% of the
    cases. What a problem more wins or loses is as much as the problems that do differ, and all of it where none does. So
    agreement on everything has the width that the number of problems deserves, on three as on three thousand.

    Args:
        before (`np.ndarray` of shape `(problems,)`):
            Share of correct samples of each problem.
        after (`np.ndarray` of shape `(problems,)`):
            The same of the other checkpoint, problem by problem.
        level (`float`, *optional*, defaults to `0.95`):
            How often it should hold the truth.

    Returns:
        `tuple[float, float, float]`: Difference, lower and upper bound.
    """
    change = np.asarray(after, dtype=float) - before
    more = normal_quantile(level) ** 2
    squares, size = float(np.sum(change**2)), float(np.sum(np.abs(change)))
    # the square of a problem more: Σ x² / Σ |x| is between the smallest and the largest change
    step = (squares + _WHOLE) / (size + _WHOLE)
    n = len(change) + more
    center = float(np.sum(change)) / n
    margin = math.sqrt(more * max((squares + more * step) / n - center**2, 0.0) / n)
    difference = float(np.mean(change))
    return difference, max(min(center - margin, difference), -1.0), min(max(center + margin, difference), 1.0)


def unpaired_difference(
    before: tuple[float, float, float], after: tuple[float, float, float]
) -> tuple[float, float, float]:
    """
    Returns the difference of two shares whose problems cannot be paired, after − before, with its interval: Newcombe's
    hybrid score interval of independent shares (Statistics in Medicine 17, 1998). Two checkpoints find the same problems
    hard, so it is wider than a paired one.

    Args:
        before (`tuple[float, float, float]`):
            Share, lower and upper bound.
        after (`tuple[float, float, float]`):
            The same of the other checkpoint, at the same level.

    Returns:
        `tuple[float, float, float]`: Difference, lower and upper bound.
    """
    (old, old_low, old_high), (new, new_low, new_high) = before, after
    difference = new - old
    return (
        difference,
        difference - math.hypot(new - new_low, old_high - old),
        difference + math.hypot(new_high - new, old - old_low),
    )


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """
    Returns the exact two-sided p-value of McNemar's test that both checkpoints are as likely to be the one that is
    right where only one is.

    Args:
        before (`np.ndarray` of shape `(problems,)`):
            Whether the one sample of each problem is correct.
        after (`np.ndarray` of shape `(problems,)`):
            The same of the other checkpoint.

    Returns:
        `float`: Probability.
    """
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    tail = sum(math.comb(lost + gained, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2 ** (lost + gained))


def paired_ratio(
    before: np.ndarray, after: np.ndarray, level: float = 0.95
) -> tuple[float, float | None, float | None]:
    """
    Returns the ratio of the mean tokens of two checkpoints on the same problems, after / before, with its interval.

    It is Student's for the logarithm of the ratio. A few long problems may weigh as much as all others, so each problem's
    residual is divided by one minus its share of the tokens (as MacKinnon and White, Journal of Econometrics 29, 1985), and
    the degrees of freedom are those of as many problems of equal weight.

    Args:
        before (`np.ndarray` of shape `(problems,)`):
            Mean tokens of each problem, above 0.
        after (`np.ndarray` of shape `(problems,)`):
            The same of the other checkpoint.
        level (`float`, *optional*, defaults to `0.95`):
            How often it should hold the truth.

    Returns:
        `tuple`: Ratio, lower and upper bound, the last two `None` for a single problem.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    n, ratio = len(before), float(np.sum(after) / np.sum(before))
    if n < 2:
        return ratio, None, None
    share = before / np.sum(before)
    residual = (after - ratio * before) / np.mean(before) / (1 - share)
    error = math.sqrt(float(np.mean(residual**2)) / n) / ratio
    margin = student_quantile(max(round(1 / float(np.sum(share**2))) - 1, 1), level) * error
    return ratio, ratio * math.exp(-margin), ratio * math.exp(margin)


def tokens_where_both_solve(before: Samples, after: Samples, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Returns the mean tokens of correct samples on the problems that two checkpoints both solve at least once. A model that
    gives up is short too, and a completion that was cut has no length; neither is among the correct ones.

    Args:
        before ([`Samples`]):
            Of one checkpoint.
        after ([`Samples`]):
            Of the other.
        rows (`Sequence[tuple[int, int]]`):
            Where each problem is in the two.

    Returns:
        `np.ndarray` of shape `(problems, 2)`: Tokens before and after, for as many problems as both solve.
    """
    sides = []
    for samples, places in zip((before, after), zip(*rows, strict=True), strict=True):
        right, tokens = samples.correct[list(places)], samples.tokens[list(places)]
        sides.append((right.sum(axis=1), (tokens * right).sum(axis=1)))
    both = (sides[0][0] > 0) & (sides[1][0] > 0)
    return np.stack([total[both] / count[both] for count, total in sides], axis=1)


def budget_curve(
    correct: np.ndarray, tokens: np.ndarray, budgets: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns accuracy at a token budget: the share of samples that are correct and no longer than it, which is what
    cutting generation there would leave.

    Args:
        correct (`np.ndarray`):
            Verdicts, of any shape.
        tokens (`np.ndarray`):
            Completion tokens, of the same shape.
        budgets (`Sequence[int]`, *optional*):
            Budgets, in tokens. Defaults to every number of tokens at which a correct sample ends.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Budgets and accuracies.
    """
    lengths = np.sort(np.asarray(tokens)[np.asarray(correct, dtype=bool)])
    budgets = np.unique(lengths) if budgets is None else np.asarray(budgets)
    return budgets, np.searchsorted(lengths, budgets, side="right") / np.size(correct)


def markers_per_1000_tokens(completions: Iterable[str], tokens: np.ndarray) -> float:
    """
    Returns how often the words of `MARKERS` come, per 1,000 tokens.

    Args:
        completions (`Iterable[str]`):
            Texts.
        tokens (`np.ndarray`):
            Their numbers of tokens, of any shape.

    Returns:
        `float`: Rate.
    """
    return 1000 * sum(len(_MARKER.findall(text)) for text in completions) / float(np.sum(tokens))


def cost_per_1000_correct(mean_tokens: float, accuracy: float, price: float) -> float | None:
    """
    Returns what 1,000 correct answers cost: the tokens of the wrong ones are paid for too.

    Args:
        mean_tokens (`float`):
            Mean completion tokens.
        accuracy (`float`):
            Share of correct completions.
        price (`float`):
            Price of a million completion tokens; the cost is in its currency. Prompt tokens are not counted.

    Returns:
        `float` or `None`: `None` when nothing is correct.
    """
    return 1000 * mean_tokens / accuracy * price / 1e6 if accuracy > 0 else None


def flops_per_1000_correct(mean_tokens: float, accuracy: float, parameters: int) -> float | None:
    """
    Returns the arithmetic behind 1,000 correct answers, 2 · parameters · tokens: a multiplication and an addition for
    each parameter and completion token. The output layer, attention to the context and the prompt are left out; the
    second is to the favour of longer completions.

    Args:
        mean_tokens (`float`):
            Mean completion tokens.
        accuracy (`float`):
            Share of correct completions.
        parameters (`int`):
            Number of parameters that are not embeddings.

    Returns:
        `float` or `None`: Floating-point operations; `None` when nothing is correct.
    """
    return 1000 * mean_tokens / accuracy * 2 * parameters if accuracy > 0 else None


def bytes_per_correct(
    samples: Samples, parameters: int, weight_bits: float
) -> tuple[float | None, float | None, float | None]:
    """
    Returns the bytes of weights that are moved for a correct answer, parameters · bits / 8 · tokens / accuracy: each token of
    a request by itself takes all weights through the processor once, and the tokens of wrong answers are paid for too. It is
    what size and precision, length and accuracy come to together, on a machine that waits for its memory. Prompts and the
    cache are left out; requests that are decoded together share the weights.

    Args:
        samples ([`Samples`]):
            What was judged.
        parameters (`int`):
            Number of parameters that a token passes.
        weight_bits (`float`):
            Bits of one of them.

    Returns:
        `tuple`: Bytes, lower and upper bound of their 95% interval, which is that of [`paired_ratio`] for tokens by correct
        answers. All `None` where nothing is correct, the bounds `None` where only one problem is.
    """
    correct, tokens = samples.correct.mean(axis=1), samples.tokens.mean(axis=1)
    solved = int((correct > 0).sum())
    if solved == 0:
        return None, None, None
    weight = parameters * weight_bits / 8
    if solved == 1:
        return weight * float(tokens.sum() / correct.sum()), None, None
    return tuple(weight * bound for bound in paired_ratio(correct, tokens))
