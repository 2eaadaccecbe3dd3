"""What reward functions are called with, and what is made of what they return. With trainers: tests/test_opsd_trainer.py."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerState

from trl_opsd.opsd.gate import judge
from trl_opsd.opsd.verify import Verifiers


ROWS = [{"prompt": f"question {index}", "answer": str(index), "completion_ids": [0]} for index in range(3)]


def score(*functions):
    PartialState()  # accelerate's loggers ask for it
    verifiers = Verifiers(list(functions), lambda name: nullcontext())
    return verifiers, verifiers.score(ROWS, ["0", "5", "2"], [[1, 9], [2, 9], [3]], TrainerState())


def test_they_see_the_columns_of_their_rows_and_what_was_written():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [float(text == answer) for text, answer in zip(kwargs["completions"], kwargs["answer"], strict=True)]

    async def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    verifiers, rewards = score(reward, length)
    assert verifiers.names == ["reward", "length"]
    assert rewards.tolist() == [[1, 2], [0, 2], [1, 1]]
    assert seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["completion_ids"] == [[1, 9], [2, 9], [3]]  # those that were written, and not the column of that name


def test_what_they_log_is_kept():
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("text", completions)
        log_metric("share", 0.5)
        return [1.0, None, 0.0]

    verifiers, rewards = score(reward)
    assert dict(verifiers.columns) == {"text": ["0", "5", "2"]} and dict(verifiers.metrics) == {"share": [0.5]}
    assert rewards.isnan().flatten().tolist() == [False, True, False]


def test_another_number_of_rewards_than_rollouts_is_an_error():
    def two(**kwargs):
        return [1.0, 0.0]

    with pytest.raises(ValueError, match="`two` returned 2 rewards for 3 rollouts"):
        score(two)


def test_correct_is_verified_finished_and_of_enough_reward():
    nan = torch.nan
    rewards = torch.tensor([[1.0, 0.2], [1.0, 0.2], [nan, 0.2], [nan, nan]])
    finished = torch.tensor([True, False, True, True])
    weights = torch.tensor([1.0, 0.5])
    verdicts = judge(rewards, torch.tensor([4, 9, 5, 6]), finished, weights, gate="correct", threshold=1.0)
    torch.testing.assert_close(verdicts.rewards, torch.tensor([1.1, 1.1, 0.1, 0.0]))
    assert verdicts.verified.tolist() == [True, True, True, False]
    assert verdicts.correct.tolist() == [True, False, False, False]
