"""The data sets that have a name here: where each lies and how its columns become `prompt`, `answer`, `solution`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


# The wording that reasoning models are trained with; the verifier reads the answer from where it asks for it.
MATH_PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Source:
    """
    One named data set.

    Args:
        hub_id (`str`):
            Repository of the data set on the Hub.
        licence (`str`):
            Licence of the data, as its authors state it.
        problem (`str`):
            Column that holds the problem.
        answer (`str`):
            Column that holds the final answer.
        solution (`str`, *optional*):
            Column that holds the reference reasoning. A row without it has no `solution`.
        config (`str`, *optional*):
            Configuration of the data set on the Hub.
        splits (`tuple[str, ...]`, *optional*, defaults to `("train", "test")`):
            Splits there are.
        prompt (`str`, *optional*, defaults to `MATH_PROMPT`):
            Wording of the user message, with `{problem}` where the problem goes.
        read_answer (`Callable`, *optional*):
            Function from the text of the answer column to the answer. Defaults to the text itself.
        read_solution (`Callable`, *optional*):
            Function from the text of the solution column to the solution. Defaults to the text itself.
    """

    hub_id: str
    licence: str
    problem: str
    answer: str
    solution: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    prompt: str = MATH_PROMPT
    read_answer: Callable[[str], str] = str.strip
    read_solution: Callable[[str], str] = str.strip

    def to_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """
        Maps one raw row to the schema; columns that the mapping does not use are kept as they are.

        Args:
            row (`dict`):
                Row as the Hub, or a local copy of it, has it.

        Returns:
            `dict`: Row with `prompt` (one user message), `answer` and, where the source has one, `solution`.
        """
        mapped = {key: value for key, value in row.items() if key not in (self.problem, self.answer, self.solution)}
        content = self.prompt.replace("{problem}", row[self.problem].strip())
        mapped["prompt"] = [{"role": "user", "content": content}]
        mapped["answer"] = self.read_answer(row[self.answer])
        if self.solution in row:
            mapped["solution"] = self.read_solution(row[self.solution])
        return mapped


def _gsm8k_answer(text: str) -> str:
    return text.rpartition("####")[2].strip().replace(",", "")


def _gsm8k_solution(text: str) -> str:
    # <<48/2=24>> are notes for a calculator tool, which no model of today writes
    return re.sub(r"<<.*?>>", "", text.rpartition("####")[0]).strip()


SOURCES = {
    # https://huggingface.co/papers/2110.14168; the answer column holds the reasoning, then `#### 42`
    "gsm8k": Source(
        hub_id="openai/gsm8k",
        config="main",
        licence="MIT",
        problem="question",
        answer="answer",
        solution="answer",
        read_answer=_gsm8k_answer,
        read_solution=_gsm8k_solution,
    ),
    # https://huggingface.co/papers/2305.20050: 500 of the test problems of https://huggingface.co/papers/2103.03874
    "math-500": Source(
        hub_id="HuggingFaceH4/MATH-500",
        licence="MIT",
        splits=("test",),
        problem="problem",
        answer="answer",
        solution="solution",
    ),
    # https://huggingface.co/papers/2503.14476, deduplicated; here the solution column holds the bare final answer
    "dapo-math-17k": Source(
        hub_id="open-r1/DAPO-Math-17k-Processed",
        config="en",
        licence="Apache-2.0",
        splits=("train",),
        problem="prompt",
        answer="solution",
    ),
}
