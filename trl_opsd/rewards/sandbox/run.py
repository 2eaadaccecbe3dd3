"""Runs a program with its tests, where the user wants that, and makes a verdict of what comes of it."""

import ast
import functools
import importlib.util
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ...cli import UserError
from .backend import SANDBOX, UNSAFE, VERDICT_BYTES, Collected
from .limits import MIB, Limits, available_processors, memory
from .local import on_this_machine
from .server import on_server


# Wall time, in units of the processor time that a program may use: a busy machine makes it wait, and only so much later is
# the wait ended, without a verdict
_BACKSTOP = 20
_INPUT_BYTES = 16 * MIB
# Top-level modules beside the standard library that a row may ask for, and what each consists of
_PACKAGES = {
    "numpy": ("numpy", "numpy.libs"),
    "pytest": ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py"),
}
_CHUNK = 50  # rows whose tests one sandbox looks at


@dataclass(frozen=True)
class Verdict:
    """
    What came out of one program.

    Args:
        status (`str`):
            `"passed"`, `"failed"`, `"timeout"`, `"output"` (it wrote too much); or without a score `"invalid"` (there are
            no tests, or they are not Python), `"vacuous"` (a program that does nothing passes them too), `"unserved"`
            (they need what the sandbox cannot give them) or `"infrastructure"` (the machine was too busy, or ended it).
        score (`float` or `None`):
            1.0 when the tests pass, else 0.0, or with partial credit the share that passes. `None` where it cannot be
            judged.
        detail (`str` or `None`):
            Why it did not pass, in a few words.
        output (`str`):
            What the program and its tests printed.
    """

    status: str
    score: float | None
    detail: str | None
    output: str


def run_tests(
    program: str,
    tests: str,
    entry_point: str | None = None,
    partial_credit: bool = False,
    limits: Limits | None = None,
    setup: str | None = None,
) -> Verdict:
    """
    Runs a program, and then tests that use it, in a sandbox of their own.

    Args:
        program (`str`):
            Python source, not trusted. It is a module called `solution`, not `__main__`.
        tests (`str`):
            Python source that raises when the program is wrong. It uses the program's functions by their names, or
            imports them from `solution`. Functions called `test...`, classes of them and of `unittest` are run, with
            pytest's marks `parametrize` and `skip`, the fixtures `capsys`, `monkeypatch` and `tmp_path`, and its own.
        entry_point (`str`, *optional*):
            Name of the function that is handed to `check`, if the tests define one and do not call it themselves; or
            an expression, such as `Solution().add`.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of tests that pass: of asserts at the top level and of `check`, and of test
            functions.
        limits ([`Limits`], *optional*):
            What it may use. Defaults to `Limits()`.
        setup (`str`, *optional*):
            Python source that comes before both the program and the tests: imports and classes that the prompt promises.

    Returns:
        [`Verdict`]: The verdict, after everything that was started has ended.

    Raises:
        UserError: If this machine cannot isolate the program and the user has not accepted that.

    Example:
    ```python
    >>> from trl_opsd.rewards.sandbox import run_tests

    >>> run_tests("def double(x):\\n    return x + x", "assert double(4) == 8").status
    'passed'
    ```
    """
    limits, setup = limits or Limits(), setup or ""
    packages, missing = _packages(setup, tests)
    if missing:
        return Verdict("unserved", None, f"the tests import {missing}, which the sandbox does not have", "")
    config = {"mode": "tests", "entry_point": entry_point, "partial_credit": partial_credit, "packages": packages}
    collected = Collected()
    output = _exchange(config, {"setup": setup, "program": program, "tests": tests}, limits, collected)
    last = collected.last
    if last["status"] == "stopped":
        return _stopped(last["detail"], output)
    return Verdict(**last, output=output)


def run_cases(
    program: str,
    inputs: list[str],
    outputs: list[str],
    partial_credit: bool = False,
    limits: Limits | None = None,
    setup: str | None = None,
) -> Verdict:
    r"""
    Runs a program that reads standard input and prints, once for each input, and compares what it prints.

    Lines are compared after each other, without empty ones at the end, and in a line what stands between spaces: as
    text, or as numbers that differ by a millionth at most where the wanted one has a decimal point. The program never
    meets what it should print: that stays in this process.

    Args:
        program (`str`):
            Python source, not trusted, run as `__main__`.
        inputs (`list[str]`):
            What it reads, in each run.
        outputs (`list[str]`):
            What it should print.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of inputs with the right output.
        limits ([`Limits`], *optional*):
            What it may use. Defaults to `Limits()`.
        setup (`str`, *optional*):
            Python source that comes before the program.

    Returns:
        [`Verdict`]: The verdict, after everything that was started has ended.

    Raises:
        UserError: If this machine cannot isolate the program and the user has not accepted that.

    Example:
    ```python
    >>> from trl_opsd.rewards.sandbox import run_cases

    >>> run_cases("print(int(input()) * 2)", ["4\n"], ["8"]).status
    'passed'
    ```
    """
    limits, setup = limits or Limits(), setup or ""
    packages, missing = _packages(setup, "")
    if missing:
        return Verdict("unserved", None, f"the row asks for {missing}, which the sandbox does not have", "")
    if not inputs or len(inputs) != len(outputs):
        return Verdict("invalid", None, f"{len(inputs)} inputs and {len(outputs)} outputs", "")
    if not any(text.strip() for text in outputs):
        return Verdict("vacuous", None, "no output is wanted: a program that does nothing passes", "")
    encoded = [_encode(text) for text in inputs]
    if max(map(len, encoded)) > min(_INPUT_BYTES, limits.folder_bytes):
        return Verdict("invalid", None, "an input is larger than the folder", "")
    config = {
        "mode": "cases",
        "partial_credit": partial_credit,
        "packages": packages,
        "input_bytes": [len(data) for data in encoded],
        "case_bytes": limits.output_bytes + 2 * max(len(text.encode()) for text in outputs),
    }
    passed, first = 0, None

    def case(message: dict) -> bool:
        nonlocal passed, first
        if message["status"] != "case":
            return True
        number = case.count = case.count + 1
        is_right = message["ended"] == "done" and same_output(message["printed"], outputs[number - 1])
        passed += is_right
        if not is_right and first is None:
            first = (message["ended"], number)
        return is_right or partial_credit

    case.count = 0
    collected = Collected(case, config["case_bytes"] * 6 + VERDICT_BYTES)
    output = _exchange(config, {"setup": setup, "program": program}, limits, collected, encoded)
    last = collected.last
    if last["status"] == "stopped" and last["detail"] not in ("timeout", "output", "mess"):
        return _stopped(last["detail"], output)
    if first is not None and first[0] == "killed":
        return _stopped("killed", output)
    score = passed / len(outputs)
    if score == 1:
        return Verdict("passed", 1.0, None, output)
    if first is None:
        first = (last["detail"] if last["status"] == "stopped" else "error", min(case.count + 1, len(outputs)))
    reason = {
        "mess": "files that cannot be removed",
        "done": "another output",
        "error": "an error",
        "timeout": "the time was up",
        "output": "too much output",
    }
    status = first[0] if first[0] in ("timeout", "output") else "failed"
    score = score if partial_credit else 0.0
    return Verdict(status, score, f"{reason[first[0]]} for input {first[1]} of {len(outputs)}", output)


def pass_without_program(
    tests: list[str], entry_points: list[str | None], partial_credit: bool = False, limits: Limits | None = None
) -> list[int]:
    """
    Finds tests that a program passes which does nothing: they say nothing of any program.

    Args:
        tests (`list[str]`):
            Python source, as for [`run_tests`].
        entry_points (`list[str | None]`):
            What is handed to their `check`.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether a part of the score counts too.
        limits ([`Limits`], *optional*):
            What each may use. Defaults to `Limits()`.

    Returns:
        `list[int]`: Their positions.
    """
    limits = limits or Limits()
    packages = _packages("", "import numpy, pytest")[0]

    def look(start: int) -> list[int]:
        encoded = [_encode(text) for text in tests[start : start + _CHUNK]]
        config = {
            "mode": "nothing",
            "entry_points": entry_points[start : start + _CHUNK],
            "partial_credit": partial_credit,
            "packages": packages,
            "tests_bytes": [len(data) for data in encoded],
            "test_seconds": limits.seconds,
        }
        collected = Collected()
        patient = replace(limits, seconds=60 + limits.seconds * len(encoded))
        _exchange(config, {}, patient, collected, encoded)
        if collected.last["status"] == "stopped":
            raise RuntimeError(f"The sandbox was stopped ({collected.last['detail']}) while it looked at the tests.")
        return [start + index for index in collected.last["passing"]]

    with ThreadPoolExecutor(available_processors()) as pool:
        return [index for found in pool.map(look, range(0, len(tests), _CHUNK)) for index in found]


def same_output(printed: str, wanted: str) -> bool:
    """Whether two texts are the same to a judge of programs: see [`run_cases`]."""
    lines, others = printed.rstrip().splitlines(), wanted.rstrip().splitlines()
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(line: str, other: str) -> bool:
    if line == other:
        return True
    words, others = line.split(), other.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if max(len(word), len(wanted)) > 40 or not wanted[-1:].isdigit() or not word[-1:].isdigit() or not word.isascii():
        return False  # `float` takes the digits of every alphabet
    try:
        number, target = float(word), float(wanted)
    except ValueError:
        return False
    if "_" in word or not any(mark in wanted for mark in ".eE"):
        return "_" not in word and "." in word and number.is_integer() and f"{number:.0f}" == wanted
    return math.isclose(number, target, rel_tol=1e-6, abs_tol=1e-6)


# ---------------------------------------------------------------------------------------------------------- backends


def require_isolation() -> None:
    """
    Checks that programs can be isolated as the user wants it, by doing it once.

    Raises:
        UserError: If they cannot.
    """
    verdict = run_tests("", "pass")
    if verdict.status == "infrastructure":
        raise UserError(f"No program can be judged here ({verdict.detail}): correct {SANDBOX}, or what it names.")


def _exchange(
    config: dict,
    parts: dict[str, str],
    limits: Limits,
    collected: Collected,
    more: list[bytes] | None = None,
    backend: str | None = None,
) -> str:
    """
    Has a sandbox do what `config` says, and returns what was printed there. Without a `backend` it is the user's, and an
    error if that refuses.
    """
    is_asked_for = backend is None
    backend = backend or os.environ.get(SANDBOX) or "namespaces"
    if not sys.platform.startswith("linux"):
        raise UserError(f"Code is only run in a sandbox on Linux, and this is {sys.platform}: use a Linux machine.")
    encoded = {name: _encode(text) for name, text in parts.items()}
    config = {
        "seconds": limits.seconds,
        "isolated": backend == "namespaces",
        "wipes": True,
        "folder": None,
        "proc": None,
        "parent": os.getpid(),
        "wall_seconds": _BACKSTOP * limits.seconds,
        "cpu_seconds": int(limits.seconds) + 1,
        "memory_bytes": limits.memory_bytes,
        "folder_bytes": limits.folder_bytes,
        "threads": limits.threads,
        "open_files": limits.open_files,
        "output_bytes": limits.output_bytes,
        "entry_point": None,
        "partial_credit": False,
        "packages": [],
        **config,
        **{f"{name}_bytes": len(data) for name, data in encoded.items()},
    }
    body = b"".join([*encoded.values(), *(more or [])])
    if backend.startswith(("http://", "https://")):
        output = on_server(backend, config, body, limits, collected)
    elif backend in ("namespaces", "bubblewrap", UNSAFE):
        with memory.hold(limits.total_bytes):
            output = on_this_machine(backend, config, body, limits, collected)
    else:
        raise UserError(
            f"{SANDBOX} is `{backend}`: set it to namespaces, bubblewrap, {UNSAFE}, or the http:// address of a sandbox "
            "server."
        )
    if collected.last is None:
        if collected.is_started:
            collected.last = {"status": "stopped", "detail": "killed"}
        else:
            raise RuntimeError(f"The sandbox did not start: {(output.splitlines() or ['it said nothing'])[-1]}.")
    if is_asked_for and collected.last["status"] == "refused":
        raise UserError(_refused(backend, collected.last["detail"]))
    return output


def _refused(backend: str, reason: str) -> str:
    """Says what is in the way, and which other way works here, having tried it."""
    ways = []
    for other in ("namespaces", "bubblewrap"):
        if other != backend:
            collected = Collected()
            try:
                parts = {"setup": "", "program": "", "tests": "pass"}
                _exchange({"mode": "tests"}, parts, Limits(), collected, backend=other)
                problem = collected.last.get("detail")
            except RuntimeError as error:
                problem = str(error)
            ways.append(
                f"{SANDBOX}={other} works here"
                if problem is None
                else f"{SANDBOX}={other} does not either ({problem})"
            )
    what = {
        "namespaces": "This machine does not let programs be isolated",
        "bubblewrap": "bubblewrap does not isolate programs here",
    }.get(backend, f"`{backend}` cannot judge programs")
    return (
        f"{what} ({reason}). {'; '.join(ways)}. Or allow user namespaces (Linux 5.14 or newer), or start a sandbox "
        f"server elsewhere and set {SANDBOX}=http://HOST:PORT, or accept programs with this user's rights over its files "
        f"by {SANDBOX}={UNSAFE}."
    )


def _stopped(reason: str, output: str) -> Verdict:
    if reason == "timeout":
        return Verdict("timeout", 0.0, "the time was up", output)
    if reason == "output":
        return Verdict("output", 0.0, "too much output", output)
    why = {"starved": "the machine was too busy", "killed": "the machine ended it"}.get(reason, reason)
    return Verdict("infrastructure", None, why, output)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate cannot be written, and no Python source has one


def _packages(*sources: str) -> tuple[list[str], str | None]:
    """Folders of the packages that some sources import, and the first import that there is nothing for."""
    found, missing = [], None
    for name in sorted(set().union(*map(_imports, sources))):
        if name in sys.stdlib_module_names or name == "solution":
            continue
        spec = importlib.util.find_spec(name) if name in _PACKAGES else None
        if spec is None or spec.origin is None:
            missing = missing or name
            continue
        site = Path(spec.origin).parents[1]
        found += [os.path.realpath(site / part) for part in _PACKAGES[name] if (site / part).exists()]
    return found, missing


@functools.lru_cache(maxsize=4096)
def _imports(source: str) -> frozenset[str]:
    if "import" not in source:
        return frozenset()
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "solution" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return frozenset(name.partition(".")[0] for name in names)
