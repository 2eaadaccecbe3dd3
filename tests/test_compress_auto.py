"""The chain that chooses for itself: what it decides, on which numbers, and that nothing is lost where it should stop."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from kernels import KEEPS_SCORES
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_opsd.cli import UserError
from trl_opsd.compress.__main__ import main
from trl_opsd.compress.auto.compaction import Promise, choose, train
from trl_opsd.compress.auto.division import load
from trl_opsd.compress.auto.export import export
from trl_opsd.compress.auto.plan import Plan, learning_rate, recovery_rates
from trl_opsd.compress.auto.run import compress, tell_time
from trl_opsd.compress.auto.runner import Runner
from trl_opsd.compress.auto.size import shrink
from trl_opsd.compress.auto.verdict import conclude, upload
from trl_opsd.compress.auto_config import AutoConfig
from trl_opsd.compress.chain import Stage, StageError
from trl_opsd.compress.config import CompressConfig
from trl_opsd.data import load_prompts
from trl_opsd.evaluate.compare import Answer, Conclusion, compare_measurements
from trl_opsd.evaluate.estimate import Samples
from trl_opsd.evaluate.results_file import Measurement
from trl_opsd.evaluate.schema import ResultRow


NUM = 300


def measurement(correct: np.ndarray, tokens: np.ndarray, stage: str = "base", file: str = "x.json") -> Measurement:
    """As the evaluation of `NUM` problems with one sample each is read back."""
    accuracy, length = float(correct.mean()), float(tokens.mean())
    row = ResultRow(
        stage=stage,
        checkpoint=stage,
        task="guard",
        decoding="sampled",
        prompt="plain",
        n=len(correct),
        samples=1,
        accuracy=accuracy,
        accuracy_low=accuracy,
        accuracy_high=accuracy,
        mean_tokens=length,
        p90_tokens=length,
        truncated=0.0,
        parameters=1000,
        wall_s=1.0,
    )
    shape = (len(correct), 1)
    samples = Samples(
        list(range(len(correct))),
        [[] for _ in correct],
        correct.reshape(shape).astype(bool),
        correct.reshape(shape).astype(float),
        tokens.reshape(shape),
        np.zeros(shape),
        np.zeros(shape, dtype=bool),
        0,
    )
    questions = {number: str(number) for number in range(len(correct))}
    return Measurement(row, {"config": {}}, {}, Path(file), samples, questions)


def share(value: float, num: int = NUM) -> np.ndarray:
    """Which of the problems are right: as many as that share, spread evenly."""
    return np.floor(np.arange(1, num + 1) * value) - np.floor(np.arange(num) * value)


PLAIN_TOKENS = np.linspace(50, 150, NUM)


class TestPromise:
    def test_of_a_context_that_is_as_right(self):
        found = Promise.of("x", measurement(share(0.9), PLAIN_TOKENS), measurement(share(0.9), PLAIN_TOKENS / 4), 0.01)
        assert found.as_right == found.usable == [True] * 3
        assert not found.needs_gate
        assert found.saving == pytest.approx(0.75)

    def test_only_where_it_is_right_is_anything_saved(self):
        right = share(0.95)
        in_context = np.where(PLAIN_TOKENS > np.quantile(PLAIN_TOKENS, 2 / 3), share(0.2), right)
        found = Promise.of("x", measurement(right, PLAIN_TOKENS), measurement(in_context, PLAIN_TOKENS * 1e-9), 0.01)
        assert found.as_right == found.usable == [True, True, False]
        assert found.needs_gate
        kept = PLAIN_TOKENS[200:].sum() / PLAIN_TOKENS.sum()
        assert found.saving == pytest.approx(1 - kept)

    def test_where_it_is_nearly_right_a_gate_makes_it_usable(self):
        right = share(0.99)
        in_context = np.where(np.arange(NUM) < 100, share(0.85), share(0.2))
        found = Promise.of("x", measurement(right, PLAIN_TOKENS), measurement(in_context, PLAIN_TOKENS / 2), 0.01)
        assert found.as_right == [False] * 3
        assert found.usable == [True, False, False]
        assert found.saving == pytest.approx(PLAIN_TOKENS[:100].sum() / 2 / PLAIN_TOKENS.sum())

    def test_problems_are_paired_by_their_id_whatever_the_order(self):
        right = share(0.5)
        after = measurement(right, PLAIN_TOKENS / 2)
        order = np.random.default_rng(0).permutation(NUM)
        after.samples.ids = [after.samples.ids[i] for i in order]
        after.samples.correct, after.samples.tokens = after.samples.correct[order], after.samples.tokens[order]
        found = Promise.of("x", measurement(right, PLAIN_TOKENS), after, 0.01)
        assert found.comparison.difference[0] == 0
        assert found.saving == pytest.approx(0.5)


def test_the_rate_goes_through_the_two_points_that_are_known():
    assert learning_rate(1_700_000_000, False) == pytest.approx(1e-6)
    assert learning_rate(166_000, False) == pytest.approx(3e-4, rel=0.05)
    assert learning_rate(8_000_000_000, True) == 1e-4


def test_the_rates_of_recovery_go_through_what_is_known():
    assert recovery_rates(1_700_000_000) == (1e-4, 1e-5)
    assert recovery_rates(83_000)[0] == pytest.approx(3e-3, rel=0.1)
    assert recovery_rates(260_000)[1] == pytest.approx(1e-3, rel=0.1)


@pytest.fixture
def problems(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, first, count in (("train", 0, 400), ("test", 1000, 100)):
        rows = [{"prompt": f"{number}=", "answer": str(number)} for number in range(first, first + count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


class Told(Runner):
    """Told what every evaluation finds, and whether training ends by itself."""

    def tell(self, found: dict, alarm_at: int | str | None = None):
        self.found, self.alarm_at, self.trained, self.stages, self.status = found, alarm_at, [], [], 3
        (self.root).mkdir(exist_ok=True)
        return self

    def measure(self, name, model, part, context=None):
        correct, tokens = self.found[name]
        return measurement(share(correct), PLAIN_TOKENS * tokens, name, f"{name}.json")

    def run(self, stage, *before):
        if stage.name in (self.alarm_at, f"round-{self.alarm_at}"):
            raise StageError(f"The stage `{stage.name}` failed: the share of correct rollouts fell.", self.status)
        self.trained.append((stage.arguments, stage.recipe))
        self.stages.append((stage, before))

    def decisions(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def told(tmp_path, problems, checkpoint):
    def make(found, alarm_at=None, **arguments) -> Told:
        given = {"model_name_or_path": checkpoint(), "dataset_name": problems, "output_dir": str(tmp_path / "out")}
        given |= {
            name: arguments.pop(name)
            for name in ("model_name_or_path", "dataset_name", "launcher")
            if name in arguments
        }
        config = CompressConfig(**given)
        options = {"contexts": ["{prompt} concise", "{prompt} brief"], "max_completion_length": 64} | arguments
        return Told(Plan(config, AutoConfig(**options))).tell(found, alarm_at)

    return make


CONTEXTS = {"context-1": (0.98, 0.5), "context-2": (0.12, 0.04)}


def take(runner):
    base = runner.measure("base", "", "guard")
    promise = choose(runner, base)
    return promise, None if promise is None else train(runner, promise, base)


class TestDecisions:
    def test_the_context_that_keeps_the_chain_is_taken_and_not_the_shortest(self, told):
        promise, _ = take(told({"base": (0.98, 1.0), **CONTEXTS, "round-1": (0.98, 0.5), "round-2": (0.98, 0.5)}))
        assert promise.context == "{prompt} concise"

    def test_a_context_that_tempts_to_skip_the_chain_is_refused(self, told):
        runner = told({"base": (0.98, 1.0), "context-1": (0.12, 0.04)}, contexts=["{prompt} brief"])
        assert take(runner) == (None, None)
        assert runner.trained == []
        assert runner.decisions()[-1]["decision"] == "no training"

    def test_a_context_that_saves_too_little_is_refused(self, told):
        runner = told({"base": (0.9, 1.0), "context-1": (0.9, 0.95)}, contexts=["{prompt} brief"])
        assert take(runner) == (None, None)

    def test_it_stops_when_there_is_no_more_to_be_had_and_takes_the_shortest(self, told):
        rounds = {"round-1": (0.98, 0.7), "round-2": (0.98, 0.5), "round-3": (0.98, 0.495)}
        runner = told({"base": (0.98, 1.0), **CONTEXTS, **rounds})
        assert Path(take(runner)[1]).name == "round-3"
        assert len(runner.trained) == 3

    def test_it_goes_on_while_accuracy_is_being_won_back(self, told):
        rounds = {"round-1": (0.95, 0.5), "round-2": (0.96, 0.5), "round-3": (0.98, 0.51)}
        runner = told({"base": (0.98, 1.0), **CONTEXTS, **rounds})
        assert Path(take(runner)[1]).name == "round-3"

    def test_a_round_that_is_worse_is_the_last_and_not_taken(self, told):
        rounds = {"round-1": (0.98, 0.7), "round-2": (0.6, 0.3)}
        runner = told({"base": (0.98, 1.0), **CONTEXTS, **rounds})
        assert Path(take(runner)[1]).name == "round-1"
        assert [entry["decision"] for entry in runner.decisions()][-2:] == ["stop", "round"]

    def test_an_alarm_ends_training_with_what_was_there(self, told):
        runner = told({"base": (0.98, 1.0), **CONTEXTS, "round-1": (0.98, 0.7)}, alarm_at=2)
        assert Path(take(runner)[1]).name == "round-1"

    def test_a_crash_is_no_verdict(self, told):
        runner = told({"base": (0.98, 1.0), **CONTEXTS, "round-1": (0.98, 0.7)}, alarm_at=1)
        runner.status = 1
        with pytest.raises(UserError, match="round-1"):
            take(runner)

    def test_a_model_that_is_never_right_has_nothing_to_train_on(self, told):
        runner = told({"base": (0.0, 1.0), "context-1": (0.0, 0.1), "context-2": (0.0, 0.1)})
        assert take(runner) == (None, None)
        assert "math_reward" in runner.decisions()[-1]["sentence"]

    def test_what_an_earlier_run_has_left_is_not_taken_for_this_ones(self, told):
        runner = told({"base": (0.0, 1.0)})
        for name in ("compressed/config.json", "report.html", "results.json"):
            (runner.root / name).parent.mkdir(exist_ok=True)
            (runner.root / name).touch()
        assert compress(runner) == 3
        assert not any((runner.root / name).exists() for name in ("compressed", "report.html", "results.json"))
        assert (runner.root / "compressed-old-1" / "config.json").is_file()

    def test_where_the_first_round_is_worse_nothing_is_left(self, told):
        runner = told({"base": (0.98, 1.0), **CONTEXTS, "round-1": (0.5, 0.3)})
        assert take(runner)[1] is None

    def test_a_round_goes_on_from_the_checkpoint_of_the_one_before(self, told):
        rounds = {"round-1": (0.98, 0.7), "round-2": (0.98, 0.5), "round-3": (0.98, 0.5)}
        runner = told({"base": (0.98, 1.0), **CONTEXTS, **rounds}, round_steps=5)
        take(runner)
        first, second, third = (arguments for arguments, _ in runner.trained)
        assert "resume_from_checkpoint" not in first
        assert second["resume_from_checkpoint"].endswith("round-1/checkpoint-5")
        assert third["resume_from_checkpoint"].endswith("round-2/checkpoint-10")
        assert third["max_steps"] == 15
        # And is made again where that is
        assert [[stage.name for stage in before] for _, before in runner.stages] == [
            [],
            ["round-1"],
            ["round-1", "round-2"],
        ]

    def test_a_context_that_fails_somewhere_gets_a_gate_of_the_teachers(self, told):
        runner = told({"base": (0.98, 1.0), **CONTEXTS, "context-1": (0.9, 0.5), "round-1": (0.98, 0.5)}, max_rounds=1)
        promise, _ = take(runner)
        assert promise.needs_gate
        (_, recipe), *_ = runner.trained
        assert yaml.safe_load(Path(recipe).read_text())["teacher_gate"] == 0.5
        runner = told({"base": (0.98, 1.0), **CONTEXTS, "round-1": (0.98, 0.5)}, max_rounds=1)
        take(runner)
        (_, recipe), *_ = runner.trained
        assert "teacher_gate" not in yaml.safe_load(Path(recipe).read_text())

    def test_every_decision_has_its_numbers(self, told):
        runner = told({"base": (0.98, 1.0), **CONTEXTS, "round-1": (0.98, 0.7), "round-2": (0.98, 0.7)})
        take(runner)
        for entry in runner.decisions():
            assert entry["because"], entry["decision"]
            assert entry["sentence"]


SMALLER = {"base": (0.98, 1.0), "small-25": (0.98, 0.5), "small-50": (0.98, 0.5), "small-75": (0.9, 0.5)}


class TestSize:
    def test_it_goes_on_until_a_student_is_no_longer_as_good(self, told):
        runner = told(SMALLER, ratio="auto")
        base = runner.measure("base", "", "guard")
        assert [Path(folder).name for folder in shrink(runner, "runs/teacher", base)] == ["small-50", "small-25"]
        names = [stage.name for stage, _ in runner.stages]
        assert names[:4] == ["bank", "pruned-25", "recovered-25", "small-25"]
        assert names[-1] == "small-75"  # and 90% is not tried
        looks = [entry for entry in runner.decisions() if entry["decision"] == "look"]
        assert [entry["because"]["ratio"] for entry in looks] == [0.25, 0.5, 0.75]
        assert runner.decisions()[-1]["because"]["difference"][0] == pytest.approx(-0.08)

    def test_a_number_is_the_only_one_tried(self, told):
        runner = told({**SMALLER, "small-40": (0.98, 0.5)}, ratio="0.4")
        found = shrink(runner, "runs/teacher", runner.measure("base", "", "guard"))
        assert [Path(folder).name for folder in found] == ["small-40"]
        assert len(runner.stages) == 4

    def test_each_ratio_is_pruned_from_the_teacher_and_taught_by_it(self, told):
        runner = told(SMALLER, ratio="auto", max_rounds=2, round_steps=3)
        shrink(runner, "runs/teacher", runner.measure("base", "", "guard"))
        stages = {stage.name: stage for stage, _ in runner.stages}
        pruned, recovered, small = (stages[f"{name}-50"] for name in ("pruned", "recovered", "small"))
        assert pruned.arguments["model_name_or_path"] == "runs/teacher"
        assert pruned.arguments["target_ratio"] == 0.5
        assert recovered.arguments["model_name_or_path"] == str(pruned.output)
        assert small.arguments["model_name_or_path"] == str(recovered.output)
        recipes = [yaml.safe_load(Path(stage.recipe).read_text()) for stage in (recovered, small)]
        for stage, recipe in zip((recovered, small), recipes, strict=True):
            assert stage.arguments["teacher_model_name_or_path"] == "runs/teacher"
            assert recipe["teacher_weights"] == "external" and recipe["max_steps"] == 6
        by_logits, own = recipes
        assert (by_logits["lmbda"], by_logits["gate"], by_logits["beta"]) == (0.0, "all", 0.0)
        assert by_logits["dataset_name"] == str(runner.root / "bank") and "reward_funcs" not in by_logits
        assert "lmbda" not in own and (own["gate"], own["beta"]) == ("correct", 1.0)
        half = round(runner.plan.fit.parameters / 2)
        assert (by_logits["learning_rate"], own["learning_rate"]) == recovery_rates(half)

    def test_after_an_alarm_what_was_recovered_is_looked_at(self, told):
        runner = told({**SMALLER, "recovered-25": (0.98, 0.5)}, alarm_at="small-25", ratio="0.25")
        found = shrink(runner, "runs/teacher", runner.measure("base", "", "guard"))
        assert [Path(folder).name for folder in found] == ["recovered-25"]

    def test_a_ratio_that_cannot_be_pruned_ends_it_and_a_crash_is_no_verdict(self, told):
        runner = told(SMALLER, alarm_at="pruned-50", ratio="auto")
        runner.status = 2
        found = shrink(runner, "runs/teacher", runner.measure("base", "", "guard"))
        assert [Path(folder).name for folder in found] == ["small-25"]
        runner.status = 1
        with pytest.raises(StageError, match="pruned-50"):
            shrink(runner, "runs/teacher", runner.measure("base", "", "guard"))

    def test_all_weights_are_trained_or_none(self, told):
        runner = told({}, ratio="auto")
        runner.plan.fit.has_adapter = True  # an adapter, because more does not fit
        with pytest.raises(UserError, match="`ratio`.*all weights"):
            runner.plan._ratios()

    @pytest.mark.parametrize(
        ("small", "large", "taken"),
        [
            (0.98, 0.98, "small-50"),  # the smallest first
            (0.7, 0.98, "round-1"),  # worse, so the next
            (0.95, 0.98, "round-1"),  # undecided, and the next is as good
            (0.95, 0.7, "small-50"),  # undecided, and the next is worse
            (0.7, 0.7, None),
        ],
    )
    def test_the_smallest_that_is_as_good_is_taken(self, told, tmp_path, monkeypatch, small, large, taken):
        runner = told({"base": (0.98, 1.0), "small-50": (small, 0.5), "round-1": (large, 0.5)}, ratio="0.5")
        runner.plan.arguments.max_accuracy_drop = 0.03
        errors, cards, reported = [], [], []

        def decide(before, after, times, output, margins, say, error):
            errors.append(error)
            pair = [runner.measure(Path(file).stem, "", "final") for file in (before, after)]
            return Conclusion([compare_measurements(*pair, margins[None])])

        monkeypatch.setattr("trl_opsd.compress.auto.verdict.decide", decide)
        monkeypatch.setattr("trl_opsd.compress.auto.verdict.write_card", lambda files, *told: cards.append(told[1:3]))
        monkeypatch.setattr("trl_opsd.compress.auto.verdict.report", lambda runner, found: reported.append(found))
        for name in ("small-50", "round-1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(name)
        (runner.root / "compressed").mkdir()  # of an earlier run
        answer = conclude(runner, [str(tmp_path / "small-50"), str(tmp_path / "round-1")])
        assert set(errors) == {0.025}
        compressed = runner.root / "compressed"
        assert compressed.exists() == (taken is not None) == (answer is not Answer.WORSE)
        if taken is not None:
            assert (compressed / "config.json").read_text() == taken
            assert [item.row.stage for item in reported[-1]] == ["base", taken]
            assert cards == [(taken, "base")]


class TestTime:
    def test_the_longest_run_has_as_many_stages_as_planned(self, told, monkeypatch):
        rounds = {f"round-{number}": (0.98, 1 - number / 10) for number in (1, 2, 3)}
        students = {f"small-{percent}": (0.98, 0.5) for percent in (25, 50, 75, 90)}
        runner = told({"base": (0.98, 1.0), **CONTEXTS, **rounds, **students}, ratio="auto", max_rounds=3)
        measured, measure = [], runner.measure

        def counted(name, model, part, context=None):
            measured.append(f"{name}-{part}")
            return measure(name, model, part, context)

        def undecided(before, after, *rest):
            return Conclusion(
                [compare_measurements(*(measure(Path(file).stem, "", "") for file in (before, after)), 0)]
            )

        monkeypatch.setattr(runner, "measure", counted)
        monkeypatch.setattr("trl_opsd.compress.auto.verdict.decide", undecided)
        monkeypatch.setattr("trl_opsd.compress.auto.verdict.merged", lambda folder, merged: folder)
        for name in ("write_card", "report", "place"):
            monkeypatch.setattr(f"trl_opsd.compress.auto.verdict.{name}", lambda *told: None)
        assert compress(runner) == Answer.UNDECIDED.status
        ran = [*measured, *(stage.name for stage, _ in runner.stages)]
        assert ran[0] == "base-guard" and {"round-3-final", "small-25-final", "base-final", "bank"} <= set(ran)
        assert len(ran) == len(set(ran)) == 1 + runner.plan.stages
        assert told({}, export_formats=["w8a8"]).plan.stages == told({}).plan.stages + 2  # with a bank of its own

    def test_what_a_stage_takes_beside_its_tokens_is_in_the_time(self, told):
        runner = told({}, contexts=["{prompt} concise"], ratio="0.5", samples=2, max_rounds=2)
        base = measurement(share(0.9, 100), PLAIN_TOKENS[:100])
        base.row = dataclasses.replace(base.row, generation_s=5.0)
        for seconds in (5.0, 25.0):
            tell_time(runner, base, seconds)
        alone, whole = (entry["because"] for entry in runner.decisions())
        assert (alone["start_s"], whole["start_s"]) == (0.0, 20.0)
        # A context, two rounds and their looks, the bank, the four of a student, and the verdict on start, student and round
        assert whole["stages"] == 1 + 4 + 1 + 4 + 3
        assert whole["seconds_at_most"] == pytest.approx(alone["seconds_at_most"] + 13 * 20)
        tell_time(runner, base, 0.1)  # they were there already, so that nothing is known of this machine
        assert len(runner.decisions()) == 2


@pytest.mark.parametrize(("answer", "names"), [(Answer.AS_GOOD, ["me/short"]), (Answer.UNDECIDED, [])])
def test_what_is_as_good_is_uploaded(told, monkeypatch, answer, names):
    pushed = []
    monkeypatch.setattr(
        "trl_opsd.compress.auto.verdict.push", lambda folder, name: pushed.append(name) or "http://hub/x"
    )
    runner = told({}, push_to_hub=True, hub_model_id="me/short")
    upload(runner, answer)
    assert pushed == names
    (decision,) = runner.decisions()
    assert decision["decision"] == ("pushed" if names else "not pushed")


EXPORT = """
import json, pathlib, sys
options, rows, status = json.loads(sys.argv[1]), ROWS, STATUS
folder = pathlib.Path(options["output_dir"])
(folder / "w8a8").mkdir(parents=True, exist_ok=True)
with open(folder.parent / "calls.txt", "a") as file:
    file.write("export\\n")
(folder / "export.json").write_text(json.dumps({"rows": rows}))
sys.exit(status)
"""


def exported(name: str, answer: str = "as good") -> dict:
    row = {"artefact": name, "answer": answer, "verdict": f"{answer}: {name}.", "bytes": 1000, "tokens_per_s": 5.0}
    return {**row, "prefix": 0.5, "why": "its engine aborts", "accuracy": {"final": [0.9, 0.8, 1.0]}}


class TestExport:
    @pytest.fixture
    def exporting(self, told, tmp_path, monkeypatch):
        def make(rows, status, formats=("safetensors:float32", "safetensors:bfloat16")) -> Told:
            script = tmp_path / "export.py"
            script.write_text(EXPORT.replace("ROWS", repr(rows)).replace("STATUS", str(status)))
            command = lambda stage, launcher: [sys.executable, str(script), json.dumps(stage.arguments)]  # noqa: E731
            monkeypatch.setattr(Stage, "command", command)
            runner = told({}, export_formats=list(formats))
            runner.run = lambda *stages: Runner.run(runner, *stages)
            (runner.root / "data").mkdir(exist_ok=True)
            (runner.root / "data" / "final.parquet").write_text("problems")
            (runner.root / "compressed").mkdir(exist_ok=True)
            (runner.root / "compressed" / "config.json").write_text("{}")
            return runner

        return make

    def calls(self, runner) -> int:
        return len((runner.root / "calls.txt").read_text().split())

    @pytest.mark.parametrize(
        ("answers", "status", "answer"),
        [
            (("identical", "as good"), 0, Answer.AS_GOOD),
            (("identical", "undecided"), 3, Answer.UNDECIDED),
            (("undecided", "worse"), 1, Answer.WORSE),
            (("identical", "failed"), 1, Answer.WORSE),
        ],
    )
    def test_each_artefact_is_a_decision_and_made_once(self, exporting, answers, status, answer):
        names = ("safetensors-float32", "safetensors-bfloat16")
        rows = [exported(name, said) for name, said in zip(names, answers, strict=True)]
        # Of an earlier call with other formats: not asked for now
        runner = exporting([*rows, exported("gguf-f32", "failed")], status)
        assert export(runner) is answer
        assert export(runner) is answer
        assert self.calls(runner) == 1
        decisions = [entry for entry in runner.decisions() if entry["decision"] == "exported"]
        assert [entry["because"]["artefact"] for entry in decisions] == [*names, *names]
        assert [entry["because"]["answer"] for entry in decisions[:2]] == list(answers)
        assert decisions[0]["because"]["bytes"] == 1000

    def test_a_crash_is_no_verdict(self, exporting):
        runner = exporting([exported("safetensors-float32", "worse")], 1)  # and the other one is not there
        with pytest.raises(StageError):
            export(runner)
        with pytest.raises(StageError):
            export(runner)
        assert self.calls(runner) == 2
        runner = exporting([exported("safetensors-float32"), exported("safetensors-bfloat16")], 2)
        with pytest.raises(StageError):
            export(runner)

    def test_what_was_made_of_another_model_is_moved_aside_and_other_formats_are_added(self, exporting):
        rows = [exported("safetensors-float32"), exported("safetensors-bfloat16")]
        export(exporting(rows, 0))
        runner = exporting([*rows, exported("onnx-fp32")], 0, ("safetensors:float32", "onnx:fp32"))
        export(runner)
        (runner.root / "compressed" / "README.md").write_text("560 MiB")  # as the card of a second run says it
        export(runner)
        assert self.calls(runner) == 2
        assert (runner.root / "export" / "w8a8").exists()
        assert not (runner.root / "export-old-1").exists()
        (runner.root / "compressed" / "config.json").write_text('{"a": 1}')
        export(runner)
        assert (runner.root / "export-old-1" / "w8a8").exists()
        assert self.calls(runner) == 3

    def test_what_is_calibrated_gets_a_bank_of_its_own(self, told, monkeypatch):
        runner = told({}, export_formats=["w8a8"])
        monkeypatch.setattr("trl_opsd.compress.auto.export.move_aside", None)
        (runner.root / "compressed").mkdir()
        with pytest.raises(FileNotFoundError):  # nothing was run
            export(runner)
        bank, last = (stage for stage, _ in runner.stages)
        assert bank.module == "trl_opsd.compress.bank"
        assert bank.arguments["model_name_or_path"] == last.arguments["model_name_or_path"]
        assert last.arguments["bank"] == bank.arguments["bank"]
        assert last.arguments["formats"] == ["w8a8"]

    def test_what_no_engine_could_end_is_refused_beforehand(self, told, monkeypatch):
        monkeypatch.setattr("trl_opsd.export.origin.turn_without_end", lambda ends, tokenizer: "it never ends")
        with pytest.raises(UserError, match="cannot be served as it is: it never ends"):
            told({}, export_formats=["onnx"])
        told({})


def test_an_adapter_is_as_large_as_what_it_is_merged_into(told, checkpoint, tmp_path, monkeypatch):
    base = checkpoint()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    runner = told({})
    found = measurement(share(0.9), PLAIN_TOKENS)
    found.row = dataclasses.replace(found.row, parameters=runner.plan.fit.parameters + 500)
    monkeypatch.setattr("trl_opsd.compress.auto.runner.load_results", lambda file: [found])
    assert Runner.measure(runner, "round-1", str(tmp_path / "adapter"), "guard").row.parameters == (
        runner.plan.fit.parameters
    )


def test_no_problem_is_in_two_parts(told):
    runner = told({})
    parts = [set(map(str, rows["prompt"])) for rows in runner.plan.data.values()]
    assert [len(part) for part in parts] == [300, 100, 100]
    assert len(set.union(*parts)) == 500


def test_without_a_test_split_the_verdict_has_problems_of_its_own(told, problems):
    Path(problems, "test.jsonl").unlink()
    parts = [set(map(str, rows["prompt"])) for rows in told({}).plan.data.values()]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 400


def test_a_single_file_is_divided_too(told, problems):
    file = Path(problems, "train.jsonl")
    runner = told({}, dataset_name=str(file))
    parts = [set(map(str, rows["prompt"])) for rows in runner.plan.data.values()]
    assert [len(part) for part in parts] == [240, 80, 80]
    assert len(set.union(*parts)) == 400


def test_a_problem_that_is_there_twice_counts_once(told, problems):
    file = Path(problems, "train.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # To the letter, in another layout, and one of the test split's
    more = [
        *rows[:150],
        *({**row, "prompt": f" {row['prompt']} "} for row in rows[:50]),
        {"prompt": "1000 =", "answer": "1"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    parts = [[prompt.replace(" ", "") for prompt in rows["prompt"]] for rows in told({}).plan.data.values()]
    assert [len(part) for part in parts] == [300, 100, 100]
    assert len(set().union(*parts)) == 500


def test_a_test_split_that_is_damaged_is_not_done_without(told, problems):
    Path(problems, "test.jsonl").write_text('{"prompt": ')
    with pytest.raises(UserError, match="not valid JSON"):
        told({})


def test_the_verifier_is_that_of_the_source(tmp_path):
    examples = [{"input": f"Sort {number}", "target": str(number)} for number in range(300)]
    (tmp_path / "word_sorting.json").write_text(json.dumps({"examples": examples}))
    for name, verifier in [
        (f"bbh:{tmp_path / 'word_sorting.json'}", "logic_reward"),
        ("reasoning-gym:chain_sum", "reasoning_gym_reward"),
    ]:
        assert load(name, AutoConfig())[1] == [verifier]


def test_columns_of_any_type_are_handed_on(told, problems):
    frame = pandas.DataFrame(
        {"prompt": [f"{n}=" for n in range(300)], "answer": "1", "score": [float("nan"), 1.0] * 150}
    )
    frame["day"] = pandas.Timestamp("2026-11-26")
    Path(problems, "train.jsonl").unlink()
    frame.to_parquet(Path(problems, "train.parquet"))
    runner = told({"base": (0.0, 1.0)})
    assert compress(runner) == 3
    found = load_prompts(str(runner.root / "data" / "train.parquet"))
    assert set(found.column_names) == set(frame.columns)
    assert found["prompt"][:] == runner.plan.data["train"]["prompt"][:]


LAUNCH = f"{sys.executable} -m accelerate.commands.launch"


@pytest.mark.parametrize(
    ("launcher", "processes", "sharding"),
    [
        (f"{LAUNCH} --config_file recipes/accelerate_configs/fsdp2.yaml", 8, "fsdp2"),
        (f"{LAUNCH} --config_file=recipes/accelerate_configs/zero3.yaml --num_processes=2", 2, "zero3"),
        (f"{sys.executable} -m torch.distributed.run --nproc_per_node=4", 4, "ddp"),
        (f"env A=1 {sys.executable}", 1, "ddp"),
    ],
)
def test_what_the_launcher_shares_out_is_planned_for(told, monkeypatch, launcher, processes, sharding):
    monkeypatch.chdir(Path(__file__).parents[1])
    runner = told({}, launcher=launcher)
    assert (runner.plan.launch.processes, runner.plan.launch.sharding) == (processes, sharding)
    assert runner.plan.recipe["per_device_train_batch_size"] == 64 // processes
    assert (runner.plan.fit.memory["weights"] < told({}).plan.fit.memory["weights"]) is (sharding != "ddp")


@pytest.mark.parametrize("launcher", ["nowhere_to_be_found", LAUNCH, f"{LAUNCH} --num_processes two"])
def test_a_launcher_that_cannot_be_planned_for_is_refused(told, launcher):
    with pytest.raises(UserError, match="`launcher`"):
        told({}, launcher=launcher)


def give_positions(model: str, positions: int) -> str:
    config = Path(model, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": positions}))
    return model


@pytest.mark.skipif(KEEPS_SCORES, reason="what training keeps is then more than the cache of every rollout")
def test_rollouts_and_evaluation_are_in_the_memory_there_is(told, checkpoint):
    assert told({}).plan.fit.batch_size == 256
    long = {"model_name_or_path": give_positions(checkpoint(1), 32_000), "max_completion_length": 16_000}
    memory = sum(told({}, rollouts=2, gpu_memory=1e3, **long).plan.fit.memory.values())
    few = told({}, rollouts=2, gpu_memory=1.2 * memory, **long)
    assert 1 <= few.plan.fit.batch_size < 256 and "use_peft" not in few.plan.recipe
    with pytest.raises(UserError, match="`rollouts`"):
        told({}, rollouts=290, gpu_memory=1.2 * memory, **long)


def test_an_adapter_is_planned_by_its_base(told, checkpoint, tmp_path):
    base = checkpoint()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    assert told({}, model_name_or_path=str(tmp_path / "adapter")).plan.fit.parameters == told({}).plan.fit.parameters


# The tiny reasoner has no others
IN_ITS_WORDS = ("--contexts", "{prompt} concise", "{prompt} brief")


def test_a_dry_run_loads_no_weights(problems, checkpoint, capsys):
    folder = checkpoint()
    (Path(folder) / "model.safetensors").write_bytes(b"")
    main(["--model_name_or_path", folder, "--dataset_name", problems, "--dry_run", "true", *IN_ITS_WORDS])
    out = capsys.readouterr().out
    assert "3. the verdict, on 100 problems" in out
    assert "GiB" in out
    # Base and two contexts, six rounds with their looks, and the verdict on the start and what is left
    assert "time: at most 17 stages" in out


@pytest.mark.parametrize(("positions", "limit"), [(512, 384), (100_000, 2048)])
def test_a_reply_has_most_of_the_positions_where_no_limit_is_given(told, checkpoint, positions, limit):
    model = give_positions(checkpoint(1), positions)
    plan = told({}, model_name_or_path=model, max_completion_length=None).plan
    assert plan.recipe["max_completion_length"] == plan.arguments.max_completion_length == limit
    assert f"in replies of at most {limit:,} tokens" in plan.describe(1.0)


def test_a_dry_run_says_how_it_goes_on(problems, checkpoint, capsys):
    given = ["--model_name_or_path", checkpoint(), "--dataset_name", problems, "--dry_run", "true", *IN_ITS_WORDS]
    main([*given, "--ratio", "auto", "--export_formats", "gguf:q8_0", "onnx"])
    out = capsys.readouterr().out
    assert "3. make it smaller: remove 25%, 50%, 75%, 90% of the parameters" in out
    assert "4. the verdict, on 100 problems that nothing has seen, the smallest first" in out
    assert "5. export it as gguf-q8_0, onnx-fp32, onnx-int4" in out


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("7 ducks", r"row 8: the tokenizer of .* cannot write this `prompt` \("),
        ("7" * 500, r"in 1 of 401 rows `prompt` is longer than the 448 tokens .* \(row 8 has "),
    ],
)
def test_the_row_that_does_not_fit_is_that_of_the_file(told, problems, prompt, sentence):
    file = Path(problems, "train.jsonl")
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows[:7], json.dumps({"prompt": prompt, "answer": "7"}) + "\n", *rows[7:]]))
    with pytest.raises(UserError, match=sentence):
        told({})


def test_a_folder_that_cannot_be_written_is_one_sentence(problems, checkpoint, capsys):
    given = ["--model_name_or_path", checkpoint(), "--dataset_name", problems, *IN_ITS_WORDS]
    with pytest.raises(SystemExit) as end:
        main([*given, "--output_dir", f"{problems}/train.jsonl"])
    assert end.value.code == 2
    assert f"error: `output_dir`: the folder `{problems}/train.jsonl` cannot be written" in capsys.readouterr().err


def test_a_context_that_cannot_be_written_is_not_left_to_a_stage(told):
    """It said that none promises anything, after a measurement, because the stage of each had failed."""
    with pytest.raises(
        UserError, match="row 1: .* this `prompt` in the context 'concise' .* another context or model"
    ):
        told({}, contexts=None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dataset_name", "DATA"], "`model_name_or_path` is missing"),
        (["--model_name_or_path", "MODEL"], "`dataset_name` is missing"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--contexts", "no placeholder"], "`{prompt}`"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--rollouts", "1000"], "`rollouts`"),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--max_accuracy_drop", "2"],
            "`max_accuracy_drop`",
        ),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--max_completion_length", "100000"],
            "`max_completion_length=100000` leaves no room for a prompt",
        ),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--gpu_memory", "0.00001"], "GiB"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--smoke"], "`smoke`"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--ratios", "0.5"], "`ratios`"),
        (["--config", "recipes/tiny/compress.yaml", "--max_rounds", "2"], "`max_rounds`"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--contexts", "solution"], "`solution`"),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--contexts", "{prompt} {solution}"],
            "`solution`",
        ),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--contexts", "sibling"], "'sibling'"),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--contexts", "concis"],
            "The context 'concis' has no `{prompt}`",
        ),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--ratio", "1.5"], "`ratio`"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--ratio", "most"], "`ratio`"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--export_formats", "ggufs"], "`gguf`?"),
        (["--config", "recipes/tiny/compress.yaml", "--ratio", "auto"], "`ratio`"),
        (["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--reward_funcs", "code_reward"], "`tests`"),
        (
            ["--model_name_or_path", "MODEL", "--dataset_name", "DATA", "--reward_funcs", "maths_reward"],
            "maths_reward",
        ),
    ],
)
def test_a_mistake_is_one_sentence(problems, checkpoint, capsys, options, sentence):
    values = {"DATA": problems, "MODEL": checkpoint()}
    words = () if {"--contexts", "--config"} & set(options) else IN_ITS_WORDS
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*(values.get(option, option) for option in options), "--dry_run", "true", *words])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
