"""
The benchmarks that have a name: what each is asked, judged by and decoded with. Where the problems come from and how the
question is worded is in [`trl_opsd.data.SOURCES`], under the same name.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ..cli import UserError
from ..data import SOURCES
from ..data.gym import REASONING_GYM
from .lm_eval import LM_EVAL, find_lm_eval


@dataclass(frozen=True)
class Task:
    """
    How one benchmark is measured. Everything here but the version can be overridden by an option of the same name.

    Args:
        dataset_split (`str`):
            Split of the data set.
        reward_funcs (`tuple[str, ...]`):
            Verifiers.
        max_completion_length (`int`):
            Maximum number of tokens of a completion.
        decoding (`tuple[str, ...]`, *optional*, defaults to `("sampled",)`):
            Ways of decoding.
        num_samples (`int`, *optional*, defaults to `1`):
            Completions per problem when sampled.
        temperature (`float`, *optional*, defaults to `0.6`):
            Temperature when sampled.
        top_p (`float`, *optional*, defaults to `0.95`):
            Share of the probability mass when sampled.
        top_k (`int`, *optional*, defaults to `20`):
            Number of tokens to draw from when sampled.
        min_p (`float`, *optional*):
            Least probability to draw when sampled, as a share of the most probable token's.
        stop (`tuple[str, ...]`, *optional*):
            Texts that end a completion.
        version (`str`, *optional*, defaults to `"1"`):
            Raised when a change here, in the wording or in the scoring, makes numbers incomparable with older ones.
    """

    dataset_split: str
    reward_funcs: tuple[str, ...]
    max_completion_length: int
    decoding: tuple[str, ...] = ("sampled",)
    num_samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    min_p: float | None = None
    stop: tuple[str, ...] | None = None
    version: str = "1"


# Sampling as Qwen3's model card gives it for thinking mode, which it advises against decoding greedily. Small sets are
# sampled often enough for an interval that says something: 30 problems once have one of ±18 points.
TASKS = {
    "gsm8k": Task("test", ("math_reward",), 8192),
    "math-500": Task("test", ("math_reward",), 16384),
    "aime24": Task("train", ("math_reward",), 32768, num_samples=16),
    "aime25": Task("test", ("math_reward",), 32768, num_samples=16),
    "amc23": Task("test", ("math_reward",), 32768, num_samples=8),
    "humaneval": Task("test", ("code_reward",), 16384, num_samples=4),
    "mbpp": Task("test", ("code_reward",), 16384),
    "bbh": Task("test", ("logic_reward",), 8192),
    "ifeval": Task("train", ("trl_opsd.evaluate.ifeval.ifeval_reward",), 8192),
    REASONING_GYM: Task("test", ("reasoning_gym_reward",), 8192),
}

# A file, a folder or a data set on the Hub
OTHER = Task("test", ("math_reward",), 1024, decoding=("greedy",), temperature=1.0, top_p=1.0, top_k=0)


def task_name(text: str) -> tuple[str, int | None]:
    """Takes `NAME[:N]` apart: the name, and the number of problems if one is given."""
    name, number = re.fullmatch(r"(.+?)(?:\[:(\d+)\])?", text).groups()
    return name, int(number) if number else None


def find_task(name: str) -> tuple[str, Task]:
    """
    Finds how to measure something.

    Args:
        name (`str`):
            Name of a task, alone or with what [`~trl_opsd.data.load_prompts`] takes after a colon, `lm_eval:` and the
            name of a task of lm-evaluation-harness, or any other data set that `load_prompts` loads.

    Returns:
        `tuple[str, Task]`: Label for the results (the name without the path of a local copy), and the task.

    Raises:
        UserError: If it is the name of a source that is for training only.
    """
    head, _, rest = name.partition(":")
    if head == LM_EVAL and rest:
        return f"{LM_EVAL}:{Path(rest).stem}", Task(**find_lm_eval(rest))
    if head in TASKS:
        part = rest.partition(":")[0] if head == REASONING_GYM else rest if rest in SOURCES[head].tasks else ""
        return f"{head}:{part}" if part else head, TASKS[head]
    if head in SOURCES:
        raise UserError(
            f"`{head}` is a source to train on: choose from {', '.join(TASKS)}, or give it as `dataset_name`."
        )
    return name, OTHER
