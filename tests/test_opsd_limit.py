"""The limit on rollouts that follows how long correct ones are: what it comes to, who it holds for, and resuming."""

import json
import random
from unittest import mock

import pytest
import torch
from test_opsd_trainer import settings
from trl import DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.limit import FEWEST, WINDOW, CompletionLimit
from trl_opsd.tiny.task import CONCISE_TEMPLATE


LONGEST = 1000


def batch(lengths, limit, correct=None, endless=0):
    """Rollouts that would have these lengths, under a limit: those that are longer are truncated, and not correct."""
    lengths = [*lengths, *[LONGEST + 1] * endless]
    finished = torch.tensor([length <= limit for length in lengths])
    correct = finished if correct is None else finished & torch.tensor(correct)
    return torch.tensor([min(length, limit) for length in lengths]), correct, finished


def feed(limit, draw, number, size=64, endless=0):
    """The limit after each batch of `size` rollouts whose lengths are drawn."""
    values = []
    for _ in range(number):
        limit.update(*batch([draw() for _ in range(size - endless)], limit.value, endless=endless))
        values.append(limit.value)
    return values


def test_it_is_the_quantile_of_correct_rollouts_with_head_room():
    limit = CompletionLimit(LONGEST, 0.5, 1.5)
    lengths = list(range(1, WINDOW + 1))
    is_even = [length % 2 == 0 for length in lengths]
    for start in range(0, WINDOW, 64):
        assert limit.value == LONGEST  # until it has seen enough
        limit.update(*batch(lengths[start : start + 64], LONGEST, is_even[start : start + 64]))
    assert limit.value == 386  # the median of 2, 4, ..., 512 is 257, and half of it more is 385.5
    longest = CompletionLimit(LONGEST, 1.0, 1.25)
    longest.update(*batch(lengths, LONGEST, is_even))
    assert longest.value == 640


def test_it_is_never_above_the_maximum_and_knows_no_lengths_but_those_of_correct_rollouts():
    limit = CompletionLimit(LONGEST, 1.0, 2.0)
    limit.update(*batch([900] * WINDOW, LONGEST))
    assert limit.value == LONGEST
    limit = CompletionLimit(LONGEST, 1.0, 2.0)
    limit.update(*batch([900] * WINDOW, LONGEST, [False] * WINDOW))
    assert limit.value == LONGEST  # nothing is known
    few = [index < FEWEST - 1 for index in range(WINDOW)]
    limit.update(*batch([100] * WINDOW, LONGEST, few))
    assert limit.value == LONGEST  # too little is


@pytest.mark.parametrize("quantile", [0.9, 1.0])
def test_what_it_cuts_off_does_not_pull_it_down(quantile):
    """Lengths with a long tail: under a limit that sees only what it lets through, it would creep down for ever."""
    draws = random.Random(0)
    limit = CompletionLimit(LONGEST, quantile, 1.25)
    values = feed(limit, lambda: min(int(draws.lognormvariate(4.6, 0.6)), LONGEST), 200)
    assert values[0] == LONGEST and min(values) < 700
    cut = [sum(draws.lognormvariate(4.6, 0.6) > value for _ in range(2000)) / 2000 for value in values[-40:]]
    assert sum(cut) / len(cut) < 0.03


def test_it_is_raised_when_rollouts_become_longer():
    draws = random.Random(0)
    limit = CompletionLimit(LONGEST, 1.0, 1.25)
    feed(limit, lambda: draws.randint(50, 100), 20)
    assert limit.value == 125
    values = feed(limit, lambda: draws.randint(200, 300), 40)
    assert values[0] == 125 * 1.25 // 1 + 1  # at once, although no correct rollout has shown how long they are now
    assert limit.value >= 300
    values = feed(limit, lambda: draws.randint(50, 100), 40)
    assert values[-1] == 125


def test_rollouts_that_never_end_do_not_raise_it():
    draws = random.Random(0)
    limit = CompletionLimit(LONGEST, 1.0, 1.25)
    values = feed(limit, lambda: draws.randint(50, 100), 60, endless=16)
    assert set(values[8:]) == {125}


def test_a_resumed_limit_goes_on_as_it_would_have(tmp_path):
    draws = random.Random(0)
    limit = CompletionLimit(LONGEST, 0.99, 1.25)
    feed(limit, lambda: draws.randint(50, 300), 13)
    limit.save(str(tmp_path))
    other = CompletionLimit(LONGEST, 0.99, 1.25)
    other.load(str(tmp_path))
    assert other.value == limit.value < LONGEST
    lengths = [random.Random(1).randint(50, 400) for _ in range(64 * 20)]
    for start in range(0, len(lengths), 64):
        for one in (limit, other):
            one.update(*batch(lengths[start : start + 64], one.value))
        assert other.value == limit.value and other.state_dict() == limit.state_dict()
    with pytest.raises(ValueError, match="has no completion_limit.json"):
        limit.load(str(tmp_path / "none"))


# In training


class Student:
    """Stands in for sampling: writes rollouts of 4 tokens, and notes how long they could have been."""

    def __init__(self, tokenizer):
        self.ids, self.limits = tokenizer("666")["input_ids"] + [tokenizer.eos_token_id], []

    def generate(self, trainer, prompt_ids, *args):
        assert trainer.generation_kwargs["max_new_tokens"] == trainer.generation_config.max_new_tokens
        self.limits.append(trainer.generation_config.max_new_tokens)
        return [list(self.ids) for _ in prompt_ids]


def trainer_with(tmp_path, small_model, tokenizer, rows, student, **changes):
    options = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 3}
    options |= {"completion_limit_quantile": 1.0, "teacher_prompt_template": CONCISE_TEMPLATE, "save_steps": 2}
    args = OPSDConfig(**settings(tmp_path, **options, save_strategy="steps", save_only_model=False) | changes)
    mock.patch.object(
        DistillationTrainer, "_generate_single_turn", lambda self, *given: student.generate(self, *given)
    ).start()
    return OPSDTrainer(
        small_model(0),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
    )


@pytest.fixture(autouse=True)
def unpatched():
    yield
    mock.patch.stopall()


def test_the_student_is_told(tmp_path, small_model, tokenizer, rows, monkeypatch):
    monkeypatch.setattr("trl_opsd.opsd.limit.WINDOW", 64)
    student = Student(tokenizer)
    trainer = trainer_with(tmp_path, small_model, tokenizer, rows, student)
    trainer.train()
    assert len(student.ids) == 4 and student.limits == [12, 12, 6]  # half as much again, after 64 rollouts
    logged = [log["opsd/completion_limit"] for log in trainer.state.log_history if "opsd/completion_limit" in log]
    assert logged == student.limits
    trainer.model.eval()
    trainer._generate_and_score_completions([rows[0]])
    assert student.limits[-1] == 12  # what is measured is not cut
    saved = json.loads((tmp_path / "out" / "checkpoint-2" / "completion_limit.json").read_text())
    assert saved["value"] == 6

    resumed = Student(tokenizer)
    other = trainer_with(tmp_path, small_model, tokenizer, rows, resumed)
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.limits == [6]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"completion_limit_quantile": 0.0}, "must be above 0 and at most 1, and is 0.0"),
        ({"completion_limit_quantile": 99}, "must be above 0 and at most 1, and is 99"),
        ({"completion_limit_headroom": 0.9}, "`completion_limit_headroom` must be at least 1, and is 0.9"),
        ({"lmbda": 0.0}, "`lmbda=0.0` generates nothing, so `completion_limit_quantile` has nothing to limit"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "`generation_kwargs` has `max_new_tokens`, which overrides"),
        ({"gate": "all"}, "cuts off what would not be trained on, and `gate='all'` trains on it"),
        ({"off_policy_steps": -1}, "`off_policy_steps` must be at least 0"),
        ({"off_policy_steps": 3, "num_generations": 2}, "`off_policy_steps=3` takes the one completion of a row"),
        ({"off_policy_steps": 3, "lmbda": 0.0, "completion_limit_quantile": None}, "has nothing to change: drop it"),
        ({"off_policy_steps": 3}, "`off_policy_steps=3` takes completions from the column `completion_ids`"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(tmp_path, tokenizer, rows, changes, message):
    options = {"completion_limit_quantile": 1.0, "teacher_prompt_template": CONCISE_TEMPLATE}
    with pytest.raises(ValueError, match=message):
        args = OPSDConfig(**settings(tmp_path, **options) | changes)
        OPSDTrainer("no/model", args=args, train_dataset=rows, reward_funcs=lambda **kwargs: [1.0])
