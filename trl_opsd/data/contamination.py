"""Which training problems are also in an evaluation set?"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import datasets
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.naming import camelcase_to_snakecase

from ..cli import UserError
from .prompts import load_prompts
from .sources import SOURCES


# The named sources that models are evaluated on, and the split of each
HELD_OUT = {
    "gsm8k": "test",
    "math-500": "test",
    "aime24": "train",
    "aime25": "test",
    "amc23": "test",
    "humaneval": "test",
    "mbpp": "test",
    "bbh": "test",
    "ifeval": "train",
}
# In the output folder of a run: which sets it has left out
_RECORD = "held_out.json"


_WORDINGS = sorted({source.prompt for source in SOURCES.values()}, key=len, reverse=True)
_LATEX_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;:! ]")
# Spaces and punctuation go, but not what tells 1.5 from 15 and `1 + 2` from `1 - 2`.
_LAYOUT = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[\s$!?;:'\"`’‘“”~]")
# Markdown's emphasis: what stands on one side of a word. On both sides, or on neither, it is a product or an index.
_EMPHASIS = re.compile(r"(?<![\w)\\*_])[*_]{1,3}(?=[^\s*_])|(?<=[^\s*_])[*_]{1,3}(?![\w(*_])")
_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[-+*/^=<>%|]")
_RUN, _SHORT_RUN, _SHARE = 13, 8, 0.6


def decontaminate(train: Dataset, evaluation: Dataset) -> tuple[Dataset, dict[str, int]]:
    """
    Counts and drops the training problems that are also in an evaluation set.

    Compared is the problem: the user's messages without the wording that a named source puts around it, so that
    sources with different wordings can be compared. Beside equal problems, one counts that has more than 60% of the
    words of an evaluation problem in runs of 13 or more that both have, which is what Qwen2.5-Math
    (https://huggingface.co/papers/2409.12122) is cleaned by: a copy with a sentence more, or part of it. Problems of 8
    to 12 words, in which runs of 8 are what s1 (https://huggingface.co/papers/2501.19393) looks for, have to be there
    whole, since one other number makes another problem. Shorter ones have to be equal.

    Args:
        train ([`~datasets.Dataset`]):
            Training rows, with `prompt`.
        evaluation ([`~datasets.Dataset`]):
            Evaluation rows, with `prompt`.

    Returns:
        `tuple[Dataset, dict[str, int]]`: The training rows that are left, and the counts: `train` and `evaluation`
        (rows), `exact` (training rows whose problem is in the evaluation set to the letter), `normalized` (further
        ones that differ only in case, spaces, punctuation or LaTeX spacing), `overlapping` (further ones that share
        long runs of words with one), `kept`, and `evaluation_seen` (evaluation rows that the training set holds in one
        of these ways).
    """
    problems = [problem_text(prompt) for prompt in train["prompt"]]
    targets = [problem_text(prompt) for prompt in evaluation["prompt"]]
    exact, normalized = set(targets), {normalize(text) for text in targets}
    same = [text in exact for text in problems]
    keys = [normalize(text) for text in problems]
    alike = [key in normalized for key in keys]
    runs = _Runs(targets)
    copied = [runs.found_in(text) for text in problems]
    gone = [alike[index] or bool(copied[index]) for index in range(len(problems))]
    kept = [index for index, found in enumerate(gone) if not found]
    seen, seen_by_runs = set(keys), set().union(*copied)
    return train.select(kept), {
        "train": len(problems),
        "evaluation": len(targets),
        "exact": sum(same),
        "normalized": sum(alike) - sum(same),
        "overlapping": sum(gone) - sum(alike),
        "kept": len(kept),
        "evaluation_seen": sum(
            normalize(text) in seen or number in seen_by_runs for number, text in enumerate(targets)
        ),
    }


class _Runs:
    """Runs of words of some problems, by which they are found in others."""

    def __init__(self, problems: list[str]):
        self.needed: dict[int, float] = {}  # words of each problem that have to be found
        self.places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, problem in enumerate(problems):
            words = _words(problem)
            if len(words) < _SHORT_RUN:
                continue
            size = _RUN if len(words) >= _RUN else _SHORT_RUN
            self.needed[number] = _SHARE * len(words) if size == _RUN else len(words) - 0.5
            for start in range(len(words) - size + 1):
                self.places[tuple(words[start : start + size])].append((number, start))

    def found_in(self, problem: str) -> set[int]:
        """Returns which of the problems are in one."""
        words, found = _words(problem), defaultdict(set)
        for size in (_RUN, _SHORT_RUN):
            for run in {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}:
                for number, start in self.places.get(run, ()):
                    found[number].update(range(start, start + size))
        return {number for number, covered in found.items() if len(covered) > self.needed[number]}


def _words(text: str) -> list[str]:
    return _WORD.findall(_EMPHASIS.sub("", text.replace(r"\*", "*")).lower())


def hold_out(
    train: Dataset, names: Sequence[str] = (), resume_from: str | None = None
) -> tuple[Dataset, list[str], str]:
    """
    Leaves out of a training set what is also in evaluation sets (see [`decontaminate`]).

    Args:
        train ([`~datasets.Dataset`]):
            Training rows, with `prompt`.
        names (`Sequence[str]`, *optional*, defaults to `()`):
            Evaluation sets, as [`load_prompts`] takes them; `["none"]` keeps all rows. Without names, those of
            [`HELD_OUT`] that the cache of `datasets` on the main process's machine holds, where an evaluation puts them.
        resume_from (`str`, *optional*):
            Checkpoint that a run goes on from. Without names, it leaves out what it began with (see
            [`record_held_out`]), whatever has been evaluated on since: its rows are to be the same.

    Returns:
        `tuple[Dataset, list[str], str]`: The rows that are left, the sets that were compared with, and a line that counts
        those that went, and says which sets were not compared with.

    Raises:
        UserError: If a set that was named cannot be loaded, or no row is left.
    """
    if list(names) == ["none"]:
        return train, ["none"], "held out: nothing, as asked for"
    record = None if resume_from is None else Path(resume_from).parent / _RECORD
    if names:
        chosen = list(names)
    elif record is not None and record.is_file():
        chosen = json.loads(record.read_text())
        if chosen == ["none"]:
            return train, chosen, "held out: nothing, as when the run began"
    else:
        (chosen,) = broadcast_object_list([[name for name in HELD_OUT if _is_here(name)]])
    went, total = {}, len(train)
    for name in chosen:
        before = len(train)
        train, _ = decontaminate(train, load_prompts(name, _split(name)))
        went[name] = before - len(train)
    if len(train) == 0:
        raise UserError(
            f"All {total} training rows are also in {', '.join(went)}: train on something else, or keep them with "
            "`--held_out none`."
        )
    parts = ", ".join(f"{name} {count}" for name, count in went.items())
    line = f"held out: {total - len(train)} of {total} rows" + (f" ({parts})" if parts else "")
    absent = [] if names else [name for name in HELD_OUT if name not in chosen]
    if absent:
        when = "were not on this machine when the run began" if record is not None else "are not on this machine"
        line += f"; not compared with {', '.join(absent)}, which {when} (name them in `held_out`)"
    return train, chosen, line


def record_held_out(output_dir: str, names: list[str]) -> None:
    """Keeps what [`hold_out`] has compared with beside the checkpoints, for when the run is resumed."""
    temporary = Path(output_dir, f".{_RECORD}.tmp")
    temporary.write_text(json.dumps(names) + "\n")
    temporary.replace(Path(output_dir, _RECORD))


def _split(name: str) -> str:
    return HELD_OUT.get(name.partition(":")[0], "test")


def _is_here(name: str) -> bool:
    namespace, _, hub_name = SOURCES[name].hub_id.partition("/")
    if not (Path(datasets.config.HF_DATASETS_CACHE) / f"{namespace}___{camelcase_to_snakecase(hub_name)}").is_dir():
        return False
    try:
        load_prompts(name, _split(name))
    except UserError:  # another part of it, or an older one
        return False
    return True


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
    text = _EMPHASIS.sub("", _LATEX_SPACING.sub("", text.replace(r"\*", "*")))
    return _LAYOUT.sub("", re.sub(r"\\[dt]frac", r"\\frac", text).lower())
