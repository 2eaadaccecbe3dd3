"""
Whether what a converter left still is the model: what its engine reads and writes, against what transformers does.

A converter that reports success has proved nothing. What is compared is what the engine does with the artefact: the tokens
that it makes of texts, the tokens that end its turn, its chat template, and, of an artefact that is not quantised, every
token of greedy completions.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


#: Texts that tokenizers take apart differently: spaces, digits, marks, other scripts, what looks like markup.
PROBES = (
    "  two spaces, a tab\tand\n\n\nlines  ",
    "0 12 345 6789 3.14159 1,000,000 -7 1e-5",
    "x**2 + y**2 != z**2; f(x)=\\frac{1}{2}\\boxed{42}",
    "It's naïve: \u201ccafé\u201d – Größe, 東京, Привет, שלום, 🙂👍🏽",
    "<b>not a token</b> </think> [INST] # ## ```python\n    return None\n```",
)


@dataclass
class Answer:
    """
    What an engine reads in an artefact and writes with it.

    Args:
        tokens (`list[list[int]]`):
            Token ids of the texts of the reference, without any that would be added around them.
        eos_ids (`list[int]`):
            Tokens that the artefact declares to end a completion.
        end_ids (`list[int]`):
            Tokens at which the engine ends, those among them.
        chat_template (`str`, *optional*):
            Its chat template.
        rendered (`list[str]`, *optional*):
            The conversations of the reference in that template, if the engine can do it.
        completions (`list[list[int]]`):
            Greedy completions of the prompts that were asked for, each with the token that ended it.
        seconds (`float`):
            What they took.
    """

    tokens: list[list[int]]
    eos_ids: list[int]
    end_ids: list[int]
    chat_template: str | None
    rendered: list[str] | None
    completions: list[list[int]]
    seconds: float


@dataclass
class Reference:
    """
    What transformers reads in the checkpoint and writes with it in float32.

    Args:
        texts (`list[str]`):
            Texts to tokenise: prompts, answers, [`PROBES`].
        tokens (`list[list[int]]`):
            Their token ids, without any that would be added around them.
        eos_ids (`Collection[int]`):
            Every token that ends a completion.
        special_ids (`Collection[int]`):
            Tokens that are no text. An engine may end at more of them than the model does.
        chat_template (`str`, *optional*):
            Chat template.
        conversations (`list`):
            Conversations to render. None where prompts are plain text.
        rendered (`list[str]`):
            The same in the template, up to where an answer begins.
        prompts (`list[tuple[list[int], int]]`):
            Token ids of prompts, and how many tokens may follow.
        completions (`list[list[int]]`):
            What follows, by greedy decoding.
    """

    texts: list[str]
    tokens: list[list[int]]
    eos_ids: Collection[int]
    special_ids: Collection[int]
    chat_template: str | None
    conversations: list
    rendered: list[str]
    prompts: list[tuple[list[int], int]]
    completions: list[list[int]]

    def differences(self, answer: Answer, is_quantised: bool = False) -> list[str]:
        """
        Says in what an artefact differs from the checkpoint.

        Args:
            answer ([`Answer`]):
                What its engine says, with the completions of `prompts` first.
            is_quantised (`bool`, *optional*, defaults to `False`):
                Whether the tokens of completions may differ.

        Returns:
            `list[str]`: What differs, each in half a sentence.
        """
        found = [*self._tokenizer(answer), *self._ends(answer), *self._template(answer)]
        return found if is_quantised else [*found, *self._completions(answer)]

    def prefix(self, answer: Answer) -> float:
        """Returns the mean share of each completion that is the same up to the first token that differs."""
        shares = [
            common_prefix(own, other) / max(len(own), len(other))
            for own, other in zip(self.completions, answer.completions, strict=False)
        ]
        return sum(shares) / len(shares)

    def _tokenizer(self, answer: Answer) -> list[str]:
        for text, own, other in zip(self.texts, self.tokens, answer.tokens, strict=True):
            if own != other:
                at = common_prefix(own, other)
                return [
                    f"its tokenizer takes {text!r:.60} apart otherwise, from token {at} on ({other[at : at + 4]} in place of "
                    f"{own[at : at + 4]})"
                ]
        return []

    def _ends(self, answer: Answer) -> list[str]:
        wrong = sorted(set(answer.eos_ids) - set(self.eos_ids))
        if wrong or not answer.eos_ids:
            return [
                f"it declares {wrong or 'no token'} to end a completion, and the checkpoint {sorted(self.eos_ids)}"
            ]
        if missing := sorted(set(self.eos_ids) - set(answer.end_ids)):
            return [f"its engine goes on after {missing}, in which the checkpoint ends"]
        if more := sorted(set(answer.end_ids) - set(self.eos_ids) - set(self.special_ids)):
            return [f"its engine ends at {more}, which are text to the checkpoint"]
        return []

    def _template(self, answer: Answer) -> list[str]:
        if self.chat_template is None:
            return []
        if answer.chat_template is None:
            return ["it has no chat template"]
        if answer.rendered is None:
            return [] if answer.chat_template == self.chat_template else ["its chat template is another one"]
        for own, other in zip(self.rendered, answer.rendered, strict=True):
            if own != other:
                at = common_prefix(own, other)
                return [
                    f"its chat template writes {other[at : at + 40]!r} where the checkpoint's writes {own[at : at + 40]!r}"
                ]
        return []

    def _completions(self, answer: Answer) -> list[str]:
        pairs = list(zip(self.completions, answer.completions, strict=False))
        wrong = [(index, own, other) for index, (own, other) in enumerate(pairs) if own != other]
        if len(pairs) < len(self.completions):
            return [f"it completed {len(pairs)} of {len(self.completions)} prompts"]
        if not wrong:
            return []
        index, own, other = wrong[0]
        at = common_prefix(own, other)
        return [
            f"{len(wrong)} of {len(pairs)} greedy completions are not those of transformers in float32: that of prompt "
            f"{index} differs from token {at} on ({other[at : at + 4]} in place of {own[at : at + 4]})"
        ]


def common_prefix(one: Sequence, other: Sequence) -> int:
    """Returns how many of the first items are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
