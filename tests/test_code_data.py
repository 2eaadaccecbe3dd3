"""Sources of programming problems: rows in the form that each has, written here, judged from beginning to end."""

import base64
import json
import logging
import pickle
import zlib

import pytest

from trl_opsd.cli import UserError
from trl_opsd.data import load_prompts
from trl_opsd.rewards import check_rows, code_reward


SUMS = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
DOUBLE = "class Solution:\n    def double(self, x: int) -> int:\n        return 2 * x"


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


APPS = {
    "problem_id": 0,
    "question": "Add the numbers.\n\n-----Input-----\n\nNumbers.\n\n-----Output-----\n\nTheir sum.",
    "solutions": json.dumps([SUMS]),
    "input_output": json.dumps({"inputs": ["1 2\n", ["3 4", "5"]], "outputs": ["3\n", ["12"]]}),
    "difficulty": "introductory",
    "url": "https://example.org/0",
    "starter_code": "",
}
APPS_CALLS = {
    **APPS,
    "question": "Double a number.",
    "solutions": json.dumps([DOUBLE]),
    "input_output": json.dumps({"fn_name": "double", "inputs": [[2], [-1]], "outputs": [[4], -2]}),
    "starter_code": "\nclass Solution:\n    def double(self, x: int) -> int:\n        ",
}
TACO = {
    **{key: value for key, value in APPS.items() if key != "problem_id"},
    "difficulty": "EASY",
    "raw_tags": "['math']",
    "name": None,
    "source": "codeforces",
    "tags": "['Mathematics']",
    "skill_types": "[]",
    "Expected Auxiliary Space": None,
    "time_limit": "1.0 seconds",
    "date": "2019-12-31",
    "picture_num": "0",
    "memory_limit": "256.0 megabytes",
    "Expected Time Complexity": None,
}
CODE_CONTESTS = {
    "name": "1_A. Sum",
    "description": "Add the numbers.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["3 4\n"], "output": ["7\n"]},
    "generated_tests": {"input": [], "output": []},
    "source": 2,
    "difficulty": 7,
    "solutions": {"language": [2, 3], "solution": ["int main() {}", SUMS]},
    "incorrect_solutions": {"language": [3], "solution": ["print(3)"]},
    "cf_contest_id": 1,
    "time_limit": {"seconds": 1, "nanos": 0},
    "memory_limit_bytes": 256000000,
    "input_file": "",
    "output_file": "",
}
LIVECODEBENCH = {
    "question_title": "Sum",
    "question_content": "Add the numbers.",
    "platform": "atcoder",
    "question_id": "abc1_a",
    "contest_id": "abc1",
    "contest_date": "2025-01-04T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "3 4\n", "output": "7\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
LIVECODEBENCH_CALLS = {
    **LIVECODEBENCH,
    "question_content": "Put b behind a.",
    "platform": "leetcode",
    "starter_code": "class Solution:\n    def join(self, a: List[int], b: str) -> List:\n        ",
    "public_test_cases": json.dumps([{"input": '[1, 2]\n"x"', "output": '[1, 2, "x"]', "testtype": "functional"}]),
    "private_test_cases": packed([{"input": '[]\n"y"', "output": '["y"]', "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "join"}),
}
KODCODE = {
    "version": "v1.0",
    "style": "instruct",
    "subset": "Prefill",
    "question_id": "Prefill_1_I",
    "question": "Write a function that divides, and refuses zero.",
    "solution": "def divide(a, b):\n    if b == 0:\n        raise ValueError('zero')\n    return a / b",
    "test": (
        "import pytest\nfrom solution import divide\n\n\ndef test_divide():\n    assert divide(6, 4) == pytest.approx(1.5)\n\n\n"
        "def test_zero():\n    with pytest.raises(ValueError, match='zero'):\n        divide(1, 0)"
    ),
    "test_info": [
        {
            "docstring": "Divides.",
            "function_declaration": "def divide(a, b):",
            "function_name": "divide",
            "parameter_list": "(a, b)",
        }
    ],
    "gpt_pass_percentage": 1.0,
}
LEETCODE = {
    "task_id": "reverse-linked-list",
    "question_id": 206,
    "difficulty": "Easy",
    "tags": ["Linked List"],
    "problem_description": "Reverse a list.",
    "starter_code": "class Solution:\n    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        ",
    "prompt": (
        "import collections, functools, math, random, string\nfrom typing import *\n\n\nclass ListNode:\n"
        "    def __init__(self, val=0, next=None):\n        self.val = val\n        self.next = next\n\n\n"
        "def list_node(values):\n    if not values:\n        return None\n    head = ListNode(values[0])\n    p = head\n"
        "    for val in values[1:]:\n        node = ListNode(val)\n        p.next = node\n        p = node\n    return head\n\n\n"
        "def is_same_list(p1, p2):\n    if p1 is None and p2 is None:\n        return True\n    if not p1 or not p2:\n"
        "        return False\n    return p1.val == p2.val and is_same_list(p1.next, p2.next)\n"
    ),
    "completion": (
        "class Solution:\n    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:\n        before = None\n"
        "        while head:\n            head.next, before, head = before, head, head.next\n        return before"
    ),
    "entry_point": "Solution().reverse",
    "test": (
        "def check(candidate):\n    assert is_same_list(candidate(head = list_node([1, 2, 3])), list_node([3, 2, 1]))\n"
        "    assert is_same_list(candidate(head = list_node([])), list_node([]))"
    ),
    "input_output": [{"input": "head = [1,2,3]", "output": "[3,2,1]"}],
    "query": "?",
    "response": "!",
}
# Of each: the raw row, and a program that is wrong in a way in which the tests must tell
ROWS = {
    "apps": (APPS, "print(3)"),
    "apps, calls": (APPS_CALLS, "class Solution:\n    def double(self, x): return 4"),
    "taco": (TACO, "print(input())"),
    "code-contests": (CODE_CONTESTS, "print(3)"),
    "livecodebench": (LIVECODEBENCH, "print(3)"),
    "livecodebench, calls": (LIVECODEBENCH_CALLS, "class Solution:\n    def join(self, a, b): return [1, 2, 'x']"),
    "kodcode": (KODCODE, "def divide(a, b): return a / b"),
    "leetcode": (LEETCODE, "class Solution:\n    def reverse(self, head): return head"),
}
# LiveCodeBench has no solutions
SOLUTIONS = {
    "livecodebench": SUMS,
    "livecodebench, calls": "class Solution:\n    def join(self, a, b): return [*a, b]",
}


def load(tmp_path, name, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = name.partition(",")[0]
    return load_prompts(f"{source}:{path}", "test" if source == "livecodebench" else "train", ["tests"])


@pytest.mark.parametrize("name", ROWS)
def test_a_source_is_judged(name, tmp_path):
    raw, wrong = ROWS[name]
    dataset = load(tmp_path, name, raw)
    check_rows(dataset, [code_reward], name)
    (row,) = dataset
    solution = row.get("solution") or f"```python\n{SOLUTIONS[name]}\n```"
    completions = [solution, f"```python\n{wrong}\n```", "```python\npass\n```"]
    columns = {key: [row[key]] * 3 for key in ("tests", "entry_point", "setup") if key in row}
    assert code_reward(completions, **columns) == [1.0, 0.0, 0.0]
    prompt = row["prompt"][0]["content"]
    assert raw.get("starter_code", "").strip() in prompt and "incorrect_solutions" not in row
    assert ("standard input" in prompt) == (name in ("apps", "taco", "code-contests", "livecodebench"))


def test_rows_that_nothing_could_judge_are_counted_and_left_out(tmp_path, caplog):
    empty = {**APPS, "input_output": ""}
    silent = {**APPS, "input_output": json.dumps({"inputs": ["1"], "outputs": ["\n"]})}
    huge = {**APPS, "input_output": '{"inputs": [[' + "9" * 5000 + ']], "outputs": [1], "fn_name": "f"}'}
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, "apps", APPS, empty, silent, huge)) == 1
    assert "3 rows of `apps:" in caplog.text and "row 2: it has no tests" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, "code-contests", CODE_CONTESTS, {**CODE_CONTESTS, "input_file": "a.txt"})) == 1
    with pytest.raises(UserError, match="has no rows"):
        load(tmp_path, "apps", empty)


def test_a_pickle_that_is_no_text_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "gone"), "w"))

    hidden = base64.b64encode(zlib.compress(pickle.dumps(Attack()))).decode()
    with pytest.raises(UserError, match="row 1: not a row of this source .*name"):
        load(tmp_path, "livecodebench", {**LIVECODEBENCH, "private_test_cases": hidden})
    assert not (tmp_path / "gone").exists()
    with pytest.raises(UserError, match="row 1: not a row of this source"):
        load(tmp_path, "livecodebench", {**LIVECODEBENCH, "private_test_cases": "AAAA"})
