import json
import math
import re

import numpy as np
import pytest
from evaluated import CONFIG, measured, records, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_opsd.cli import UserError
from trl_opsd.evaluate.commands import compare_command
from trl_opsd.evaluate.compare import Answer, Conclusion, compare_files, compare_measurements, margins_of, warnings_of
from trl_opsd.evaluate.estimate import paired_difference
from trl_opsd.evaluate.report import report_results
from trl_opsd.evaluate.results_file import load_results


def column(*values):
    return np.array(values, dtype=object)[:, None]


def verdicts(problems, wrong):
    """All right but the first `wrong`."""
    return np.arange(problems)[:, None] >= wrong


@pytest.fixture
def pair(tmp_path):
    def write(wrong_before, wrong_after, problems=1000, **values):
        rng = np.random.default_rng(0)
        tokens = rng.integers(40, 60, size=(problems, 1))
        before = write_run(tmp_path / "a.json", records("rlvr", verdicts(problems, wrong_before), tokens))
        after = write_run(tmp_path / "b.json", records("opsd", verdicts(problems, wrong_after), tokens // 2), **values)
        return str(before), str(after)

    return write


class TestAnswer:
    @pytest.mark.parametrize(
        ("wrong", "margin", "status", "answer"),
        [
            (50, 0.01, 0, "✓ as good: opsd against rlvr"),
            (20, 0.01, 0, "✓ as good"),  # better
            (54, 0.01, 0, "✓ as good"),  # 4 lost, none gained
            (58, 0.01, 3, "? undecided"),  # lower, and a loss of a point is neither shown nor ruled out
            (54, 0.02, 0, "✓ as good"),
            (60, 0.0, 1, "✗ worse"),
            (150, 0.05, 1, "✗ worse: opsd against rlvr"),
            (150, 0.10, 3, "? undecided"),
            (150, 0.15, 0, "✓ as good"),
        ],
    )
    def test_planted_differences(self, pair, capsys, wrong, margin, status, answer):
        before, after = pair(50, wrong)
        assert compare_command(["--compare", before, after, "--margin", str(margin)]) == status
        sentence = capsys.readouterr().out
        assert sentence.startswith(answer) and sentence.count("\n") == 1
        assert f"{(50 - wrong) / 10:+.2f} points" in sentence and "1,000 problems" in sentence

    @settings(max_examples=200, deadline=None)
    @given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.5), st.booleans())
    def test_three_answers_that_exclude_each_other(self, value, below, above, margin, floor):
        difference = value, value - below, value + above
        answer = Answer.of(difference, margin, floor)
        assert (answer is Answer.WORSE) == (difference[2] < -margin)
        assert (answer is Answer.AS_GOOD) == (difference[1] > -margin and not floor)
        assert [a.status for a in Answer] == [0, 1, 3] and [a.sign for a in Answer] == ["✓", "✗", "?"]

    def test_too_few_problems_are_undecided(self, pair, capsys):
        assert compare_command(["--compare", *pair(1, 1, problems=12)]) == 3
        sentence = capsys.readouterr().out
        assert sentence.startswith("? undecided: opsd against rlvr") and "problems would decide" in sentence

    def test_the_numbers(self, pair):
        (comparison,) = compare_files(*pair(50, 54, parameters=500))
        assert comparison.difference[0] == pytest.approx(-0.004)
        assert comparison.p_value == 2 / 2**4  # four lost, none gained
        assert (
            0.48 < comparison.ratio[1] < comparison.ratio[0] < comparison.ratio[2] < 0.5 and comparison.solved == 946
        )
        assert "0.50 times the parameters" in comparison.sentence() and "McNemar p = 0.12" in comparison.sentence()

    def test_what_would_decide_does(self):
        """With as many problems as it says, of the same kind, it is decided, and with a quarter fewer it is not."""
        order = np.random.default_rng(0).permutation(400)
        before, after = np.arange(400) < 320, (np.arange(400) < 304) | (np.arange(400) >= 386)  # 16 lost, 14 gained

        def compare(times):
            sides = [np.resize(side[order], 400 * times)[:, None] for side in (before, after)]
            return compare_measurements(*map(measured, "ab", "tt", sides), 0.02)

        first = compare(1)
        problems, samples = first.needed()
        assert first.answer is Answer.UNDECIDED and samples is None and 400 < problems < 2000
        assert compare(math.ceil(problems / 400)).answer is Answer.AS_GOOD
        assert compare(math.floor(problems / 400)).answer is Answer.UNDECIDED

    def test_how_many_samples_would_decide(self):
        rng = np.random.default_rng(4)
        chance = rng.beta(2, 1, 200)[:, None]
        sides = [rng.random((200, 4)) < chance for _ in range(2)]
        first = compare_measurements(
            *(measured(n, "t", side, decoding="sampled") for n, side in zip("ab", sides, strict=True))
        )
        problems, samples = first.needed()
        assert first.answer is Answer.UNDECIDED and f"{samples:.2g} times as many samples" in first.sentence()
        # the samples of a problem differ at random alone here, so they count as much as problems do
        assert first.within == pytest.approx(1, abs=0.2) and samples == pytest.approx(problems / 200, rel=0.7)
        # where problems themselves have changed, no number of samples tells it
        sides = rng.random((200, 8)) < 0.999, np.repeat(rng.random((200, 1)) < 0.97, 8, axis=1)
        second = compare_measurements(
            *(measured(n, "t", side, decoding="sampled") for n, side in zip("ab", sides, strict=True)), 0.03
        )
        assert second.answer is Answer.UNDECIDED and second.needed()[1] is None and second.within < 0.1
        assert "more samples of these would not" in second.sentence()

    def test_identical_models(self):
        """The answer is wrong as rarely as is claimed, and mostly that one cannot tell."""
        rng = np.random.default_rng(5)
        for problems, samples in ((30, 16), (164, 4), (1319, 1)):
            for loss, wrong in ((0.0, [Answer.WORSE]), (0.01, [Answer.AS_GOOD, Answer.WORSE])):
                found = []
                for _ in range(400):
                    chance = rng.beta(0.8, 0.4, problems)
                    before, after = (rng.binomial(samples, p) / samples for p in (chance, chance * (1 - loss * 1.5)))
                    found.append(Answer.of(paired_difference(before, after), 0.01))
                assert all(np.mean([answer is bad for answer in found]) <= 0.045 for bad in wrong)
                assert np.mean([answer is Answer.UNDECIDED for answer in found]) > 0.75


def test_margins_are_read():
    assert margins_of([]) == {None: 0.01} and margins_of(["0.02", "a=b=0.005"]) == {None: 0.02, "a=b": 0.005}


class TestSeveralTasks:
    def compare(self, margins=None, problems=1000, **lost):
        """Of its problems each task has, how many `b` loses; `a` solves all."""
        margins = margins or {}
        return Conclusion(
            [
                compare_measurements(
                    measured("a", task, verdicts(problems, 0)),
                    measured("b", task, verdicts(problems, wrong)),
                    margins.get(task, 0.01),
                )
                for task, wrong in lost.items()
            ]
        )

    @pytest.fixture
    def files(self, tmp_path):
        def write(**lost):
            sides = {name: [] for name in "ab"}
            for task, wrong in lost.items():
                for name, samples in sides.items():
                    samples += records(name, verdicts(400, 0 if name == "a" else wrong), 10, task=task)
            return [str(write_run(tmp_path / f"{name}.json", samples)) for name, samples in sides.items()]

        return write

    def test_all_together(self, files, capsys):
        assert compare_command(["--compare", *files(easy=0, hard=2, third=0)]) == 0  # hard alone is undecided
        first, easy, hard, *_ = capsys.readouterr().out.splitlines()
        assert (
            first.startswith("✓ as good: b against a on 3 tasks together: -0.17 points") and "1,200 problems" in first
        )
        assert easy.startswith("✓") and hard.startswith("? undecided")

    def test_every_problem_counts_the_same(self):
        conclusion = self.compare({"one": 0.1}, one=40, other=0, third=8)
        assert conclusion.pooled.difference[0] == pytest.approx(-0.016)
        assert conclusion.pooled.margin == pytest.approx((0.1 + 0.01 + 0.01) / 3)
        alone = np.concatenate([single.pairs[0][1].samples.correct[:, 0] for single in conclusion.singles])
        assert conclusion.pooled.difference == paired_difference(np.ones(3000), alone)

    def test_a_task_that_collapses_is_not_hidden_by_others(self):
        conclusion = self.compare(a=0, b=0, c=0, d=0, e=0, ruined=30)
        assert conclusion.pooled.answer is Answer.AS_GOOD and conclusion.answer is Answer.WORSE
        assert "less accurate on ruined" in conclusion.headline()
        assert conclusion.sentences()[0].startswith("✗ worse on ruined, greedy, whatever the rest says: ✓ as good")

    def test_looking_at_each_task_is_paid_for(self):
        # by itself this task is just worse, and among eight it may be chance
        found = [self.compare(**{name: 20 * (name == "x") for name in names}) for names in ("x", "abcdefgx")]
        assert [one.singles[-1].answer for one in found] == [Answer.WORSE] * 2
        assert [bool(one.alone) for one in found] == [True, False]

    def test_margins_by_task(self, files, capsys):
        names = files(easy=0, hard=30)
        assert compare_command(["--compare", *names]) == 1
        assert compare_command(["--compare", *names, "--margin", "0.01", "hard=0.15"]) == 0
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            compare_command(["--compare", *names, "--margin", "harder=0.1"])
        assert error.value.code == 2
        assert "names the task `harder`, and there are only easy, hard" in capsys.readouterr().err

    def test_a_task_decoded_both_ways_counts_by_sampling(self):
        singles = []
        for decoding, lost in (("sampled", 450), ("greedy", 0)):
            sides = [measured(n, "t", verdicts(900, wrong), decoding=decoding) for n, wrong in (("a", 0), ("b", lost))]
            singles.append(compare_measurements(*sides))
        conclusion = Conclusion(singles)
        assert conclusion.pooled is singles[0] and conclusion.answer is Answer.WORSE


class TestWhatTheAnswerIsWorth:
    def compare(self, tmp_path, before, after):
        files = [str(write_run(tmp_path / f"{n}.json", side)) for n, side in (("a", before), ("b", after))]
        return compare_files(*files)

    def test_a_floor_is_undecided_with_its_reason(self, tmp_path):
        """What the committed page of SmolLM2 said was: yes, as accurate, 0.0% against 0.0%."""
        sides = [records(name, verdicts(1319, 1319), 200) for name in ("a", "b")]
        for side, cut in zip(sides, (841, 1125), strict=True):
            for sample in side[:cut]:
                sample["truncated"] = True
        (comparison,) = self.compare(tmp_path, *sides)
        assert comparison.difference[1] > -0.01  # the interval alone would say as good
        assert comparison.answer is Answer.UNDECIDED and comparison.ratio is None
        sentence = comparison.sentence()
        assert "a itself solves 0.0% (0.0 to 0.3%), with 64% of its completions cut at the limit" in sentence
        assert "no problem that both solve" in sentence and "times the tokens" not in sentence
        assert "undecided, a itself solves 0.0%" in comparison.headline() and "tokens" not in comparison.headline()
        what = dict(warnings_of([comparison]))
        assert any("cut at the limit" in kind and len(places) == 2 for kind, places in what.items())

    @pytest.mark.parametrize(("solved", "answer"), [(26, Answer.UNDECIDED), (70, Answer.AS_GOOD)])
    def test_what_can_be_lost_is_more_than_the_margin(self, solved, answer):
        sides = [measured(name, "t", verdicts(1319, 1319 - solved)) for name in ("a", "b")]
        assert compare_measurements(*sides).answer is answer

    def test_a_floor_hides_no_loss(self):
        sides = [measured(name, "t", verdicts(1319, 1319 - solved)) for name, solved in (("a", 40), ("b", 0))]
        assert compare_measurements(*sides).answer is Answer.WORSE

    def test_giving_up_early_is_not_shorter(self):
        lengths = np.where(np.arange(1000) < 500, 1000, 100)[:, None]
        gives_up = np.where(np.arange(1000) < 500, 5, 100)[:, None]
        sides = measured("a", "t", verdicts(1000, 0), lengths), measured("b", "t", verdicts(1000, 500), gives_up)
        comparison = compare_measurements(*sides)
        assert comparison.ratio[0] == 1 and comparison.solved == 500

    def test_several_samples_are_compared_by_the_right_ones(self):
        correct = np.tile([[True, False]], (300, 1))
        sides = measured("a", "t", correct, [[100, 900]]), measured("b", "t", ~correct, [[800, 50]])
        assert compare_measurements(*sides).ratio[0] == 0.5

    def test_warnings(self, tmp_path, capsys):
        before, after = (records(name, verdicts(1000, 10), 10) for name in ("a", "b"))
        for sample in after[:60]:
            sample["truncated"], sample["correct"] = True, False
        for sample in before[:30]:
            sample["correct_flexible"] = True
        (comparison,) = self.compare(tmp_path, before, after)
        found = {kind.partition(",")[0]: places for kind, places in warnings_of([comparison])}
        assert found["Completions cut at the limit"] == ["b on sums, greedy 6.0%"]
        assert found["Nearly all solved"] == ["a on sums, greedy 99.0%"]
        (apart,) = (places for kind, places in found.items() if "scorer" in kind)
        assert apart == ["b on sums, greedy 5.0%"]  # one point apart is not more than the margin
        assert compare_command(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
        assert capsys.readouterr().out.count("\n! ") == 3

    def test_headline(self, tmp_path):
        rng = np.random.default_rng(6)
        serving = [
            {"concurrency": c, "total_p50_s": 0.1, "tokens_per_s": 50.0, "requests_per_s": 2.0 * c} for c in (1, 8)
        ]
        faster = [{**level, "requests_per_s": 1.9 * level["requests_per_s"]} for level in serving]
        old, new = rng.random((900, 1)) < 0.8, rng.random((900, 1)) < 0.9
        files = [
            str(write_run(tmp_path / f"{name}.json", records(name, correct, tokens), serving=levels))
            for name, correct, tokens, levels in (("rlvr", old, 100, serving), ("opsd", new, 53, faster))
        ]
        (comparison,) = compare_files(*files)
        points, low, high = (f"{100 * value:+.1f}" for value in comparison.difference)
        expected = f"opsd against rlvr: as accurate ({points}, {low} to {high}) · 47% fewer tokens · same size · ×1.9 answers per second"
        assert comparison.headline() == expected


class TestPairing:
    def test_pairs_by_id_and_not_by_place(self, tmp_path):
        rng = np.random.default_rng(1)
        samples = records("a", rng.random((300, 1)) < 0.5, 10)
        other = [{**sample, "stage": "b", "checkpoint": "runs/b"} for sample in samples]
        rng.shuffle(other)
        files = [write_run(tmp_path / f"{i}.json", rows) for i, rows in enumerate((samples, other))]
        (comparison,) = compare_files(*map(str, files))
        assert comparison.p_value == 1.0 and comparison.difference[2] < 0.02  # unpaired it would be 0.08

    def test_several_samples(self, tmp_path):
        rng = np.random.default_rng(2)
        shares = rng.random((400, 1))
        files = [
            write_run(tmp_path / f"{name}.json", records(name, rng.random((400, 8)) < shares - loss, 10))
            for name, loss in (("a", 0.0), ("b", 0.1))
        ]
        (comparison,) = compare_files(*map(str, files))
        assert comparison.p_value is None and comparison.difference[0] < -0.05 and comparison.answer is Answer.WORSE

    def test_a_problem_without_a_verdict_is_left_out(self, tmp_path):
        before = write_run(tmp_path / "a.json", records("a", column(True, None, True, True), 10))
        after = write_run(tmp_path / "b.json", records("b", column(True, True, None, False), 10))
        (comparison,) = compare_files(str(before), str(after))
        assert comparison.n == 2 and comparison.difference[0] == -0.5

    def test_one_of_several_checkpoints(self, tmp_path, capsys):
        samples = records("rlvr", verdicts(500, 0), 10) + records("opsd", verdicts(500, 0), 5)
        path = write_run(tmp_path / "chain.json", samples)
        stem = str(path.with_suffix(""))
        assert compare_command(["--compare", f"{stem}:rlvr", f"{path}:opsd"]) == 0
        assert "0.500 times the tokens" in capsys.readouterr().out
        with pytest.raises(UserError, match="holds rlvr, opsd: say which one"):
            compare_files(str(path), str(path))
        with pytest.raises(UserError, match="and no `sft`"):
            compare_files(f"{path}:sft", f"{path}:opsd")


class TestRefusal:
    def refuse(self, tmp_path, message, before=None, after=None, **values):
        first = write_run(tmp_path / "a.json", before or records("a", verdicts(9, 1), 10))
        second = write_run(tmp_path / "b.json", after or records("b", verdicts(9, 1), 10), **values)
        with pytest.raises(UserError, match=message) as error:
            compare_files(str(first), str(second))
        assert "\n" not in str(error.value)

    def test_other_problems(self, tmp_path):
        self.refuse(
            tmp_path, "their problems differ, 1 of them, the first is 'p9'", after=records("b", verdicts(10, 1), 1)
        )

    def test_the_same_ids_of_other_problems(self, tmp_path):
        after = records("b", verdicts(9, 1), 10)
        after[3]["question"] = "What else?"
        self.refuse(tmp_path, "their problems differ, 1 of them, the first is 'p3'", after=after)

    def test_other_tasks(self, tmp_path):
        self.refuse(tmp_path, "Only one of .* has", after=records("b", verdicts(9, 1), 10, task="more sums"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"task_version": 2}, "task version differs"),
            ({"temperature": 0.6}, "decoding differs"),
            ({"max_completion_length": 128}, "decoding differs"),
            ({"reward_funcs": ["code_reward"]}, "scoring differs"),
        ],
    )
    def test_other_settings(self, tmp_path, change, message):
        self.refuse(tmp_path, message, **change)
        self.refuse(tmp_path, message, **change, config={**CONFIG, **change})

    def test_another_context_is_a_baseline(self, tmp_path):
        before = write_run(tmp_path / "a.json", records("a", verdicts(900, 1), 10), top_k=5)
        after = write_run(tmp_path / "b.json", records("b", verdicts(900, 1), 10, prompt="concise"))
        assert compare_files(str(before), str(after))[0].answer is Answer.AS_GOOD  # nor does top_k matter to greedy

    def test_no_completions(self, tmp_path):
        write_run(tmp_path / "a.json", records("a", verdicts(9, 1), 10))
        write_run(tmp_path / "b.json", records("b", verdicts(9, 1), 10), save=False)
        with pytest.raises(UserError, match="no completions beside .*b.json.*save_completions"):
            compare_files(str(tmp_path / "a"), str(tmp_path / "b"))

    @pytest.mark.parametrize("margin", ["-0.1", "1", "nan"])
    def test_margin(self, pair, margin, capsys):
        with pytest.raises(SystemExit) as error:
            compare_command(["--compare", *pair(1, 1, problems=9), "--margin", margin])
        assert error.value.code == 2 and "`margin` is a share of the problems" in capsys.readouterr().err


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: "", "not valid JSON"),
            (lambda text: text[:-20], "not valid JSON .* may have been cut"),
            (lambda text: "[]", "has no `rows`"),
            (lambda text: "[" * 100_000, "nested too deep"),
            (lambda text: text.replace('"n": 9', '"n": true'), "`n` has a value of the wrong type"),
            (lambda text: text.replace('"mean_tokens": 10.0', '"mean_tokens": NaN'), "NaN is not a number"),
            (lambda text: text.replace('"mean_tokens": 10.0', '"mean_tokens": ' + "1" * 9999), "not valid JSON"),
            (lambda text: text.replace('"decoding"', '"decode"'), "`decoding` is missing"),
            (lambda text: text.replace('"maj@2": 1.0', '"maj@2": "1"'), "`maj@2` has a value of the wrong type"),
            (lambda text: text.replace('"p99_tokens": 10.0', '"p99_tokens": []'), "`p99_tokens` has a value"),
            (
                lambda text: text.replace('"seed": 0', '"serving": [{}], "seed": 0'),
                "`serving`: `concurrency` is missing",
            ),
            (lambda text: text.replace('"run"', '"ran"'), "does not say what was run"),
            (lambda text: text.replace('"mean_tokens": 10.0', '"mean_tokens": 11.0'), "is not of the run in"),
        ],
    )
    def test_results(self, tmp_path, damage, message):
        path = write_run(tmp_path / "a.json", records("a", np.ones((9, 2)), 10))
        path.write_text(damage(path.read_text()))
        with pytest.raises(UserError, match=message) as error:
            load_results(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda lines: [*lines[:3], lines[3][:40]], "line 4: not valid JSON"),
            (lambda lines: [*lines, lines[0]], "Sample 0 of problem 'p0' is there twice"),
            (lambda lines: lines[:-1], "is not of the run in"),
            (
                lambda lines: [lines[0].replace("10", '"10"'), *lines[1:]],
                "line 1: `tokens` has a value of the wrong type",
            ),
            (
                lambda lines: [lines[0].replace('"tokens": 10', '"tokens": 0'), *lines[1:]],
                "line 1: `tokens` cannot be 0",
            ),
            (lambda lines: [lines[0].replace('"id": "p0"', '"id": null'), *lines[1:]], "line 1: `id` must be"),
            (lambda lines: [*lines, lines[0].replace('"a"', '"b"')], "that no row of .* is about"),
            (lambda lines: ["[1]", *lines[1:]], "line 1: not a mapping"),
            (lambda lines: ["\0" * 100, *lines[1:]], "line 1: not valid JSON"),
            (lambda lines: [lines[0].replace('"question"', '"q"'), *lines[1:]], "line 1: `question` is missing"),
        ],
    )
    def test_completions(self, tmp_path, damage, message):
        path = write_run(tmp_path / "a.json", records("a", verdicts(9, 1), 10))
        completions = path.with_suffix(".completions.jsonl")
        completions.write_text("\n".join(damage(completions.read_text().splitlines())) + "\n")
        with pytest.raises(UserError, match=message) as error:
            load_results(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600

    def test_any_damage_ends_in_a_sentence_or_changes_nothing(self, tmp_path):
        """No value of a wrong type, however placed, ends in a traceback or in another number."""
        rng = np.random.default_rng(0)
        pristine = write_run(tmp_path / "a.json", records("a", np.arange(12).reshape(6, 2) % 3 > 0, 10), serving=[])
        other = write_run(tmp_path / "b.json", records("b", np.ones((6, 2)), 5))
        sentence = compare_files(str(pristine), str(other))[0].sentence()
        results, completions = pristine, pristine.with_suffix(".completions.jsonl")
        texts = {path: path.read_text() for path in (results, completions)}
        values = [None, "x", "", -1, 1.5, True, [], {}, [[]], 10**400, "\ud800", 1e308]
        refused = 0
        for number in range(300):
            path = (results, completions)[number % 2]
            if path is results:
                damaged = json.loads(texts[path])
                target = damaged["rows"][0] if rng.random() < 0.8 else damaged
                target[rng.choice(list(target))] = values[rng.integers(len(values))]
                path.write_text(json.dumps(damaged))
            else:
                lines = texts[path].splitlines()
                line = rng.integers(len(lines))
                record = json.loads(lines[line])
                record[rng.choice(list(record))] = values[rng.integers(len(values))]
                lines[line] = (
                    json.dumps(record) if rng.random() < 0.8 else lines[line][: rng.integers(len(lines[line]))]
                )
                path.write_text("\n".join(lines))
            try:
                found = compare_files(str(pristine), str(other))[0].sentence()
                report_results([pristine, other], tmp_path / "report")
                # A label, or a number that the comparison does not use, may have changed
                assert re.findall(r"[-+]\d+\.\d+ points .* tokens", found) == re.findall(
                    r"[-+]\d+\.\d+ points .* tokens", sentence
                )
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
            path.write_text(texts[path])
        assert 150 < refused < 300

    def test_exit_status_of_a_mistake(self, capsys):
        with pytest.raises(SystemExit) as error:
            compare_command(["--compare", "nothing.json", "neither"])
        assert error.value.code == 2
        sentence = "error: There is no results file at `nothing.json`: give the `output` of an evaluation.\n"
        assert capsys.readouterr() == ("", sentence)

    def test_huge_and_odd_texts_are_texts(self, tmp_path):
        samples = records("a", verdicts(9, 1), 10)
        samples[1]["completion"] = "x" * 10_000_000
        samples[0]["completion"] = "\ud800 \u0000"
        (measurement,) = load_results(write_run(tmp_path / "a.json", samples))
        assert json.dumps(measurement.samples.records[0][0].completion) == '"\\ud800 \\u0000"'
