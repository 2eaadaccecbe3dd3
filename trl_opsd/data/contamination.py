"""Which training problems are also in an evaluation set?"""

import re

from datasets import Dataset

from .sources import SOURCES


_WORDINGS = sorted({source.prompt for source in SOURCES.values()}, key=len, reverse=True)
_LATEX_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;:! ]")
# Spaces and punctuation go, but not what tells 1.5 from 15 and `1 + 2` from `1 - 2`.
_LAYOUT = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[\s$!?;:'\"`’‘“”*_~]")


def decontaminate(train: Dataset, evaluation: Dataset) -> tuple[Dataset, dict[str, int]]:
    """
    Counts and drops the training problems that are also in an evaluation set.

    Compared is the problem: the user's messages without the wording that a named source puts around it, so that
    sources with different wordings can be compared.

    Args:
        train ([`~datasets.Dataset`]):
            Training rows, with `prompt`.
        evaluation ([`~datasets.Dataset`]):
            Evaluation rows, with `prompt`.

    Returns:
        `tuple[Dataset, dict[str, int]]`: The training rows that are left, and the counts: `train` and `evaluation`
        (rows), `exact` (training rows whose problem is in the evaluation set to the letter), `normalized` (further
        ones that differ only in case, spaces, punctuation or LaTeX spacing), `kept`, and `evaluation_seen` (evaluation
        rows that the training set holds in either way).
    """
    problems = [problem_text(prompt) for prompt in train["prompt"]]
    targets = [problem_text(prompt) for prompt in evaluation["prompt"]]
    exact, normalized = set(targets), {normalize(text) for text in targets}
    same = [text in exact for text in problems]
    keys = [normalize(text) for text in problems]
    alike = [key in normalized for key in keys]
    kept = [index for index, found in enumerate(alike) if not found]
    seen = set(keys)
    return train.select(kept), {
        "train": len(problems),
        "evaluation": len(targets),
        "exact": sum(same),
        "normalized": sum(alike) - sum(same),
        "kept": len(kept),
        "evaluation_seen": sum(normalize(text) in seen for text in targets),
    }


def problem_text(prompt: list[dict[str, str]] | str) -> str:
    """Returns the problem that a prompt asks about: what its users say, without a named source's wording."""
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt if message["role"] == "user")
    for wording in _WORDINGS:
        before, after = wording.split("{problem}")
        if prompt.startswith(before) and prompt.endswith(after):
            return prompt[len(before) : len(prompt) - len(after)].strip()
    return prompt.strip()


def normalize(text: str) -> str:
    """Returns a text in lower case, without spaces, punctuation and LaTeX spacing."""
    text = _LATEX_SPACING.sub("", text)
    return _LAYOUT.sub("", re.sub(r"\\[dt]frac", r"\\frac", text).lower())
