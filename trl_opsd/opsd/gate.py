"""The gate: which rollouts are trained on."""

from dataclasses import dataclass, fields

import torch


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
        finished (`torch.Tensor`):
            Which have come to an end, `bool`, of shape `(N,)`.
    """

    rewards_per_func: torch.Tensor
    rewards: torch.Tensor
    verified: torch.Tensor
    correct: torch.Tensor
    passed: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor

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
    finished = finished.bool()
    correct = verified & finished & (rewards >= threshold)
    passed = {"correct": correct, "incorrect": verified & ~correct, "all": torch.ones_like(correct)}[gate]
    return Verdicts(rewards_per_func, rewards, verified, correct, passed, lengths, finished)


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
