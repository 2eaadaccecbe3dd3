"""The code verifier: does the completion's program pass its tests?"""

import functools
import json
import os
import textwrap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from ..cli import UserError
from .sandbox import SANDBOX, Limits, Verdict, available_processors, pass_without_program, run_cases, run_tests


_LANGUAGES = ("", "python", "python3", "py")
# What can come of a program that is not about the program; each is a metric
UNJUDGED = ("invalid", "vacuous", "unserved", "infrastructure")
_SERVER_WORKERS = 32

# Of tests that say what a function returns for which arguments. Names with two underscores are not the program's.
_CALLS = """
def __same__(result, wanted):
    if isinstance(result, tuple):
        result = list(result)
    if isinstance(result, list) and isinstance(wanted, list):
        return len(result) == len(wanted) and all(map(__same__, result, wanted))
    if isinstance(result, float) or isinstance(wanted, float):
        numbers = isinstance(result, (int, float)) and isinstance(wanted, (int, float))
        return numbers and (result == wanted or abs(result - wanted) <= 1e-6 * max(1, abs(wanted)))
    return result == wanted


def __function__():
    try:
        instance = Solution()
    except NameError:
        return {name}
    return instance.{name}

"""


def code_reward(
    completions: list[list[dict[str, str]]] | list[str],
    tests: list[str],
    entry_point: list[str | None] | None = None,
    setup: list[str | None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    partial_credit: bool = False,
    limits: Limits | None = None,
    num_workers: int | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that is 1.0 where the program in a completion passes its tests, and 0.0 where not.

    Programs run in a sandbox made for hostile code (see `trl_opsd.rewards.sandbox`), several at a time. What is no
    program's fault is `None`, and counted: `code_reward/invalid` is the share of completions whose tests are none or
    cannot be read, `code_reward/vacuous` of those whose tests a program passes that does nothing,
    `code_reward/unserved` of those that need what the sandbox cannot give them, `code_reward/infrastructure` of those
    that the machine was too busy for.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain. The program is what [`extract_program`]
            finds.
        tests (`list[str]`):
            Python source that raises when the program is wrong (see [`~trl_opsd.rewards.sandbox.run_tests`]); or a JSON
            object with `inputs` and `outputs`: texts, if the program reads standard input and prints, and with `fn_name`
            too, arguments and results of that function, or of that method of a class `Solution`.
        entry_point (`list[str | None]`, *optional*):
            Name of the function that is handed to the `check(candidate)` of the tests, or an expression, such as
            `Solution().add`.
        setup (`list[str | None]`, *optional*):
            Python source that comes before the program and before its tests. If it or the tests import NumPy, the program
            may do so too.
        log_extra (`Callable`, *optional*):
            Function to log extra columns to the completions table, given by the trainer.
        log_metric (`Callable`, *optional*):
            Function to log a metric, given by the trainer.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of tests that pass: of inputs, of test functions, of asserts at the top level
            of the tests and of `check`.
        limits ([`~trl_opsd.rewards.sandbox.Limits`], *optional*):
            What each program may use. Defaults to 5 seconds of processor time, 512 MiB of memory and a folder of 16 MiB.
        num_workers (`int`, *optional*):
            Programs that run at a time. Defaults to the processors that this process may use, a share of them where it
            is one of several on the machine, and to 32 on a sandbox server.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float | None]`: One score per completion, `None` where it cannot be judged.

    Raises:
        UserError: If this machine cannot isolate the programs and the user has not accepted that.

    Example:
    ```python
    >>> from trl_opsd.rewards import code_reward

    >>> completions = ["```python\ndef double(x):\n    return x + x\n```", "I cannot."]
    >>> code_reward(completions, tests=["assert double(4) == 8"] * 2)
    [1.0, 0.0]
    >>> code_reward(["```python\nprint(2 * int(input()))\n```"], tests=['{"inputs": ["4"], "outputs": ["8"]}'])
    [1.0]
    ```
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"] or "" for completion in completions
    ]
    programs = [extract_program(text) for text in texts]
    nothing = [None] * len(programs)
    jobs = zip(programs, tests, entry_point or nothing, setup or nothing, strict=True)

    def judge(job: tuple[str | None, str, str | None, str | None]) -> Verdict:
        program, source, function, before = job
        if program is None:
            return Verdict("failed", 0.0, "no program", "")
        try:
            return _judge(program, source, function, before, partial_credit, limits)
        except RuntimeError as error:  # no sandbox could be started, although one could when training began
            return Verdict("infrastructure", None, str(error)[:200], "")

    served = os.environ.get(SANDBOX, "").startswith("http")
    pool = ThreadPoolExecutor(num_workers or (_SERVER_WORKERS if served else available_processors()))
    try:
        verdicts = list(pool.map(judge, jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for what has not begun
    if log_extra is not None:
        log_extra("program", [program or "[none]" for program in programs])
        log_extra("verdict", [f"{verdict.status}: {verdict.detail or 'all tests'}" for verdict in verdicts])
    if log_metric is not None and verdicts:
        for status in UNJUDGED:
            share = sum(verdict.status == status for verdict in verdicts) / len(verdicts)
            log_metric(f"code_reward/{status}", share)
    return [verdict.score for verdict in verdicts]


def _judge(
    program: str,
    tests: str,
    entry_point: str | None,
    setup: str | None,
    partial_credit: bool,
    limits: Limits | None,
) -> Verdict:
    try:
        cases = read_cases(tests)
    except ValueError as error:
        return Verdict("invalid", None, str(error), "")
    if cases is not None and "fn_name" not in cases:
        return run_cases(program, cases["inputs"], cases["outputs"], partial_credit, limits, setup)
    tests = tests if cases is None else calls(**cases)
    verdict = run_tests(program, tests, entry_point, partial_credit, limits, setup)
    if (verdict.score or partial_credit) and _is_vacuous(f"{setup or ''}\n{tests}", entry_point, partial_credit):
        return Verdict("vacuous", None, "a program that does nothing passes these tests too", verdict.output)
    return verdict


@functools.lru_cache(maxsize=65536)
def _is_vacuous(tests: str, entry_point: str | None, partial_credit: bool) -> bool:
    # Tests that pass because they stop before the first assert have no part that passes
    ways = {partial_credit, False}
    return any(pass_without_program([tests], [entry_point], way) for way in ways)


def read_cases(tests: str) -> dict | None:
    """
    Reads tests that are inputs and outputs, in the form of APPS and TACO.

    Args:
        tests (`str`):
            Tests of a row.

    Returns:
        `dict` or `None`: `inputs`, `outputs`, and `fn_name` where there is one; `None` where the tests are Python.

    Raises:
        ValueError: If it is such an object, but there is something wrong with it.
    """
    if not tests.lstrip().startswith("{"):
        return None
    try:
        cases = json.loads(tests)
    except ValueError:
        return None
    if not isinstance(cases, dict) or not {"inputs", "outputs"} <= set(cases):
        return None
    inputs, outputs, name = cases["inputs"], cases["outputs"], cases.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise ValueError("`inputs` and `outputs` must be lists of the same length, of one at least")
    if name is not None:
        if not isinstance(name, str) or not name.isidentifier() or not all(isinstance(args, list) for args in inputs):
            raise ValueError("`fn_name` must be a name, and each of `inputs` a list of arguments")
        return {"inputs": inputs, "outputs": outputs, "fn_name": name}
    # A text, or a list of its lines
    inputs, outputs = (
        ["\n".join(text) if _are_lines(text) else text for text in texts] for texts in (inputs, outputs)
    )
    if not all(isinstance(text, str) for text in [*inputs, *outputs]):
        raise ValueError("`inputs` and `outputs` must hold texts, or lists of lines")
    return {"inputs": inputs, "outputs": outputs}


def _are_lines(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


def calls(inputs: list[list], outputs: list, fn_name: str) -> str:
    """Returns tests, as Python source, that call a function with arguments and compare its results."""
    lines = []
    for arguments, wanted in zip(inputs, outputs, strict=True):
        call = f"__function__()({', '.join(map(repr, arguments))})"
        # These sets wrap some results in a list of one, and not others
        also = f" or __same__(__result__, {wanted[0]!r})" if isinstance(wanted, list) and len(wanted) == 1 else ""
        lines.append(f"__result__ = {call}\nassert __same__(__result__, {wanted!r}){also}")
    return _CALLS.replace("{name}", fn_name) + "\n".join(lines) + "\n"


def check_tests(
    tests: Iterable[str | None],
    entry_point: Iterable[str | None] | None = None,
    setup: Iterable[str | None] | None = None,
    name: str = "the data set",
) -> None:
    """
    Checks that the tests of rows say something of a program, by running them with none.

    Args:
        tests (`Iterable[str | None]`):
            Tests of the rows.
        entry_point (`Iterable[str | None]`, *optional*):
            What is handed to their `check`.
        setup (`Iterable[str | None]`, *optional*):
            What comes before them.
        name (`str`, *optional*, defaults to `"the data set"`):
            Name of the data set, for the message.

    Raises:
        UserError: If a program that does nothing passes, naming the rows.
    """
    tests = list(tests)
    nothing = [None] * len(tests)
    sources, functions, rows, found = [], [], [], []
    for row, (text, function, before) in enumerate(
        zip(tests, entry_point or nothing, setup or nothing, strict=True), start=1
    ):
        try:
            cases = read_cases(text or "")
        except ValueError as error:
            raise UserError(f"`{name}`, row {row}: its `tests` cannot be used ({error}): correct the row.") from None
        if cases is None:
            sources.append(f"{before or ''}\n{text or ''}")
            functions.append(function)
            rows.append(row)
        elif "fn_name" not in cases and not any(text.strip() for text in cases["outputs"]):
            found.append(row)
    try:
        found += [rows[index] for index in pass_without_program(sources, functions)]
    except RuntimeError as error:
        raise UserError(f"The tests of `{name}` cannot be tried: {error}") from None
    if found:
        shown = ", ".join(map(str, sorted(found)[:5])) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"`{name}`, row {shown}: a program that does nothing passes its `tests`, so every program would: make them "
            "call the program (a `check` needs `entry_point`), or remove the row."
        )


def extract_program(text: str) -> str | None:
    """
    Returns the program of a completion: its last fenced block of Python, or all of it where there is no fence at all.

    Args:
        text (`str`):
            Text of the completion. What comes before a closing think tag is not looked at.

    Returns:
        `str` or `None`: The source, or `None` where there is none or the thinking trace is not closed. A block that is
        not closed was cut, and is none.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    program, block, fence = None, [], None
    for line in text.splitlines(keepends=True):
        mark = line.strip()
        if fence is None and mark.startswith("```"):
            fence, block = mark, []
        elif fence is not None and mark == "```":
            if fence[3:].strip().lower() in _LANGUAGES:
                program = textwrap.dedent("".join(block))
            fence = None
        elif fence is not None:
            block.append(line)
    if "```" not in text:
        program = text
    return program if program and program.strip() else None
