"""
How often the intervals and the answers of an evaluation are right, by simulation.

    python -m scripts.experiments.coverage

Draws data sets whose truth is known, and counts how often an interval of trl_opsd.evaluate.estimate lies wholly below or above
it (2.5% each is what is claimed at most), and how often a comparison answers as good, worse or undecided. Beside each interval
stands the one that it replaced. Writes recipes/results/coverage/coverage.json and table.md (`--report`: only that). It takes a
few minutes on one core.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from scripts.harness.results import RESULTS, read, write_results, write_text
from scripts.harness.tables import markdown
from trl_opsd.evaluate.compare import Answer, Comparison, Conclusion
from trl_opsd.evaluate.decide import looks
from trl_opsd.evaluate.estimate import (
    Samples,
    mean_interval,
    normal_quantile,
    paired_difference,
    paired_ratio,
    share_interval,
    wilson_interval,
)
from trl_opsd.evaluate.results_file import Measurement
from trl_opsd.evaluate.schema import ResultRow


FOLDER = RESULTS / "coverage"
Z = normal_quantile()

# What was used before: intervals that the ones of the package are compared with


def plain_share(values: np.ndarray, samples: int) -> tuple[float, float, float]:
    """Wilson's at the effective number of samples, believed as it is."""
    n, mean, variance = len(values), float(np.mean(values)), float(np.var(values))
    most = mean * (1 - mean)
    effective = n if most <= 0 else n * samples if variance <= 0 else min(max(n, n * most / variance), n * samples)
    return mean, *wilson_interval(mean * effective, effective)


def newcombe(before: np.ndarray, after: np.ndarray, samples: int) -> tuple[float, float, float]:
    """Newcombe's tenth method for paired shares, with the interval above for each."""
    (old, old_low, old_high), (new, new_low, new_high) = plain_share(before, samples), plain_share(after, samples)
    covariance = float(np.mean((before - old) * (after - new)))
    if covariance > 0:
        covariance = max(covariance - 1 / (2 * len(before) * samples), 0.0)
    spread = float(np.std(before) * np.std(after))
    correlation = covariance / spread if spread > 0 else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * correlation * a * b + b * b, 0.0))

    difference = new - old
    low = difference - distance(new - new_low, old_high - old)
    return difference, low, difference + distance(new_high - new, old - old_low)


def log_normal_mean(values: np.ndarray) -> tuple[float, float, float]:
    """Normal for the logarithm of the mean."""
    mean = float(np.mean(values))
    margin = Z * float(np.std(values, ddof=1)) / mean / math.sqrt(len(values))
    return mean, mean * math.exp(-margin), mean * math.exp(margin)


# Worlds


def difficulties(rng: np.random.Generator, kind: str, problems: int, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """The chance of a right answer of each problem, before and after: lower by `loss` in the mean over many problems."""
    if kind.startswith("known"):  # a problem is solved always or never, and some of the solved are lost
        share = float(kind.split()[1])
        before = (rng.random(problems) < share).astype(float)
        return before, before * (rng.random(problems) >= loss / share)
    if kind == "coin":
        return np.full(problems, 0.9), np.full(problems, 0.9 - loss)
    a, b = {"varied": (0.8, 0.4), "changed": (0.8, 0.4), "hard": (0.3, 3.0), "easy": (3.0, 0.3)}[kind]
    before = rng.beta(a, b, problems)
    after = before
    if kind == "changed":  # a tenth of the problems is another matter now
        after = np.where(rng.random(problems) < 0.1, rng.beta(a, b, problems), before)
    return before, after * (1 - loss * (a + b) / a)


LENGTHS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    **{
        f"log-normal, σ {sigma}": (
            lambda rng, n, sigma=sigma: rng.lognormal(5, sigma, n),
            math.exp(5 + sigma**2 / 2),
        )
        for sigma in (0.3, 0.6, 0.8, 1.0, 1.2)
    },
    "gamma, shape 2": (lambda rng, n: rng.gamma(2, 100, n), 200.0),
    "two kinds, 15% ten times as long": (
        lambda rng, n: np.where(rng.random(n) < 0.15, rng.normal(2000, 200, n), rng.normal(200, 30, n)),
        470.0,
    ),
}


def missed(intervals: Iterable[tuple[float, float, float]], truth: float) -> dict[str, float]:
    """How often the truth was above and below, and how wide the intervals were at the median."""
    bounds = np.array([interval[1:] for interval in intervals])
    return {
        "too_low": float(np.mean(bounds[:, 1] < truth)),
        "too_high": float(np.mean(bounds[:, 0] > truth)),
        "width": float(np.median(bounds[:, 1] - bounds[:, 0])),
    }


def shares(rng: np.random.Generator, draws: int) -> list[dict]:
    """Accuracy, of one sample of each problem or several."""
    rows = []
    for problems, samples, kind, truth in (
        (30, 1, "varied", 2 / 3),
        (30, 16, "varied", 2 / 3),
        (30, 16, "hard", 1 / 11),
        (30, 16, "easy", 10 / 11),
        (30, 64, "hard", 1 / 11),
        (164, 4, "varied", 2 / 3),
        (164, 4, "hard", 1 / 11),
        (164, 16, "known 0.02", 0.02),
        (164, 4, "coin", 0.9),
        (1319, 1, "easy", 10 / 11),
        (1319, 4, "hard", 1 / 11),
    ):
        drawn = [rng.binomial(samples, difficulties(rng, kind, problems, 0.0)[0]) / samples for _ in range(draws)]
        for method, interval in (("ours", share_interval), ("before", plain_share)):
            found = missed((interval(values, samples) for values in drawn), truth)
            rows.append(
                {"of": "accuracy", "problems": problems, "samples": samples, "world": kind, "method": method} | found
            )
    return rows


def edge() -> list[dict]:
    """The upper bound where the first few of 480 samples of 30 problems are right, each of another problem."""
    rows = []
    for right in range(7):
        values = np.zeros(30)
        values[:right] = 1 / 16
        bounds = {"ours": share_interval(values, 16)[2], "before": plain_share(values, 16)[2]}
        rows += [{"of": "edge", "right": right, "method": method, "upper": upper} for method, upper in bounds.items()]
    return rows


def differences(rng: np.random.Generator, draws: int) -> list[dict]:
    """The difference in accuracy, where it is the margin: too high is `as good` when it is not, too low `worse`."""
    rows = []
    for problems, samples, kind, loss in (
        (300, 1, "known 0.5", 0.01),
        (300, 1, "known 0.9", 0.01),
        (1319, 1, "known 0.5", 0.003),
        (1319, 1, "known 0.9", 0.01),
        (30, 4, "known 0.5", 0.05),
        (100, 16, "known 0.5", 0.01),
        (300, 4, "known 0.5", 0.01),
        (30, 16, "varied", 0.05),
        (30, 16, "changed", 0.05),
        (164, 4, "varied", 0.02),
        (164, 4, "changed", 0.02),
        (164, 4, "hard", 0.02),
        (1319, 1, "varied", 0.01),
        (1319, 1, "coin", 0.01),
        (1000, 16, "changed", 0.01),
    ):
        drawn = []
        for _ in range(draws):
            pair = difficulties(rng, kind, problems, loss)
            drawn.append([rng.binomial(samples, chance) / samples for chance in pair])
        for method, interval in (
            ("ours", paired_difference),
            ("before", lambda before, after, samples=samples: newcombe(before, after, samples)),
        ):
            found = missed((interval(*pair) for pair in drawn), -loss)
            rows.append(
                {
                    "of": "difference",
                    "problems": problems,
                    "samples": samples,
                    "world": kind,
                    "loss": loss,
                    "method": method,
                }
                | found
            )
    return rows


def lengths(rng: np.random.Generator, draws: int) -> list[dict]:
    """Mean tokens, and their ratio where a problem's are shortened by a factor of its own."""
    rows = []
    for problems in (10, 30, 100, 300):
        for kind, (draw, mean) in LENGTHS.items():
            drawn = [np.maximum(draw(rng, problems), 1) for _ in range(draws)]
            for method, interval in (("ours", mean_interval), ("before", log_normal_mean)):
                found = missed(map(interval, drawn), mean)
                found["width"] /= mean
                rows.append(
                    {"of": "tokens", "problems": problems, "samples": 1, "world": kind, "method": method} | found
                )
            shorter = [values * rng.lognormal(-0.7, 0.4, problems) for values in drawn]
            truth = math.exp(-0.7 + 0.4**2 / 2)
            found = missed(map(paired_ratio, drawn, shorter), truth)
            found["width"] /= truth
            rows.append(
                {"of": "ratio of tokens", "problems": problems, "samples": 1, "world": kind, "method": "ours"} | found
            )
    return rows


# Answers


def measurement(stage: str, task: str, correct: np.ndarray) -> Measurement:
    """What an evaluation would have found of these verdicts, all completions being as long as another."""
    n, samples = correct.shape
    accuracy, low, high = share_interval(correct.mean(axis=1), samples)
    row = ResultRow(
        stage=stage,
        checkpoint=stage,
        task=task,
        decoding="sampled",
        prompt="plain",
        n=n,
        samples=samples,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        mean_tokens=1.0,
        p90_tokens=1.0,
        truncated=0.0,
        parameters=1,
        wall_s=0.0,
    )
    ones = np.ones(correct.shape, dtype=int)
    found = Samples(list(range(n)), [], correct, np.full(correct.shape, np.nan), ones, 0 * ones, 0 * correct, 0)
    return Measurement(row, {}, {}, Path("simulated.json"), found, {})


BENCHMARKS = {"30 × 16": (30, 16), "164 × 4": (164, 4), "1,319 × 1": (1319, 1), "1,319 × 16": (1319, 16)}


def answers(rng: np.random.Generator, draws: int, margin: float = 0.01) -> list[dict]:
    """What is answered of two models of which one loses nothing, the margin, or three times that."""

    def compare(task: str, shape: tuple[int, int], loss: float, world: str = "varied") -> Comparison:
        pair = difficulties(rng, world, shape[0], loss)
        verdicts = [rng.random(shape) < chance[:, None] for chance in pair]
        sides = [measurement(stage, task, side) for stage, side in zip("ab", verdicts, strict=True)]
        return Comparison([tuple(sides)], [margin])

    def tally(name: str, loss: float, found: list[Answer]) -> dict:
        counts = Counter(found)
        shares = {answer.name.lower(): counts[answer] / len(found) for answer in Answer}
        return {"of": "answer", "tasks": name, "margin": margin, "loss": loss} | shares

    rows = []
    for loss in (0.0, margin, 3 * margin):
        for name, shape in BENCHMARKS.items():
            rows.append(tally(name, loss, [compare("task", shape, loss).answer for _ in range(draws // 4)]))
        # one model twice, decoded greedily, and a model that solves next to nothing
        rows.append(
            tally(
                "1,319 × 1, known",
                loss,
                [compare("task", (1319, 1), loss, "known 0.8").answer for _ in range(draws // 4)],
            )
        )
        together = [
            Conclusion([compare(name, BENCHMARKS[name], loss) for name in ("30 × 16", "164 × 4", "1,319 × 1")]).answer
            for _ in range(draws // 4)
        ]
        rows.append(tally("30 × 16, 164 × 4 and 1,319 × 1 together", loss, together))
    floor = [compare("task", (1319, 1), 0.0, "known 0.002").answer for _ in range(draws // 4)]
    rows.append(tally("1,319 × 1, of which 0.2% are solved", 0.0, floor))
    return rows


def sequential(rng: np.random.Generator, draws: int, margin: float = 0.01, budget: int = 16) -> list[dict]:
    """What `--decide` answers, at which times the first samples; and what comes of a look at 95% before it."""
    rows = []
    for name, (problems, samples) in {"164 × 4": (164, 4), "500 × 4": (500, 4), "1,319 × 1": (1319, 1)}.items():
        for world in ("varied", "changed"):
            for loss in (0.0, margin, 3 * margin):
                found, peeked, spent = Counter(), Counter(), []
                for _ in range(draws):
                    pair = difficulties(rng, world, problems, loss)
                    right, drawn, first = [np.zeros(problems), np.zeros(problems)], 0, None
                    for times, level in looks(budget):
                        more = times * samples - drawn
                        right = [side + rng.binomial(more, chance) for side, chance in zip(right, pair, strict=True)]
                        drawn += more
                        sides = [side / drawn for side in right]
                        if first is None:
                            first = Answer.of(paired_difference(*sides), margin)
                        answer = Answer.of(paired_difference(*sides, level), margin)
                        if answer is not Answer.UNDECIDED:
                            break
                    found[answer] += 1
                    peeked[answer if first is Answer.UNDECIDED else first] += 1
                    spent.append(times)
                base = {
                    "of": "sequential",
                    "tasks": name,
                    "world": world,
                    "margin": margin,
                    "loss": loss,
                    "budget": budget,
                }
                for rule, counts in (("decide", found), ("compare, then decide", peeked)):
                    row = base | {"rule": rule} | {answer.name.lower(): counts[answer] / draws for answer in Answer}
                    rows.append(row | ({"mean_times": float(np.mean(spent))} if rule == "decide" else {}))
    return rows


# Tables


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table() -> str:
    """Intervals that miss, and answers, in per cent."""
    rows = read(FOLDER / "coverage.json")
    draws = rows[0]["draws"]
    parts = [
        f"Made by `python -m scripts.experiments.coverage`: {draws:,} data sets of each kind, a quarter as many for answers. "
        f"A share of 2.5% has a standard error of {100 * math.sqrt(0.025 * 0.975 / draws):.1f} points here.",
        "## Intervals\n\nHow often, in per cent, a 95% interval lies wholly below the truth (too low) or above it (too high), "
        "and its width at the median. *Before* is what was used before: Wilson's interval at the effective number of samples "
        "believed as it is, Newcombe's for paired shares, and the normal one for the logarithm of a mean.",
    ]
    names = {
        "accuracy": "Accuracy",
        "difference": "Difference in accuracy, which is the margin: too high says *as good* wrongly, too low *worse*",
        "tokens": "Mean tokens; the width is to the mean",
        "ratio of tokens": "Ratio of mean tokens",
    }
    for of, title in names.items():
        lines: dict[tuple, dict[str, dict]] = {}
        for row in rows:
            if row["of"] == of:
                key = f"{row['problems']:,} × {row['samples']}", row["world"], row.get("loss")
                lines.setdefault(key, {})[row["method"]] = row
        methods = [method for method in ("ours", "before") if any(method in line for line in lines.values())]
        heading = ["problems × samples", "world", *(["loss, points"] if of == "difference" else [])]
        heading += [f"{method}: {what}" for method in methods for what in ("too low", "too high", "width")]
        width = _percent if of in ("accuracy", "difference") else "{:.2f}".format
        body = [
            [
                *(part if isinstance(part, str) else f"{100 * part:g}" for part in key if part is not None),
                *(
                    text
                    for method in methods
                    for text in (
                        _percent(line[method]["too_low"]),
                        _percent(line[method]["too_high"]),
                        width(line[method]["width"]),
                    )
                ),
            ]
            for key, line in lines.items()
        ]
        parts += [f"**{title}**", markdown(heading, body)]
    edges = [row for row in rows if row["of"] == "edge"]
    heading = ["right of 480 samples of 30 problems", *(str(row["right"]) for row in edges if row["method"] == "ours")]
    body = [
        [f"upper bound, {method}", *(_percent(row["upper"]) for row in edges if row["method"] == method)]
        for method in ("ours", "before")
    ]
    parts += ["**At the edge**", markdown(heading, body)]
    parts.append(
        "## Answers\n\nTwo models with the same chance of a right answer on every problem, or one that loses the margin of "
        "1 point (where *as good* and *worse* are both wrong in what they rule out, and each may be said in 2.5%), or three "
        "times that. In per cent."
    )
    heading = ["problems × samples", "loss, points", *(answer.text for answer in Answer)]
    body = [
        [row["tasks"], f"{100 * row['loss']:g}", *(_percent(row[answer.name.lower()]) for answer in Answer)]
        for row in rows
        if row["of"] == "answer"
    ]
    parts.append(markdown(heading, body))
    chosen = [row for row in rows if row["of"] == "sequential"]
    parts.append(
        f"## `--decide {chosen[0]['budget']}`\n\nThe same where samples are drawn until it is decided, up to "
        f"{chosen[0]['budget']} times the first ones, and where `--compare` is asked first and `--decide` only if that "
        "is undecided, which is one look more. In per cent."
    )
    heading = [
        "first samples",
        "world",
        "loss, points",
        "rule",
        *(answer.text for answer in Answer),
        "times the samples",
    ]
    body = [
        [
            row["tasks"],
            row["world"],
            f"{100 * row['loss']:g}",
            row["rule"],
            *(_percent(row[answer.name.lower()]) for answer in Answer),
            f"{row['mean_times']:.1f}" if "mean_times" in row else "",
        ]
        for row in chosen
    ]
    parts.append(markdown(heading, body))
    parts.append(
        "Worlds: *known x*: a problem is solved always or never, x of them before, and what is lost is lost for good. "
        "*varied*, *hard*, *easy*: chances from Beta(0.8, 0.4), Beta(0.3, 3) and Beta(3, 0.3), all lowered by the same "
        "factor. *changed*: as varied, and a tenth of the problems has another chance afterwards. *coin*: every problem 0.9."
    )
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="data sets of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    if not args.report:
        rng = np.random.default_rng(args.seed)
        rows = edge()
        for part in (shares, differences, lengths, answers, sequential):
            rows += part(rng, args.draws)
            print(part.__name__, len(rows), flush=True)
        write_results(FOLDER / "coverage.json", [{"draws": args.draws, **row} for row in rows], vars(args))
    write_text(FOLDER / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
