"""The math verifier: is the completion's final answer the reference answer?"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from .judge import Judge


_JUDGE = Judge("math_verify")
_MAX_CHARS = 1000  # no reference answer of the known data sets is a third as long

# Where an answer can be.
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are text, not groups
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:\\text\{[\s,]*)?(?:and|or)?[\s$}]*(?:[a-zA-Z]\s*=)?\s*")
_MARK = re.compile(r"(?:####|\banswer(?: is)?\s*:|\banswer is\b)[ \t*]*([^\n]+)", re.IGNORECASE)
_MATH = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")

# How it can be written.
_INTEGER = re.compile(r"[+-]?(?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9})")
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}|\d{1,3}(?:,\d{3}){1,9})?(?:\.\d{0,30})?")
_SPACED = re.compile(r"[+-]?\d{1,3}(?: \d{3}){1,9}(?:\.\d{0,30})?")
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{?(?:\\text\{)?(\d+)\}?\}?")
_ASSIGNED = re.compile(r"^[a-zA-Z]\s*=\s*")
_MIXED = re.compile(r"(-?)(\d{1,15})\s*(?:\\frac\{(\d{1,15})\}\{(\d{1,15})\}|\s(\d{1,15})/(\d{1,15}))")
_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it))\s*\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[).:](?!.*(?:\b[A-Z]\b|\([a-z]\))).*)?", re.DOTALL)  # not `(A) or (B)`
_TEXT = re.compile(r"[A-Za-z][A-Za-z',.& -]*[A-Za-z]")
_UNIT = re.compile(
    r"(?<=[\d}])\s*(?:\\(?:text|mbox)\{[^{}]*\}|\s(?:sq\.?|cu\.?)?\s?(?:[a-zA-Z]{3,}|(?:[cmk]?m|in|ft|yd|mi|k?g|lb|oz|s|h)\b)"
    r"[a-zA-Z ./]*)(?:\^\{?\d\}?)?$"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS = re.compile(
    r"percent|pct|half|halves|third|quarter|fourth|fifth|dozen|squared|cubed|factorial|sqrt|infty|or\b|and\b"
)
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "°": r"^\circ", "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "≤": r"\le "}
    | {"≥": r"\ge ", "∪": r"\cup ", "±": r"\pm ", "√": r"\sqrt ", "€": "", "£": "", "²": "^2", "³": "^3"}
)
_DROPPED = re.compile(
    r"\\[!,;: ]\s*(?=\d{3}(?!\d))|\\!|\\[$]|\$|\\displaystyle|\\(?:left|right)(?![a-z])|~|\^\{?\\circ\}?|\\degree"
)


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
    trace that is not closed is wrong. Numbers and words are compared here, in microseconds; everything else by
    math-verify in a helper process (see [`~trl_opsd.rewards.judge.Judge`]), because such a text can cost any amount of
    time and memory: an answer that takes more than 3 seconds of CPU time or 2 GiB is wrong.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        answer (`list[str]`):
            Reference answers, as LaTeX or plain text, with or without dollar signs or `\boxed{}` around them.
        log_extra (`Callable`, *optional*):
            Function to log extra columns to the completions table, given by the trainer: the reference answer, the
            answer found, and where it was found (`boxed`, `marked`, `last` or `none`).
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
    found = [find_answer(text_of(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("answer", list(answer))
        log_extra("answer_extracted", [text or "[none]" for text, _ in found])
        log_extra("answer_form", [form for _, form in found])
    return [
        _score(text if flexible or form == "boxed" else None, _gold(gold))
        for (text, form), gold in zip(found, answer, strict=True)
    ]


def text_of(completion: list[dict[str, str]] | str) -> str:
    """Returns the text of a completion: itself if it is one, else that of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def extract_answer(text: str, flexible: bool = False) -> str | None:
    r"""
    Returns the final answer of a completion as text.

    Args:
        text (`str`):
            Text of the completion. What comes before a closing think tag is not looked at.
        flexible (`bool`, *optional*, defaults to `False`):
            Whether to take, where there is no `\boxed{}`, what follows the last `####`, `Answer:` or `answer is` on
            its line, or else the last formula or number.

    Returns:
        `str` or `None`: The answer, or `None` where there is none, it is longer than any answer would be (1,000
        characters), or the thinking trace is not closed. Boxes that only commas, "and" or "or" separate are one answer
        with several parts.
    """
    found, form = find_answer(text)
    return found if flexible or form == "boxed" else None


def find_answer(text: str) -> tuple[str | None, str]:
    r"""
    Finds the final answer of a completion.

    Args:
        text (`str`):
            Text of the completion.

    Returns:
        `tuple[str | None, str]`: The answer, and where it was: `"boxed"` (strict), `"marked"` or `"last"` (flexible),
        or `"none"`. A box that is empty, unfinished or too long hides what is outside of it.
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "none"
    boxes = list(_BOX.finditer(text))
    if boxes:
        found, form = _boxed(text, boxes), "boxed"
    elif marked := _MARK.findall(text[-20_000:]):
        found, form = _from_line(marked[-1]), "marked"
    else:
        found, form = _last(text[-20_000:]), "last"
    return (found, form) if found is not None and len(found) <= _MAX_CHARS else (None, "none")


def _boxed(text: str, boxes: list[re.Match]) -> str | None:
    end, parts = len(text), []
    for box in reversed(boxes):
        depth = 1
        for brace in _BRACE.finditer(text, box.end(), end):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                break
        if depth or (parts and (end - brace.end() > 40 or not _BETWEEN_BOXES.fullmatch(text, brace.end(), end))):
            break
        if len(parts) > 20:
            return None
        part = text[box.end() : brace.start()].strip()
        if part not in parts:
            parts.append(part)
        end = box.start()
    return ", ".join(reversed(parts)) if parts else None


def _from_line(line: str) -> str:
    line = line.strip(" \t\r*")
    formula = _MATH.search(line)
    if formula:
        return next(filter(None, formula.groups())).strip()
    numbers = _PLAIN_NUMBER.findall(line)
    if len(numbers) == 1 and re.search(r"(?<![\\a-z])[a-z]{2,} ", line):  # a sentence with one number
        return numbers[0]
    return line.strip("$").rstrip(".")


def _last(text: str) -> str | None:
    number = max(_PLAIN_NUMBER.finditer(text), key=re.Match.start, default=None)
    formula = max(_MATH.finditer(text), key=re.Match.start, default=None)
    if formula and (number is None or number.start() < formula.end()):
        return next(filter(None, formula.groups())).strip()
    return number and number.group()


def _gold(answer: str | None) -> str:
    text = "" if answer is None else str(answer).strip()
    boxes = list(_BOX.finditer(text))
    return (_boxed(text, boxes) or "") if boxes else text


@lru_cache(maxsize=4096)  # the rollouts of a group often agree
def _score(answer: str | None, gold: str) -> float | None:
    if answer is not None and _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return float(int(answer.replace(",", "")) == int(gold.replace(",", "")))
    words = _words(gold, True)
    if words is not None:
        return float(answer is not None and _words(answer, False) == words)
    gold = _clean(gold)
    value, based = _value(gold), _BASE.fullmatch(gold)
    if value is None and not based and not _JUDGE.ask("parses", gold):
        return None
    if answer is None:
        return 0.0
    answer = _clean(answer)
    if answer == gold:
        return 1.0
    if based and (other := _BASE.fullmatch(answer)):  # math-verify does not look at the base
        return float(other.groups() == based.groups())
    if value is not None and (other := _value(_ASSIGNED.sub("", answer))) is not None:
        return float(abs(other - value) * 2_000_000 <= min(1, abs(value)))
    return float(_JUDGE.ask("equal", answer, gold) is True)


def _words(text: str, is_gold: bool) -> str | None:
    """Returns an answer in words, a choice or brackets in one spelling, or `None` if a reference answer is math."""
    plain = _WRAPPED.sub(r"\1", text.strip().strip("$")).strip(" *.\t\n")
    plain = " ".join(plain.replace("\\{", "{").replace("\\}", "}").replace("\\ ", " ").split())
    wrapped = _WRAPPED.fullmatch(text.strip()) is not None
    choice = _CHOICE.fullmatch(plain)
    if not is_gold:
        return choice[1].lower() if choice else re.sub(r"\s*([^\w\s])\s*", r"\1", plain).lower()
    if choice and (wrapped or plain.startswith("(")):
        return choice[1].lower()
    letters = _TEXT.fullmatch(plain) and (re.search(r"[A-Za-z]{3}", plain) or plain.lower() == "no")
    if wrapped or letters or (plain and not re.search(r"[\w\\]", plain)):
        return re.sub(r"\s*([^\w\s])\s*", r"\1", plain).lower()
    return None


def _clean(text: str) -> str:
    """Takes away what the ways of writing one answer differ in."""
    text = _DROPPED.sub("", text.strip().translate(_SIGNS)).strip().rstrip(" .")
    for delimiters in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(delimiters[0]) and text.endswith(delimiters[1]):
            text = text[2:-2].strip()
    text = re.sub(r"\\[dtc]frac", r"\\frac", text.replace("{,}", ","))
    text = re.sub(r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<=[\d}])\s*i\b", " i", text)  # math-verify takes `2i` for a variable and `2 i` for a number
    unit = _UNIT.search(text)
    if unit:
        name = _WRAPPED.sub(r"\1", unit.group()).strip().lower()
        scale = next((zeros for word, zeros in _SCALES.items() if name.startswith(word)), 0)
        value = _value(text[: unit.start()].strip())
        if scale and value is not None:
            text = str(value * 10**scale)
        elif not _NOT_UNITS.search(name):
            text = text[: unit.start()].strip()
    mixed = _MIXED.fullmatch(text)
    if mixed:
        sign, whole = mixed[1], int(mixed[2])
        above, below = int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
        text = f"{sign}\\frac{{{whole * below + above}}}{{{below}}}"
    return text


def _value(text: str) -> Fraction | None:
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if not _NUMBER.fullmatch(text) or not any(map(str.isdigit, text)):
        return None
    return Fraction(text.replace(",", ""))
