"""`--decide`: more samples of the same problems until a comparison is decided, in a world where every chance is known."""

import json

import numpy as np
import pytest
from evaluation_world import make_tokenizer, save_checkpoint, write_rows

from trl_opsd.cli import UserError
from trl_opsd.evaluate.__main__ import main
from trl_opsd.evaluate.commands import compare_command
from trl_opsd.evaluate.compare import Answer
from trl_opsd.evaluate.decide import decide, looks
from trl_opsd.evaluate.estimate import paired_difference
from trl_opsd.evaluate.results_file import load_results


@pytest.mark.parametrize("budget", [2, 3, 8, 10, 16, 64])
def test_looks_share_what_may_be_wrong(budget):
    found = looks(budget)
    assert (
        found[0][0] == 1
        and found[-1][0] == budget
        and all(b <= 2 * a for (a, _), (b, _) in zip(found, found[1:], strict=False))
    )
    assert sum(1 - level for _, level in found) == pytest.approx(0.05)
    assert [1 - level for _, level in looks(8)] == pytest.approx([0.05 / 8, 0.05 / 8, 0.1 / 8, 0.2 / 8])


def test_looking_often_makes_no_error_more_likely():
    """At a loss of the margin itself, as good and worse are each said in at most 2.5%; at 95% each time it is far more."""
    rng = np.random.default_rng(0)
    wrong = {"ours": 0, "naive": 0}
    for _ in range(600):
        chance = rng.beta(0.8, 0.4, 400)
        right, drawn, said = [np.zeros(400), np.zeros(400)], 0, {"ours": None, "naive": None}
        for times, level in looks(16):
            right = [
                r + rng.binomial(times - drawn, p)
                for r, p in zip(right, (chance, chance * (1 - 0.03 * 1.5)), strict=True)
            ]
            drawn = times
            for rule, at in (("ours", level), ("naive", 0.95)):
                if said[rule] in (None, Answer.UNDECIDED):
                    said[rule] = Answer.of(paired_difference(*(r / drawn for r in right), at), 0.03)
        for rule, answer in said.items():
            wrong[rule] += answer is not Answer.UNDECIDED
    assert wrong["ours"] / 600 < 0.055 and wrong["naive"] > 1.8 * wrong["ours"]


class Coin:
    """An engine that answers a sum rightly with a chance of its own, in `tokens` tokens."""

    chances: dict[str, float] = {}
    loaded: list[str] = []

    def __init__(self, config, checkpoint, tokenizer):
        self.name, self.tokenizer = config.stage, make_tokenizer()
        self.loaded.append(self.name)

    def generate(self, requests, sampling, done=()):
        for index, request in enumerate(requests):
            if index not in done:
                a, b = self.tokenizer.decode(request.prompt_ids).split("=")[0].split("+")
                rng = np.random.default_rng([request.seed, len(self.name), ord(self.name[0])])
                answer = int(a) + int(b) + int(rng.random() >= self.chances[self.name])
                yield index, self.tokenizer(rf"\boxed{{{answer}}}<eos>")["input_ids"]

    def reset_peak_memory(self):
        pass

    def peak_memory(self):
        return None

    def close(self):
        pass


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """The results of two checkpoints, sampled twice on 60 sums."""
    monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", Coin)
    monkeypatch.setattr(Coin, "loaded", [])
    sums = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}"}], "answer": str(a + b)}
        for a in range(10)
        for b in range(6)
    ]
    data = write_rows(tmp_path / "sums.jsonl", sums)
    for seed, name in enumerate("ab"):
        save_checkpoint(tmp_path / name, seed=seed)

    def run(chances, *more):
        monkeypatch.setattr(Coin, "chances", chances)
        main(
            [
                *("--checkpoints", *(f"{name}={tmp_path / name}" for name in "ab"), "--prompt_only", "false"),
                *("--dataset_name", data, "--decoding", "sampled", "--num_samples", "2"),
                *("--max_completion_length", "12", "--output", str(tmp_path / "results.json"), *more),
            ]
        )
        return f"{tmp_path / 'results.json'}:a", f"{tmp_path / 'results.json'}:b"

    return run


class TestDecide:
    def test_draws_until_it_is_decided(self, evaluated, tmp_path, capsys):
        files = evaluated({"a": 0.9, "b": 0.9})
        assert compare_command(["--compare", *files, "--margin", "0.06"]) == 3
        capsys.readouterr()
        status = compare_command(["--compare", *files, "--margin", "0.06", "--decide", "32"])
        lines = capsys.readouterr().out.splitlines()
        assert status == 0 and lines[0].startswith("1 of 32 times the samples: ? undecided")
        times = [int(line.split()[0]) for line in lines if "times the samples: " in line]
        assert times == [2**power for power in range(len(times))] and 2 < len(times) < 6  # it ended before the budget
        assert lines[-2 if lines[-1].startswith("!") else -1].startswith("✓ as good")
        assert sorted(Coin.loaded) == sorted("ab" * len(times))  # once in each round
        measured = load_results(tmp_path / "results-decided.json")
        assert {item.row.samples for item in measured} == {2 * times[-1]}
        # what had been drawn before is among it
        first = {item.label: item.samples for item in load_results(tmp_path / "results.json")}
        for item in measured:
            assert item.samples.correct[:, :2].tolist() == first[item.label].correct.tolist()

    def test_a_loss_is_found(self, evaluated):
        files = evaluated({"a": 0.95, "b": 0.5})
        assert compare_command(["--compare", *files, "--margin", "0.3", "--decide", "16"]) == 1

    def test_the_budget_is_kept(self, evaluated, tmp_path, capsys):
        files = evaluated({"a": 0.9, "b": 0.9})
        output = tmp_path / "more.json"
        conclusion = decide(*files, 3, output, {None: 0.001})
        assert conclusion.answer is Answer.UNDECIDED
        assert {item.row.samples for item in load_results(output)} == {6}
        assert conclusion.level == pytest.approx(1 - 0.05 / 3)

    def test_refuses_other_weights(self, evaluated, tmp_path, capsys):
        """More samples are of what was measured, and not of what lies in its folder today."""
        files = evaluated({"a": 0.9, "b": 0.9})
        save_checkpoint(tmp_path / "b", seed=7)
        with pytest.raises(SystemExit) as stop:
            compare_command(["--compare", *files, "--decide", "4", "--margin", "0.001"])
        assert stop.value.code == 2 and "has other weights than those" in capsys.readouterr().err
        assert Coin.loaded == ["a", "b"]  # by the first evaluation

    def test_refuses_other_problems(self, evaluated, tmp_path, capsys):
        files = evaluated({"a": 0.9, "b": 0.9})
        write_rows(tmp_path / "sums.jsonl", [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}])
        with pytest.raises(SystemExit) as stop:
            compare_command(["--compare", *files, "--decide", "4", "--margin", "0.001"])
        assert stop.value.code == 2 and "problems have changed" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--decide", "1"], "at least 2, and is 1"),
            (["--decide", "4", "--output", "results.json"], "is one of the files"),
        ],
    )
    def test_refuses(self, evaluated, arguments, message, capsys, monkeypatch, tmp_path):
        files = evaluated({"a": 0.9, "b": 0.9})
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            compare_command(["--compare", *files, *arguments])
        assert error.value.code == 2 and message in capsys.readouterr().err

    def test_greedy_decoding_has_one_sample(self, evaluated, tmp_path):
        files = evaluated({"a": 0.9, "b": 0.9}, "--decoding", "greedy")
        with pytest.raises(UserError, match="greedy decoding has one of each"):
            decide(*files, 4, tmp_path / "more.json")

    def test_results_of_another_command(self, evaluated, tmp_path):
        files = evaluated({"a": 0.9, "b": 0.9})
        results = json.loads((tmp_path / "results.json").read_text())
        results["run"]["config"] = {"ratios": None, **results["run"]["config"]}
        (tmp_path / "results.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match="was not written by `python -m trl_opsd.evaluate`"):
            decide(*files, 4, tmp_path / "more.json")
