import itertools
import math
from collections import Counter
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opsd.evaluate.estimate import (
    MARKERS,
    Samples,
    budget_curve,
    bytes_per_correct,
    cost_per_1000_correct,
    flops_per_1000_correct,
    majority,
    markers_per_1000_tokens,
    mcnemar,
    mean_interval,
    paired_difference,
    paired_ratio,
    pass_at_k,
    share_interval,
    student_quantile,
    summarize,
    tokens_where_both_solve,
    unpaired_difference,
    wilson_interval,
)
from trl_opsd.evaluate.schema import CompletionRecord, to_json
from trl_opsd.evaluate.score import same_answer
from trl_opsd.rewards import code_reward, format_reward, logic_reward, math_reward, reasoning_gym_reward


def record(id, sample=0, **values):
    base = {
        **dict.fromkeys(("stage", "checkpoint", "task", "decoding", "prompt", "question"), "?"),
        "completion": "",
        "tokens": 10,
        "thinking_tokens": 0,
        "truncated": False,
        "correct": True,
        "correct_flexible": None,
        "answer": None,
    }
    return CompletionRecord(id=id, sample=sample, **{**base, **values})


class TestAgainstEnumeration:
    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    def test_pass_at_k(self, n):
        for k in range(1, n + 1):
            for c in range(n + 1):
                verdicts = [True] * c + [False] * (n - c)
                subsets = list(itertools.combinations(verdicts, k))
                assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))

    def test_pass_at_k_is_unbiased(self):
        # Its mean over the draws of n samples is the chance that one of k is correct
        p, n, k = 0.3, 6, 4
        weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        assert np.dot(weights, pass_at_k(np.arange(n + 1), n, k)) == pytest.approx(1 - (1 - p) ** k)

    @pytest.mark.parametrize("k", [0, 5])
    def test_pass_at_k_needs_as_many_samples(self, k):
        with pytest.raises(ValueError, match="pass@k needs 1 ≤ k ≤ n"):
            pass_at_k(np.array([1]), 4, k)

    @pytest.mark.parametrize(
        "answers",
        [
            ["1", "1", "2"],
            ["1", "2", "2", "3", "3"],  # a tie without the right one
            ["1", "1", "2", "2"],
            ["3", "2", "1"],
            [None, None, "1", "2"],  # what has no answer does not vote
            [None, None],
            ["2", "2", None, "1"],
        ],
    )
    def test_majority(self, answers):
        # Over every order of the samples, the answer with most votes that comes first
        outcomes = []
        for order in itertools.permutations([answer for answer in answers if answer is not None]):
            winner = max(order, key=order.count, default=None)
            outcomes.append(winner == "1")
        records = [record(0, i, answer=answer, correct=answer == "1") for i, answer in enumerate(answers)]
        assert majority(Samples.from_records(records)).tolist() == pytest.approx([np.mean(outcomes)])

    def test_truncated_samples_do_not_vote(self):
        records = [record(0, i, answer="2", truncated=True, correct=False) for i in range(3)] + [
            record(0, 3, answer="1")
        ]
        assert majority(Samples.from_records(records)).tolist() == [1.0]

    @pytest.mark.parametrize(
        ("right", "wrong", "share"),
        [
            (["1/2", "0.5", r"\frac{1}{2}"], ["3", "3"], 1.0),  # by texts 3 has two votes, and each of the others one
            ([r"\sqrt{8}", r"2\sqrt{2}"], ["3", "x = 3"], 0.5),
            (["(A)", "A"], ["(B)", r"\text{B}", "B"], 0.0),
            (["7"], ["07.0", "7.00", "8", "8"], 1 / 3),  # a judge that is of two minds about an answer
        ],
    )
    def test_one_answer_in_several_spellings(self, right, wrong, share):
        same = same_answer([math_reward])
        for order in itertools.permutations(right + wrong):
            records = [
                record(0, i, question="?", answer=answer, correct=answer in right) for i, answer in enumerate(order)
            ]
            assert majority(Samples.from_records(records), same).tolist() == pytest.approx([share])

    def test_a_majority_against_brute_force(self):
        # Answers are pairs of digits, the same when their first digits are; `same` may be asked or not
        rng = np.random.default_rng(0)
        for _ in range(300):
            answers = [f"{a}-{b}" for a, b in rng.integers(0, [4, 3], size=(rng.integers(1, 9), 2))]
            counts = Counter(answer[0] for answer in answers)
            won = [digit for digit, count in counts.items() if count == max(counts.values())]
            records = [record(0, i, question="?", answer=a, correct=a[0] == "1") for i, a in enumerate(answers)]
            found = majority(Samples.from_records(records), lambda question, one, other: one[0] == other[0])
            assert found.tolist() == pytest.approx([("1" in won) / len(won)])

    def test_few_answers_are_compared(self):
        asked = []

        def same(question, one, other):
            asked.append((question, one, other))
            return False

        def compared(answers):
            asked.clear()
            majority(Samples.from_records([record(0, i, question="q", answer=a) for i, a in enumerate(answers)]), same)
            return len(asked)

        assert compared([str(i) for i in range(1000)]) == 0  # numbers are compared as numbers
        assert compared(["x"] * 501 + [f"y{i}" for i in range(499)]) == 0  # the rest cannot win any more
        assert compared(["x"] * 600 + ["y"] * 400) == 0
        assert compared(["x", "y", "7", "x", "y", "8"]) == 5 and asked[0] == ("q", "x", "y")  # all but 7 and 8

    def test_what_says_that_two_answers_are_one(self):
        question = "Which?\n(A) red\n(B) blue"
        assert same_answer([format_reward, logic_reward])(question, "(B)", "blue")
        assert not same_answer([logic_reward])(question, "(A)", "blue")
        assert not same_answer([math_reward])(question, "(B)", "blue")
        assert not same_answer([math_reward])("?", r"\frac{", r"\frac{")
        assert same_answer([reasoning_gym_reward]) is None and same_answer([code_reward]) is None

    @pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 1), (3, 3), (1, 6), (7, 2), (0, 9)])
    def test_mcnemar(self, lost, gained):
        m = lost + gained
        extreme = [abs(2 * sum(flips) - m) >= abs(gained - lost) for flips in itertools.product((0, 1), repeat=m)]
        before = np.array([1] * lost + [0] * gained + [1, 0], dtype=bool)
        after = np.array([0] * lost + [1] * gained + [1, 0], dtype=bool)
        assert mcnemar(before, after) == pytest.approx(np.mean(extreme))

    def test_mcnemar_with_thousands(self):
        before = np.arange(2000) % 2 == 0
        assert mcnemar(before, ~before) == 1.0
        assert 0 < mcnemar(before, before | (np.arange(2000) > 1000)) < 1e-100

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), min_size=1, max_size=20))
    def test_budget_curve(self, samples):
        correct, tokens = map(np.array, zip(*samples, strict=True))
        budgets, accuracies = budget_curve(correct, tokens, range(14))
        for budget, accuracy in zip(budgets, accuracies, strict=True):
            assert accuracy == sum(right and length <= budget for right, length in samples) / len(samples)
        budgets, accuracies = budget_curve(correct, tokens)
        assert set(budgets) == {length for right, length in samples if right}
        assert all(np.diff(accuracies) > 0) and (not budgets.size or accuracies[-1] == correct.mean())


class TestClosedForms:
    @pytest.mark.parametrize(("both", "gained", "lost", "neither"), [(36, 12, 2, 0), (900, 0, 8, 92), (5, 0, 0, 7)])
    @pytest.mark.parametrize("level", [0.95, 0.99])
    def test_the_difference_is_a_normal_interval_after_some_problems_more(self, both, gained, lost, neither, level):
        before = np.array([1.0] * both + [0] * gained + [1] * lost + [0] * neither)
        after = np.array([1.0] * both + [1] * gained + [0] * lost + [0] * neither)
        more = NormalDist().inv_cdf((1 + level) / 2) ** 2
        # the shares of the four outcomes, after half of them as gains and half as losses
        n = len(before) + more
        up, down = (gained + more / 2) / n, (lost + more / 2) / n
        margin = math.sqrt(more * (up + down - (up - down) ** 2) / n)
        expected = (gained - lost) / len(before), up - down - margin, up - down + margin
        assert paired_difference(before, after, level) == pytest.approx(expected)

    def test_independent_shares(self):
        # 56 of 70 and 48 of 80: method 10 of Newcombe's comparison of eleven methods, Statistics in Medicine 17 (1998)
        shares = [(k / n, *wilson_interval(k, n)) for k, n in ((48, 80), (56, 70))]
        assert unpaired_difference(*shares) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)

    # Quantiles of Student's distribution, from a table of it
    @pytest.mark.parametrize(
        ("degrees", "level", "value"),
        [(1, 0.95, 12.7062), (2, 0.95, 4.30265), (3, 0.95, 3.18245), (5, 0.95, 2.57058), (29, 0.95, 2.04523)]
        + [(2, 0.99, 9.92484), (5, 0.99, 4.03214), (9, 0.99, 3.24984), (1000, 0.99, 2.58075)],
    )
    def test_student(self, degrees, level, value):
        assert student_quantile(degrees, level) == pytest.approx(value, rel=0.01 if degrees < 6 else 1e-4)

    def test_hall(self):
        # The bounds are where the transformed statistic is Student's quantile; numbers of one long tail and of one short
        for values in (
            np.array([1.0, 2, 2, 3, 3, 4, 9, 30]),
            np.array([30.0, 29, 29, 28, 27, 27, 26, 26, 25, 24, 20, 12]),
        ):
            n, mean, low, high = len(values), *mean_interval(values)
            skewness = np.mean((values - values.mean()) ** 3) / np.std(values) ** 3
            for bound, sign in ((low, 1), (high, -1)):
                s = (mean - bound) / np.std(values, ddof=1)
                transformed = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * n)
                assert math.sqrt(n) * transformed == pytest.approx(sign * student_quantile(n - 1))
            assert (high - mean > mean - low) == (skewness > 0)

    def test_one_sample_is_wilson(self):
        for correct in (0, 3, 29, 30):
            values = np.array([1.0] * correct + [0.0] * (30 - correct))
            assert share_interval(values)[1:] == pytest.approx(wilson_interval(correct, 30))

    def test_samples_that_are_all_alike_say_no_more_than_one(self):
        values = np.array([1.0] * 20 + [0.0] * 10)
        assert share_interval(values, samples=16) == pytest.approx(share_interval(values))

    def test_samples_that_are_independent_say_as_much_as_they_are(self):
        for problems, tolerance in (
            (30, 0.1),
            (3000, 1e-3),
        ):  # no variance between problems, which takes many to believe
            found = share_interval(np.array([0.5] * problems), samples=16)[1:]
            exact = wilson_interval(8 * problems, 16 * problems)
            assert found == pytest.approx(exact, rel=tolerance) and found[0] <= exact[0] + 1e-9

    def test_nothing_jumps_at_an_edge(self):
        # 30 problems of 16 samples: the first right one says little of how alike the samples of a problem are
        bounds = []
        for right in range(31):
            values = np.zeros(30)
            values[:right] = 1 / 16
            bounds.append(share_interval(values, 16)[2])
            assert share_interval(1 - values, 16)[1] == pytest.approx(1 - bounds[-1])
        steps = np.diff(bounds)
        assert bounds[0] == pytest.approx(wilson_interval(0, 30)[1]) and 0 <= min(steps) and max(steps) < 0.005
        widths = []
        for changed in range(31):
            after = np.zeros(30)
            after[:changed] = 1 / 16
            _, low, high = paired_difference(np.zeros(30), after)
            widths.append(high - low)
        assert 0.2 < widths[0] < 0.25 and max(np.abs(np.diff(widths))) < 0.04

    def test_the_difference_is_antisymmetric(self):
        rng = np.random.default_rng(0)
        before, after = rng.binomial(4, 0.5, 50) / 4, rng.binomial(4, 0.6, 50) / 4
        difference, low, high = paired_difference(before, after)
        assert paired_difference(after, before) == pytest.approx((-difference, -high, -low))

    def test_agreement_on_few_problems_is_no_certainty(self):
        difference, low, high = paired_difference(np.ones(5), np.ones(5))
        assert difference == 0 and low < -0.3 and high > 0.3
        low = paired_difference(np.ones(5000), np.ones(5000))[1]
        assert -0.002 < low < 0
        mixed = np.array([1.0, 0.0] * 50)
        assert -0.15 < paired_difference(mixed, mixed)[1] < -0.01

    def test_ratio(self):
        before, after = np.array([10.0, 20.0, 30.0]), np.array([5.0, 10.0, 15.0])
        assert paired_ratio(before, after) == pytest.approx((0.5, 0.5, 0.5))
        assert paired_ratio(before[:1], after[:1]) == (0.5, None, None)
        assert mean_interval(before[:1]) == (10.0, None, None)

    def test_markers_are_whole_words(self):
        text = "Wait, no. Hmm... let me check: actually 3. The waiter awaits." + 4 * " HOLD ON"
        assert markers_per_1000_tokens([text, ""], np.array([300, 100])) == pytest.approx(1000 * 8 / 400)
        for word in MARKERS:
            assert markers_per_1000_tokens([word], np.array([1])) == 1000

    def test_costs(self):
        # 100 tokens at 50%: 200 tokens for each right answer
        assert cost_per_1000_correct(100, 0.5, price=2.0) == pytest.approx(1000 * 200 * 2e-6)
        assert flops_per_1000_correct(100, 0.5, parameters=7) == pytest.approx(1000 * 200 * 14)
        assert cost_per_1000_correct(100, 0.0, 2.0) is None and flops_per_1000_correct(100, 0.0, 7) is None

    def test_bytes_per_correct_by_its_formula(self):
        correct = np.array([[1, 0], [1, 1], [0, 0]], dtype=bool)
        tokens = np.array([[10, 30], [20, 40], [50, 60]])
        samples = SimpleNamespace(correct=correct, tokens=tokens)
        # Three of six are right, in 35 tokens on average, and each token moves 12 parameters of 4 bits
        definition = np.float64(12) * 4 / 8 * tokens.mean(dtype=np.float64) / (3 / 6)
        found, low, high = bytes_per_correct(samples, 12, 4)
        assert found == pytest.approx(definition, rel=1e-15) and definition == 420
        assert low < found < high
        samples.correct = correct & [[True], [False], [False]]
        assert bytes_per_correct(samples, 12, 4) == (pytest.approx(3 * definition), None, None)
        samples.correct = np.zeros_like(correct)
        assert bytes_per_correct(samples, 12, 4) == (None, None, None)

    def test_how_often_the_interval_of_bytes_is_right(self):
        generator = np.random.default_rng(0)

        # The harder a problem, the longer its answers and the rarer right ones: 1e6 problems say what is true
        def draw(number):
            hardness = generator.random(number)
            tokens = np.exp(generator.normal(3 + hardness, 0.5))[:, None]
            return SimpleNamespace(correct=(generator.random(number) > hardness)[:, None], tokens=tokens)

        truth = bytes_per_correct(draw(1_000_000), 8, 8)[0]
        assert 0.93 <= coverage([bytes_per_correct(draw(150), 8, 8) for _ in range(2000)], truth) <= 0.97


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for _, low, high in intervals])


def draw(rng, problems, n, mean, spread, datasets=1000):
    """Verdict shares of problems whose difficulty varies: Beta with the given mean, the more alike the larger spread."""
    difficulty = rng.beta(mean * spread, (1 - mean) * spread, size=(datasets, problems))
    return difficulty, rng.binomial(n, difficulty) / n


class TestCoverage:
    """
    The 95% intervals hold the truth in 93 to 97% of 1,000 simulated data sets (their own error is 0.7%), and in more where
    few problems leave room for doubt. More of this is in recipes/results/coverage.
    """

    @pytest.mark.parametrize(
        ("problems", "n", "mean", "spread", "most"),
        [
            (100, 1, 0.5, 1, 0.97),
            (500, 1, 0.95, 1, 0.97),
            (30, 4, 0.5, 1, 0.97),
            (100, 4, 0.8, 1, 0.97),
            (2000, 16, 0.9, 2, 0.97),
            (200, 16, 0.9, 2, 0.99),
            (100, 8, 0.3, 50, 0.99),
        ],
    )
    def test_mean_at_n(self, problems, n, mean, spread, most):
        _, shares = draw(np.random.default_rng(1), problems, n, mean, spread)
        assert 0.93 <= coverage([share_interval(values, n) for values in shares], mean) <= most

    def test_the_cluster_counts(self):
        # The same, taking 16 samples of a problem for 16 problems, is what must not happen
        _, shares = draw(np.random.default_rng(2), 100, 16, 0.5, 1)
        naive = [(0, *wilson_interval(16 * values.sum(), 1600)) for values in shares]
        assert coverage(naive, 0.5) < 0.6

    @pytest.mark.parametrize(
        ("problems", "n", "mean", "loss"),
        [(100, 1, 0.5, 0.0), (500, 1, 0.8, 0.1), (50, 4, 0.5, 0.1), (200, 4, 0.7, 0.0), (500, 16, 0.9, 0.02)],
    )
    def test_difference(self, problems, n, mean, loss):
        rng = np.random.default_rng(3)
        difficulty, before = draw(rng, problems, n, mean, 1)
        other, _ = draw(rng, problems, n, mean, 1)
        difficulty = np.where(rng.random(other.shape) < 0.4, other, difficulty) * (1 - loss)  # correlated, not equal
        after = rng.binomial(n, difficulty) / n
        intervals = [paired_difference(a, b) for a, b in zip(before, after, strict=True)]
        assert 0.93 <= coverage(intervals, -mean * loss) <= 0.98

    @pytest.mark.parametrize(
        ("problems", "n", "share", "loss"),
        [(300, 1, 0.5, 0.01), (30, 4, 0.5, 0.05), (100, 16, 0.5, 0.01), (300, 4, 0.5, 0.01)],
    )
    def test_what_is_lost_for_good_on_few_problems_is_not_missed(self, problems, n, share, loss):
        """Where no problem of the sample has been lost yet a loss is not ruled out: Newcombe's interval did in 5 to 34%."""
        rng = np.random.default_rng(8)
        known = rng.random((1000, problems)) < share  # solved always or never
        kept = known & (rng.random(known.shape) >= loss / share)
        lows = [paired_difference(a, b)[1] for a, b in zip(known.astype(float), kept.astype(float), strict=True)]
        assert np.mean(np.array(lows) > -loss) < 0.035

    def test_difference_near_the_ceiling(self):
        """Where few problems can differ no interval is exact; ours errs to the wide side, and resampling does not."""
        rng = np.random.default_rng(4)
        intervals, resampled = [], []
        for _ in range(500):
            before, after = rng.random(30) < 0.98, rng.random(30) < 0.97
            intervals.append(paired_difference(before.astype(float), after.astype(float)))
            means = (after * 1.0 - before)[rng.integers(0, 30, size=(400, 30))].mean(axis=1)
            resampled.append((0, *np.percentile(means, [2.5, 97.5])))
        assert coverage(intervals, -0.01) > 0.97
        assert coverage(resampled, -0.01) < 0.85

    def test_paired_beats_unpaired(self):
        rng = np.random.default_rng(5)
        difficulty, before = draw(rng, 300, 1, 0.5, 0.2, datasets=1)
        after = rng.binomial(1, difficulty[0])
        _, low, high = paired_difference(before[0], after)
        _, shuffled_low, shuffled_high = paired_difference(before[0], rng.permutation(after))
        assert high - low < 0.6 * (shuffled_high - shuffled_low)

    def test_agrees_with_resampling_where_that_is_good(self):
        rng = np.random.default_rng(6)
        difficulty, before = draw(rng, 1000, 4, 0.6, 1, datasets=1)
        before, after = before[0], rng.binomial(4, 0.9 * difficulty[0]) / 4
        tokens = rng.lognormal(5, 0.7, size=1000)
        shorter = tokens * rng.lognormal(-0.7, 0.3, size=1000)
        drawn = rng.integers(0, 1000, size=(4000, 1000))
        differences = (after - before)[drawn].mean(axis=1)
        assert paired_difference(before, after)[1:] == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=2e-3)
        ratios = shorter[drawn].mean(axis=1) / tokens[drawn].mean(axis=1)
        assert paired_ratio(tokens, shorter)[1:] == pytest.approx(np.percentile(ratios, [2.5, 97.5]), rel=0.01)

    @pytest.mark.parametrize("problems", [30, 200, 500])
    def test_ratio_and_mean_tokens(self, problems):
        rng = np.random.default_rng(7)
        tokens = rng.lognormal(5, 0.6, size=(1000, problems))  # lengths have a long tail
        shorter = tokens * rng.lognormal(-0.7, 0.4, size=tokens.shape)
        ratio, mean = math.exp(-0.7 + 0.4**2 / 2), math.exp(5 + 0.6**2 / 2)
        assert 0.92 <= coverage(map(paired_ratio, tokens, shorter), ratio) <= 0.97
        assert 0.93 <= coverage(map(mean_interval, tokens), mean) <= 0.97


class TestSamples:
    def test_summary(self):
        records = [
            record("a", 0, tokens=10, thinking_tokens=4, correct=True, correct_flexible=True, answer="1"),
            record("a", 1, tokens=30, thinking_tokens=20, correct=False, correct_flexible=True, answer="2"),
            record("b", 1, tokens=20, correct=True, correct_flexible=False, answer="1", completion="Wait"),
            record("b", 0, tokens=100, correct=False, correct_flexible=False, truncated=True),
            record("c", 0, correct=None),
            record("c", 1, correct=True),
        ]
        row = to_json(summarize(Samples.from_records(records)))
        assert (row["n"], row["samples"], row["unverified"], row["estimator"]) == (2, 2, 1, "mean@2")
        assert (row["accuracy"], row["accuracy_flexible"]) == (0.5, 0.5)
        assert (row["strict_only"], row["flexible_only"]) == (1, 1)
        assert (row["pass@2"], row["maj@2"]) == (1.0, 0.75)  # a ties, b has one vote
        assert (row["mean_tokens"], row["median_tokens"]) == (40, 25)
        assert row["mean_tokens_low"] < 40 < row["mean_tokens_high"]
        assert row["p90_tokens"] == pytest.approx(np.percentile([10, 20, 30, 100], 90))
        assert (row["mean_thinking_tokens"], row["mean_answer_tokens"]) == (6, 34)
        assert row["truncated"] == 0.25
        assert row["markers_per_1000_tokens"] == 1000 / 160

    def test_lengths_where_both_solve(self):
        before = [
            record("a", 0, tokens=10),
            record("a", 1, tokens=30),
            record("b", 0, tokens=7),
            record("b", 1, tokens=9),
        ]
        before += [record("c", 0, tokens=50, correct=False), record("c", 1, tokens=60, correct=False)]
        after = [record("a", 0, tokens=4), record("a", 1, tokens=999, correct=False, truncated=True)]
        after += [record("b", i, tokens=1, correct=False) for i in (0, 1)] + [record("c", i, tokens=5) for i in (0, 1)]
        found = tokens_where_both_solve(*map(Samples.from_records, (before, after)), [(0, 0), (1, 1), (2, 2)])
        assert found.tolist() == [[20, 4]]  # b is given up, and c is new; what was cut has no length

    @pytest.mark.parametrize("cut", [0, 1, 3, 10, 11, 50, 99])
    def test_what_rests_on_completions_that_were_cut(self, cut):
        lengths = sorted(range(1, 101))
        samples = [
            record(i, tokens=min(length, 100 - cut), truncated=length > 100 - cut) for i, length in enumerate(lengths)
        ]
        row = summarize(Samples.from_records(samples))
        for quantile, value in ((0.5, row.median_tokens), (0.9, row.p90_tokens), (0.99, row.p99_tokens)):
            # a number that is not marked is the one that no limit would have given
            assert row.is_cut(quantile) or value == pytest.approx(np.percentile(lengths, 100 * quantile))
            assert row.is_cut(quantile) == (value >= 100 - cut - (0.99 if cut else 0) and cut > 0)
        assert row.is_cut(1) == (cut > 0)

    def test_one_sample_names_no_other_estimator(self):
        row = to_json(summarize(Samples.from_records([record(0), record(1, correct=False)])))
        assert row["estimator"] == "mean@1" and not any("@" in key for key in row)
        assert row["accuracy_flexible"] is None and row["strict_only"] is None

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([record(7), record(7)], "Sample 0 of problem 7 is there twice"),
            ([record(7), record(7, 1), record(8)], "Problem 8 has 1 samples, and others have 2"),
            ([record(7, correct=None)], "None of the 1 problems can be verified"),
            ([], "None of the 0 problems"),
        ],
    )
    def test_what_cannot_be_counted(self, records, message):
        with pytest.raises(ValueError, match=message):
            Samples.from_records(records)
