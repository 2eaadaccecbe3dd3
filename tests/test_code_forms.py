"""The forms that tests of code have, and what the judge cannot serve, which must never look like a wrong program."""

import json
import os

import pytest
from datasets import Dataset

from trl_opsd.cli import UserError
from trl_opsd.rewards import check_rows, code_reward, sandbox
from trl_opsd.rewards.code import read_cases
from trl_opsd.rewards.sandbox import Limits, available_memory, available_processors, run_tests, same_output


F = "def f(x):\n    return x + 1\n"
WRONG = "def f(x):\n    return x\n"
# Tests that no line of theirs runs. Before they were run, each of them gave 1.0 to any program.
WAITING = {
    "functions": "def test_one():\n    assert f(1) == 2\n",
    "functions of a module": "from solution import f\n\n\ndef test_one():\n    assert f(1) == 2\n",
    "a module": "import solution\n\n\ndef test_one():\n    assert solution.f(1) == 2\n",
    "a class": "class TestF:\n    def setup_method(self):\n        self.x = 1\n\n    def test_one(self):\n        assert f(self.x) == 2\n",
    "unittest": (
        "import unittest\n\n\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.x = 1\n\n"
        "    def test_one(self):\n        self.assertEqual(f(self.x), 2)\n"
    ),
    "unittest, with subtests": (
        "import unittest\n\n\nclass T(unittest.TestCase):\n    def test_one(self):\n        for x in (1, 2):\n"
        "            with self.subTest(x=x):\n                self.assertEqual(f(x), x + 1)\n"
    ),
    "unittest, with main": (
        "import unittest\n\n\nclass T(unittest.TestCase):\n    def test_one(self):\n        self.assertEqual(f(1), 2)\n\n\n"
        "if __name__ == '__main__':\n    unittest.main()\n"
    ),
    "parametrized": (
        "import pytest\n\n\n@pytest.mark.parametrize(('x', 'y'), [(1, 2), pytest.param(2, 3)])\n"
        "def test_one(x, y):\n    assert f(x) == y\n"
    ),
    "fixtures": (
        "import pytest\n\n\n@pytest.fixture\ndef one():\n    yield 1\n\n\n@pytest.fixture\ndef two(one):\n"
        "    return one + 1\n\n\ndef test_one(one, two, tmp_path):\n    assert f(one) == two and tmp_path.is_dir()\n"
    ),
}
VACUOUS = {
    "a check without entry_point": "def check(candidate):\n    assert candidate(1) == 2\n",
    "no assert": "x = 1\n",
    "a test that tests nothing": "def test_one():\n    pass\n",
    "a test that is skipped": "import pytest\n\n\n@pytest.mark.skip\ndef test_one():\n    assert f(1) == 2\n",
    "an end before the asserts": "import sys\n\nsys.exit(0)\nassert f(1) == 2\n",
    "a test that passes whatever happens": "try:\n    assert f(1) == 2\nexcept Exception:\n    pass\n",
}


class TestTestsThatNobodyCalls:
    @pytest.mark.parametrize("name", WAITING)
    def test_they_are_called(self, name):
        assert code_reward([F, WRONG], tests=[WAITING[name]] * 2) == [1.0, 0.0]
        assert code_reward(["pass"], tests=[WAITING[name]], partial_credit=True) == [0.0]

    @pytest.mark.parametrize("partial_credit", [False, True])
    def test_what_an_empty_program_passes_is_no_test(self, partial_credit):
        logged, verdicts = {}, {}
        tests = list(VACUOUS.values())
        scores = code_reward(
            ["pass"] * len(tests) + [F],
            tests=[*tests, "assert f(1) == 2"],
            partial_credit=partial_credit,
            log_metric=lambda name, value: logged.update({name: value}),
            log_extra=verdicts.setdefault,
        )
        assert scores == [None] * len(tests) + [1.0]
        assert logged["code_reward/vacuous"] == len(tests) / (len(tests) + 1) and logged["code_reward/unserved"] == 0.0
        assert verdicts["verdict"][0] == "vacuous: a program that does nothing passes these tests too"

    @pytest.mark.parametrize("number", [4, len(VACUOUS)])
    def test_such_rows_are_refused(self, number):
        tests = ["assert f(1) == 2"] * 60 + list(VACUOUS.values())[-number:]
        named = "61, 62, 63, 64" if number == 4 else "61, 62, 63, 64, 65, ..."
        with pytest.raises(UserError, match=f"`x.jsonl`, row {named}: a program that does nothing passes its `tests`"):
            check_rows(Dataset.from_list([{"prompt": "p", "tests": text} for text in tests]), [code_reward], "x.jsonl")

    def test_rows_of_every_form_are_looked_at(self):
        check = "def check(candidate):\n    assert candidate(1) == 2\n"
        calls = json.dumps({"inputs": [[1]], "outputs": [2], "fn_name": "f"})
        good = [
            ("assert f(1)", None),
            (check, "f"),
            (json.dumps({"inputs": ["1"], "outputs": ["2"]}), None),
            (calls, None),
        ]
        rows = [{"tests": tests, "entry_point": entry_point} for tests, entry_point in good]
        check_rows(Dataset.from_list(rows), [code_reward], "x")
        blank = {"tests": json.dumps({"inputs": ["1"], "outputs": [" \n"]}), "entry_point": None}
        with pytest.raises(UserError, match="row 5: a program that does nothing"):
            check_rows(Dataset.from_list([*rows, blank]), [code_reward], "x")
        short = {"tests": '{"inputs": ["1"], "outputs": []}', "entry_point": None}
        with pytest.raises(UserError, match="row 5: its `tests` cannot be used .*same length"):
            check_rows(Dataset.from_list([*rows, short]), [code_reward], "x")

    def test_check_is_called_once(self):
        tests = "calls = []\n\n\ndef check(candidate):\n    calls.append(0)\n    assert candidate(1) == 2 and len(calls) == 1\n"
        assert run_tests(F, tests + "\n\ncheck(f)\n", "f").status == "passed"
        assert run_tests(F, tests, "f", True).score == 1.0

    def test_partial_credit_counts_tests(self):
        tests = "def test_one():\n    assert f(1) == 2\n\n\ndef test_two():\n    assert f(2) == 9\n"
        assert run_tests(F, tests).score == 0.0
        assert run_tests(F, tests, partial_credit=True).score == 0.5
        constant = "assert True, 'a note'\nassert f(1) == 2\n"
        assert run_tests(WRONG, constant, partial_credit=True).score == 0.0


LIST = "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val = val\n        self.next = next\n"
TREE = (
    "class TreeNode:\n    def __init__(self, val=0, left=None, right=None):\n"
    "        self.val, self.left, self.right = val, left, right\n"
)
# Tests, a program that is right, and one that is wrong
SERVED = {
    "a list of nodes": (
        LIST + "l = ListNode(1, ListNode(2))\nm = reverse(l)\nassert (m.val, m.next.val, m.next.next) == (2, 1, None)",
        "def reverse(l):\n before = None\n while l: l.next, before, l = before, l, l.next\n return before",
        "def reverse(l): return l",
    ),
    "a tree, and nodes in a set": (
        TREE + "assert size(TreeNode(1, TreeNode(2), TreeNode(3))) == 3",
        "def size(t):\n seen, rest = set(), [t]\n while rest:\n  t = rest.pop()\n  if t is not None and t not in seen:\n"
        "   seen.add(t)\n   rest += [t.left, t.right]\n return len(seen)",
        "def size(t): return 1",
    ),
    "a dataclass, and its methods": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n x: int\n def twice(self): return 2 * self.x\n"
        "p = P(3)\nassert f(p) == 6 and p == P(4)",
        "def f(p):\n t = p.twice()\n p.x += 1\n return t",
        "def f(p): return p.x",
    ),
    "operators of the tests' own class": (
        "class V:\n def __init__(self, x): self.x = x\n def __add__(self, o): return V(self.x + o)\n"
        " def __eq__(self, o): return self.x == (o.x if isinstance(o, V) else o)\n def __len__(self): return self.x\n"
        "assert f(V(1)) == V(3)",
        "def f(v): return v + 2 if v == 1 and len(v) == 1 else v",
        "def f(v): return v",
    ),
    "prints": (
        "import contextlib, io\nout = io.StringIO()\nwith contextlib.redirect_stdout(out): f('a')\nassert out.getvalue() == 'a\\n'",
        "def f(x): print(x)",
        "def f(x): print(x, x)",
    ),
    "prints, for a fixture": (
        "def test_f(capsys):\n f('a')\n assert capsys.readouterr().out == 'a\\n'\n f('b')\n assert capsys.readouterr().out == 'b\\n'",
        "import sys\ndef f(x): sys.stdout.write(x + '\\n')",
        "def f(x): return x",
    ),
    "input": (
        "from unittest.mock import patch\nimport io\nwith patch('builtins.input', side_effect=['2', '3']): assert f() == 5\n"
        "with patch('sys.stdin', io.StringIO('4\\n5\\n')): assert f() == 9",
        "def f(): return int(input()) + int(input('?'))",
        "def f(): return int(input())",
    ),
    "defaultdict": (
        "from collections import defaultdict\nd = defaultdict(list)\nf(d, 1)\nassert d == {1: ['x']}",
        "def f(d, x): d[x].append('x')",
        "def f(d, x): d[x]",
    ),
    "what collections has": (
        "from collections import *\nassert f(Counter('aab'), deque([1, 2], 2), OrderedDict(a=1)) == (['a', 'a', 'b'], deque([2, 3]))",
        "def f(c, d, o):\n d.append(3)\n o.move_to_end('a')\n return sorted(c.elements()), d",
        "def f(c, d, o): return sorted(c), d",
    ),
    "a namedtuple": (
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\nq = f(P(1, 2))\nassert q == (2, 2) and q.x == 2",
        "def f(p): return p._replace(x=p.x + 1)",
        "def f(p): return p",
    ),
    "lists in lists, changed in place": (
        "m = [[1, 2], [3, 4]]\nrow = m[0]\nassert f(m) is None and m == [[3, 1], [4, 2]] and row == [3, 1]",
        "def f(m): m[:] = [list(r) for r in zip(*m[::-1])]",
        "def f(m): m.reverse()",
    ),
    "a keyword, changed in place": (
        "x = [2, 1]\nf(x=x)\nassert x == [1, 2]",
        "def f(x): x.sort()",
        "def f(x): sorted(x)",
    ),
    "exceptions of its own": (
        "import unittest\nfrom solution import *\nclass T(unittest.TestCase):\n def test(self):\n"
        "  with self.assertRaises(Poor) as caught: f(5)\n  self.assertEqual(caught.exception.need, 5)\n"
        "  self.assertEqual(str(caught.exception), 'need 5')\n  self.assertRaises(Bank, f, 1)",
        "class Bank(Exception): pass\nclass Poor(Bank):\n def __init__(self, need):\n  super().__init__(f'need {need}')\n"
        "  self.need = need\ndef f(x): raise Poor(x)",
        "class Bank(Exception): pass\nclass Poor(Bank): pass\ndef f(x): raise Bank(x)",
    ),
    "an exception and its text": (
        "try: f({})\nexcept KeyError as error: assert error.args == ('a',) and str(error) == \"'a'\"\nelse: assert False",
        "def f(d): return d['a']",
        "def f(d): raise KeyError('b')",
    ),
    "arithmetic of a class that is named": (
        "v = Vec(1, 2) * 3 + 1\nassert (v.x, v.y) == (4, 7) and 7 in v and 2 * Vec(1, 1) > 1\nwith Vec(1, 2) as w: assert w.x == 1",
        "class Vec:\n def __init__(s, x, y): s.x, s.y = x, y\n def __mul__(s, k): return Vec(s.x * k, s.y * k)\n"
        " __rmul__ = __mul__\n def __add__(s, k): return Vec(s.x + k, s.y + k)\n def __contains__(s, k): return k in (s.x, s.y)\n"
        " def __gt__(s, k): return s.x > k\n def __enter__(s): return s\n def __exit__(s, *e): pass",
        "class Vec:\n def __init__(s, x, y): s.x, s.y = x, y\n def __mul__(s, k): return s",
    ),
    "types and functions of Python": (
        "assert f(str, 3) == '3' and f(len, 'ab') == 2",
        "def f(t, x): return t(x)",
        "def f(t, x): return x",
    ),
    "a path": (
        "def test_f(tmp_path):\n (tmp_path / 'a').write_text('x')\n assert f(tmp_path / 'a') == 'x'",
        "def f(p): return p.read_text()",
        "def f(p): return p.name",
    ),
    "a mock": (
        "from unittest.mock import Mock\nm = Mock()\nm.get.return_value = 4\nassert f(m) == 4\nm.get.assert_called_once_with(3)",
        "def f(m): return m.get(3)",
        "def f(m): return m.get(4)",
    ),
    "numpy": (
        "import numpy as np\nnp.testing.assert_allclose(f(np.array([1.0, 3.0])), [2.0, 6.0])\nx = np.zeros(2)\nf(x)\n"
        "assert x[0] == 1 and f(x).dtype == np.float64 and int(f(np.arange(3))[2]) == 4",
        "import numpy\ndef f(x):\n y = 2 * numpy.asarray(x)\n x[0] = 1\n return y",
        "def f(x): return x",
    ),
}
UNSERVED = {
    "a class of the program's below one of the tests": (
        "class Dog(Animal): pass\nassert Dog().legs == 4",
        "class Animal: legs = 4",
    ),
    "a replaced name of the program's": (
        "from unittest.mock import patch, mock_open\nwith patch('builtins.open', mock_open(read_data='x')): assert f('a') == 'x'",
        "def f(p): return open(p).read()",
    ),
    "a lock": ("import threading\nassert f(threading.Lock())", "def f(l): return not l.locked()"),
    "a package that is not there": ("import pandas\nassert f(pandas)", "def f(p): return True"),
    "a fixture of a plugin": ("def test_f(mocker): assert f()", "def f(): return True"),
    "a coroutine": ("async def test_f(): assert f()", "def f(): return True"),
    "JSON of its object": ("import json\nassert json.dumps(f())", "class X(): pass\ndef f(): return X()"),
}


class TestWhatTestsDo:
    @pytest.mark.parametrize("name", SERVED)
    def test_served(self, name):
        tests, right, wrong = SERVED[name]
        logged = {}
        scores = code_reward([right, wrong], tests=[tests] * 2, log_extra=logged.setdefault)
        assert scores[0] == 1.0, logged["verdict"]
        assert not scores[1], logged["verdict"]

    @pytest.mark.parametrize("name", UNSERVED)
    def test_unserved_is_no_verdict_and_is_counted(self, name):
        tests, right = UNSERVED[name]
        logged = {}
        assert code_reward([right], tests=[tests], log_metric=lambda key, value: logged.update({key: value})) == [None]
        assert logged["code_reward/unserved"] == 1.0

    def test_setup_comes_before_both(self):
        setup = LIST + "from typing import *\ndef to_list(l): return [l.val, *to_list(l.next)] if l else []"
        program = (
            "class Solution:\n def second(self, head: Optional[ListNode]) -> ListNode: return ListNode(9, head.next)"
        )
        tests = "def check(candidate): assert to_list(candidate(head=ListNode(1, ListNode(2)))) == [9, 2]"
        columns = {"tests": [tests], "entry_point": ["Solution().second"]}
        assert code_reward([program], setup=[setup], **columns) == [1.0]
        assert code_reward([program.replace("9", "8")], setup=[setup], **columns) == [0.0]
        assert code_reward([program], setup=[None], **columns) == [0.0]

    def test_numpy_is_there_only_where_a_row_asks(self):
        program = "import numpy\nprint(int(numpy.sum([1, 2])))"
        tests = json.dumps({"inputs": [""], "outputs": ["3"]})
        assert code_reward([program] * 2, tests=[tests] * 2, setup=["import numpy", None]) == [1.0, 0.0]

    def test_what_is_hidden_of_the_tests_objects(self):
        tests = "class Case:\n def __init__(self): self._wanted = 5\n def show(self): return 0\ncase = Case()\nassert f(case) == 5"
        for way in ("case._wanted", "case.__dict__['_wanted']", "case.show.__self__._wanted", "vars(case)['_wanted']"):
            assert not run_tests(f"def f(case): return {way}", tests).score, way


class TestStandardInput:
    def reward(self, program, inputs, outputs, **more):
        return code_reward([program], tests=[json.dumps({"inputs": inputs, "outputs": outputs})], **more)[0]

    @pytest.mark.parametrize(
        "program",
        [
            "a, b = map(int, input().split())\nprint(a + b)",
            "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
            "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
            "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
            "import threading, sys\nsys.setrecursionlimit(10 ** 6)\nthreading.stack_size(1 << 26)\n"
            "threading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
            "import atexit, io, sys, os\nsys.stdout = io.StringIO()\n"
            "atexit.register(lambda: os.write(1, sys.stdout.getvalue().encode()))\nprint(sum(map(int, input().split())))",
            "print(sum(map(int, open(0).read().split())))\nraise SystemExit",
            "open('x', 'x').close()\nprint(sum(map(int, input().split())))",
        ],
    )
    def test_right(self, program):
        assert self.reward(program, ["1 2\n", "3 4"], ["3\n", "7"]) == 1.0

    @pytest.mark.parametrize(
        "program",
        [
            "pass",
            "print(3)",
            "print(7)",
            "print(sum(map(int, input().split())), 'x')",
            "print(sum(map(int, input().split())))\nraise ValueError",
            "print(sum(map(int, input().split())))\nimport sys; sys.exit(1)",
            "print(sum(map(int, input().split()))) ; print()\nprint(0)",
            "x = [",
        ],
    )
    def test_wrong(self, program):
        assert self.reward(program, ["1 2\n", "3 4"], ["3\n", "7"]) == 0.0

    def test_partial_credit(self):
        program = "x = int(input())\nprint(x if x < 3 else 1 // 0)"
        assert self.reward(program, ["1", "2", "3", "4"], ["1", "2", "3", "4"], partial_credit=True) == 0.5
        assert self.reward(program, ["1", "2", "3", "4"], ["1", "2", "3", "4"]) == 0.0

    @pytest.mark.parametrize(
        ("printed", "wanted", "same"),
        [
            ("1 2\n3\n", "1 2 \n3", True),
            ("1 2\n3\n\n", "1  2\n3\n", True),
            ("1 2 3", "1 2\n3", False),
            ("12", "1 2", False),
            ("0.3333333", "0.33333333333", True),
            ("0.3334", "0.3333", False),
            ("1e3", "1000.0", True),
            ("2", "2.0", True),
            ("2.0", "2", True),
            ("2.5", "2", False),
            ("3", "2", False),
            ("1_0", "10", False),
            ("1_0", "10.0", False),
            ("nan", "nan", True),
            ("nan", "0.5", False),
            ("inf", "1.0", False),
            ("Yes", "YES", False),
            ("", "0", False),
            ("100000000000000000000001", "100000000000000000000002", False),
        ],
    )
    def test_same_output(self, printed, wanted, same):
        assert same_output(printed, wanted) is same

    @pytest.mark.parametrize(
        ("tests", "message"),
        [
            ({"inputs": [], "outputs": []}, "same length, of one at least"),
            ({"inputs": [1], "outputs": [1]}, "must hold texts"),
            ({"inputs": [1], "outputs": [1], "fn_name": "f"}, "a list of arguments"),
            ({"inputs": [[1]], "outputs": [1], "fn_name": "f()"}, "must be a name"),
        ],
    )
    def test_mistakes(self, tests, message):
        with pytest.raises(ValueError, match=message):
            read_cases(json.dumps(tests))
        assert code_reward(["x = 1"], tests=[json.dumps(tests)]) == [None]
        assert read_cases("{1: 2}") is None and read_cases("{'inputs': f(), 'outputs': 1}") is None

    def test_calls(self):
        tests = json.dumps({"fn_name": "f", "inputs": [[[1, 2]], [[]]], "outputs": [[[2, 1.0]], []]})
        right = ["def f(x): return tuple(x[::-1])", "class Solution:\n def f(self, x): return x[::-1]"]
        wrong = ["def f(x): return x", "def f(x): return True", "class Solution: pass"]
        assert code_reward(right + wrong, tests=[tests] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


class TestABusyMachine:
    def test_processor_time_decides(self):
        """More programs at a time than processors, each of which computes for half of its limit."""
        work = "import time\ndef f():\n while time.process_time() < start + 0.3: pass\n return 1\nstart = time.process_time()"
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            limits = Limits(seconds=0.6, memory_bytes=128 << 20)
            assert code_reward([work] * 4, tests=["assert f() == 1"] * 4, num_workers=4, limits=limits) == [1.0] * 4
            late = work.replace("0.3", "0.9")
            assert code_reward([late], tests=["assert f() == 1"], limits=limits) == [0.0]
        finally:
            os.sched_setaffinity(0, before)

    @pytest.mark.slow
    def test_thirty_two_on_one_processor(self):
        work = "import time\ndef f():\n while time.process_time() < start + 0.4: pass\n return 1\nstart = time.process_time()"
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        try:
            limits = Limits(memory_bytes=128 << 20)
            assert (
                code_reward([work] * 32, tests=["assert f() == 1"] * 32, num_workers=32, limits=limits) == [1.0] * 32
            )
        finally:
            os.sched_setaffinity(0, before)

    def test_a_machine_that_is_too_busy_gives_no_verdict(self, monkeypatch):
        monkeypatch.setattr(sandbox.run, "_BACKSTOP", 0.2)
        logged = {}
        program = "import time\nwhile True: time.sleep(0.01)"
        limits = Limits(seconds=5.0)
        assert code_reward([program], tests=["f"], limits=limits, log_metric=lambda n, v: logged.update({n: v})) == [
            None
        ]
        assert logged["code_reward/infrastructure"] == 1.0

    def test_processors(self, monkeypatch, tmp_path):
        number = len(os.sched_getaffinity(0))
        monkeypatch.setattr(sandbox.limits, "_control_groups", lambda name: [])
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert available_processors() == number
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
        assert available_processors() == 64
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        assert available_processors() == 8
        (tmp_path / "below").mkdir()
        monkeypatch.setattr(sandbox.limits, "_control_groups", lambda name: [tmp_path / "below", tmp_path])
        (tmp_path / "cpu.max").write_text("1600000 100000\n")
        assert available_processors() == 2
        (tmp_path / "below" / "cpu.max").write_text("max 100000\n")
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
        assert available_processors() == 16
        (tmp_path / "cpu.max").unlink()
        (tmp_path / "cpu.cfs_quota_us").write_text("50000")
        (tmp_path / "cpu.cfs_period_us").write_text("100000")
        assert available_processors() == 1

    def test_memory_of_all_together(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sandbox.limits, "_control_groups", lambda name: [tmp_path])
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        (tmp_path / "memory.max").write_text(str(2 << 30))
        assert available_memory() == 1 << 30
        limits = Limits(memory_bytes=300 << 20)  # of which one fits
        most, listen = [], sandbox.local._listen

        def watch(*args):
            most.append(sandbox.limits.memory.held)
            return listen(*args)

        monkeypatch.setattr(sandbox.local, "_listen", watch)
        assert code_reward([F] * 3, tests=["assert f(1) == 2"] * 3, num_workers=3, limits=limits) == [1.0] * 3
        assert most and max(most) == limits.total_bytes <= available_memory() and sandbox.limits.memory.held == 0
        (tmp_path / "memory.max").write_text(str(512 << 20))
        with pytest.raises(UserError, match="may take 616 MiB, and all together 256 MiB"):
            code_reward([F], tests=["assert f(1) == 2"], limits=limits)
