"""The code verifier: does the completion's program pass its tests?"""

import os
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from .sandbox import Limits, Verdict, run_tests


_LANGUAGES = ("", "python", "python3", "py")


def code_reward(
    completions: list[list[dict[str, str]]] | list[str],
    tests: list[str],
    entry_point: list[str | None] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    partial_credit: bool = False,
    limits: Limits | None = None,
    num_workers: int | None = None,
    **kwargs,
) -> list[float | None]:
    """
    Reward function that is 1.0 where the program in a completion passes its tests, and 0.0 where not.

    Programs run in a sandbox made for hostile code (see `trl_opsd.rewards.sandbox`), several at a time.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain. The program is what [`extract_program`]
            finds.
        tests (`list[str]`):
            Python source that raises when the program is wrong.
        entry_point (`list[str | None]`, *optional*):
            Name of the function that is handed to the `check(candidate)` of the tests.
        log_extra (`Callable`, *optional*):
            Function to log extra columns to the completions table, given by the trainer.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of asserts at the top level of the tests, and of `check`, that pass.
        limits ([`~trl_opsd.rewards.sandbox.Limits`], *optional*):
            What each program may use. Defaults to 5 seconds, 512 MiB of memory and a folder of 16 MiB.
        num_workers (`int`, *optional*):
            Programs that run at a time. Defaults to the number of processors.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float | None]`: One score per completion, `None` where there are no tests or they are not Python.

    Raises:
        UserError: If this machine cannot isolate the programs and the user has not accepted that.

    Example:
    ```python
    >>> from trl_opsd.rewards import code_reward

    >>> completions = ["```python\\ndef double(x):\\n    return x + x\\n```", "I cannot."]
    >>> code_reward(completions, tests=["assert double(4) == 8"] * 2)
    [1.0, 0.0]
    ```
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"] or "" for completion in completions
    ]
    programs = [extract_program(text) for text in texts]

    jobs = zip(programs, tests, entry_point or [None] * len(programs), strict=True)

    def judge(job: tuple[str | None, str, str | None]) -> Verdict:
        program, source, function = job
        if program is None:
            return Verdict("failed", 0.0, "no program", "")
        return run_tests(program, source, function, partial_credit, limits)

    pool = ThreadPoolExecutor(num_workers or os.cpu_count())
    try:
        verdicts = list(pool.map(judge, jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for what has not begun
    if log_extra is not None:
        log_extra("program", [program or "[none]" for program in programs])
        log_extra("verdict", [f"{verdict.status}: {verdict.detail or 'all tests'}" for verdict in verdicts])
    return [verdict.score for verdict in verdicts]


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
