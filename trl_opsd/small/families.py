"""
The families of tasks: which problems reasoning-gym generates for each, and how one of them is worked out.

A solver works step by step. It hands each step to `step(text, right, wrong)`, which says what came out, and goes on from
there: that is `right`, or in a slip one of `wrong`. So an answer that follows from a slip is what one really gets.
"""

import ast
import operator
import re
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


def near(right: int) -> list[int]:
    """Numbers that one gets for `right` by a slip. They have the same sign, so that what follows stays possible."""
    distances = [d for d in (-10, -2, -1, 1, 2, 10) if abs(d) < 10 or abs(right) >= 10]
    return [right + d for d in distances if (right + d < 0) == (right < 0)]


_RESULTS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))


def _take_first(node: ast.BinOp) -> tuple[ast.BinOp, ast.expr]:
    """The first operation of an expression whose operands are numbers, and the expression with `_` in its place."""
    if not _is_number(node.left):
        operation, node.left = _take_first(node.left)
    elif not _is_number(node.right):
        operation, node.right = _take_first(node.right)
    else:
        return node, ast.Name("_")
    return operation, node


def _parse(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _write(node: ast.expr) -> str:
    """Without spaces and without parentheses that are not needed."""
    return ast.unparse(node).replace(" ", "")


def _calculate(expression: str, step: Step) -> int:
    """
    Works out an expression, one operation in a step.

    A step writes down all that is left, as `8-6-1+4=2-1+4`. So the next operands lie beside each other, and one sees when
    there is nothing left to do. Where they had to be fetched from the question, small models took wrong ones or ended
    early.
    """
    while not _is_number(_parse(expression)):
        operation, rest = _take_first(_parse(expression))
        right = _RESULTS[type(operation.op)](ast.literal_eval(operation.left), ast.literal_eval(operation.right))
        rest = _write(rest)
        outcomes = [rest.replace("_", str(result)) for result in (right, *near(right))]
        expression = step(f"{expression}=", outcomes[0], outcomes[1:])
    return int(expression)


def _expression(metadata: dict, step: Step) -> str:
    return str(_calculate(_write(_parse(metadata["expression"])), step))


def _leg_counting(metadata: dict, step: Step) -> str:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS  # an optional package

    legs = [
        step(f"{number} {animal}: {number}*{ANIMALS[animal]}=", number * ANIMALS[animal])
        for animal, number in metadata["animals"].items()
    ]
    return str(_calculate("+".join(map(str, legs)), step))


def _gcd(metadata: dict, step: Step) -> str:
    b, a = sorted(metadata["numbers"])
    while b:
        a, b = b, step(f"{a} mod {b}=", a % b)
    return str(a)


_RELATIONS = ("larger", "smaller", "equal")
#: What `keep_larger` and the like make of a number, by how it compares
_RULES = {
    f"{action}_{which}": {
        relation: "keep" if (relation == which) == (action == "keep") else "remove" for relation in _RELATIONS
    }
    for action in ("keep", "remove")
    for which in ("larger", "smaller")
}


def _number_filtering(metadata: dict, step: Step) -> str:
    # The rule in a step of its own: what is asked for and how a number compares are too much for one token
    rules = {
        name: ", ".join(f"{relation} {rule[relation]}" for relation in _RELATIONS) for name, rule in _RULES.items()
    }
    right = rules.pop(metadata["operation"])
    rule = step("The rule: ", right, list(rules.values()))
    verdicts = dict(part.split() for part in rule.split(", "))
    limit, kept = float(metadata["filter_value"]), []
    for number in metadata["original_numbers"]:
        outcomes = {}
        for relation, verdict in verdicts.items():
            so_far = [*kept, number] if verdict == "keep" else kept
            outcomes[relation] = f"{relation}, {verdict}, so {', '.join(so_far) or 'none'}"
        relation = "equal" if float(number) == limit else "larger" if float(number) > limit else "smaller"
        right = outcomes.pop(relation)
        if ", keep, " in step(f"{number} against {metadata['filter_value']}: ", right, list(outcomes.values())):
            kept.append(number)
    return str(kept)


def _simple_equations(metadata: dict, step: Step) -> str:
    left, expression = metadata["equation"].split(" = ")
    factor = 0
    for term in left.replace(" - ", " + -").split(" + "):
        if term.endswith(metadata["variable"]):
            digits = term[:-1].rstrip("*")
            factor = int(f"{digits}1" if digits in ("", "-") else digits)
        else:
            expression += f"{-int(term):+}"
    value = _calculate(expression, step)
    return str(value if factor == 1 else step(f"{value}/{factor}=", value // factor))


def _base_conversion(metadata: dict, step: Step) -> str:
    if metadata["target_base"] == 10:
        base, number = metadata["source_base"], metadata["source_repr"]
        value, *digits = step(f"{number} is ", " ".join(number), [" ".join(number[::-1])]).split()
        for digit in digits:
            value = _calculate(f"{value}*{base}+{digit}", step)
        return str(value)
    base, value, digits = metadata["target_base"], metadata["decimal_value"], []
    while value:
        quotient, rest = divmod(value, base)
        slips = [(quotient + 1, rest), (quotient, (rest + 1) % base), (quotient, (rest - 1) % base)]
        outcomes = [f"{q} r {r}, so {' '.join(map(str, [r, *digits]))}" for q, r in [(quotient, rest), *slips]]
        division, written = step(f"{value}/{base}=", outcomes[0], outcomes[1:]).split(", so ")
        value, digits = int(division.split()[0]), written.split()
    return "".join(digits)


def _conversion(metadata: dict) -> str:
    return f"{metadata['source_repr']} from base {metadata['source_base']} to {metadata['target_base']}"


def _stays_small(entry: dict, solve: Callable) -> bool:
    """Whether no step leaves what two digits can write."""
    texts = []

    def step(text: str, right: str | int, wrong: list | None = None) -> str | int:
        texts.append(f"{text}{right}")
        return right

    solve(entry["metadata"], step)
    return all(int(number) < 100 for text in texts for number in re.findall(r"\d+", text))


#: By the name of the task in reasoning-gym. Numbers are small: with up to 99 (and 250, in other bases) a model of five million
#: parameters was right in 24% of the problems after an hour.
FAMILIES = {
    "chain_sum": Family(
        levels=[
            {"min_terms": few, "max_terms": many, "min_digits": 1, "max_digits": 1}
            for few, many in ((2, 3), (3, 4), (5, 6))
        ],
        about=lambda metadata: f"the value of {metadata['expression']}",
        solve=_expression,
    ),
    "leg_counting": Family(
        levels=[{"min_animals": n, "max_animals": n, "max_instances": most} for n, most in ((2, 4), (2, 6), (3, 6))],
        about=lambda metadata: "the legs of " + ", ".join(f"{n} {name}" for name, n in metadata["animals"].items()),
        solve=_leg_counting,
        keep=lambda entry: _stays_small(entry, _leg_counting),
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
        solve=_expression,
        keep=lambda entry: _stays_small(entry, _expression),
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
