"""Rewards for how a completion is written. For think tags, overlong completions and repetition TRL has its own."""

import json
from collections import defaultdict

from .math import extract_answer, math_reward, texts_of


def format_reward(
    completions: list[list[dict[str, str]]] | list[str],
    prompts: list[list[dict[str, str]]] | list[str] | None = None,
    **kwargs,
) -> list[float]:
    r"""
    Reward function that is 1.0 where a completion gives its answer where the prompt asks for it: in a `\boxed{}` that
    is complete and not empty, after the thinking trace if there is one, and the trace is closed once.

    [`~trl.rewards.think_format_reward`] wants the completion to begin with `<think>`, which fails where the chat
    template has already written that tag, and does not look at the answer.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        prompts (`list[list[dict[str, str]]]` or `list[str]`, *optional*):
            Prompts. Where one ends in an open think tag, the completion has to close it.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float]`: One score per completion.

    Example:
    ```python
    >>> from trl_opsd.rewards import format_reward

    >>> format_reward([r"<think>1 + 1</think> \boxed{2}", r"<think>1 + 1 \boxed{2}", "2"])
    [1.0, 0.0, 0.0]
    ```
    """
    texts = texts_of(completions, prompts)
    return [
        float(bool(extract_answer(text)) and text.count("</think>") <= 1 and text.count("<think>") <= 1)
        for text in texts
    ]


def length_reward(
    completions: list[list[dict[str, str]]] | list[str],
    prompts: list[list[dict[str, str]]] | list[str],
    completion_ids: list[list[int]],
    answer: list[str],
    **kwargs,
) -> list[float]:
    r"""
    Reward function that prefers the short among the completions of one prompt, from 0.5 for the shortest to -0.5 for
    the longest in tokens, and gives a wrong completion no more than 0.0, so that being short never makes up for it. See
    section 2.3.3 of https://huggingface.co/papers/2501.12599. It is meant beside a verifier.

    [`~trl.rewards.get_soft_overlong_punishment`] only punishes what comes near the limit, and
    [`~trl.rewards.get_cosine_scaled_reward`] needs one scale of length for all prompts.

    Args:
        completions (`list[list[dict[str, str]]]` or `list[str]`):
            Completions, conversational (the last message is read) or plain.
        prompts (`list[list[dict[str, str]]]` or `list[str]`):
            Prompts. The completions of equal prompts are compared with one another, among those of this process.
        completion_ids (`list[list[int]]`):
            Token ids of the completions.
        answer (`list[str]`):
            Reference answers of [`math_reward`], which decides what is wrong.
        **kwargs:
            Other columns and what trainers add, none of which is used.

    Returns:
        `list[float]`: One score per completion; 0.0 for all of a prompt whose completions are equally long.
    """
    lengths = [len(ids) for ids in completion_ids]
    keys = [json.dumps(prompt) for prompt in prompts]
    groups = defaultdict(list)
    for key, length in zip(keys, lengths, strict=True):
        groups[key].append(length)
    rewards = []
    for key, length, correct in zip(keys, lengths, math_reward(completions, answer, prompts), strict=True):
        shortest, longest = min(groups[key]), max(groups[key])
        reward = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(reward if correct == 1.0 else min(0.0, reward))
    return rewards
