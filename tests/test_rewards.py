import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import golds
import pytest
import trl
import trl.scripts.grpo
from datasets import Dataset
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from trl_opsd.cli import UserError
from trl_opsd.data import load_prompts
from trl_opsd.rewards import (
    check_rows,
    extract_answer,
    format_reward,
    length_reward,
    load_reward_funcs,
    logic_reward,
    math_reward,
    reasoning_gym_reward,
    required_columns,
)
from trl_opsd.rewards import judge as judge_module
from trl_opsd.rewards import math as math_verifier
from trl_opsd.rewards.judge import Judge, Unjudged
from trl_opsd.rewards.math import find_answer


SHARED = Path(__file__).parents[2] / "shared" / "data"


class TestExtractAnswer:
    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"\boxed{5}", "5"),
            (r"first \boxed{1}, then \boxed{ 2 }.", "2"),
            (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
            (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
            (r"<think>\boxed{1}</think> \boxed{2}", "2"),
            (r"\boxed{1}</think> \boxed{2}", "2"),
            (r"<think>\boxed{1}</think> so 2", None),
            (r"<think>\boxed{1}", None),
            (r"<think>a</think> b <think> \boxed{1}", None),
            (r"\boxed{1} and \boxed{2", None),
            (r"$x=\boxed{1}$ and $y = \boxed{2}$", "1, 2"),
            (r"\boxed{1}, \boxed{2} or \boxed{3}", "1, 2, 3"),
            (r"\boxed{5} \boxed{5}", "5"),
            (r"\fbox{5}", "5"),
            (r"\boxed{" * 20_000, None),
            (r"\boxed{1}" * 20_000 + r"\boxed{2}", "1, 2"),
            ("the answer is 5", None),
            ("", None),
        ],
    )
    def test_strict(self, text, answer):
        assert extract_answer(text) == answer

    @pytest.mark.parametrize(
        ("text", "answer"),
        [
            (r"Answer: 3 \boxed{5} 7", "5"),
            ("so\n#### 1,200", "1,200"),
            ("**Answer:** $x + 1$.\nDone in 3 steps", "x + 1"),
            ("answer: 1\nanswer: 2\n", "2"),
            ("from 3 apples to -4.5 in all.", "-4.5"),
            ("it is 3/4.", "3/4"),
            ("there are 1,000, or so", "1,000"),
            ("<think>4", None),
            ("<think>4</think> none", None),
            ("The answer is 18.", "18"),
            ("Answer: there are 18 apples", "18"),
            (r"so $3 + 4$ gives $\frac{7}{2}$.", r"\frac{7}{2}"),
            ("I paid $18 and then $20.", "20"),
            (r"\(x\) is \(\sqrt{2}\)", r"\sqrt{2}"),
        ],
    )
    def test_flexible(self, text, answer):
        assert extract_answer(text, flexible=True) == answer

    def test_form(self):
        texts = (r"\boxed{5}", "#### 5", "it is 5", "none", r"<think>\boxed{5}", r"5 \boxed{5")
        assert [find_answer(text)[1] for text in texts] == ["boxed", "marked", "last", "none", "none", "none"]


class TestMathReward:
    @pytest.mark.parametrize(
        ("answer", "gold", "score"),
        [
            ("5", "5", 1.0),
            ("5", "6", 0.0),
            ("1,000", "1000", 1.0),
            ("+07", "7", 1.0),
            ("-7", "7", 0.0),
            ("5.0", "5", 1.0),
            (r"\frac{2}{4}", "0.5", 1.0),
            (r"\frac43", "4/3", 1.0),
            (r"\$18", "18", 1.0),
            (r"18 \text{ dollars}", "18", 1.0),
            ("x + 1", "1 + x", 1.0),
            ("x + 1", "x - 1", 0.0),
            ("(1, 2)", r"\left(1, 2\right)", 1.0),
            ("(2, 1)", "(1, 2)", 0.0),
            (r"\{2, 1\}", r"\{1, 2\}", 1.0),
            (r"\text{Evelyn}", r"\text{Evelyn}", 1.0),
            ("5", r"\boxed{5}", 1.0),
            ("x", "$x$", 1.0),
            ("", "5", 0.0),
            ("5", r"\frac{", None),
            ("5", "", None),
            ("None", None, None),
            ("9" * 100_000, "9", 0.0),
            ("5 million", "5", 0.0),
            (r"5 \text{ million}", "5000000", 1.0),
            ("18 dollars per day", "18", 1.0),
            ("3 halves", "3", 0.0),
            ("3 xy", "3", 0.0),
            ("15 cm^2", r"15\mbox{ cm}^2", 1.0),
            ("15^2", r"15\mbox{ cm}^2", 0.0),
            ("90°", r"90^\circ", 1.0),
            ("11 111", r"11,\! 111", 1.0),
            (r"\$18.9", r"\$18.90", 1.0),
            (r"1\frac{4}{5}", "9/5", 1.0),
            ("137 1/2", r"137 \frac{1}{2}", 1.0),
            (r"10\%", "0.1", 1.0),
            ("10 percent", r"10\%", 1.0),
            ("11", r"10\%", 0.0),
            ("0.0000673", ".0000672", 0.0),
            (r"6.73\times10^{-5}", ".0000672", 0.0),
            (r"6.72\times10^{-5}", ".0000672", 1.0),
            ("0.333333", r"\frac13", 1.0),
            ("0.33", r"\frac13", 0.0),
            ("52_{8}", "52_8", 1.0),
            ("52_9", "52_8", 0.0),
            ("1+274 i", "1+274i", 1.0),
            ("1-274i", "1+274i", 0.0),
            (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}", 1.0),
            (r"1+\sqrt{19}", r"1 \pm \sqrt{19}", 0.0),
            ("(3,4]", "[3,4)", 0.0),
            (r"-2 \le x \le 7", r"x \in [-2,7]", 1.0),
            (r"(2,12)\cup(12,102)", r"(2,12) \cup (12,102)", 1.0),
            (r"\begin{bmatrix} \frac15 \\ -18/5 \end{bmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", 1.0),
            (r"\begin{pmatrix} 1/5 \\ 18/5 \end{pmatrix}", r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", 0.0),
            ("C", r"\text{(C)}", 1.0),
            (r"\textbf{(C)}", r"\text{(C)}", 1.0),
            ("(C) 12 apples", "(C)", 1.0),
            ("(C) or (D)", "(C)", 0.0),
            ("C. or D.", "(C)", 0.0),
            ("Evelyn", r"\text{Evelyn}", 1.0),
            ("Evelny", r"\text{Evelyn}", 0.0),
            ("valid", "invalid", 0.0),
            ("therefrom syndrome", "syndrome therefrom", 0.0),
            (r"] \}", "] }", 1.0),
            ("] ]", "] )", 0.0),
            ("5 or 6", "5", 0.0),
        ],
    )
    def test_scores(self, answer, gold, score):
        text = rf"The answer is \boxed{{{answer}}}."
        assert math_reward([text], answer=[gold]) == [score]
        assert math_reward([[{"role": "assistant", "content": text}]], answer=[gold]) == [score]

    @pytest.mark.parametrize(
        ("gold", "right", "wrong"),
        [
            (
                "4.5e33",
                [r"4.5 \times 10^{33}", "4.5E33", r"4.5\cdot10^{33} \text{ J}", "45e32"],
                ["148.5 e", "4.5e32"],
            ),
            ("8.49e-4", [r"8.49\times 10^{-4}", "0.000849", r"8.49 * 10^-4"], [r"8.49\times 10^{-5}", "0.00085"]),
            ("1e-5", ["10^{-5}", "0.00001"], ["10^{5}", "10^{-4}"]),
            (r"3 \times 10^8", ["3e8", "300,000,000", r"3\times10^8 \text{ m/s}"], ["3e9", "38"]),
            ("1", ["1.0", "01", r"\frac{2}{2}", "x = 1"], ["0.9999999", "1.0000001", r"\frac{9999999}{10000000}"]),
            ("0.5", [r"\frac12", "0.50"], ["0.4999999", "0.5000001"]),
            (r"\frac13", ["0.333333", "0.3333333333", "2/6"], ["0.33", "0.333334", r"\frac{333333}{1000000}"]),
            (
                "(1, 2)",
                [r"\left(1.0,2\right)", "(x,y) = (1, 2)"],
                ["(0.9999999, 2)", "(2, 1)", "1, 2", "[1, 2)", r"\{1,2\}"],
            ),
            ("204", ["204.0"], [r"204\%", r"204 \text{ percent}", r"20400\%x"]),
            ("2.04", [r"204\%"], [r"2.04\%"]),
            (r"10\%", ["10", "0.1", r"10 \%", "10 percent"], ["11", "0.11", r"0.1\%"]),
            (
                "4, 5",
                ["5, 4", "4 and 5", r"4 \text{ or } 5", r"\{5, 4\}", "4; 5"],
                ["(4, 5)", "4", "4, 4", "4, 5, 6", "45"],
            ),
            (r"\{3\}", [r"\left\{ 3 \right\}"], ["3", r"\{3, 4\}"]),
            ("3", ["x = 3"], [r"\{3\}", "3, 3", "(3, 3)", "3:1", r"\pm 3"]),
            (r"1 \pm \sqrt{5}", [r"1-\sqrt5, 1+\sqrt5", r"\{1 \pm \sqrt{5}\}"], [r"1+\sqrt5", r"1 \pm \sqrt{6}"]),
            (r"(1,8,19), (2,7,13)", ["(2,7,13) and (1,8,19)"], ["(1,8,19), (2,13,7)", "(1,8,19)", "1,8,19,2,7,13"]),
            (r"\frac{3}{4}", ["3/4", "0.75"], ["3:4", "3 to 4"]),
            ("10:3", ["10 to 3", r"10 \text{ to } 3", "10 : 3", r"10\!:\!3"], ["3:10", "20:6", "10/3", "10:3:1"]),
            ("11:30", ["11:30 a.m.", r"\text{11:30 PM}"], ["11:31", "1130", r"\frac{11}{30}"]),
            (r"11:30 \text{ a.m.}", ["11:30", r"\text{11:30 AM}"], ["11:30 p.m.", "11:31 a.m."]),
            (
                "1.6",
                ["1.6 eV", r"1.6 \text{ mL}", "1.6 kHz", "1.6eV", r"1.6 \, \mathrm{~J}", r"\approx 1.6"],
                ["1.7 eV", "1.6 x"],
            ),
            (
                "5",
                [r"5 \text{ m/s}^2", r"5 \mathrm{m}\,\mathrm{s}^{-1}", "5 kJ/mol", "5 square feet"],
                ["5 x", "5 n", "6 kJ/mol"],
            ),
            (
                r"15 \text{ cm}^2",
                ["15", "15 cm^2", "0.0015 m^2", "15 square centimeters"],
                [r"15 \text{ cm}^3", "15 m^2"],
            ),
            ("15 cm", ["0.15 m", "150 mm"], ["15 m", "15 kg", "15 inches"]),
            ("6m", ["6 m", r"6\text{ m}", r"m \cdot 6"], ["6", "6n", "6 km"]),
            (r"\text{27}", ["27.0", "27"], ["28"]),
            (r"\textbf{(073)}", ["073", "73", "(73)"], ["74", "730"]),
            (r"\text{18 apples}", ["18", "18 apples", "18.0"], ["19", "19 apples"]),
            ("9 (apples)", ["9", "9 apples", "9 (apples)"], ["8", "8 (apples)"]),
            (
                r"\frac{d x}{d t}=k x-a",
                [r"\frac{dx}{dt} - kx = -a", r"2\frac{dx}{dt} = 2(kx-a)"],
                [r"\frac{dx}{dt}=2(kx-a)", r"\frac{dx}{dt}=kx+a", "kx - a = 0"],
            ),
            ("y = 2x + 3", ["y = 3 + 2x", "2x - y + 3 = 0"], ["y = 2x - 3", "2y = 2x + 3", "y = 2(2x + 3)"]),
            ("7", ["m + n = 7"], ["m + n = 8"]),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_decisions_of_the_table(self, gold, right, wrong):
        scores = math_reward([rf"so \boxed{{{text}}}" for text in right + wrong], answer=[gold] * len(right + wrong))
        assert dict(zip(right + wrong, scores, strict=True)) == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)

    def test_the_page_says_what_is_done(self):
        lines = (golds.ROOT / "trl_opsd" / "rewards" / "ANSWERS.md").read_text().splitlines()
        rows = [line.split("|")[1:4] for line in lines if line.startswith("| ") and not line.startswith("| reference")]
        assert len(rows) > 20
        for row in rows:
            references, right, wrong = (re.findall(r"`([^`]+)`", cell) for cell in row)
            prompt = "What percent?" if "percent" in row[0] else "?"
            scores = {
                answer: [math_reward([rf"\boxed{{{answer}}}"], [gold], prompts=[prompt])[0] for gold in references]
                for answer in right + wrong or references
            }
            if right:
                assert all(1.0 in scores[answer] for answer in right), (row, scores)
                assert not any(1.0 in scores[answer] for answer in wrong), (row, scores)
            elif wrong:
                assert set(map(max, scores.values())) == {0.0}, (row, scores)
            else:
                assert set(itertools.chain(*scores.values())) == {None}, (row, scores)

    def test_percent_where_the_problem_asks_for_it(self):
        asked = "What percent of the apples are left?"
        texts = [r"\boxed{35\%}", r"\boxed{35 \text{ percent}}", r"\boxed{35}", r"\boxed{0.35}", r"\boxed{36\%}"]
        for prompt in (asked, [{"role": "user", "content": asked}]):
            assert math_reward(texts, answer=["35"] * 5, prompts=[prompt] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]
        assert math_reward(texts, answer=["35"] * 5, prompts=["How many?"] * 5) == [0.0, 0.0, 1.0, 0.0, 0.0]

    def test_a_thinking_block_that_the_prompt_opens(self):
        texts = [r"so \boxed{5}", r"so 4</think> \boxed{5}"]
        for prompt in (
            "1 + 4?<think>\n",
            [{"role": "user", "content": "1 + 4?"}, {"role": "assistant", "content": "<think>"}],
        ):
            prompts = [prompt] * 2
            assert math_reward(texts, answer=["5", "5"], prompts=prompts) == [0.0, 1.0]
            assert math_reward(texts, answer=["5", "5"], prompts=prompts, flexible=True) == [0.0, 1.0]
            assert logic_reward(texts, answer=["5", "5"], prompts=prompts) == [0.0, 1.0]
            assert format_reward(texts, prompts=prompts) == [0.0, 1.0]
            ids = [[0] * 10, [0] * 20]
            assert length_reward(texts, prompts=prompts, completion_ids=ids, answer=["5", "5"]) == [0.0, -0.5]
        opened = "The word (yes or no)?<think>"
        assert logic_reward(["yes", "no</think> yes"], ["yes"] * 2, [opened] * 2, flexible=True) == [0.0, 1.0]

    def test_what_cannot_be_read_is_not_scored(self):
        golds = [r"$f(x)=a x+b$, where $b$ is an integer", "np.arcsin(10/13)", r"\frac{"]
        assert math_reward([rf"\boxed{{{gold}}}" for gold in golds], answer=golds) == [None] * len(golds)

    def test_what_fails_is_neither_right_nor_wrong(self, monkeypatch):
        judge = Judge("math_verify")
        monkeypatch.setattr(math_verifier, "_JUDGE", judge)
        assert math_reward([r"\boxed{\sqrt{98}}"], answer=[r"7\sqrt{2}"]) == [1.0]
        exchange = judge._exchange
        monkeypatch.setattr(judge, "_exchange", lambda line: "" if "compare" in line else exchange(line))
        assert math_reward([r"\boxed{\sqrt{99}}", r"\boxed{5}"], answer=[r"3\sqrt{11}", "5"]) == [None, 1.0]
        monkeypatch.undo()
        assert math_reward([r"\boxed{\sqrt{99}}"], answer=[r"3\sqrt{11}"]) == [1.0]  # and it is not remembered
        judge.stop()

    def test_unparseable_gold_is_none_whatever_the_completion(self):
        completions = [r"\boxed{\frac{}", r"\boxed{1}", "nothing"]
        assert math_reward(completions, answer=[r"\frac{"] * 3) == [None] * 3

    def test_flexible(self):
        assert math_reward(["#### 5", "#### 5"], answer=["5", "6"], flexible=True) == [1.0, 0.0]
        assert math_reward(["#### 5"], answer=["5"]) == [0.0]

    def test_integer_column(self):
        assert math_reward([r"\boxed{5}"], answer=[5]) == [1.0]

    def test_extra_arguments_of_the_trainer(self):
        logged = {}
        rewards = math_reward(
            prompts=["a", "b"],
            completions=[r"\boxed{1}", "?"],
            completion_ids=[[1], [2]],
            answer=["1", "1"],
            log_extra=lambda name, values: logged.update({name: values}),
            trainer_state=None,
        )
        assert rewards == [1.0, 0.0]
        assert logged == {
            "answer": ["1", "1"],
            "answer_extracted": ["1", "[none]"],
            "answer_form": ["boxed", "none"],
        }

    def test_hedging_does_not_pay(self):
        hedges = [r"\boxed{1}, \boxed{2}", r"\boxed{1} or \boxed{2}", r"\boxed{1, 2}", r"\boxed{1 \text{ or } 2}"]
        assert math_reward(hedges, answer=["2"] * 4) == [0.0] * 4
        assert math_reward(hedges[:3], answer=["1,2"] * 3) == [1.0] * 3

    def test_other_threads(self):
        results = []
        texts = [r"\boxed{\sqrt{8}}", r"\boxed{\frac{7}{3}}"]

        def score():
            results.append(math_reward(texts, answer=[r"2\sqrt{2}", "2"]))

        threads = [threading.Thread(target=score) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [[1.0, 0.0]] * 4

    def test_fast_for_integers(self):
        completions = [f"{'x' * 300} \\boxed{{{number % 17}}}" for number in range(2000)]
        start = time.perf_counter()
        math_reward(completions, answer=[str(number % 13) for number in range(2000)])
        assert (time.perf_counter() - start) / 2000 < 1e-3

    @pytest.mark.parametrize("name", golds.SETS)
    def test_some_real_answers_in_other_spellings_and_their_neighbours(self, name):
        if not SHARED.is_dir():  # a checkout on its own has no benchmark data
            return
        found = golds.judge(name, every=11)
        assert found["spellings"] > 500 and found["neighbours"] > 150
        assert found["false_negatives"] == found["false_positives"] == 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", golds.SETS)
    def test_real_answers_in_other_spellings_and_their_neighbours(self, name):
        if not SHARED.is_dir():
            return
        recorded = json.loads((golds.ROOT / "recipes/results/math_reward/golds.json").read_text())["rows"]
        assert golds.judge(name) in recorded

    def test_real_answers_in_words(self):
        if not SHARED.is_dir():
            return
        gold = load_prompts(f"bbh:{SHARED / 'bbh'}", "test")["answer"][:]
        texts = [rf"\boxed{{{text.replace('{', chr(92) + '{').replace('}', chr(92) + '}')}}}" for text in gold]
        assert math_reward(texts, answer=gold) == [1.0] * len(gold)
        other = gold[1:] + gold[:1]
        assert math_reward(texts, answer=other) == [float(a == b) for a, b in zip(gold, other, strict=True)]


PATHOLOGICAL = {
    "tower": r"\boxed{9^{9^{9^{9}}}}",
    "Python": r"\boxed{9**9**9}",
    "powers of ten": r"\boxed{10^{10^{10}}}",
    "factorials": r"\boxed{((((99!)!)!)!)!}",
    "expansion": r"\boxed{(x+y+1)^{100000}}",
    "sum": r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k}}",
    "nested brackets": r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 100 + "1" + "}" * 100 + "}",
    "digits": "9" * 100_000,
    "open boxes": r"\boxed{" * 15_000,
    "many boxes": " ".join(rf"\boxed{{{number}}}" for number in range(9000)),
    "nested braces": r"\boxed{" + "{" * 50_000 + "}" * 50_001,
    "dollars": "$" * 100_000,
    "open formulas": r"\(" * 50_000,
    "marks": "answer: " * 12_500,
    "spaces": "answer:" + " " * 100_000 + "\n",
    "spaces between boxes": r"\boxed{1}" + " " * 100_000 + r"\boxed{2}",
    "unit": r"\boxed{1" + "a" * 990 + "1}",
    "units of units": r"\boxed{7 " + r"\text{ m} /" * 90 + "}",
    "list of towers": r"\boxed{" + ", ".join(["9^{9^{9}}"] * 80) + "}",
    "signs": r"\boxed{" + r"\pm 1," * 140 + "2}",
    "ratios": r"\boxed{" + "1:" * 490 + "1}",
    "exponent": r"\boxed{1e999}",
    "negative exponent": r"\boxed{10^{-999}}",
    "code": r"\boxed{__import__('os').system('true')}",
    "code in LaTeX": r"\boxed{\text{__import__}(\text{'os'})}",
    "lambda": r"\boxed{(lambda: 7/3)()}",
    "units": r"\boxed{" + "1 aaa" * 190 + "}",
}


SLOW = ("powers of ten", "factorials", "expansion", "sum", "nested brackets")


def score_pathological(names):
    scores = [math_reward([PATHOLOGICAL[name]], answer=["7/3"], flexible=True) for name in names]
    return scores, math_reward([r"\boxed{\frac{14}{6}}"], answer=["7/3"])


def helper_after(names):
    math_verifier._score.cache_clear()  # a fork has its parent's
    return score_pathological(names), math_verifier._JUDGE._process.pid


def failure(judge, text):
    with pytest.raises(Unjudged) as caught:
        judge.ask("compare", [[text, "1"]])
    return str(caught.value)


class TestJudge:
    """The helper process: what a text can cost is bounded, wherever the reward function is called."""

    @pytest.mark.parametrize(
        "name",
        # three seconds each: what the helper is killed for
        [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PATHOLOGICAL],
    )
    def test_main_thread(self, name):
        cpu, wall = time.process_time(), time.perf_counter()
        assert score_pathological([name]) == ([[0.0]], [1.0])
        assert time.process_time() - cpu < 3  # in this process; the helper's own limit is 3 seconds
        assert time.perf_counter() - wall < 40

    def test_thread(self):
        results = []
        threads = [threading.Thread(target=lambda: results.append(score_pathological(["tower"]))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == [([[0.0]], [1.0])] * 2

    @pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
    def test_process(self, method):
        judge = math_verifier._JUDGE
        assert judge.ask("parse", ["1"])
        busy = threading.Thread(target=judge.ask, args=("compare", [["10^{10^{10}}", "1"]]))
        busy.start()  # for three seconds: a fork finds the helper in use, and its lock held
        time.sleep(0.2)
        with multiprocessing.get_context(method).Pool(1) as pool:
            result = pool.apply_async(helper_after, [("tower", "digits")])
            assert math_reward([r"\boxed{\sqrt{12}}"], answer=[r"2\sqrt{3}"]) == [1.0]
            scores, helper = result.get(120)
        busy.join()
        assert scores == ([[0.0]] * 2, [1.0])
        assert helper != judge._process.pid

    def test_memory(self):
        judge = Judge("math_verify")
        assert judge.ask("parse", [r"\frac{1}{2}"]) == [True]
        (child,) = Path(f"/proc/{judge._process.pid}/task/{judge._process.pid}/children").read_text().split()
        limits = Path(f"/proc/{child}/limits").read_text()
        assert f"Max address space         {2 << 30}" in limits
        judge.stop()

    @pytest.mark.slow
    def test_the_cost_of_many_parts_is_bounded_together(self):
        gold = ", ".join(f"x^{{{n}}}+1" for n in range(2, 12))
        hostile = ", ".join([r"\sum_{k=1}^{10^{9}} \frac{1}{k}"] * 10)
        start = time.perf_counter()
        assert math_reward([rf"\boxed{{{hostile}}}"], answer=[gold]) == [0.0]
        assert time.perf_counter() - start < 40  # one limit of 3 seconds of CPU time, on a machine however busy

    def test_a_child_that_others_kill_has_no_verdict(self):
        judge = Judge("math_verify")
        judge.ask("parse", ["1"])
        asked = threading.Thread(target=lambda: failures.append(failure(judge, "10^{10^{10}}")))
        failures = []
        (child,) = Path(f"/proc/{judge._process.pid}/task/{judge._process.pid}/children").read_text().split()
        asked.start()
        time.sleep(0.3)
        os.kill(int(child), signal.SIGKILL)
        asked.join(60)
        assert "out of memory" in failures[0]
        assert judge.ask("compare", [["1/2", "0.5"]]) == [True]
        judge.stop()

    def test_a_dead_helper_is_replaced(self):
        judge = Judge("math_verify")
        assert judge.ask("compare", [[r"\frac{1}{2}", "0.5"]]) == [True]
        (child,) = Path(f"/proc/{judge._process.pid}/task/{judge._process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        with contextlib.suppress(Unjudged):  # no answer if the line went to the dead child
            assert judge.ask("compare", [[r"\frac{1}{2}", "0.5"]]) == [True]
        os.kill(judge._process.pid, signal.SIGKILL)
        judge._process.wait()
        assert judge.ask("compare", [[r"\frac{1}{2}", "0.5"]]) == [True]
        judge.stop()

    def test_an_interruption_does_not_mix_up_answers(self, monkeypatch):
        judge = Judge("math_verify")
        judge.ask("parse", ["1"])

        def interrupt():
            raise KeyboardInterrupt

        monkeypatch.setattr(judge._process.stdout, "readline", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            judge.ask("compare", [["1/2", "0.5"]])
        assert judge.ask("compare", [["1/3", "0.5"]]) == [False]
        judge.stop()

    def test_a_helper_that_does_not_start(self):
        with pytest.raises(RuntimeError, match="does not start"):
            Judge("no_such_library").ask("parse", ["1"])

    def test_nothing_is_left_behind(self):
        code = (
            "from trl_opsd.rewards import math as m; m.math_reward([r'\\boxed{x+1}'], answer=['1+x']);"
            "print(m._JUDGE._process.pid, flush=True); import os; os.kill(os.getpid(), 9)"
        )
        environment = {**os.environ, "PYTHONPATH": str(golds.ROOT)}
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        helper = Path(f"/proc/{int(run.stdout)}")
        deadline = time.monotonic() + 20
        while helper.exists() and "Z" not in (helper / "stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not helper.exists() or "Z" in (helper / "stat").read_text()


class TestReasoningGym:
    def test_scores_of_the_task(self):
        rows = load_prompts("reasoning-gym:countdown:size=2,min_numbers=3,max_numbers=3")
        texts = [rf"<think>\boxed{{0}}</think> \boxed{{\text{{{answer}}}}}" for answer in rows["answer"]]
        columns = {"answer": rows["answer"][:], "metadata": rows["metadata"][:]}
        assert reasoning_gym_reward(texts, **columns) == [1.0, 1.0]
        assert max(reasoning_gym_reward([r"\boxed{1}", "1"], **columns)) < 1.0

    def test_answers_that_verifiers_evaluate(self, tmp_path):
        rows = load_prompts("reasoning-gym:string_insertion:size=1")
        flag = tmp_path / "flag"
        hostile = [f"__import__('os').system('touch {flag}')", f"[open('{flag}', 'w').write('x')]", "[9**9**9**9]"]
        columns = {"answer": rows["answer"][:] * 3, "metadata": rows["metadata"][:] * 3}
        assert max(reasoning_gym_reward([rf"\boxed{{{text}}}" for text in hostile], **columns)) < 1.0
        assert not flag.exists()

    @pytest.mark.parametrize("task", ["string_insertion", "n_queens", "countdown", "polynomial_multiplication"])
    def test_no_answer_makes_another_one_right(self, task):
        rows = load_prompts(f"reasoning-gym:{task}:size=1")
        poison = "setattr(__import__('builtins'), 'float', lambda *a: 1.0)"
        texts = [poison, f"[{poison}]", f"sqrt('{poison}')", "(lambda: 1)()", "().__class__", "float('inf')", "zzz"]
        columns = {"answer": rows["answer"][:] * len(texts), "metadata": rows["metadata"][:] * len(texts)}
        assert max(reasoning_gym_reward([rf"\boxed{{{text}}}" for text in texts], **columns)) <= 0.05

    def test_what_a_child_changes_is_gone_with_it(self):
        judge = Judge("reasoning_gym")
        task, entry = "chain_sum", {"answer": "5", "metadata": {}}
        children = []
        for answer in ("5", "6"):
            judge.ask("reasoning_gym", task, answer, entry)
            path = Path(f"/proc/{judge._process.pid}/task/{judge._process.pid}/children")
            children += path.read_text().split()
        assert children == []
        judge.stop()

    def test_verifiers_that_evaluate_answers_are_known(self):
        folder = Path(importlib.util.find_spec("reasoning_gym").origin).parent
        found = {path.stem for path in folder.rglob("*.py") if re.search(r"\beval\(answer", path.read_text())}
        assert found == set(judge_module._EVALUATING)

    def test_lists_and_arithmetic_are_still_read(self):
        row = load_prompts("reasoning-gym:string_insertion:size=1")
        listed = rf"\boxed{{{list(row['answer'][0])}}}"
        assert reasoning_gym_reward([listed], row["answer"][:], row["metadata"][:]) == [0.1]
        row = load_prompts("reasoning-gym:simple_integration:size=1")
        answer = row["answer"][0].replace("C", "0 * sin(3) + C")
        assert reasoning_gym_reward([rf"\boxed{{{answer}}}"], row["answer"][:], row["metadata"][:]) == [1.0]

    def test_a_thinking_block_that_the_prompt_opens(self):
        rows = load_prompts("reasoning-gym:chain_sum:size=1")
        text = rf"\boxed{{{rows['answer'][0]}}}"
        columns = {"answer": rows["answer"][:] * 2, "metadata": rows["metadata"][:] * 2, "prompts": ["?<think>"] * 2}
        assert reasoning_gym_reward([text, f"</think>{text}"], **columns) == [0.0, 1.0]

    def test_unknown_task(self):
        with pytest.raises(ValueError, match="names the task `nothing`"):
            reasoning_gym_reward([r"\boxed{1}"], answer=["1"], metadata=['{"source_dataset": "nothing"}'])


class TestFormatAndLength:
    @pytest.mark.parametrize(
        ("text", "score"),
        [
            (r"<think>a</think> \boxed{1}", 1.0),
            (r"a</think> \boxed{1}", 1.0),
            (r"\boxed{1}", 1.0),
            (r"<think>a</think> <think>b</think> \boxed{1}", 0.0),
            (r"<think>a \boxed{1}", 0.0),
            (r"<think>\boxed{1}</think> 1", 0.0),
            (r"\boxed{}", 0.0),
            ("1", 0.0),
        ],
    )
    def test_format(self, text, score):
        assert format_reward([text]) == [score]
        assert format_reward([[{"role": "assistant", "content": text}]]) == [score]

    def test_length(self):
        rewards = length_reward(
            completions=[r"\boxed{1}", r"\boxed{1}", r"\boxed{2}", r"\boxed{2}", r"\boxed{1}"],
            prompts=["a", "a", "a", "a", "b"],
            completion_ids=[[0] * n for n in (10, 20, 5, 25, 9)],
            answer=["1"] * 5,
        )
        assert rewards == [0.25, -0.25, 0.0, -0.5, 0.0]


class TestLoad:
    def test_references_that_cannot_be_read_are_reported(self, caplog):
        answers = ["5", r"\frac{", None, r"\sqrt{2}", "", *["a=b where nothing holds"] * 5]
        dataset = Dataset.from_dict({"prompt": ["?"] * len(answers), "answer": answers})
        check_rows(dataset, [math_reward], "mine.jsonl")
        assert len(caplog.messages) == 6 and "2 more" in caplog.messages[-1]
        expected = "`mine.jsonl`, row 2: the answer '\\\\frac{' cannot be read, so its row is not scored."
        assert caplog.messages[0] == expected and "row 5" in caplog.messages[1]
        with pytest.raises(UserError, match=r"`mine.jsonl`: no `answer` can be read .* \(row 1 has"):
            check_rows(dataset.select([1, 2, 4]), [length_reward], "mine.jsonl")
        caplog.clear()
        check_rows(dataset, [format_reward], "mine.jsonl")
        assert not caplog.messages

    def test_by_name(self):
        names = ["math_reward", "accuracy_reward", "think_format_reward", "trl.rewards.think_format_reward"]
        assert load_reward_funcs(names) == [math_reward, accuracy_reward, think_format_reward, think_format_reward]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("maths", "Unknown reward function `maths`: choose from math_reward, format_reward"),
            ("no_such_module.reward", "`no_such_module.reward` cannot be imported"),
            ("trl_opsd.rewards.nothing", "`trl_opsd.rewards.nothing` cannot be imported"),
            ("trl_opsd.__version__", "is a str, not a function"),
        ],
    )
    def test_unknown(self, name, message):
        with pytest.raises(UserError, match=message):
            load_reward_funcs([name])

    @pytest.mark.parametrize("name", ["math_reward", "format_reward", "length_reward", "reasoning_gym_reward"])
    def test_in_the_script_of_trl(self, name, monkeypatch, tmp_path):
        loaded = []

        class Trainer:
            def __init__(self, reward_funcs, **kwargs):
                loaded.extend(reward_funcs)
                raise InterruptedError

        monkeypatch.setattr(trl, "GRPOTrainer", Trainer)
        monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: {"train": None})
        monkeypatch.setattr(sys, "path", list(sys.path))
        arguments = ["--model_name_or_path", "x", "--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu"]
        arguments += ["--bf16", "false", "--reward_funcs", f"trl_opsd.rewards.{name}"]
        parsed = trl.scripts.grpo.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=False)
        with pytest.raises(InterruptedError):
            trl.scripts.grpo.main(*parsed[:4])
        assert loaded == load_reward_funcs([name]) == load_reward_funcs([f"trl_opsd.rewards.{name}"])

    def test_required_columns(self):
        assert required_columns(length_reward) == {"answer"} and required_columns(format_reward) == set()
        assert required_columns(reasoning_gym_reward) == {"answer", "metadata"}
        assert required_columns(math_reward) == {"answer"}
        assert required_columns(accuracy_reward) == {"solution"}
        assert required_columns(think_format_reward) == set()
        assert required_columns(get_soft_overlong_punishment(10, 5)) == set()
        assert required_columns(lambda prompts, completions, tests, entry_point=None, **kwargs: []) == {"tests"}
