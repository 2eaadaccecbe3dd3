import json
import re

import numpy as np
import pytest
from evaluated import CONFIG, records, write_run

from trl_opsd.cli import UserError
from trl_opsd.evaluate.commands import compare_command
from trl_opsd.evaluate.compare import compare_files
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
            (50, 0.01, 0, "yes: opsd is as accurate as rlvr"),
            (20, 0.01, 0, "yes: opsd is as accurate as rlvr"),  # better
            (54, 0.01, 0, "yes"),  # 4 lost, none gained
            (58, 0.01, 1, "no: opsd is less accurate than rlvr"),
            (54, 0.02, 0, "yes"),
            (150, 0.05, 1, "no: opsd is less accurate than rlvr"),
            (150, 0.15, 0, "yes"),
        ],
    )
    def test_planted_differences(self, pair, capsys, wrong, margin, status, answer):
        before, after = pair(50, wrong)
        assert compare_command(["--compare", before, after, "--margin", str(margin)]) == status
        sentence = capsys.readouterr().out
        assert sentence.startswith(answer) and sentence.count("\n") == 1
        assert f"{(50 - wrong) / 10:+.2f} points" in sentence and "1,000 problems" in sentence

    def test_too_few_problems_are_no_yes(self, pair, capsys):
        assert compare_command(["--compare", *pair(1, 1, problems=12)]) == 1
        assert capsys.readouterr().out.startswith("no: opsd is not shown to be as accurate as rlvr")

    def test_the_numbers(self, pair):
        (comparison,) = compare_files(*pair(50, 54, parameters=500))
        assert comparison.difference[0] == pytest.approx(-0.004)
        assert comparison.p_value == 2 / 2**4  # four lost, none gained
        assert 0.48 < comparison.ratio[1] < comparison.ratio[0] < comparison.ratio[2] < 0.5
        assert "0.50 times the parameters" in comparison.sentence() and "McNemar p = 0.12" in comparison.sentence()

    def test_every_task_must_be_a_yes(self, tmp_path, capsys):
        tokens = 10
        easy = [records(stage, verdicts(900, 0), tokens, task="easy") for stage in ("a", "b")]
        hard = [records(stage, verdicts(900, wrong), tokens, task="hard") for stage, wrong in (("a", 0), ("b", 90))]
        files = [str(write_run(tmp_path / f"{i}.json", easy[i] + hard[i])) for i in range(2)]
        assert compare_command(["--compare", *files]) == 1
        assert [line[:3] for line in capsys.readouterr().out.splitlines()] == ["yes", "no:"]

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
        assert comparison.p_value is None and comparison.difference[0] < -0.05 and not comparison.as_accurate

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
        assert compare_files(str(before), str(after))[0].as_accurate  # nor does top_k matter to greedy

    def test_no_completions(self, tmp_path):
        write_run(tmp_path / "a.json", records("a", verdicts(9, 1), 10))
        write_run(tmp_path / "b.json", records("b", verdicts(9, 1), 10), save=False)
        with pytest.raises(UserError, match="no completions beside .*b.json.*save_completions"):
            compare_files(str(tmp_path / "a"), str(tmp_path / "b"))

    @pytest.mark.parametrize("margin", ["-0.1", "1", "nan"])
    def test_margin(self, pair, margin, capsys):
        with pytest.raises(SystemExit) as error:
            compare_command(["--compare", *pair(1, 1, problems=9), "--margin", margin])
        assert error.value.code == 2 and "`margin` is a share" in capsys.readouterr().err


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
