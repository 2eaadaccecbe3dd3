"""
Where math-verify takes unequal answers for equal, or equal ones for unequal: the smallest cases, for a report upstream.

`python -m scripts.experiments.math_verify_cases` prints each case and what the installed version says of it. The verifier
of this package reads these itself (see trl_opsd/rewards/README.md), so it does not depend on the outcome.
"""

from importlib.metadata import version

from math_verify import LatexExtractionConfig, parse, verify


# Reference answer, answer, what is right, and where it goes wrong
CASES = (
    ("4.5e33", r"4.5 \times 10^{33}", True, "`e` between two numbers is read as Euler's number"),
    ("4.5e33", "148.5 e", False, "the same: 4.5 times 33 is 148.5"),
    ("204", r"204\%", False, "whole numbers are compared without their percent signs"),
    (r"\frac{3}{4}", "3:4", False, "a ratio is read as a quotient, and so is a time of day"),
    ("3", r"\{3\}", False, "an element is turned into a set with one element"),
    ("4, 5", "(4, 5)", False, "an open interval is compared with a list of two"),
    (
        r"\frac{dx}{dt} = kx - a",
        r"\frac{dx}{dt} = 2(kx - a)",
        False,
        "solve() finds nothing for either, and all() of nothing is true",
    ),
    ("x^2 + V", "x^2 + v", False, "symbols are put into lower case"),
)


def judged() -> list[tuple[str, str, bool, bool, str]]:
    """Returns each case with what math-verify says before the reason."""
    configs = (LatexExtractionConfig(boxed_match_priority=0),)
    read = [[parse(rf"\boxed{{{text}}}", extraction_config=configs) for text in case[:2]] for case in CASES]
    return [
        (gold, answer, right, verify(*parsed), reason)
        for (gold, answer, right, reason), parsed in zip(CASES, read, strict=True)
    ]


if __name__ == "__main__":
    print(f"math-verify {version('math-verify')}")
    for gold, answer, right, verdict, reason in judged():
        print(f"{'wrong' if verdict != right else 'right'}: {answer} for {gold} is {verdict}: {reason}")
