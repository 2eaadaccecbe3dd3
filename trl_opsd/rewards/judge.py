"""
Judges text that a model wrote in a helper process, because it can cost any amount of time and memory to understand.

`9**9**9` blocks an interpreter inside one C call, where no Python timeout reaches it, and `signal.alarm` needs the main
thread. So the helper sets itself limits that the kernel keeps, and what is over them is killed and judged wrong: the
trainer waits for one line on a pipe, from any thread and any process. The helper imports the libraries once and forks
a child that answers, in milliseconds; a killed child is replaced by another. Where an answer is more than LaTeX that is
read, the child is replaced each time, so that no answer finds what another one has left behind.

This file is also the helper's program (run by path, so it must import nothing of this package).
"""

import ast
import atexit
import dataclasses
import functools
import importlib
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO


logger = logging.getLogger(__name__)

_CPU_SECONDS = 3  # the slowest of the MATH-500 answers takes a tenth of it
_WALL_SECONDS = 30  # only for what sleeps: CPU seconds do not depend on how busy the machine is
_MEMORY = 2 << 30
# Run by path, or in this folder, Python would take math.py here for its own.
_START = "import runpy, sys; sys.path[:] = filter(None, sys.path); runpy.run_path(sys.argv[1], run_name='__main__')"


class Unjudged(Exception):
    """The machine failed, and not the text: out of memory, stalled, or the helper process killed from outside."""


class Judge:
    """
    The helper process as this process sees it: started when first asked, and again if it is gone.

    Args:
        library (`str`):
            Module that the helper imports once, before it limits itself.

    Example:
    ```python
    >>> from trl_opsd.rewards.judge import Judge

    >>> judge = Judge("math_verify")
    >>> judge.ask("compare", [[r"\\frac{1}{2}", "0.5"]]), judge.ask("compare", [["9^{9^{9^9}}", "0.5"]])
    ([True], None)
    ```
    """

    def __init__(self, library: str):
        self._library = library
        self._forget()
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self._forget)  # a forked worker must not share its parent's pipes

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process = None

    def ask(self, question: str, *args: Any) -> Any:
        """
        Asks one question. Threads take turns.

        Args:
            question (`str`):
                Name of a function of `_QUESTIONS`.
            *args (`Any`):
                Its arguments, as JSON.

        Returns:
            `Any`: Its answer, or `None` where it took more than 3 seconds of CPU time or 2 GiB, or crashed.

        Raises:
            RuntimeError: If the helper process does not start.
            Unjudged: If the helper process was killed twice, or took more than 30 seconds of wall time and yet not
                3 of CPU time: the verdict is unknown.
        """
        line = json.dumps([question, *args]) + "\n"
        with self._lock:
            reply = self._exchange(line) or self._exchange(line)  # one that was killed is replaced once
        if not reply:
            raise Unjudged("the helper process of the verifiers was killed twice at one question")
        verdict, error, failure = json.loads(reply)
        if failure:
            raise Unjudged(failure)
        if error:
            logger.warning("A verifier failed, and its verdict is `wrong`: %s", error)
        return verdict

    def _exchange(self, line: str) -> str:
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # Ctrl-C: the next question must not be given this one's answer
            self.stop()
            raise
        if not reply:  # not the child alone but the helper is gone
            self.stop()
        return reply

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, __file__, self._library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        if self._process.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("The helper process of the verifiers does not start: its error is above.")

    def stop(self) -> None:
        """Ends the helper process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._process = None


def compare(pairs: list[list[str]]) -> list[bool]:
    """Whether math-verify takes the two LaTeX texts of each pair, answer and reference answer, for the same."""
    return [_equal(answer, gold) for answer, gold in pairs]


def _equal(answer: str, gold: str) -> bool:
    from math_verify import verify
    from sympy import Integer

    expected, found = _parse(gold), _parse(answer)
    if not expected or not found:
        return False
    equations = _equation(expected[0]), _equation(found[0])
    if None not in equations:
        return _same_equation(*equations)
    exact = isinstance(expected[0], Integer)  # six decimals would take 0.9999999 for 1
    return verify(
        expected,
        found,
        float_rounding=12 if exact else 6 + _leading_zeros(expected[0]),
        allow_set_relation_comp=True,  # `-2 < x < 7` is an interval
        timeout_seconds=None,
    )


def _equation(expression) -> Any:
    """Returns the difference of the two sides of an equation; of a chain, of its first and last part."""
    from math_verify.grader import And
    from sympy import Eq, Expr

    if isinstance(expression, Eq) and isinstance(expression.lhs, Expr) and isinstance(expression.rhs, Expr):
        return expression.lhs - expression.rhs
    if isinstance(expression, And) and all(isinstance(part, Eq) for part in expression.args):
        first, last = expression._unsorted_args[0].lhs, expression._unsorted_args[-1].rhs
        return first - last if isinstance(first, Expr) and isinstance(last, Expr) else None
    return None


def _same_equation(gold, answer) -> bool:
    """
    Whether one difference is a multiple of the other. math-verify compares what sympy solves the equations for, and
    takes any two that it solves for nothing, such as differential equations, for the same.
    """
    from sympy import Derivative, Dummy, nsimplify, simplify

    # sympy takes the derivative of a mere letter for zero
    names = {part: Dummy() for part in gold.atoms(Derivative) | answer.atoms(Derivative)}
    gold, answer = (nsimplify(side.xreplace(names).doit(), rational=True) for side in (gold, answer))
    if gold == 0 or answer == 0:
        return gold == answer
    factor = simplify(gold / answer)
    return bool(factor.is_number and factor.is_finite and factor != 0)


def _leading_zeros(expression) -> int:
    """Zeros after the decimal point: six decimals would not tell 0.0000672 from 0.0000673."""
    from sympy import Expr

    value = expression.evalf() if isinstance(expression, Expr) and expression.is_number else None
    return max(0, -math.floor(math.log10(abs(value))) - 1) if value is not None and value.is_Float and value else 0


def parse(texts: list[str]) -> list[bool]:
    """Whether math-verify understands each of some LaTeX texts."""
    return [bool(_parse(text)) for text in texts]


def reasoning_gym(task: str, answer: str, entry: dict) -> float:
    """Score that a task of reasoning-gym gives to an answer."""
    if task in ("arc_agi", "rearc"):  # they compare with tuples, which JSON made lists
        entry["metadata"]["output"] = tuple(map(tuple, entry["metadata"]["output"]))
    verifier = _verifier(task)
    try:
        return float(verifier(answer, entry))
    except (ArithmeticError, AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError):
        return 0.0  # not even of the form that the verifier expects


# Tasks whose verifiers hand the answer to `eval` for a list
_EVALUATING = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
# What an answer that sympy reads may call: sympy turns a text into Python source and evaluates it.
_CONSTRUCTORS = {"Symbol", "Integer", "Float", "Rational", "Function", "factorial"}
_FUNCTIONS = {
    *("Abs", "E", "I", "Pow", "abs", "acos", "acosh", "acot", "asin", "asinh", "atan", "atanh", "cbrt", "cos", "cosh"),
    *("cot", "csc", "erf", "exp", "expint", "gamma", "li", "ln", "log", "root", "sec", "sign", "sin", "sinh", "sqrt"),
    *("tan", "tanh", "Ei", "Si", "Ci", "Shi", "Chi", "fresnelc", "fresnels"),
}
_ARITHMETIC = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Constant, ast.Name, ast.Load),
    *(ast.Call, ast.Tuple, ast.keyword),
)


@functools.cache
def _verifier(task: str) -> Callable[[str, dict], float]:
    from reasoning_gym import get_score_answer_fn
    from sympy.parsing import sympy_parser

    verifier = get_score_answer_fn(task)
    if task in _EVALUATING:
        sys.modules[verifier.__module__].eval = ast.literal_eval
    if sympy_parser.eval_expr is not _eval_arithmetic:
        _eval_arithmetic.trusting = sympy_parser.eval_expr
        sympy_parser.eval_expr = _eval_arithmetic
    return verifier


def _eval_arithmetic(code: str, local_dict: dict, global_dict: dict) -> Any:
    """In place of sympy's `eval_expr`: an answer is arithmetic, and whatever else it is, is not evaluated."""
    for node in ast.walk(ast.parse(code.strip(), mode="eval")):
        if not isinstance(node, _ARITHMETIC):
            raise ValueError(f"an answer has a {type(node).__name__}")
        if isinstance(node, ast.Call):
            function = node.func.func if isinstance(node.func, ast.Call) else node.func  # Function('f')(x)
            name = function.id if isinstance(function, ast.Name) else None
            if name not in _CONSTRUCTORS | _FUNCTIONS:
                raise ValueError(f"an answer calls {name}")
    return _eval_arithmetic.trusting(code, local_dict, global_dict)


_QUESTIONS = {function.__name__: function for function in (compare, parse, reasoning_gym)}


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list:
    # LaTeX only: math-verify hands plain expressions to Python's eval
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex

    normalization = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)  # `6m` is not 6
    extraction = (LatexExtractionConfig(False, boxed_match_priority=0, normalization_config=normalization),)
    return parse_latex(
        f"\\boxed{{{text}}}", extraction_config=extraction, fallback_mode="no_fallback", parsing_timeout=None
    )


def _serve() -> None:
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # the pipe is for answers alone
    logging.disable()  # math-verify warns that its own timeouts are off
    importlib.import_module(sys.argv[2])

    for name in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT):  # the parent may have ignored them
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    output.write("ready\n")
    child = None
    for line in sys.stdin:  # until the trainer is gone, or has closed the pipe
        question, *args = json.loads(line)
        if question == "reasoning_gym":
            _verifier(args[0])  # once, and not in each child: some take seconds
        child = child or _Child(output)
        reply = child.answer(line)
        if question == "reasoning_gym" or child.gone:
            child.end()  # no answer is scored where another one has been
            child = None
        output.write(reply)


class _Child:
    """A fork of the helper that answers questions, over pipes of its own: it cannot write what others are told."""

    def __init__(self, output: TextIO):
        asked, asks = os.pipe()
        replies, replied = os.pipe()
        self.pid, self.gone = os.fork(), False
        if self.pid == 0:
            for number in (asks, replies, output.fileno()):
                os.close(number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            _answer(os.fdopen(asked), os.fdopen(replied, "w", buffering=1))
            os._exit(0)
        os.close(asked)
        os.close(replied)
        self.asks, self.replies = os.fdopen(asks, "w", buffering=1), os.fdopen(replies)

    def answer(self, line: str) -> str:
        try:
            self.asks.write(line)
        except BrokenPipeError:
            pass
        reply = self.replies.readline()
        if reply.endswith("\n"):
            return reply
        self.gone = True
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        # What a text brings on itself is a verdict; what only somebody else does to a process is none.
        outside = {-signal.SIGKILL: "killed, as where a machine is out of memory", -signal.SIGTERM: "terminated"}
        outside[-signal.SIGALRM] = f"stalled for {_WALL_SECONDS} seconds"
        return json.dumps([None, None, outside.get(status)]) + "\n"

    def end(self) -> None:
        if not self.gone:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        try:
            self.asks.close()
        except BrokenPipeError:
            pass
        self.replies.close()


def _answer(lines: TextIO, output: TextIO) -> None:
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in lines:
        question, *args = json.loads(line)
        signal.alarm(_WALL_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        verdict = error = None
        try:
            verdict = _QUESTIONS[question](*args)
        except (MemoryError, RecursionError):
            pass
        except BaseException as exception:  # whatever a text makes them raise, the next one is to be judged
            error = repr(exception)[:500]
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        output.write(json.dumps([verdict, error, None]) + "\n")


def _refuse(event: str, args: tuple) -> None:
    """Answers are data, and no verifier runs them. Were one to, this is no sandbox, but it ends the obvious."""
    harmless = ("os.listdir", "os.scandir", "os.walk")  # importing looks into folders
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    kinds = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "signal.", "tempfile.", "pty.")
    if writes or (event.startswith(kinds) and event not in harmless):
        raise PermissionError(f"an answer asked for {event}")


if __name__ == "__main__":
    _serve()
