"""The math verifier: is the completion's final answer the reference answer?"""

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from .judge import Judge, Unjudged


logger = logging.getLogger(__name__)

_JUDGE = Judge("math_verify")
_MAX_CHARS = 1000  # no reference answer of the known data sets is a third as long

# Where an answer can be.
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # `\{` and `\}` are text, not groups
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:\\text\{[\s,]*)?(?:and|or)?[\s$}]*(?:[a-zA-Z]\s*=)?\s*")
_MARK = re.compile(r"(?:####|\banswer(?: is)?\s*:|\banswer is\b)[ \t*]*([^\n]+)", re.IGNORECASE)
_MATH = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.)+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")

# How a number can be written.
_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d{1,30})"
_INTEGER = re.compile(rf"[+-]?{_DIGITS}")
_SPACED = re.compile(r"[+-]?\d{1,3}(?: \d{3}){1,9}(?:\.\d{0,30})?")
_NUMBER = re.compile(
    rf"([+-]?(?:{_DIGITS}(?:\.\d{{0,30}})?|\.\d{{1,30}}))"
    r"(?:[eE]([+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(\{\s*[+-]?\d{1,3}\s*\}|[+-]?\d{1,3}))?"
)
_POWER_OF_TEN = re.compile(r"([+-]?)10\s*(?:\^|\*\*)\s*(\{\s*[+-]?\d{1,3}\s*\}|[+-]?\d{1,3})")
_FRACTION = re.compile(
    r"([+-]?)\s*(?:\\frac\{\s*([+-]?\d{1,30})\s*\}\{\s*([+-]?\d{1,30})\s*\}|(\d{1,30})\.?\s*/\s*(\d{1,30}))"
)
_MIXED = re.compile(r"(-?)(\d{1,15})\s*(?:\\frac\{(\d{1,15})\}\{(\d{1,15})\}|\s(\d{1,15})/(\d{1,15}))")
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{?(?:\\text\{)?(\d+)\}?\}?")

# What can stand around it.
_WRAPPED = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it))\s*\{([^{}]*)\}")
_ASSIGNED = re.compile(r"^[a-zA-Z]\s*=\s*")
_NAMES = re.compile(r"^(?:\([\sa-zA-Z\\]+(?:,[\sa-zA-Z\\]+)+\)\s*=\s*(?=\()|[a-zA-Z]\s*\\in(?![a-z])\s*)")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|leq|geq|lt|gt|leqslant|geqslant)(?![a-z])")
_ABOUT = re.compile(r"^(?:[a-zA-Z]\s*)?(?:\\(?:approx|thickapprox|simeq|sim)(?![a-zA-Z])|≈)\s*")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent)\s*\}|\spercent)$", re.IGNORECASE)
_PERCENT_ASKED = re.compile(r"%|per\s?cent", re.IGNORECASE)
_NUMBER_IN_TEXT = re.compile(r"\(?\s*([+-]?[\d,]*\.?\d+)\s*\)?(?:\s+([A-Za-z][A-Za-z .-]*))?")
_NAMED = re.compile(r"(.*[\d}])\s+\(([A-Za-z]{3,}(?: [A-Za-z]+)*)\)")  # `9 (apples)`
_CLOCK = re.compile(r"\s*(?:\\(?:text|mbox)\{\s*)?\b([ap])\.?\s?m\b\.?\s*\}?$", re.IGNORECASE)

# Words.
_CHOICE = re.compile(r"\(?([A-Za-z])\)?(?:[).:](?!.*(?:\b[A-Z]\b|\([a-z]\))).*)?", re.DOTALL)  # not `(A) or (B)`
_TEXT = re.compile(r"[A-Za-z][A-Za-z',.& -]*[A-Za-z]")
_PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{4,}")
_COMMAND_WITH_TEXT = re.compile(r"\\(?:text[a-z]*|mbox|math[a-z]+|operatorname|begin|end)\s*\{[^{}]*\}")
_VARIABLE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")

# What an answer consists of.
_TO = re.compile(r"\s*(?:\\(?:text|mbox)\{\s*to\s*\}|\\colon|(?<=[\d})])\sto\s(?=\s*[\d\\(]))\s*")
_AND = re.compile(r",?\s*(?:\\(?:text|mbox)\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d})\s])\b(?:and|or)\b(?=[\s\d\\(-]))\s*")
_TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|[()\[\]{},:;]")
_OPEN, _CLOSE = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_MAX_PAIRS = 400

# Units: a name of one or two letters is a variable in a reference, where nothing says that it is text.
_BARE = r"(?<![A-Za-z])(?:\\mu\s?|μ|µ)?[A-Za-z]+\.?"
_UNIT = re.compile(
    r"(?:(?<=[\d})])|(?<=\\pi)|(?<=\\pi\s))"
    rf"((?:(?:\s|/|\\cdot(?![a-z]))*(?:\\(?:text[a-z]*|mbox|math(?:rm|bf))\s*\{{[^{{}}]*\}}|{_BARE})(?:\^\{{?-?\d\}}?)?)+)$"
)
_FUNCTIONS = ("sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "min", "mod", "gcd", "lcm")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NOT_UNITS = re.compile(
    r"percent|pct|half|halves|third|quarter|fourth|fifth|dozen|squared|cubed|factorial|sqrt|infty|\bor\b|\band\b|mod|pi\b"
)
_PREFIXES = {"": 0, "n": -9, "μ": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9}
# Symbol to the factor and the unit that it is a multiple of; two units without one in common differ.
_UNITS = {
    prefix + symbol: (Fraction(10) ** power, symbol)
    for symbol in (*"mgsLVAWJNKCF", "Hz", "Pa", "eV", "mol", "cal", "rad")
    for prefix, power in _PREFIXES.items()
}
for _factor, _symbol, _names in (
    ("1", "m", "meter metre"),
    ("1000", "m", "kilometer kilometre"),
    ("0.01", "m", "centimeter centimetre"),
    ("0.001", "m", "millimeter millimetre"),
    ("0.0254", "m", "in inch inche"),
    ("0.3048", "m", "ft foot feet"),
    ("0.9144", "m", "yd yard"),
    ("1609.344", "m", "mi mile"),
    ("1", "g", "gram"),
    ("1000", "g", "kilogram"),
    ("453.59237", "g", "lb"),
    ("28.349523125", "g", "oz ounce"),
    ("1", "s", "sec second"),
    ("60", "s", "min minute"),
    ("3600", "s", "h hr hour"),
    ("86400", "s", "day"),
    ("1", "L", "l liter litre"),
    ("0.001", "L", "ml milliliter millilitre"),
    ("1", "dollar", "dollar"),
    ("0.01", "dollar", "cent"),
):
    _UNITS |= {_name: (Fraction(_factor), _symbol) for _name in _names.split()}

_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "°": r"^\circ", "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "≤": r"\le "}
    | {"≥": r"\ge ", "∪": r"\cup ", "±": r"\pm ", "√": r"\sqrt ", "€": "", "£": "", "²": "^2", "³": "^3"}
    | {"∶": ":", "，": ",", "µ": "μ"}
)
_DROPPED = re.compile(
    r"(?<!\\)\\[!,;: ]\s*(?=\d{3}(?!\d))|\\!|\\[$]|\$|\\displaystyle|\\(?:left|right|bigg?[lr]?|Bigg?[lr]?)(?![a-z])"
    r"|\^\{?\\circ\}?|\\degree"
)
_SPACING = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-z])")


def math_reward(
    completions: list[list[dict[str, str]]] | list[str],
    answer: list[str],
    prompts: list[list[dict[str, str]]] | list[str] | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    flexible: bool = False,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that is 1.0 where the final answer of a completion equals the reference answer, and 0.0 where not.

    The final answer is the last `\boxed{}`; with a thinking trace only what follows the closing think tag counts, and a
    trace that is not closed is wrong. Numbers and words are compared here, in microseconds; everything else by
    math-verify in a helper process (see [`~trl_opsd.rewards.judge.Judge`]), because such a text can cost any amount of
    time and memory: an answer that takes more than 3 seconds of CPU time or 2 GiB is wrong. What counts as equal is a
    table in the folder's README.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        answer (`list[str]`):
            Reference answers, as LaTeX or plain text, with or without dollar signs or `\boxed{}` around them.
        prompts (`list[list[dict[str, str]]]` or `list[str]`, *optional*):
            Prompts. `35\%` equals the reference answer 35 only where the prompt speaks of percentages; and where a
            prompt ends in an open think tag, a completion that does not close it has no answer.
        log_extra (`Callable`, *optional*):
            Function to log extra columns to the completions table, given by the trainer: the reference answer, the
            answer found, and where it was found (`boxed`, `marked`, `last` or `none`).
        flexible (`bool`, *optional*, defaults to `False`):
            Whether an answer counts that is not where the prompt asked for it (see [`extract_answer`]).
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float | None]`: One score per completion, `None` where the reference answer cannot be read, or where the
        machine failed before there was a verdict.

    Example:
    ```python
    >>> from trl_opsd.rewards import math_reward

    >>> math_reward([r"so it is \boxed{\frac{2}{4}}", r"so it is \boxed{2}"], answer=["0.5", "0.5"])
    [1.0, 0.0]
    ```
    """
    found = [find_answer(text) for text in texts_of(completions, prompts)]
    if log_extra is not None:
        log_extra("answer", list(answer))
        log_extra("answer_extracted", [text or "[none]" for text, _ in found])
        log_extra("answer_form", [form for _, form in found])
    asked = [False] * len(found) if prompts is None else [_asks_for_percent(prompt) for prompt in prompts]
    scores = []
    for (text, form), gold, percent in zip(found, answer, asked, strict=True):
        try:
            scores.append(_score(text if flexible or form == "boxed" else None, reference(gold), percent))
        except Unjudged as error:
            logger.warning("An answer was not judged: %s.", error)
            scores.append(None)
    return scores


def text_of(completion: list[dict[str, str]] | str) -> str:
    """Returns the text of a completion: itself if it is one, else that of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def texts_of(
    completions: list[list[dict[str, str]]] | list[str], prompts: list[list[dict[str, str]]] | list[str] | None
) -> list[str]:
    """Returns the texts of completions, with the think tag in front that the end of their prompt has opened."""
    texts = [text_of(completion) for completion in completions]
    if prompts is None:
        return texts
    opened = [text_of(prompt).rstrip().endswith("<think>") for prompt in prompts]
    return [f"<think>{text}" if begun else text for text, begun in zip(texts, opened, strict=True)]


def _asks_for_percent(prompt: list[dict[str, str]] | str) -> bool:
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    return any(_PERCENT_ASKED.search(message["content"] or "") for message in messages)


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


def reference(answer: str | float | None) -> str:
    """Returns a reference answer as it is compared: the text of its last box if it has one."""
    text = "" if answer is None else str(answer).strip()
    boxes = list(_BOX.finditer(text))
    return (_boxed(text, boxes) or "") if boxes else text


@lru_cache(maxsize=4096)  # the rollouts of a group often agree
def _score(answer: str | None, gold: str, percent: bool) -> float | None:
    if answer is not None and _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return float(int(answer.replace(",", "")) == int(gold.replace(",", "")))
    if not is_readable(gold):
        return None
    if answer is None:
        return 0.0
    # Twice: what math-verify has to say is collected, so that all of it together has one limit, and then looked up.
    pairs = {}
    verdict = _same(answer, gold, percent, lambda *pair: pairs.setdefault(pair, False))
    if not pairs or len(pairs) > _MAX_PAIRS:
        return float(verdict)
    verdicts = _JUDGE.ask("compare", list(pairs))
    if verdicts is None:
        return 0.0
    pairs = dict(zip(pairs, verdicts, strict=True))
    return float(_same(answer, gold, percent, lambda *pair: pairs[pair]))


@lru_cache(maxsize=4096)
def is_readable(gold: str) -> bool:
    """
    Whether answers can be compared with a reference answer: it is a number, words, or math-verify understands it.

    Args:
        gold (`str`):
            Reference answer.

    Returns:
        `bool`: `False` where it is empty, mixes prose and formulas, or does not parse.
    """
    expressions = _expressions(gold)
    if expressions is None:
        return False
    return not expressions or _JUDGE.ask("parse", expressions) == [True] * len(expressions)


def _expressions(gold: str) -> list[str] | None:
    """Returns the parts of a reference answer that only math-verify can read, `None` where nothing can."""
    gold = _unwrapped(gold)
    if not gold:
        return None
    if _words(gold, True) is not None:
        return []
    kind, parts = _structure(_NAMES.sub("", _clean(gold)))
    if kind:
        if any(" " in part and _TEXT.fullmatch(part) for part in parts):  # `f(x) = a, where a is an integer`
            return None
        each = [_expressions(part) for part in parts]
        return None if None in each else [text for texts in each for text in texts]
    text = _split_unit(_PERCENT.sub("", parts[0]), True)[0]
    if _value(text) is not None or _BASE.fullmatch(text):
        return []
    return None if _PROSE.search(_COMMAND_WITH_TEXT.sub("", text)) else [text]


def _same(answer: str, gold: str, percent: bool, ask: Callable[[str, str], bool]) -> bool:
    """Whether two answers are one; `ask` is asked where only math-verify can tell."""
    answer, gold = _unwrapped(answer), _unwrapped(gold)
    words = _words(gold, True)
    if words is not None:
        return _words(answer, False) == words
    answer, gold = (_NAMES.sub("", _clean(text)) for text in (answer, gold))
    if answer == gold:
        return True
    (kind, parts), (found, found_parts) = _structure(gold), _structure(answer)
    if ({kind, found} == {"list", "set"} and len(parts) > 1) or {kind, found} in ({":", ":a"}, {":", ":p"}):
        found = kind
    if (found == "" and len(kind) == 2 and _RELATION.search(answer)) or (kind == "" and _RELATION.search(gold)):
        return ask(answer, gold)  # `-2 < x < 7` is an interval
    if found != kind or len(parts) != len(found_parts):
        return False
    if kind in ("list", "set"):
        # each with each, and each once
        equal = [[_same(one, other, percent, ask) for other in parts] for one in found_parts]
        free = set(range(len(parts)))
        for row in equal:
            match = next((index for index in sorted(free) if row[index]), None)
            if match is None:
                return False
            free.discard(match)
        return True
    if kind:
        each = [_same(one, other, percent, ask) for one, other in zip(found_parts, parts, strict=True)]
        return all(each)  # not before all have been asked about
    return _same_quantity(found_parts[0], parts[0], percent, ask)


def _same_quantity(answer: str, gold: str, percent: bool, ask: Callable[[str, str], bool]) -> bool:
    gold, answer = _ABOUT.sub("", gold), _ABOUT.sub("", answer)
    gold_rate, answer_rate = _PERCENT.search(gold) is not None, _PERCENT.search(answer) is not None
    scales = [Fraction(1)]
    if answer_rate and not gold_rate:  # `204\%` is 2.04, unless a percentage is what the problem asks for
        scales = [Fraction(1, 100), *([Fraction(1)] if percent else [])]
    elif gold_rate and not answer_rate:
        scales = [Fraction(1), Fraction(100)]
    gold, gold_unit = _split_unit(_PERCENT.sub("", gold), True)
    # In `6m` the letter is a variable, and so it is in the answer
    value, unit = _split_unit(_PERCENT.sub("", answer), False)
    if (
        unit
        and _value(gold) is None
        and _VARIABLE.search(gold)
        and not gold_unit
        and len(_WRAPPED.sub(r"\1", unit).strip()) < 3
    ):
        value, unit = f"{value} {_WRAPPED.sub(chr(92) + '1', unit).strip()}", ""
    sizes = _size(unit), _size(gold_unit)
    if None not in sizes:
        if sizes[0][1] != sizes[1][1]:
            return False
        scales = [scale * sizes[0][0] / sizes[1][0] for scale in scales]
    each = [_same_value(value, gold, scale, ask) for scale in scales]
    return any(each)


def _same_value(answer: str, gold: str, scale: Fraction, ask: Callable[[str, str], bool]) -> bool:
    if answer == gold and scale == 1:
        return True
    if based := _BASE.fullmatch(gold):
        if other := _BASE.fullmatch(answer):  # math-verify does not look at the base
            return other.groups() == based.groups()
    wanted, found = _value(gold), _value(_ASSIGNED.sub("", answer))
    if wanted is not None and found is not None:
        return _close(found[0] * scale, found[1], *wanted)
    answer = _latex(answer)
    if scale != 1:
        answer = rf"\frac{{{scale.numerator}}}{{{scale.denominator}}} \cdot ({answer})"
    return ask(answer, _latex(gold))


def _close(found: Fraction, found_decimals: int | None, wanted: Fraction, wanted_decimals: int | None) -> bool:
    """A decimal stands for a number that it rounds, in six digits or more, only if it could not be written out."""
    if found == wanted:
        return True
    for decimals, other in ((found_decimals, wanted), (wanted_decimals, found)):
        if decimals is not None and (other * 10**decimals).denominator == 1:
            return False
    if found_decimals is None and (wanted_decimals is None or wanted_decimals < 6):
        return False
    return abs(found - wanted) * 2_000_000 <= min(1, 10 * abs(wanted))


def _structure(text: str) -> tuple[str, list[str]]:
    """
    Returns what an answer is, and its parts: a `list` of answers, a `set`, a ratio or a time (`:`, `:a`, `:p`), a tuple or an
    interval (its two brackets), or, with one part, the empty text for everything else.
    """
    if _value(text) is not None:
        return "", [text]
    clock = _CLOCK.search(text)
    parts = _split(_TO.sub(":", text[: clock.start()] if clock else text), ":")
    if len(parts) > 1 and all(parts):
        return f":{clock[1].lower() if clock else ''}", parts
    listed = _split(_AND.sub(",", text), ",")
    if len(listed) > 1 and all(listed):
        return "list", [part for each in listed for part in _signs(each)]
    brackets = re.match(r"\\\{|[(\[]", text), re.search(r"\\\}$|[)\]]$", text)
    if None not in brackets and _closes_last(text):
        inside = text[brackets[0].end() : brackets[1].start()]
        kind = brackets[0][0] + brackets[1][0]
        parts = _split(_AND.sub(",", inside), ",")
        if kind == r"\{\}" and all(parts) and not re.search(r"\||:|\\mid", inside):
            return "set", [part for each in parts for part in _signs(each)]
        if kind[0] != "\\" and len(parts) > 1 and all(parts):
            return kind, parts
    signs = _signs(text)
    return ("list", signs) if len(signs) > 1 else ("", [text])


def _signs(text: str) -> list[str]:
    r"""Returns the two answers that `\pm` makes of one."""
    if text.count(r"\pm") != 1 or r"\mp" in text:
        return [text]
    before, after = text.split(r"\pm")
    plus = "" if not before.strip() or before.strip()[-1] in "=({[" else "+"
    return [f"{before}{plus}{after}".strip(), f"{before}-{after.lstrip()}".strip()]


def _split(text: str, separator: str) -> list[str]:
    """Splits where no bracket is open. With spaces after commas, those without one are for thousands."""
    thousands = separator == "," and re.search(r",\s", text)
    depth, start, parts = 0, 0, []
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        wanted = token[0] == separator or (separator == "," and token[0] == ";")
        if wanted and depth <= 0 and not (thousands and re.match(r"\d{3}(?!\d)", text[token.end() :])):
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def _closes_last(text: str) -> bool:
    """Whether the bracket that a text begins with is closed at its end, which `(1, 2) \\cup (3, 4)` does not do."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth <= 0:
            return token.end() == len(text)
    return False


def _unwrapped(text: str) -> str:
    r"""Returns `\text{27}`, `\textbf{(073)}`, `\text{18 apples}` and `9 (apples)` as what else they would be written."""
    text = text.strip().strip("*").strip()
    wrapped = _WRAPPED.fullmatch(text.strip("$"))
    if wrapped:
        number = _NUMBER_IN_TEXT.fullmatch(wrapped[1].strip())
        if number:
            return f"{number[1]} \\text{{ {number[2]}}}" if number[2] else number[1]
        if re.match(r"\s*\d", wrapped[1]) and (":" in wrapped[1] or "%" in wrapped[1]):
            return wrapped[1].strip()
    named = _NAMED.fullmatch(text.strip("$"))
    return f"{named[1]} \\text{{ {named[2]}}}" if named else text


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
    text = _SPACING.sub(" ", _DROPPED.sub("", text.strip().translate(_SIGNS))).strip().rstrip(" .")
    for delimiters in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(delimiters[0]) and text.endswith(delimiters[1]):
            text = text[2:-2].strip()
    text = re.sub(r"\\[dtc]frac", r"\\frac", text.replace("{,}", ","))
    text = re.sub(r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}", text)
    return re.sub(r"(?<=[\d}])\s*i\b", " i", text)  # math-verify takes `2i` for a variable and `2 i` for a number


def _split_unit(text: str, is_gold: bool) -> tuple[str, str]:
    """Returns an answer without its unit, and the unit; million and the like are multiplied in."""
    found = _UNIT.search(text)
    unit = found[1] if found else ""
    plain = _WRAPPED.sub(r"\1", unit).strip()
    if found and _WRAPPED.search(unit) is None:
        names = re.findall(r"(?:\\mu\s?|μ)?[A-Za-z]+", unit)
        words = unit.startswith(" ") and len(names[0]) >= 3 and names[0] not in _FUNCTIONS
        known = all(name in _UNITS or name == "per" for name in map(_symbol, names))
        if not (words or known) or (is_gold and not words and any(len(name) < 2 or name[0] in "mM" for name in names)):
            unit = ""
    scale = next((zeros for word, zeros in _SCALES.items() if plain.lower().startswith(word)), 0)
    value = _value(text[: found.start()].strip()) if found else None
    if scale and value is not None:
        return str(value[0] * 10**scale), ""
    if not unit or _NOT_UNITS.search(plain.lower()):
        return _improper(text), ""
    return _improper(text[: found.start()].strip()), unit


def _improper(text: str) -> str:
    mixed = _MIXED.fullmatch(text)
    if mixed is None:
        return text
    sign, whole = mixed[1], int(mixed[2])
    above, below = int(mixed[3] or mixed[5]), int(mixed[4] or mixed[6])
    return f"{sign}\\frac{{{whole * below + above}}}{{{below}}}"


def _symbol(name: str) -> str:
    name = name.replace(r"\mu", "μ").replace(" ", "")
    singular = name[:-1] if len(name) > 2 and name.endswith("s") else name
    return name if name in _UNITS else singular if singular in _UNITS else singular.lower()


def _size(unit: str) -> tuple[Fraction, str] | None:
    """Returns how much a unit is and of what, `None` where it is not known."""
    text = re.sub(r"\\cdot", " ", _WRAPPED.sub(r"\1", unit).replace(".", " "))
    powers, size = {}, Fraction(1)
    for side, part in enumerate(re.split(r"/|\bper\b", text)):
        for square, name, power in re.findall(
            r"(sq\s|cu\s|square\s|cubic\s)?\s*((?:\\mu\s?|μ)?[A-Za-z]+)(?:\^\{?(-?\d)\}?)?", part
        ):
            known = _UNITS.get(_symbol(name))
            if known is None:
                return None
            exponent = int(power or {"s": 2, "c": 3}.get(square[:1], 1)) * (-1 if side else 1)
            size *= known[0] ** exponent
            powers[known[1]] = powers.get(known[1], 0) + exponent
    return (size, str(sorted(powers.items()))) if powers else None


def _value(text: str) -> tuple[Fraction, int | None] | None:
    """Returns a number, and the digits after its decimal point, `None` for a fraction; or `None` if it is none."""
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if power := _POWER_OF_TEN.fullmatch(text):
        text = f"{power[1]}1e{power[2].strip('{} ')}"
    if number := _NUMBER.fullmatch(text):
        exponent = int((number[2] or number[3] or "0").strip("{} "))
        digits = number[1].replace(",", "")
        decimals = len(digits.partition(".")[2]) - exponent
        return Fraction(digits) * Fraction(10) ** exponent, max(0, decimals)
    fraction = _FRACTION.fullmatch(text)
    if fraction is None:
        return None
    above, below = int(fraction[2] or fraction[4]), int(fraction[3] or fraction[5])
    return (Fraction(above, below) * (-1 if fraction[1] == "-" else 1), None) if below else None


def _latex(text: str) -> str:
    """Returns a number as math-verify reads it: in `4.5e33` it takes the `e` for Euler's number."""
    number = _NUMBER.fullmatch(text)
    if number is None:
        return text
    exponent = (number[2] or number[3] or "").strip("{} ")
    return number[1].replace(",", "") + (rf" \times 10^{{{exponent}}}" if exponent else "")
