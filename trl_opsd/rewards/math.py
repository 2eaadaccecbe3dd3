"""The math verifier: is the completion's final answer the reference answer?"""

import logging
import re
import threading
from collections.abc import Callable
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify


_BOXED = r"\boxed{"
_INTEGER = re.compile(r"[+-]?(?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9})")
_MARKED = re.compile(r"(?:####|answer:)[ \t*]*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
# No reference answer of the known data sets is a third as long; parsing time grows with the length.
_MAX_CHARS = 1000
_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),)


def math_reward(
    completions: list[list[dict[str, str]]] | list[str],
    answer: list[str],
    log_extra: Callable[[str, list], None] | None = None,
    flexible: bool = False,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that is 1.0 where the final answer of a completion equals the reference answer, and 0.0 where not.

    The final answer is the last `\boxed{}`; with a thinking trace only what follows the closing think tag counts, and a
    trace that is not closed is wrong. Integers are compared as they are, everything else by math-verify.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        answer (`list[str]`):
            Reference answers, as LaTeX or plain text, with or without dollar signs or `\boxed{}` around them.
        log_extra (`Callable`, *optional*):
            Function to log extra columns to the completions table, given by the trainer.
        flexible (`bool`, *optional*, defaults to `False`):
            Whether an answer counts that is not where the prompt asked for it (see [`extract_answer`]).
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float | None]`: One score per completion, `None` where the reference answer cannot be parsed.

    Example:
    ```python
    >>> from trl_opsd.rewards import math_reward

    >>> math_reward([r"so it is \boxed{\frac{2}{4}}", r"so it is \boxed{2}"], answer=["0.5", "0.5"])
    [1.0, 0.0]
    ```
    """
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"] or "" for completion in completions
    ]
    answers = [extract_answer(text, flexible) for text in texts]
    if log_extra is not None:
        log_extra("answer", list(answer))
        log_extra("answer_extracted", [text or "[none]" for text in answers])
    return [_score(text, _clean_gold(gold)) for text, gold in zip(answers, answer, strict=True)]


def extract_answer(text: str, flexible: bool = False) -> str | None:
    r"""
    Returns the final answer of a completion as text.

    Args:
        text (`str`):
            Text of the completion. What comes before a closing think tag is not looked at.
        flexible (`bool`, *optional*, defaults to `False`):
            Whether to take, where there is no `\boxed{}`, what follows the last `####` or `Answer:` on its line, or
            else the last number.

    Returns:
        `str` or `None`: The answer, or `None` where there is none, it is longer than any answer would be (1,000
        characters), or the thinking trace is not closed.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    found = _last_boxed(text)
    if found is None and flexible:
        marked = _MARKED.findall(text)
        numbers = [] if marked else _NUMBER.findall(text)
        if marked:
            found = marked[-1].strip(" \t\r*$.")
        elif numbers:
            found = numbers[-1].rstrip(",")
    return found if found is None or len(found) <= _MAX_CHARS else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # `\{` and `\}` are text, not groups
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : start + match.start()].strip()
    return None


def _clean_gold(answer: str | None) -> str:
    text = "" if answer is None else str(answer).strip()
    boxed = _last_boxed(text)
    return text.strip("$").strip() if boxed is None else boxed


@lru_cache(maxsize=4096)  # the rollouts of a group often agree
def _score(answer: str | None, gold: str) -> float | None:
    if _INTEGER.fullmatch(gold):
        if answer is None:
            return 0.0
        if _INTEGER.fullmatch(answer):
            return float(int(answer.replace(",", "")) == int(gold.replace(",", "")))
    parsed_gold = _parse(gold)
    if not parsed_gold:
        return None
    if answer is None:
        return 0.0
    if answer == gold:
        return 1.0
    return float(verify(parsed_gold, _parse(answer), timeout_seconds=_seconds(5)))


@lru_cache(maxsize=4096)
def _parse(text: str) -> list:
    return parse(
        f"{_BOXED}{text}}}", extraction_config=_EXTRACTION, fallback_mode="no_fallback", parsing_timeout=_seconds(5)
    )


def _seconds(limit: int) -> int | None:
    """Time limit for math-verify, which keeps it with `signal.alarm`: that exists in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        return limit
    for module in ("parser", "grader"):  # it warns that there is no limit, and we know
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return None
