"""The verifier of reasoning-gym's tasks: each task's own, asked in a helper process."""

import json
import logging

from .judge import Judge, Unjudged
from .math import _WRAPPED, extract_answer, texts_of


logger = logging.getLogger(__name__)

_JUDGE = Judge("reasoning_gym")


def reasoning_gym_reward(
    completions: list[list[dict[str, str]]] | list[str],
    answer: list[str],
    metadata: list[str],
    prompts: list[list[dict[str, str]]] | list[str] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""
    Reward function that gives the score of the reasoning-gym task that a problem comes from (0.0 to 1.0; many tasks
    give part of it to an answer that is partly right). The answer is read from the last `\boxed{}`, after the thinking
    trace.

    Some of the tasks' verifiers evaluate the answer as Python. Here they get no further than lists of literals and
    arithmetic with elementary functions: an answer that is more is not evaluated. Each answer is scored in a process
    of its own, without the trainer's environment variables, which is killed after 3 seconds of CPU time.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        answer (`list[str]`):
            Reference answers; `None` where the task has none and checks the answer against the problem.
        metadata (`list[str]`):
            What the task's verifier needs to know about the problem, as JSON; among it `source_dataset`, the name of
            the task.
        prompts (`list[list[dict[str, str]]]` or `list[str]`, *optional*):
            Prompts. Where one ends in an open think tag, a completion that does not close it has no answer.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float | None]`: One score per completion, `None` where the machine failed to give one.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If `metadata` names a task that reasoning-gym does not have.
    """
    from reasoning_gym.factory import DATASETS  # optional, and the helper process could only answer "wrong"

    scores = []
    for completion, gold, text in zip(texts_of(completions, prompts), answer, metadata, strict=True):
        found = extract_answer(completion)
        entry = {"answer": gold, "metadata": json.loads(text)}
        task = entry["metadata"]["source_dataset"]
        if task not in DATASETS:
            raise ValueError(f"`metadata` names the task `{task}`, which reasoning-gym does not have.")
        if found is None:
            scores.append(0.0)
            continue
        wrapped = _WRAPPED.fullmatch(found)
        found = wrapped[1] if wrapped else found
        try:
            scores.append(_JUDGE.ask("reasoning_gym", task, found, entry) or 0.0)
        except Unjudged as error:
            logger.warning("An answer was not judged: %s.", error)
            scores.append(None)
    return scores
