"""The verifier of reasoning-gym's tasks: each task's own, asked in a helper process."""

import json

from .judge import Judge
from .math import _WRAPPED, extract_answer, text_of


_JUDGE = Judge("reasoning_gym")


def reasoning_gym_reward(
    completions: list[list[dict[str, str]]] | list[str], answer: list[str], metadata: list[str], **kwargs
) -> list[float]:
    r"""
    Reward function that gives the score of the reasoning-gym task that a problem comes from (0.0 to 1.0; many tasks
    give part of it to an answer that is partly right). The answer is read from the last `\boxed{}`, after the thinking
    trace.

    Some of the tasks' verifiers evaluate the answer as Python. They do so in a helper process without the trainer's
    environment variables, which is killed after 3 seconds of CPU time and cannot write files or start programs by
    ordinary means; that stops accidents, not an attacker.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        answer (`list[str]`):
            Reference answers; `None` where the task has none and checks the answer against the problem.
        metadata (`list[str]`):
            What the task's verifier needs to know about the problem, as JSON; among it `source_dataset`, the name of
            the task.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float]`: One score per completion.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If `metadata` names a task that reasoning-gym does not have.
    """
    from reasoning_gym.factory import DATASETS  # optional, and the helper process could only answer "wrong"

    scores = []
    for completion, gold, text in zip(completions, answer, metadata, strict=True):
        found = extract_answer(text_of(completion))
        entry = {"answer": gold, "metadata": json.loads(text)}
        task = entry["metadata"]["source_dataset"]
        if task not in DATASETS:
            raise ValueError(f"`metadata` names the task `{task}`, which reasoning-gym does not have.")
        if found is None:
            scores.append(0.0)
            continue
        wrapped = _WRAPPED.fullmatch(found)
        found = wrapped[1] if wrapped else found
        scores.append(_JUDGE.ask("reasoning_gym", task, found, entry) or 0.0)
    return scores
