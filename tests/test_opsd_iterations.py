"""Several optimizer steps on each batch of rollouts."""

import math
from unittest import mock

import pytest
import torch
from datasets import IterableDataset
from test_opsd_trainer import Recorder, reference_loss, reward_by_length, settings
from trl import DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.faults import IN_A_ROW
from trl_opsd.opsd import AlarmCallback
from trl_opsd.tiny.task import CONCISE_TEMPLATE


ROLLOUTS = (
    "completions/mean_length",
    "completions/clipped_ratio",
    "opsd/correct",
    "opsd/kept",
    "reward",
    "num_tokens",
)


def build(tmp_path, model, tokenizer, rows, **changes):
    config = OPSDConfig(
        **settings(tmp_path, shuffle_dataset=False, **changes), teacher_prompt_template=CONCISE_TEMPLATE
    )
    recorder = Recorder()
    trainer = OPSDTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward_by_length(5),
        callbacks=[recorder],
    )
    return trainer, recorder


@pytest.mark.parametrize("budget", [None, 130])
def test_the_loss_is_that_of_the_student_as_it_is(tmp_path, small_model, tokenizer, rows, budget):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5", "4 a:-1=3 b:+1=4", "0"]
    completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    asked, written = [], []

    def generate(self, prompt_ids, *args, **kwargs):
        asked.append([tokenizer.decode(ids) for ids in prompt_ids])
        written.append([completions[(place + len(asked)) % len(completions)] for place in range(len(prompt_ids))])
        return [list(ids) for ids in written[-1]]

    model = small_model(0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    changes = {"max_steps": 5, "num_iterations": 2, "max_tokens_per_microbatch": budget}
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", generate):
        trainer, recorder = build(tmp_path, model, tokenizer, rows, **changes)
        trainer.train()
    # Each prompt is asked once, and none is left out
    questions = [row["prompt"][0]["content"] for row in rows]
    assert [len(prompts) for prompts in asked] == [8, 8, 8]
    for place, prompt in enumerate(sum(asked, [])):
        assert questions[place] in prompt
    logs = recorder.logs[:5]
    assert [log["opsd/staleness"] for log in logs] == [0, 1, 0, 1, 0]
    teacher = small_model(0)
    teacher.load_state_dict(start)
    for step, log in enumerate(logs):
        student = small_model(0)
        student.load_state_dict(start if step == 0 else recorder.weights[step - 1])
        batch, rollouts = list(rows)[8 * (step // 2) :][:8], written[step // 2]
        kept = [len(ids) >= 5 for ids in rollouts]
        expected = reference_loss(student, teacher, tokenizer, batch, rollouts, kept, CONCISE_TEMPLATE)
        assert log["loss"] == pytest.approx(expected, rel=1e-3)
        # What is logged of rollouts is that of those that are trained on
        assert log["opsd/correct"] == sum(kept) / 8
        assert log["completions/mean_length"] == pytest.approx(sum(map(len, rollouts)) / 8)
        assert log.keys() >= set(ROLLOUTS)
    assert logs[0]["loss"] != pytest.approx(logs[1]["loss"], rel=1e-2)
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"] < logs[2]["num_tokens"] == logs[3]["num_tokens"]


@pytest.mark.parametrize("logging_steps", [2, 5])
def test_logs_are_means_over_steps(tmp_path, small_model, tokenizer, rows, logging_steps):
    logs = []
    for every in (1, logging_steps):
        changes = {"max_steps": 2 * logging_steps, "num_iterations": 2, "logging_steps": every}
        trainer, recorder = build(tmp_path / str(every), small_model(0), tokenizer, rows, **changes)
        trainer.train()
        logs.append([log for log in recorder.logs if "loss" in log])
    for number, log in enumerate(logs[1]):
        part = logs[0][number * logging_steps :][:logging_steps]
        for name in ("opsd/staleness", "completions/mean_length", "opsd/kept"):
            assert log[name] == pytest.approx(sum(one[name] for one in part) / logging_steps), name


def test_a_resumed_run_goes_on_or_writes_the_batch_again(tmp_path, small_model, tokenizer, rows):
    changes = {"max_steps": 6, "num_iterations": 3, "save_strategy": "steps", "save_steps": 1, "gate": "all"}
    trainer, whole = build(tmp_path / "whole", small_model(0), tokenizer, rows, **changes)
    trainer.train()
    for step, staleness in ((3, [0, 1, 2]), (1, [0, 1, 0, 1, 2]), (5, [0])):
        trainer, again = build(tmp_path / f"from-{step}", small_model(0), tokenizer, rows, **changes)
        checkpoint = str(tmp_path / "whole" / "out" / f"checkpoint-{step}")
        trainer.train(resume_from_checkpoint=checkpoint)
        assert [log["opsd/staleness"] for log in again.logs if "loss" in log] == staleness
        same = all(torch.equal(value, again.weights[-1][name]) for name, value in whole.weights[-1].items())
        assert same is (step == 3)
        # A trainer that has gone on knows nothing of the batches of before
        again.logs.clear()
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
        assert [log["opsd/staleness"] for log in again.logs if "loss" in log] == [0, 0, 1, 2]


def test_what_is_given_stays_so_in_the_whole_batch(tmp_path, small_model, tokenizer, rows):
    """Through an evaluation, whose rollouts are the student's, and to those that ask: the alarms take no such for its own."""
    ids = tokenizer("6 a:-3=3")["input_ids"] + [tokenizer.eos_token_id]
    given = rows.map(lambda row: {"completion_ids": ids})
    for first in (0, 1):  # a resumed run decides as the one that it goes on from
        changes = {
            "max_steps": 4,
            "num_iterations": 2,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "off_policy_steps": 2,
        }
        changes |= {"save_strategy": "steps", "save_steps": 1}
        config = OPSDConfig(**settings(tmp_path, **changes), teacher_prompt_template=CONCISE_TEMPLATE)
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=given,
            eval_dataset=rows.select(range(8)),
            processing_class=tokenizer,
            reward_funcs=reward_by_length(5),
        )
        alarms = AlarmCallback(trainer)
        trainer.add_callback(alarms)
        checkpoint = str(tmp_path / "out" / f"checkpoint-{first}") if first else None
        trainer.train(resume_from_checkpoint=checkpoint)
        assert [math.isnan(length) for length in alarms.lengths] == [True, True, False, False]


def test_alarms_and_faults_count_batches(tmp_path, small_model, tokenizer, rows):
    once, _ = build(tmp_path, small_model(0), tokenizer, rows)
    thrice, _ = build(tmp_path, small_model(0), tokenizer, rows, num_iterations=3)
    assert AlarmCallback(thrice).window == 3 * AlarmCallback(once).window
    assert thrice.faults._bound == 3 * once.faults._bound == 3 * IN_A_ROW


def test_an_evaluation_in_between_writes_its_own(tmp_path, small_model, tokenizer, rows):
    changes = {"max_steps": 2, "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 1}
    runs = []
    for name, evaluation in (("with", rows.select(range(8))), ("without", None)):
        given = changes if evaluation is not None else {"max_steps": 2, "num_iterations": 2}
        asked, generate = [], DistillationTrainer._generate_single_turn

        def counted(self, prompt_ids, *args, asked=asked, generate=generate, **kwargs):
            asked.append(self.model.training)
            return generate(self, prompt_ids, *args, **kwargs)

        config = OPSDConfig(
            **settings(tmp_path / name, shuffle_dataset=False, **given), teacher_prompt_template=CONCISE_TEMPLATE
        )
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            eval_dataset=evaluation,
            processing_class=tokenizer,
        )
        with mock.patch.object(DistillationTrainer, "_generate_single_turn", counted):
            trainer.train()
        runs.append((asked.count(True), trainer.model.state_dict()))
    assert runs[0][0] == runs[1][0] == 1
    for name, value in runs[0][1].items():  # the order within the batch is drawn anew, and with it that of the sums
        torch.testing.assert_close(value, runs[1][1][name], rtol=1e-3, atol=1e-4)


def test_it_takes_prompts_that_can_be_asked_again(tmp_path, small_model, tokenizer, rows):
    streamed = IterableDataset.from_generator(lambda: iter(list(rows)))
    with pytest.raises(ValueError, match="`num_iterations=2` needs a dataset that can be indexed"):
        build(tmp_path, small_model(0), tokenizer, streamed, num_iterations=2)
    with pytest.raises(ValueError, match="`off_policy_steps=3` ends within a batch"):
        OPSDConfig(**settings(tmp_path, num_iterations=2, off_policy_steps=3))
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1, and is 0"):
        OPSDConfig(**settings(tmp_path, num_iterations=0))


def test_a_value_that_takes_the_place_of_another_is_in_every_log(tmp_path, small_model, tokenizer, rows):
    """Logged every second step, of which the second may make none of it anew."""
    changes = {"max_steps": 10, "num_iterations": 5, "logging_steps": 2}
    trainer, recorder = build(
        tmp_path, small_model(0), tokenizer, rows, teacher_gate=0.5, teacher_gate_rollouts=2, **changes
    )
    trainer.train()
    logs = [log for log in recorder.logs if "loss" in log]
    assert len(logs) == 5
    for log in logs:
        assert log["opsd/teacher_gate_tokens"] > 0 and log["num_tokens"] > 0
    assert logs[0]["num_tokens"] == logs[1]["num_tokens"] < logs[3]["num_tokens"] == logs[4]["num_tokens"]
