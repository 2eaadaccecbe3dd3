"""The gate: which rollouts are trained on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, fields
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
        ValueError: If the gate, or what goes with it, needs a verifier and there is none, if `max_generation_rounds`
            has nothing to ask again for, if a reward function is not callable, or if the number of reward weights is
            not that of the reward functions.
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
    if args.max_generation_rounds > 1 and gate == "all":
        raise ValueError(
            f"`max_generation_rounds={args.max_generation_rounds}` asks again for the rollouts that the gate rejects, and "
            "`gate='all'` rejects none: leave it at 1, or set `reward_funcs` and another gate."
        )
    if args.max_generation_rounds > 1 and gate == "incorrect" and context is not None and "sibling" in context.fields:
        raise ValueError(
            f"`max_generation_rounds={args.max_generation_rounds}` with `gate='incorrect'` replaces the correct rollouts "
            "that the sibling context lives on: leave it at 1, or take another context."
        )
    bounds = [name for name in ("min_pass_rate", "max_pass_rate") if vars(args)[name] is not None]
    if bounds and not reward_funcs:
        raise ValueError(f"`{bounds[0]}` needs a verifier to measure it, and there is none: set `reward_funcs`.")
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


def check_completion_ids(column_names: list[str], lmbda: float) -> None:
    """
    Checks that the completions of off-policy batches are there.

    Args:
        column_names (`list[str]`):
            Columns of the training data.
        lmbda (`float`):
            Share of the batches that need none.

    Raises:
        ValueError: If the column is missing, naming those found.
    """
    if "completion_ids" not in column_names:
        raise ValueError(
            f"`lmbda={lmbda}` takes completions from the column `completion_ids`, and the columns found are "
            f"{', '.join(f'`{name}`' for name in column_names)}: give a data set that has it, such as the bank of an "
            "RLVR run, or set `lmbda=1.0`."
        )


@dataclass
class Verdicts:
    """
    What the verifiers say of `N` rollouts.

    Args:
        rewards_per_func (`torch.Tensor`):
            Reward by each function, of shape `(N, functions)`, NaN where a function has returned `None`.
        rewards (`torch.Tensor`):
            Their weighted sum, of shape `(N,)`.
        verified (`torch.Tensor`):
            Which rollouts any function has judged, `bool`, of shape `(N,)`.
        correct (`torch.Tensor`):
            Which are correct, `bool`, of shape `(N,)`.
        passed (`torch.Tensor`):
            Which pass the gate, `bool`, of shape `(N,)`.
        lengths (`torch.Tensor`):
            Their tokens, of shape `(N,)`.
    """

    rewards_per_func: torch.Tensor
    rewards: torch.Tensor
    verified: torch.Tensor
    correct: torch.Tensor
    passed: torch.Tensor
    lengths: torch.Tensor

    def replace(self, slots: torch.Tensor, others: "Verdicts", rows: torch.Tensor) -> None:
        """
        Puts the verdicts on other rollouts in the place of these.

        Args:
            slots (`torch.Tensor`):
                Places to be taken.
            others (`Verdicts`):
                Verdicts on the rollouts that take them.
            rows (`torch.Tensor`):
                Which of the others, in the order of `slots`.
        """
        for field in fields(self):
            vars(self)[field.name][slots] = vars(others)[field.name][rows]


def judge(
    rewards_per_func: torch.Tensor,
    lengths: torch.Tensor,
    finished: torch.Tensor,
    reward_weights: torch.Tensor,
    gate: str,
    threshold: float,
) -> Verdicts:
    """
    Verdicts from rewards.

    Args:
        rewards_per_func (`torch.Tensor`):
            Reward by each function, of shape `(N, functions)`, NaN where a function has returned `None`.
        lengths (`torch.Tensor`):
            Tokens of the rollouts, of shape `(N,)`.
        finished (`torch.Tensor`):
            Which of them have come to an end, of shape `(N,)`.
        reward_weights (`torch.Tensor`):
            Weight of each function, of shape `(functions,)`.
        gate (`str`):
            `"correct"`, `"incorrect"` or `"all"`.
        threshold (`float`):
            Reward from which on a finished rollout is correct.

    Returns:
        `Verdicts`: A rollout that no function has judged is neither correct nor incorrect.
    """
    rewards = (rewards_per_func * reward_weights.to(rewards_per_func.device)).nansum(dim=1)
    verified = ~rewards_per_func.isnan().all(dim=1)
    correct = verified & finished.bool() & (rewards >= threshold)
    passed = {"correct": correct, "incorrect": verified & ~correct, "all": torch.ones_like(correct)}[gate]
    return Verdicts(rewards_per_func, rewards, verified, correct, passed, lengths)


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
