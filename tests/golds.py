"""
Every reference answer of GSM8K's and MATH-500's test sets against spellings of itself and against wrong neighbours.

`python tests/golds.py` judges all of them and writes what went wrong, by number, to
recipes/results/math_reward/golds.json; test_rewards.py judges them again and expects the same.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from trl_opsd.data import load_prompts
from trl_opsd.results import write_results
from trl_opsd.rewards import math_reward


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SETS = {"gsm8k": SHARED / "gsm8k" / "test.jsonl", "math-500": SHARED / "math500" / "test.jsonl"}
# Neighbours that are no mistake: the next problem has the same answer in another form.
EQUAL = {("math-500", 22)}


def spellings(gold: str) -> Iterator[tuple[str, str, bool]]:
    """Yields the kind of a spelling, a completion with it, and whether only flexible scoring has to accept it."""
    yield "plain", rf"So the answer is \boxed{{{gold}}}.", False
    yield "dollars", rf"<think>\boxed{{0}} or \boxed{{-77}}?</think> Then $\boxed{{${gold}$}}$ is it.", False
    yield "spaces", rf"The final answer: \[ \boxed{{ {gold} . }} \]", False
    yield "Answer:", f"First 123, then 456.\nAnswer: ${gold}$.\n", True
    yield "answer is", f"It follows that the answer is ${gold}$.", True
    yield "####", f"3 + 4 = 7\n#### {gold}", True
    for kind, other in rewritten(gold):
        if other != gold:
            yield kind, rf"We get \boxed{{{other}}}", False


def rewritten(gold: str) -> Iterator[tuple[str, str]]:
    if re.fullmatch(r"-?\d+", gold):
        yield "decimal", f"{gold}.00"
        yield "dollar sign", rf"\${gold}"
        yield "unit", rf"{gold} \text{{ apples}}"
        yield "plain unit", f"{gold} dollars per day"
        yield "assignment", f"x = {gold}"
        yield "thousands", f"{int(gold):,}"
        yield "thousands, LaTeX", f"{int(gold):,}".replace(",", r",\!")
        yield "thousands, braces", f"{int(gold):,}".replace(",", "{,}")
        yield "fraction", rf"\frac{{{3 * int(gold)}}}{{3}}"
    simple = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if simple:
        sign, above, below = simple[1], int(simple[2]), int(simple[3])
        yield "slash", f"{sign}{above}/{below}"
        yield "unreduced", rf"{sign}\frac{{{3 * above}}}{{{3 * below}}}"
        yield "decimal fraction", f"{sign}{above / below:.9f}"
    if r"\text" not in gold and r"\mbox" not in gold:
        yield "no spaces", re.sub(r"(?<![a-z]) ", "", gold)
    for kind, old, new in (
        ("dfrac", r"\\d?frac", r"\\dfrac"),
        ("tfrac", r"\\d?frac", r"\\tfrac"),
        ("brackets", "pmatrix", "bmatrix"),
        ("no degrees", r"\^\\circ", ""),
        ("degree sign", r"\^\\circ", "°"),
        ("degrees", r"\^\\circ", r"\\text{ degrees}"),
        ("bold", r"\\text\{", r"\\textbf{"),
        ("no text", r"\\(?:text|mbox)\{([^}]*)\}", r"\1"),
        ("lower case", r"\\text\{([A-Za-z]+)\}", lambda match: match[1].lower()),
        ("no unit", r"(?<=\d)\s*\\(?:text|mbox)\{[^}]*\}(?:\^2)?$", ""),
        ("left right", r"^\(([^()]*)\)$", r"\\left(\1\\right)"),
        ("no left right", r"\\(?:left|right)", ""),
        ("no dollar", r"\\\$", ""),
        ("base in braces", r"_\{?(\d)\}?$", r"_{\1}"),
        ("pi", r"\\pi", "π"),
        ("root", r"\\sqrt\{?(\d+)\}?", r"\\sqrt{\1}"),
        ("plus or minus", r"^(\d) \\pm (.*)$", r"\1 - \2, \1 + \2"),
        ("and", r"^([^,()\[\]{}]+),(?!\\!|\d{3})([^,()\[\]{}]+)$", r"\2 \\text{ and } \1"),
        ("braces", r"^([^()\[\]{}_$!]*[^\d()\[\]{}_$!]),([^()\[\]{}_$!]*)$", r"\\{\1,\2\\}"),
        ("no name", r"^[xy] (?:=|\\in) ?|^[xy]=", ""),
    ):
        yield kind, re.sub(old, new, gold)


def neighbours(gold: str, following: str) -> Iterator[tuple[str, str]]:
    """Yields wrong answers that look like the right one."""
    if following != gold:
        yield "next problem", following
    if re.fullmatch(r"-?\d+", gold):
        number = int(gold)
        yield "plus one", str(number + 1)
        yield "minus one", str(number - 1)
        yield "times ten", f"{number}0" if number else "10"
        yield "plus a half", f"{number}.5"
        yield "plus a little", f"{number}.001"
        yield "plus one, unit", rf"{number + 1} \text{{ apples}}"
        yield "plus a third", rf"\frac{{{3 * number + 1}}}{{3}}"
        yield "plus a thousand", f"{number + 1000:,}"
        if number:
            yield "minus", str(-number)
    digits = list(re.finditer(r"\d+", gold))
    for kind, run in (("first number", digits[:1]), ("last number", digits[-1:])):
        for match in run:
            yield kind, f"{gold[: match.start()]}{int(match[0]) + 1}{gold[match.end() :]}"
    signs = list(re.finditer(r"(?<=[\w} ])([+-])(?= ?[\w\\])", gold))
    if signs:
        position = signs[-1].start()
        yield "last sign", gold[:position] + {"+": "-", "-": "+"}[gold[position]] + gold[position + 1 :]
    elif re.match(r"\\(?:frac|dfrac|sqrt|pi)|[1-9]", gold) and "," not in gold:
        yield "minus sign", f"-{gold}"
    if re.match(r"^[(\[].*[)\]]$", gold):
        swapped = {"(": "[", ")": "]", "[": "(", "]": ")"}
        if gold[0] + gold[-1] in ("(]", "[)", "[]"):
            yield "brackets", swapped[gold[0]] + gold[1:-1] + swapped[gold[-1]]
    word = re.fullmatch(r"\\text\{\(?(\w+)\)?\}", gold)
    if word:
        yield "other word", rf"\text{{{word[1][:-1]}{chr(ord(word[1][-1]) + 1)}}}"
        yield "letters in another order", word[1][::-1] if len(word[1]) > 1 else "D" if word[1] != "D" else "A"


def judge(name: str) -> dict:
    """Returns how many spellings and neighbours of a set's answers were judged, and those judged wrongly."""
    gold = load_prompts(f"{name}:{SETS[name]}", "test")["answer"][:]
    wrong, right_count, wrong_count = [], 0, 0
    for number in range(len(gold)):
        following = gold[(number + 1) % len(gold)]
        kinds, texts, only_flexible = zip(*spellings(gold[number]), strict=True)
        assert len(kinds) - sum(only_flexible) >= 3
        right_count += len(kinds)
        strict, flexible = (
            math_reward(texts, answer=[gold[number]] * len(texts), flexible=flexible) for flexible in (False, True)
        )
        for kind, text, only, a, b in zip(kinds, texts, only_flexible, strict, flexible, strict=True):
            if b != 1.0 or a != (0.0 if only else 1.0):
                wrong.append(
                    {"set": name, "number": number, "mistake": "false negative", "kind": kind, "gold": gold[number]}
                    | {"text": text, "strict": a, "flexible": b}
                )
        others = list(neighbours(gold[number], following))
        wrong_count += len(others)
        scores = math_reward([rf"\boxed{{{text}}}" for _, text in others], answer=[gold[number]] * len(others))
        for (kind, text), score in zip(others, scores, strict=True):
            if score != 0.0:
                mistake = "equal" if kind == "next problem" and (name, number) in EQUAL else "false positive"
                wrong.append(
                    {"set": name, "number": number, "mistake": mistake, "kind": kind, "gold": gold[number]}
                    | {"text": text, "strict": score, "flexible": score}
                )
    mistakes = [case["mistake"] for case in wrong]
    return {
        "set": name,
        "answers": len(gold),
        "spellings": right_count,
        "neighbours": wrong_count,
        "false_negatives": mistakes.count("false negative"),
        "false_positives": mistakes.count("false positive"),
        "cases": wrong,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = ROOT / "recipes" / "results" / "math_reward" / "golds.json"
    write_results(path, [judge(name) for name in SETS], {"sets": list(SETS)})


if __name__ == "__main__":
    main()
