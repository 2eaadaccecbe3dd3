import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from trl_opsd.rewards import code, code_reward, extract_program, load_reward_funcs, required_columns
from trl_opsd.rewards.sandbox import Limits


# In HumanEval's form, in our words: name, program, test. The full set is used where it lies beside the checkout.
OWN = [
    (
        "add",
        "def add(a, b):\n    return a + b\n",
        "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
    ),
    (
        "is_prime",
        "def is_prime(n):\n    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))\n",
        "def check(candidate):\n    assert [n for n in range(20) if candidate(n) is True] == [2, 3, 5, 7, 11, 13, 17, 19]\n",
    ),
    (
        "mean",
        "from typing import List\n\n\ndef mean(xs: List[float]) -> float:\n    return sum(xs) / len(xs)\n",
        "def check(candidate):\n    assert abs(candidate([1.0, 2.0, 4.0]) - 7 / 3) < 1e-6\n",
    ),
    (
        "count",
        "def count(text):\n    return {c: text.count(c) for c in text}\n",
        "def check(candidate):\n    assert candidate('aab') == {'a': 2, 'b': 1}\n    assert candidate('') == {}\n",
    ),
    (
        "decode",
        "def encode(text):\n    return text[::-1]\n\n\ndef decode(text):\n    return encode(text)\n",
        "def check(candidate):\n    for text in ('abc', ''):\n        assert candidate(encode(text)) == text\n",
    ),
]
HUMANEVAL = Path(__file__).parents[2] / "shared" / "data" / "humaneval" / "test.jsonl"


def fenced(program):
    return f"Here it is:\n\n```python\n{program}\n```\nDone."


def broken(name, program):
    return f"{program}\n_right = {name}\ndef {name}(*args):\n    return (_right(*args), 'broken')\n"


class TestExtractProgram:
    @pytest.mark.parametrize(
        ("text", "program"),
        [
            ("```python\nx = 1\n```", "x = 1\n"),
            ("```\nx = 1\n```", "x = 1\n"),
            ("```py\nx = 1\n```\nor\n``` Python\nx = 2\n```\n.", "x = 2\n"),
            ("```python\nx = 1\n```\nprints\n```text\n1\n```", "x = 1\n"),
            ("- so:\n  ```python\n  if x:\n      y\n  ```", "if x:\n    y\n"),
            ("```python\nx = '''\n  ```python '''\n```", "x = '''\n  ```python '''\n"),
            ("<think>\n```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2\n"),
            ("```python\nx = 1\n```\n</think>\n```python\nx = 2\n```", "x = 2\n"),
            ("<think>\n```python\nx = 1\n```\n</think>\nnothing to do ``` here", None),
            ("<think>\n```python\nx = 1\n```", None),
            ("```python\nx = 1\n```\n```python\nx = 2", "x = 1\n"),
            ("```python\nx = 1", None),
            ("```python\n\n```", None),
            ("x = 1\ny = 2", "x = 1\ny = 2"),
            (" \n", None),
            ("", None),
        ],
    )
    def test_program(self, text, program):
        assert extract_program(text) == program

    @pytest.mark.parametrize(
        "piece", ["```\n", "```python\n", "``` x\n", "```python\n\n```\n", " ", "a```", "<think>"]
    )
    def test_time_is_linear(self, piece):
        start = time.process_time()
        extract_program(piece * (1_000_000 // len(piece)))
        assert time.process_time() - start < 1


class TestCodeReward:
    def test_scores(self):
        right, wrong = fenced("def f(x):\n    return x + 1"), fenced("def f(x):\n    return x")
        completions = [right, wrong, "no", "", f"<think>{right}", right, right]
        tests = ["assert f(1) == 2"] * 5 + ["", "assert ("]
        assert code_reward(completions, tests=tests) == [1.0, 0.0, 0.0, 0.0, 0.0, None, None]
        conversational = [[{"role": "assistant", "content": text}] for text in completions]
        assert code_reward(conversational, tests=tests) == [1.0, 0.0, 0.0, 0.0, 0.0, None, None]
        assert code_reward([[{"role": "assistant", "content": None}]], tests=["pass"]) == [0.0]

    def test_lone_surrogate(self):
        assert code_reward([fenced("x = '\ud800'")], tests=["assert x == '?'"]) == [1.0]

    def test_entry_points(self):
        name, program, tests = OWN[0]
        completions, tests = [fenced(program)] * 3, [tests, tests, "assert add(1, 1) == 2"]
        assert code_reward(completions, tests=tests, entry_point=[name, "other", None]) == [1.0, 0.0, 1.0]

    def test_partial_credit(self):
        name, program, tests = OWN[0]
        half = fenced("def add(a, b):\n    return 5")
        assert code_reward([half], tests=[tests], entry_point=[name]) == [0.0]
        assert partial(code_reward, partial_credit=True)([half], tests=[tests], entry_point=[name]) == [0.5]

    def test_extra_arguments_of_the_trainer(self):
        logged = {}
        rewards = code_reward(
            prompts=["a", "b", "c"],
            completions=["def f(): return 1", "def f(): return 2", ""],
            completion_ids=[[1], [2], [3]],
            tests=["assert f() == 1"] * 3,
            log_extra=lambda name, values: logged.update({name: values}),
            trainer_state=None,
        )
        assert rewards == [1.0, 0.0, 0.0]
        assert logged == {
            "program": ["def f(): return 1", "def f(): return 2", "[none]"],
            "verdict": ["passed: all tests", "failed: AssertionError at line 1 of the tests", "failed: no program"],
        }

    def test_several_at_a_time(self, monkeypatch):
        together, run_tests = threading.Barrier(4, timeout=60), code.run_tests

        def run_when_all_are_here(*args):  # a clock would be that of a busy machine
            together.wait()
            return run_tests(*args)

        sleeps = ["import time\ntime.sleep(1)"] * 4
        with monkeypatch.context() as patch:
            patch.setattr(code, "run_tests", run_when_all_are_here)
            assert code_reward(sleeps, tests=["assert time"] * 4, num_workers=4) == [1.0] * 4
        limits = Limits(seconds=0.5)
        assert code_reward(sleeps[:1], tests=["assert time"], limits=limits) == [0.0]

    def test_lengths_differ(self):
        with pytest.raises(ValueError, match="zip"):
            code_reward(["x = 1", "x = 1"], tests=["pass"])

    def test_by_name(self):
        assert load_reward_funcs(["code_reward", "trl_opsd.rewards.code_reward"]) == [code_reward] * 2
        assert required_columns(code_reward) == {"tests"}

    def test_problems_in_the_form_of_humaneval(self):
        problems = list(OWN)
        if HUMANEVAL.is_file():  # a checkout on its own has no benchmark data
            rows = [json.loads(line) for line in HUMANEVAL.read_text().splitlines()]
            assert len(rows) == 164
            problems += [(row["entry_point"], row["prompt"] + row["canonical_solution"], row["test"]) for row in rows]
        names, programs, tests = map(list, zip(*problems, strict=True))
        right = [fenced(program) for program in programs]
        wrong = [fenced(broken(name, program)) for name, program in zip(names, programs, strict=True)]
        limits = Limits(seconds=20.0)  # a busy machine is not a wrong program
        assert code_reward(right, tests=tests, entry_point=names, limits=limits) == [1.0] * len(problems)
        assert code_reward(wrong, tests=tests, entry_point=names, limits=limits) == [0.0] * len(problems)
