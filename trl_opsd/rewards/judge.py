"""
Judges text that a model wrote in a helper process, because it can cost any amount of time and memory to understand.

`9**9**9` blocks an interpreter inside one C call, where no Python timeout reaches it, and `signal.alarm` needs the main
thread. So the helper sets itself limits that the kernel keeps, and what is over them is killed and judged wrong: the
trainer waits for one line on a pipe, from any thread and any process. The helper imports the libraries once and forks
a child that answers; a killed child is replaced by another fork, in milliseconds.

This file is also the helper's program (run by path, so it must import nothing of this package).
"""

import atexit
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
    >>> judge.ask("equal", r"\\frac{1}{2}", "0.5"), judge.ask("equal", "9^{9^{9^9}}", "0.5")
    (True, None)
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
            `Any`: Its answer, or `None` where it took more than 3 seconds of CPU time, 30 of wall time or 2 GiB, or
            died otherwise.

        Raises:
            RuntimeError: If the helper process does not start.
        """
        line = json.dumps([question, *args]) + "\n"
        with self._lock:
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
        verdict, error = json.loads(reply) if reply else (None, None)
        if error:
            logger.warning("A verifier failed, and its verdict is `wrong`: %s", error)
        return verdict

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


def equal(answer: str, gold: str) -> bool:
    """Whether math-verify takes two LaTeX texts for the same."""
    from math_verify import verify

    gold_parsed = _parse(gold)
    return verify(
        gold_parsed,
        _parse(answer),
        float_rounding=6 + _leading_zeros(gold_parsed[0]),
        allow_set_relation_comp=True,  # `-2 < x < 7` is an interval
        timeout_seconds=None,
    )


def _leading_zeros(expression) -> int:
    """Zeros after the decimal point: six decimals would not tell 0.0000672 from 0.0000673."""
    from sympy import Expr

    value = expression.evalf() if isinstance(expression, Expr) and expression.is_number else None
    return max(0, -math.floor(math.log10(abs(value))) - 1) if value is not None and value.is_Float and value else 0


def parses(gold: str) -> bool:
    """Whether math-verify understands a LaTeX text."""
    return bool(_parse(gold))


def reasoning_gym(task: str, answer: str, entry: dict) -> float:
    """Score that a task of reasoning-gym gives to an answer."""
    if task in ("arc_agi", "rearc"):  # they compare with tuples, which JSON made lists
        entry["metadata"]["output"] = tuple(map(tuple, entry["metadata"]["output"]))
    verifier = _verifier(task)
    try:
        return float(verifier(answer, entry))
    except (ArithmeticError, AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError):
        return 0.0  # not even of the form that the verifier expects


@functools.cache
def _verifier(task: str) -> Callable[[str, dict], float]:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(task)


_QUESTIONS = {function.__name__: function for function in (equal, parses, reasoning_gym)}


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list:
    # LaTeX only: math-verify hands plain expressions to Python's eval
    from math_verify import LatexExtractionConfig, parse

    extraction = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)
    return parse(f"\\boxed{{{text}}}", extraction_config=extraction, fallback_mode="no_fallback", parsing_timeout=None)


def _serve() -> None:
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # the pipe is for answers alone
    logging.disable()  # math-verify warns that its own timeouts are off
    importlib.import_module(sys.argv[2])

    for name in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGPIPE):  # the parent may have ignored them
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    output.write("ready\n")
    while True:
        child = os.fork()
        if child == 0:
            _answer(output)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:  # the trainer is gone, or has closed the pipe
            return
        output.write("[null, null]\n")


def _answer(output: TextIO) -> None:
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
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
        output.write(json.dumps([verdict, error]) + "\n")


def _refuse(event: str, args: tuple) -> None:
    """Some verifiers of reasoning-gym hand the answer to `eval`. This is no sandbox, but it ends the obvious."""
    harmless = ("os.listdir", "os.scandir", "os.walk")  # importing looks into folders
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    kinds = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "signal.", "tempfile.", "pty.")
    if writes or (event.startswith(kinds) and event not in harmless):
        raise PermissionError(f"an answer asked for {event}")


if __name__ == "__main__":
    _serve()
