"""
The families of tasks: which problems reasoning-gym generates for each, and how one of them is worked out.

A solver works step by step. It hands each step to `step(text, right, wrong)`, which says what came out, and goes on from
there: that is `right`, or in a slip one of `wrong`. So an answer that follows from a slip is what one really gets.
"""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


#: What came out of a step: its text, what is right, and what a slip may give (for numbers by default one close to it).
Step = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """
    One family of tasks.

    Args:
        levels (`Sequence[dict]`):
            Parameters of reasoning-gym's generator at each difficulty, from 1 on.
        about (`Callable`):
            What a problem asks, in a few words, from its metadata.
        solve (`Callable`):
            Works a problem out: takes its metadata and [`Step`], returns the answer.
        keep (`Callable`, *optional*):
            Which of the generated problems belong to the family; takes the entry.
        style (`str`, *optional*, defaults to `"common"`):
            In which words a reply is written, a key of [`~trl_opsd.small.task.STYLES`].
    """

    levels: Sequence[dict]
    about: Callable[[dict], str]
    solve: Callable[[dict, Step], str]
    keep: Callable[[dict], bool] = lambda entry: True
    style: str = "common"


def _calculate(a: int, sign: str, b: int, step: Step) -> int:
    return step(f"{a}{sign}{b}=", {"+": a + b, "-": a - b, "*": a * b}[sign])


def _chain_sum(metadata: dict, step: Step) -> str:
    first, *rest = metadata["expression"].split()
    total = int(first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        total = _calculate(total, sign, int(term), step)
    return str(total)


_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def _basic_arithmetic(metadata: dict, step: Step) -> str:
    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        left, right = value(node.left), value(node.right)
        return _calculate(left, _SIGNS[type(node.op)], right, step)

    return str(value(ast.parse(metadata["expression"], mode="eval").body))


def _leg_counting(metadata: dict, step: Step) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # an optional package

    total = 0
    for index, (animal, number) in enumerate(metadata["animals"].items()):
        legs = step(f"{number} {animal}: {number}*{ANIMALS[animal]}=", number * ANIMALS[animal])
        total = _calculate(total, "+", legs, step) if index else legs
    return str(total)


def _gcd(metadata: dict, step: Step) -> str:
    b, a = sorted(metadata["numbers"])
    while b:
        a, b = b, step(f"{a} mod {b}=", a % b)
    return str(a)


def _number_filtering(metadata: dict, step: Step) -> str:
    limit, (action, which) = float(metadata["filter_value"]), metadata["operation"].split("_")
    # First how it compares, then what follows from that: both at once is more than one token can work out
    verdicts = {
        relation: f"{relation}, {'keep' if (relation == which) == (action == 'keep') else 'remove'}"
        for relation in ("larger", "smaller", "equal")
    }
    kept = []
    for number in metadata["original_numbers"]:
        relation = "equal" if float(number) == limit else "larger" if float(number) > limit else "smaller"
        wrong = [verdict for name, verdict in verdicts.items() if name != relation]
        if step(f"{number} against {metadata['filter_value']}: ", verdicts[relation], wrong).endswith("keep"):
            kept.append(number)
    return str(kept)


def _simple_equations(metadata: dict, step: Step) -> str:
    left, right = metadata["equation"].split(" = ")
    factor, value = 0, int(right)
    terms = left.replace(" - ", " + -").split(" + ")
    for term in terms:
        if term.endswith(metadata["variable"]):
            digits = term[:-1].rstrip("*")
            factor = int(f"{digits}1" if digits in ("", "-") else digits)
    for term in terms:
        if not term.endswith(metadata["variable"]):
            value = _calculate(value, "+" if int(term) < 0 else "-", abs(int(term)), step)
    return str(value if factor == 1 else step(f"{value}/{factor}=", value // factor))


def _base_conversion(metadata: dict, step: Step) -> str:
    if metadata["target_base"] == 10:
        base = metadata["source_base"]
        first, *rest = metadata["source_repr"]
        value = int(first)
        for digit in rest:
            value = step(f"{value}*{base}+{digit}=", value * base + int(digit))
        return str(value)
    base, value, digits = metadata["target_base"], metadata["decimal_value"], []
    while value:
        quotient, rest = divmod(value, base)
        wrong = [f"{quotient + 1} r {rest}", f"{quotient} r {(rest + 1) % base}", f"{quotient} r {(rest - 1) % base}"]
        quotient, rest = step(f"{value}/{base}=", f"{quotient} r {rest}", wrong).split(" r ")
        value = int(quotient)
        digits.append(rest)
    return "".join(reversed(digits))


def _conversion(metadata: dict) -> str:
    return f"{metadata['source_repr']} from base {metadata['source_base']} to {metadata['target_base']}"


def _stays_small(entry: dict) -> bool:
    """Whether no step of an expression leaves what two digits can write."""
    results = []

    def step(text: str, right: int) -> int:
        results.append(right)
        return right

    _basic_arithmetic(entry["metadata"], step)
    return all(abs(result) < 100 for result in results)


#: By the name of the task in reasoning-gym. Numbers are small: with up to 99 (and 250, in other bases) a model of five million
#: parameters was right in 24% of the problems after an hour.
FAMILIES = {
    "chain_sum": Family(
        levels=[
            {"min_terms": few, "max_terms": many, "min_digits": 1, "max_digits": 1}
            for few, many in ((2, 3), (3, 4), (5, 6))
        ],
        about=lambda metadata: f"the value of {metadata['expression']}",
        solve=_chain_sum,
    ),
    "leg_counting": Family(
        levels=[{"min_animals": n, "max_animals": n, "max_instances": most} for n, most in ((2, 4), (2, 6), (3, 6))],
        about=lambda metadata: "the legs of " + ", ".join(f"{n} {name}" for name, n in metadata["animals"].items()),
        solve=_leg_counting,
    ),
    "gcd": Family(
        levels=[{"min_value": 2, "max_value": most} for most in (30, 40, 50)],
        about=lambda metadata: "the greatest common divisor of {} and {}".format(*metadata["numbers"]),
        solve=_gcd,
        style="other",
    ),
    "number_filtering": Family(
        levels=[
            {"min_numbers": n, "max_numbers": n, "max_decimals": 0, "min_value": 0.0, "max_value": 30.0}
            for n in (2, 3, 4)
        ],
        about=lambda metadata: "the list " + ", ".join(metadata["original_numbers"]),
        solve=_number_filtering,
        keep=lambda entry: entry["metadata"]["result"] != [],
    ),
    "basic_arithmetic": Family(
        levels=[
            {"min_terms": 2, "max_terms": n, "max_digits": 1, "operators": ["+", "-", "*"], "allow_negation": False}
            for n in (2, 3, 4)
        ],
        about=lambda metadata: f"the value of {metadata['expression']}",
        solve=_basic_arithmetic,
        keep=_stays_small,
    ),
    "simple_equations": Family(
        levels=[
            {
                "min_terms": 2,
                "max_terms": n,
                "max_value": most,
                "operators": ("+", "-"),
                "operators_weights": [0.5, 0.5],
            }
            for n, most in ((2, 6), (2, 12), (3, 16))
        ],
        about=lambda metadata: f"{metadata['variable']} in {metadata['equation']}",
        solve=_simple_equations,
    ),
    "base_conversion": Family(
        levels=[
            {"min_base": base, "max_base": 10, "min_value": 10, "max_value": most}
            for base, most in ((5, 60), (4, 70), (4, 80))
        ],
        about=_conversion,
        solve=_base_conversion,
        keep=lambda entry: 10 in (entry["metadata"]["source_base"], entry["metadata"]["target_base"]),
        style="other",
    ),
}
