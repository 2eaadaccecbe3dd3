"""The thinking block of a completion: by which tags, how long, and whether it was ever closed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


# A pair of tags as templates write them: `<think>`, `<seed:think>`, `<thought>`, `[THINK]`, `◁think▷`
_OPEN = re.compile(r"([<\[◁])([\w:]*(?:think|thought|reason)\w*)([>\]▷])", re.IGNORECASE)


@dataclass(frozen=True)
class ThinkingTags:
    """
    What encloses the thinking block.

    Args:
        start (`str`, *optional*, defaults to `"<think>"`):
            What opens it, in the completion or at the end of the prompt.
        end (`str`, *optional*, defaults to `"</think>"`):
            What closes it.
    """

    start: str = "<think>"
    end: str = "</think>"


@dataclass(frozen=True)
class Thinking:
    """
    A completion, read.

    Args:
        text (`str`):
            Its text, without special tokens.
        judged (`str`):
            The same with `<think>` and `</think>` for whatever tags the model has: what verifiers read.
        tokens (`int`):
            Number of its tokens up to the closing tag; all of them if it never comes.
        is_open (`bool`):
            Whether the block was not closed, so that there is no answer.
    """

    text: str
    judged: str
    tokens: int
    is_open: bool


def find_tags(tokenizer: PreTrainedTokenizerBase, said: Sequence[str] | None = None) -> ThinkingTags:
    """
    Finds the tags of a model's thinking block.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, whose chat template shows them.
        said (`Sequence[str]`, *optional*):
            Opening and closing tag, for a template that does not show them as a pair such as `<think>`, `</think>`.

    Returns:
        [`ThinkingTags`]: Those that were said, or the first pair of the template, or `<think>` and `</think>`.
    """
    if said is not None:
        return ThinkingTags(*said)
    templates = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else " ".join(templates.values())
    for left, name, right in _OPEN.findall(text):
        if f"{left}/{name}{right}" in text:
            return ThinkingTags(f"{left}{name}{right}", f"{left}/{name}{right}")
    return ThinkingTags()


def is_opened(prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase, tags: ThinkingTags) -> bool:
    """Whether a prompt ends in an open thinking block, which the completion is to close."""
    return tokenizer.decode(prompt_ids[-32:]).rstrip().endswith(tags.start)


def read_thinking(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, tags: ThinkingTags, opened: bool = False
) -> Thinking:
    """
    Reads a completion.

    Args:
        ids (`list[int]`):
            Its token ids.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        tags ([`ThinkingTags`]):
            Tags, which may be special tokens.
        opened (`bool`, *optional*, defaults to `False`):
            Whether the prompt has opened the block.

    Returns:
        [`Thinking`]: What was read.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    whole = tokenizer.decode(ids)
    before, closed, after = whole.rpartition(tags.end)
    is_open = tags.start in after or (opened and not closed)
    if is_open:
        tokens = len(ids)
    elif closed:
        length = len(before + closed)
        tokens = fewest(ids, lambda part: len(tokenizer.decode(part)) >= length)
    else:
        tokens = 0
    if tags == ThinkingTags() and text.count(tags.end) == whole.count(tags.end):  # the tags are in the text as it is
        return Thinking(text, text, tokens, is_open)
    thinking, answer = (
        tokenizer.decode(part, skip_special_tokens=True).replace(tags.start, "").replace(tags.end, "")
        for part in (ids[:tokens], ids[tokens:])
    )
    judged = answer if tokens == 0 else f"<think>{thinking}" + ("" if is_open else f"</think>{answer}")
    return Thinking(text, judged, tokens, is_open)


def fewest(ids: list[int], has: Callable[[list[int]], bool]) -> int:
    """Returns how many of the first tokens it takes to have something that all of them have, and more never lose."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if has(ids[:middle]) else (middle + 1, high)
    return low
