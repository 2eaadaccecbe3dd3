"""The verifier of BIG-Bench Hard's tasks: choices, yes or no, brackets, words and numbers."""

import re
from collections.abc import Callable

from .math import extract_answer, math_reward, text_of, texts_of


_GOLD = re.compile(r"\(([A-R])\)")
_OPTION = re.compile(r"^\(([A-R])\)\s*(.+)$", re.MULTILINE)
_LETTER = re.compile(r"\(([A-R])\)")
_PAIRS = ({"true", "false"}, {"yes", "no"}, {"valid", "invalid"})
_LAYOUT = re.compile(r"[\s$*`'\".]+|\\(?:text|mathrm|textbf)\b|[{}]")


def logic_reward(
    completions: list[list[dict[str, str]]] | list[str],
    answer: list[str],
    prompts: list[list[dict[str, str]]] | list[str],
    log_extra: Callable[[str, list], None] | None = None,
    flexible: bool = False,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that is 1.0 where the final answer of a completion is the reference answer, and 0.0 where not.

    The final answer is the last `\boxed{}` after the thinking trace. Where the reference answer is a choice, such as
    `(B)`, the letter counts, and so does the whole text of that option; everything else is compared by
    [`math_reward`].

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        answer (`list[str]`):
            Reference answers.
        prompts (`list[list[dict[str, str]]]` or `list[str]`):
            Prompts, for the texts of the options: lines that begin with `(A)`, `(B)`, ...
        log_extra (`Callable`, *optional*):
            Function to log extra columns to the completions table, given by the trainer.
        flexible (`bool`, *optional*, defaults to `False`):
            Whether an answer counts that is not boxed: what follows the last `Answer:` or `answer is`, or else the last
            letter in brackets that the completion names, or the last of the two words (true or false, yes or no, valid
            or invalid) that the reference answer is one of.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float | None]`: One score per completion, `None` where the reference answer cannot be parsed.
    """
    texts = texts_of(completions, prompts)
    found = [extract_answer(text, flexible) for text in texts]
    if log_extra is not None:
        log_extra("answer", list(answer))
        log_extra("answer_extracted", [text or "[none]" for text in found])
    scores = math_reward(completions, answer, prompts, flexible=flexible)
    for index, (gold, prompt) in enumerate(zip(answer, prompts, strict=True)):
        if scores[index] == 0 and (wanted := _GOLD.fullmatch(str(gold).strip())):
            options = {letter: _plain(text) for letter, text in _OPTION.findall(text_of(prompt))}
            scores[index] = float(_chosen(found[index], options) == wanted[1])
        if scores[index] == 0 and flexible and r"\boxed" not in texts[index]:
            scores[index] = float(_last_named(texts[index], str(gold).strip()))
    return scores


def _plain(text: str) -> str:
    return _LAYOUT.sub("", text).lower()


def _chosen(found: str | None, options: dict[str, str]) -> str | None:
    """Returns the letter of the option that an answer names, by letter and text or by its text alone."""
    if found is None:
        return None
    letter = re.match(r"\W*(?:\\text\{)?\(?([A-R])\)\s*(.*)", found, re.DOTALL)
    if letter and options.get(letter[1]) == _plain(letter[2]):
        return letter[1]
    same = [name for name, text in options.items() if text == _plain(found)]
    return same[0] if len(same) == 1 else None


def _last_named(text: str, gold: str) -> bool:
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return False
    if wanted := _GOLD.fullmatch(gold):
        return _LETTER.findall(text)[-1:] == [wanted[1]]
    pair = next((pair for pair in _PAIRS if gold.lower() in pair), None)
    if pair is None:
        return False
    return re.findall(rf"\b(?:{'|'.join(pair)})\b", text.lower())[-1:] == [gold.lower()]
