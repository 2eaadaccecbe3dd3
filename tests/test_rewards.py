import contextlib
import json
import multiprocessing
import os
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
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from trl_opsd.cli import UserError
from trl_opsd.data import load_prompts
from trl_opsd.rewards import (
    extract_answer,
    format_reward,
    length_reward,
    load_reward_funcs,
    math_reward,
    reasoning_gym_reward,
    required_columns,
)
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
    def test_real_answers_in_other_spellings_and_their_neighbours(self, name):
        if not SHARED.is_dir():  # a checkout on its own has no benchmark data
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
    "units": r"\boxed{" + "1 aaa" * 190 + "}",
}


SLOW = ("powers of ten", "factorials", "expansion", "sum", "nested brackets")


def score_pathological(names):
    scores = [math_reward([PATHOLOGICAL[name]], answer=["7/3"], flexible=True) for name in names]
    return scores, math_reward([r"\boxed{\frac{14}{6}}"], answer=["7/3"])


def helper_after(names):
    math_verifier._score.cache_clear()  # a fork has its parent's
    return score_pathological(names), math_verifier._JUDGE._process.pid


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

    @pytest.mark.parametrize("method", ["spawn", "fork"])
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
