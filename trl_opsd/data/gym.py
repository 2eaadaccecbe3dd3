"""Problems that reasoning-gym generates: about a hundred tasks, each with a verifier of its own."""

import json
import re

import yaml
from datasets import Dataset

from ..cli import UserError
from .sources import MATH_PROMPT


REASONING_GYM = "reasoning-gym"
# Problem i is made from the seed plus i, so seeds that lie close give the same problems.
_SEEDS = {"train": 0, "test": 1_000_000_000}
# Its verifier takes every answer for right where the reference answer is a non-empty text, which it always is.
_BROKEN = ("game_of_life_halting",)


def generate_prompts(task: str, split: str = "train") -> Dataset:
    r"""
    Generates problems of one task of reasoning-gym (https://huggingface.co/papers/2505.24760, Apache-2.0). Their
    verifier is [`~trl_opsd.rewards.reasoning_gym_reward`].

    Args:
        task (`str`):
            Name of the task, and after a colon its parameters: `"chain_sum"`, or
            `"chain_sum:size=2000,max_terms=3,seed=1"`. `size` is 500 problems and `seed` 0 if not given; lists are
            written with brackets: `"basic_arithmetic:operators=['+','-']"`.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`, which have different seeds. In a small task the same problem can still be in both:
            see [`decontaminate`].

    Returns:
        [`~datasets.Dataset`]: Rows with `prompt`, `answer` (`None` in tasks that have no single one) and `metadata`.

    Raises:
        UserError: If reasoning-gym is not installed, or has no such task or parameter.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError("The source `reasoning-gym` needs a package: run `pip install reasoning-gym`.") from None
    name, _, text = task.partition(":")
    if name not in DATASETS or name == "composite":
        raise UserError(f"reasoning-gym has no task `{name}`: choose from {', '.join(sorted(DATASETS))}.")
    if name in _BROKEN:
        raise UserError(f"The verifier of reasoning-gym's `{name}` accepts any answer: choose another task.")
    if split not in _SEEDS:
        raise UserError(f"`{REASONING_GYM}` has no split `{split}`: choose from {', '.join(_SEEDS)}.")
    parameters = {}
    for part in re.split(r",(?![^\[]*\])", text) if text else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"The parameter `{part}` of `{REASONING_GYM}:{name}` must be NAME=VALUE.")
        try:
            parameters[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"The value of `{part}` of `{REASONING_GYM}:{name}` is not YAML.") from None
    try:
        parameters["seed"] = parameters.get("seed", 0) + _SEEDS[split]
        problems = create_dataset(name, **parameters)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"`{REASONING_GYM}:{name}` does not take these parameters: {error}.") from None
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": MATH_PROMPT.replace("{problem}", problem["question"].strip())}],
                "answer": problem["answer"],
                # tasks differ in what they keep, and a column has one type
                "metadata": json.dumps({**problem["metadata"], "source_dataset": name}),
            }
            for problem in (problems[index] for index in range(len(problems)))
        ]
    )
