"""
Every reference answer of GSM8K's and MATH-500's test sets against spellings of itself and against wrong neighbours.

`python tests/golds.py` judges all of them and writes what went wrong, by kind, to
recipes/results/math_reward/golds.json; test_rewards.py judges them again and expects the same, and each time a part. before.json beside it is
what this made of the verifier that left to math-verify what is not a plain number.
"""

import argparse
import re
from collections import Counter, defaultdict
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


def spellings(gold: str, percent: bool) -> Iterator[tuple[str, str, bool]]:
    """Yields the kind of a spelling, a completion with it, and whether only flexible scoring has to accept it."""
    yield "plain", rf"So the answer is \boxed{{{gold}}}.", False
    yield "dollars", rf"<think>\boxed{{0}} or \boxed{{-77}}?</think> Then $\boxed{{${gold}$}}$ is it.", False
    yield "spaces", rf"The final answer: \[ \boxed{{ {gold} . }} \]", False
    yield "Answer:", f"First 123, then 456.\nAnswer: ${gold}$.\n", True
    yield "answer is", f"It follows that the answer is ${gold}$.", True
    yield "####", f"3 + 4 = 7\n#### {gold}", True
    yield "bold", f"12 + 3 = 15.\n\n**The final answer is: ${gold}$**", True
    yield "bold mark", f"12 + 3 = 15.\n\n**Final Answer:** ${gold}$\n\nI have checked all 3 steps.", True
    yield "trailing text", rf"Hence \[ \boxed{{{gold}}} \] and that is what had to be found in 2 steps.", False
    yield "displayed", f"\\[\n\\boxed{{\n{gold}\n}}\n\\]", False
    if percent and re.fullmatch(r"\d+", gold):
        yield "percent", rf"We get \boxed{{{gold}\%}}", False
        yield "percent in words", rf"We get \boxed{{{gold} \text{{ percent}}}}", False
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
        yield "about", rf"\approx {gold}"
        yield "bold number", rf"\mathbf{{{gold}}}"
        yield "text", rf"\text{{{gold} apples}}"
        yield "brackets, unit", f"{gold} (apples)"
        yield "power of ten", rf"{int(gold) / 1000} \times 10^{{3}}"
        yield "unit, upright", rf"{gold}\,\mathrm{{m/s}}"
        yield "symbol", f"{gold} kHz"
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
        ("spaces, LaTeX", r"(?<=[a-z0-9}]), ?(?! ?\\!|\d{3})", r",\\, "),
        ("big", r"^\(([^()]*)\)$", r"\\bigl(\1\\bigr)"),
        ("choice", r"^\\text\{\(([A-E])\)\}$", r"\1"),
        ("choice, full stop", r"^\\text\{\(([A-E])\)\}$", r"\\textbf{(\1)}."),
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


def neighbours(gold: str, following: str, percent: bool) -> Iterator[tuple[str, str]]:
    """Yields wrong answers that look like the right one."""
    if following != gold:
        yield "next problem", following
    fraction = re.fullmatch(r"-?\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if fraction:
        yield "ratio", f"{fraction[1]}:{fraction[2]}"
    elements = re.fullmatch(r"([^(){}\[\],]+), ?([^(){}\[\],]+)", gold)
    if elements and not re.search(r"\d,\\?!?\s?\d{3}", gold):
        yield "brackets", f"({gold})"
        yield "one of two", elements[1]
        yield "one more", f"{gold}, 777"
    pair = re.fullmatch(r"\\?l?e?f?t?\(\s*([^(){}\[\],\\]+), ?([^(){}\[\],\\]+)\)", gold)
    if pair and pair[1].strip() != pair[2].strip():
        yield "other order", f"({pair[2]},{pair[1]})"
        yield "without brackets", f"{pair[1]},{pair[2]}"
    if "=" in gold:
        left, right = gold.split("=")
        if right.strip() != "0":
            yield "half an equation doubled", f"{left}= 2({right})"
    if re.search(r"\d\s*\\(?:text|mbox)\{ ?cm\}", gold):
        yield "other unit", gold.replace("cm", "m")
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
        yield "almost", f"{number - 1}.9999999" if number > 0 else f"{number}.0000001"
        yield "set", rf"\{{{number}\}}"
        yield "twice", f"{number}, {number}"
        yield "ten times, power of ten", rf"{number or 1} \times 10^{{1}}"
        yield "Euler's number", f"{number or 1} e"
        if not percent and number:
            yield "percent", rf"{number}\%"
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


def judge(name: str, every: int = 1) -> dict:
    """Returns how many spellings and neighbours of a set's answers were judged, of one in `every`, and how wrongly."""
    dataset = load_prompts(f"{name}:{SETS[name]}", "test")
    gold, prompts = dataset["answer"][:], dataset["prompt"][:]
    wrong, right_count, wrong_count = [], 0, 0
    for number in range(0, len(gold), every):
        following = gold[(number + 1) % len(gold)]
        percent = re.search(r"%|percent", prompts[number][-1]["content"]) is not None
        kinds, texts, only_flexible = zip(*spellings(gold[number], percent), strict=True)
        assert len(kinds) - sum(only_flexible) >= 3
        right_count += len(kinds)
        strict, flexible = (
            math_reward(texts, [gold[number]] * len(texts), prompts=[prompts[number]] * len(texts), flexible=flexible)
            for flexible in (False, True)
        )
        for kind, text, only, a, b in zip(kinds, texts, only_flexible, strict, flexible, strict=True):
            if b != 1.0 or a != (0.0 if only else 1.0):
                wrong.append(
                    {"set": name, "number": number, "mistake": "false negative", "kind": kind, "gold": gold[number]}
                    | {"text": text, "strict": a, "flexible": b}
                )
        others = list(neighbours(gold[number], following, percent))
        wrong_count += len(others)
        texts = [rf"\boxed{{{text}}}" for _, text in others]
        scores = math_reward(texts, [gold[number]] * len(texts), prompts=[prompts[number]] * len(texts))
        for (kind, text), score in zip(others, scores, strict=True):
            if score != 0.0:
                mistake = "equal" if kind == "next problem" and (name, number) in EQUAL else "false positive"
                wrong.append(
                    {"set": name, "number": number, "mistake": mistake, "kind": kind, "gold": gold[number]}
                    | {"text": text, "strict": score, "flexible": score}
                )
    mistakes = [case["mistake"] for case in wrong]
    kinds = Counter(f"{case['mistake']}: {case['kind']}" for case in wrong)
    first = defaultdict(list)
    for case in wrong:
        first[case["mistake"], case["kind"]].append(case)
    return {
        "set": name,
        "answers": len(gold),
        "spellings": right_count,
        "neighbours": wrong_count,
        "false_negatives": mistakes.count("false negative"),
        "false_positives": mistakes.count("false positive"),
        "kinds": dict(kinds),
        "cases": [case for cases in first.values() for case in cases[:2]],  # of each kind
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = ROOT / "recipes" / "results" / "math_reward" / "golds.json"
    write_results(path, [judge(name) for name in SETS], {"sets": list(SETS)})


if __name__ == "__main__":
    main()
