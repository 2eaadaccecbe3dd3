"""The gate: which rollouts are trained on."""

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from .config import OPSDConfig


# A reward function as GRPO takes it, without the reward models
RewardFunc = Callable[..., list[float | None]]


def resolve_gate(args: OPSDConfig, reward_funcs: list[RewardFunc]) -> str:
    """
    Gate, checked against the reward functions.

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        reward_funcs (`list[Callable]`):
            Verifiers.

    Returns:
        `str`: `"correct"`, `"incorrect"` or `"all"`.

    Raises:
        ValueError: If the gate needs a verifier and there is none, if a reward function is not callable, or if the
            number of reward weights is not that of the reward functions.
    """
    gate = args.gate or ("correct" if reward_funcs else "all")
    if gate != "all" and not reward_funcs:
        raise ValueError(
            f"`gate='{gate}'` needs a verifier to decide it, and there is none: set `reward_funcs`, or `gate='all'`."
        )
    context = args.build_teacher_context()
    if not reward_funcs and context is not None and "sibling" in context.fields:
        raise ValueError(
            "The sibling context needs a verifier to find correct siblings, and there is none: set `reward_funcs`."
        )
    if not reward_funcs and args.keep_shortest is not None:
        raise ValueError(
            f"`keep_shortest={args.keep_shortest}` chooses among rollouts that pass the gate, and there is no verifier: "
            "set `reward_funcs`."
        )
    for func in reward_funcs:
        if isinstance(func, torch.nn.Module) or not callable(func):
            raise ValueError(
                f"A verifier must be a function, and `reward_funcs` holds {func!r}: reward models are not verifiers."
            )
    if args.reward_weights is not None and len(args.reward_weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(args.reward_weights)} entries and `reward_funcs` {len(reward_funcs)}: give one "
            "weight for each function."
        )
    return gate


def shortest(kept: torch.Tensor, lengths: torch.Tensor, group_size: int, number: int) -> torch.Tensor:
    """
    Which rollouts are among the shortest of those kept of their group.

    Args:
        kept (`torch.Tensor`):
            Which rollouts pass the gate, of shape `(N,)`, groups side by side.
        lengths (`torch.Tensor`):
            Their tokens, of shape `(N,)`.
        group_size (`int`):
            Rollouts of one prompt.
        number (`int`):
            How many to choose of each group.

    Returns:
        `torch.Tensor`: `bool`, of shape `(N,)`. Of two that are as long, the first one comes first.
    """
    length = torch.where(kept, lengths, torch.iinfo(lengths.dtype).max).view(-1, group_size)
    rank = length.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < number).view(-1)


def shortest_siblings(correct: torch.Tensor, lengths: torch.Tensor, group_size: int) -> list[int | None]:
    """
    The shortest correct rollout of the same group, other than the one itself.

    Args:
        correct (`torch.Tensor`):
            Which rollouts are correct, of shape `(N,)`, groups side by side.
        lengths (`torch.Tensor`):
            Their tokens, of shape `(N,)`.
        group_size (`int`):
            Rollouts of one prompt.

    Returns:
        `list[int | None]`: Index of each rollout's sibling, `None` where there is none.
    """
    lengths = lengths.tolist()
    candidates = correct.nonzero().flatten().tolist()
    return [
        min(
            (other for other in candidates if other // group_size == index // group_size and other != index),
            key=lambda other: lengths[other],
            default=None,
        )
        for index in range(len(lengths))
    ]


def name_errors(func: RewardFunc) -> RewardFunc:
    """
    Makes the error of a reward function say which function and which sample it was.

    Args:
        func (`Callable`):
            Reward function, synchronous or not.

    Returns:
        `Callable`: The same function, whose errors are a `RuntimeError` with the original one as its cause.
    """

    def explain(error: Exception, kwargs: dict[str, Any]) -> RuntimeError:
        def raises(index: int) -> bool:
            # Of what comes as one list per batch, the entry of this sample
            size = len(kwargs["completions"])
            one = {
                name: [value[index]] if isinstance(value, list) and len(value) == size else value
                for name, value in kwargs.items()
            }
            try:
                asyncio.run(func(**one)) if is_async_callable(func) else func(**one)
            except type(error):
                return True
            return False

        index = next((index for index in range(len(kwargs["completions"])) if raises(index)), None)
        where = "for the batch as a whole"
        if index is not None:
            prompt, completion = (str(kwargs[name][index])[:200] for name in ("prompts", "completions"))
            where = f"on the sample with the prompt {prompt!r} and the completion {completion!r}"
        step = kwargs["trainer_state"].global_step + 1
        return RuntimeError(
            f"The reward function `{get_callable_name(func)}` raised {type(error).__name__} ({error}) in step {step}, "
            f"{where}. The last checkpoint is as it was."
        )

    if is_async_callable(func):

        async def named(**kwargs):
            try:
                return await func(**kwargs)
            except Exception as error:
                raise await asyncio.to_thread(explain, error, kwargs) from error

    else:

        def named(**kwargs):
            try:
                return func(**kwargs)
            except Exception as error:
                raise explain(error, kwargs) from error

    return named
