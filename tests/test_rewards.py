import threading
import time
from pathlib import Path

import pytest
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from trl_opsd.cli import UserError
from trl_opsd.data import load_prompts
from trl_opsd.rewards import extract_answer, load_reward_funcs, math_reward, required_columns


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
        ],
    )
    def test_flexible(self, text, answer):
        assert extract_answer(text, flexible=True) == answer


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
        assert logged == {"answer": ["1", "1"], "answer_extracted": ["1", "[none]"]}

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

    def test_real_answers_against_themselves_and_their_neighbours(self):
        if not SHARED.is_dir():  # a checkout on its own has no benchmark data
            return
        sets = {"gsm8k": SHARED / "gsm8k" / "test.jsonl", "math-500": SHARED / "math500" / "test.jsonl"}
        for name, path in sets.items():
            gold = load_prompts(f"{name}:{path}", "test")["answer"][:]
            assert math_reward([rf"\boxed{{{text}}}" for text in gold], answer=gold) == [1.0] * len(gold)
            other = gold[1:] + gold[:1]
            scores = math_reward([rf"\boxed{{{text}}}" for text in other], answer=gold)
            # Neighbours written alike are right; one more pair of MATH-500 is equal in value.
            assert sum(scores) - sum(a == b for a, b in zip(gold, other, strict=True)) == (name == "math-500")


class TestLoad:
    def test_by_name(self):
        names = ["math_reward", "accuracy_reward", "think_format_reward", "trl.rewards.think_format_reward"]
        assert load_reward_funcs(names) == [math_reward, accuracy_reward, think_format_reward, think_format_reward]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("maths", "Unknown reward function `maths`: choose from math_reward, accuracy_reward"),
            ("no_such_module.reward", "`no_such_module.reward` cannot be imported"),
            ("trl_opsd.rewards.nothing", "`trl_opsd.rewards.nothing` cannot be imported"),
            ("trl_opsd.__version__", "is a str, not a function"),
        ],
    )
    def test_unknown(self, name, message):
        with pytest.raises(UserError, match=message):
            load_reward_funcs([name])

    def test_required_columns(self):
        assert required_columns(math_reward) == {"answer"}
        assert required_columns(accuracy_reward) == {"solution"}
        assert required_columns(think_format_reward) == set()
        assert required_columns(get_soft_overlong_punishment(10, 5)) == set()
        assert required_columns(lambda prompts, completions, tests, entry_point=None, **kwargs: []) == {"tests"}
