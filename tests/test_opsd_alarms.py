"""What ruins a run is said with its number, and stopped where going on would ruin the model."""

import copy

import pytest
import torch
from test_opsd_trainer import Recorder, same_rollouts, settings

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.alarms import AlarmCallback
from trl_opsd.opsd.metrics import OPSDAlarm
from trl_opsd.tiny.task import CONCISE_TEMPLATE


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def build(tmp_path, model, tokenizer, rows, reward_funcs=None, teacher_model=None, **changes):
    config = OPSDConfig(**settings(tmp_path, **changes), teacher_prompt_template=CONCISE_TEMPLATE)
    return watched(
        OPSDTrainer(
            model=model,
            teacher_model=teacher_model,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=reward_funcs,
            callbacks=[Recorder()],
        )
    )


def watched(trainer):
    """A trainer with its alarms, which a test reads as `trainer.alarms`."""
    trainer.alarms = AlarmCallback(trainer)
    trainer.add_callback(trainer.alarms)
    return trainer


@pytest.mark.parametrize(
    "value, message", [(0.0, r"The teacher is dead: in step 1 its entropy is 4\.\d+ nats"), (torch.nan, "is nan")]
)
def test_a_teacher_without_weights_ends_the_run_before_a_step(tmp_path, small_model, tokenizer, rows, value, message):
    teacher, student = small_model(1), small_model(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(value)
    before = copy.deepcopy(student.state_dict())
    trainer = build(tmp_path, student, tokenizer, rows, teacher_model=teacher)
    with pytest.raises(OPSDAlarm, match=message):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_by_itself_the_trainer_ends_on_nothing_but_a_divergence_that_is_not_finite(
    tmp_path, small_model, tokenizer, rows
):
    """A dead teacher, and one that says nothing, are trained from unless somebody asked for alarms."""
    dead = small_model(1)
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.fill_(0.0)
    for teacher in (dead, small_model(0)):
        config = OPSDConfig(**settings(tmp_path))
        trainer = OPSDTrainer(
            model=small_model(0), teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        assert trainer.state.global_step == 3
    with torch.no_grad():
        dead.lm_head.weight.fill_(torch.nan)
    trainer = OPSDTrainer(
        model=small_model(0), teacher_model=dead, args=config, train_dataset=rows, processing_class=tokenizer
    )
    with pytest.raises(OPSDAlarm, match="of step 1 is nan"):
        trainer.train()


def test_two_models_that_know_nothing_train(tmp_path, small_model, tokenizer, rows):
    """Near uniform are both: the teacher has not lost what the student has."""
    student, teacher = small_model(0), small_model(1)
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.weight.mul_(1e-3)
    trainer = build(tmp_path, student, tokenizer, rows, teacher_model=teacher, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_healthy_teacher_raises_nothing(tmp_path, small_model, tokenizer, rows, caplog):
    trainer = build(tmp_path, small_model(0), tokenizer, rows, learning_rate=1e-4, max_completion_length=64)
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.alarms.stopped_by is None
    assert not [record for record in caplog.records if record.name == "trl_opsd.opsd.alarms"]


def test_a_context_that_says_nothing_stops_the_run(tmp_path, small_model, tokenizer, rows, caplog):
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template="{prompt}")
    trainer = watched(OPSDTrainer(args=config, model=small_model(0), train_dataset=rows, processing_class=tokenizer))
    trainer.train()
    assert trainer.state.global_step == 1
    assert "Stopped at step 1: The divergence is" in caplog.text and "nothing is learned" in caplog.text


def falling(start, steps_up, then):
    """Rewards that hold for some steps and then fall."""

    def reward(completions, trainer_state, **kwargs):
        share = start if trainer_state.global_step < steps_up else then
        return [float(index < share * len(completions)) for index in range(len(completions))]

    return reward


def test_falling_accuracy_stops_the_run_and_names_the_best_checkpoint(
    tmp_path, small_model, tokenizer, rows, completions, caplog
):
    with same_rollouts(completions):
        trainer = build(
            tmp_path,
            small_model(0),
            tokenizer,
            rows,
            reward_funcs=falling(1.0, 8, 0.5),
            max_steps=30,
            learning_rate=1e-4,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
        )
        trainer.alarms.window = 5
        trainer.train()
    # 80% is 20 points below the start. Of the last five steps two are at 50% after step 10, three after step 11
    assert trainer.state.global_step == 11
    assert "at the start they were 100%" in trainer.alarms.stopped_by
    best = trainer.alarms.best_checkpoint(0.2)
    assert best in trainer.alarms.stopped_by and best in caplog.text
    assert trainer.state.best_model_checkpoint == best
    assert (tmp_path / "out" / best.split("/")[-1] / "model.safetensors").is_file()  # kept through rotation


def test_a_resumed_run_remembers_how_it_started(tmp_path, small_model, tokenizer, rows, completions):
    options = {"learning_rate": 1e-4, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    with same_rollouts(completions):
        model = small_model(0)
        reward = falling(1.0, 4, 0.5)
        trainer = build(tmp_path, model, tokenizer, rows, reward_funcs=reward, max_steps=4, **options)
        trainer.train()
        trainer = build(tmp_path, model, tokenizer, rows, reward_funcs=reward, max_steps=30, **options)
        trainer.alarms.window = 3
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    # Without its memory it would take 50% for its start and go on to the end
    assert trainer.state.global_step == 6
    assert trainer.alarms.stopped_by.endswith("The best checkpoint is " + str(tmp_path / "out" / "checkpoint-4") + ".")


def test_an_alarm_looks_at_256_rollouts(tmp_path, small_model, tokenizer, rows):
    trainer = build(tmp_path, small_model(0), tokenizer, rows, per_device_train_batch_size=6)
    assert trainer.args.gradient_accumulation_steps == 2
    assert trainer.alarms.window == 22  # steps, of 264 rollouts


def test_the_best_checkpoint_is_the_shortest_of_the_accurate_ones(tmp_path, small_model, tokenizer, rows):
    alarms = build(tmp_path, small_model(0), tokenizer, rows).alarms
    alarms.correct = [0.9]
    alarms.checkpoints = [("a", 0.9, 40.0), ("b", 0.75, 30.0), ("c", 0.6, 10.0), ("d", 0.88, 35.0)]
    assert alarms.best_checkpoint(0.2) == "b"
    assert alarms.best_checkpoint(0.1) == "d"
    alarms.checkpoints = [("c", 0.6, 10.0)]
    assert alarms.best_checkpoint(0.2) is None


@pytest.mark.parametrize("probed, stopped_at", [((32, 31), 3), ((32, 12), None), (None, None)])
def test_a_collapse_within_the_first_rollouts_is_seen_from_the_probe(
    tmp_path, small_model, tokenizer, rows, completions, probed, stopped_at
):
    """Of 31 of 32 at least 84% were likely, of 12 of 32 at least 23%, and the run has 50% from its first step on."""
    with same_rollouts(completions):
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-4}
        trainer = build(tmp_path, small_model(0), tokenizer, rows, reward_funcs=falling(0.5, 9, 0.5), **options)
        trainer.alarms.window, trainer.alarms.probed = 2, probed
        trainer.train()
    assert trainer.state.global_step == (stopped_at or 5)
    if stopped_at:
        assert "50% of the last 256 rollouts are correct, at the start they were 84%" in trainer.alarms.stopped_by
        assert "None of its 2 checkpoints is as good as at the start" in trainer.alarms.stopped_by


def test_warnings_carry_their_numbers(tmp_path, small_model, tokenizer, rows, caplog):
    trainer = build(tmp_path, small_model(0), tokenizer, rows)
    log = {"opsd/kl": 0.1, "opsd/correct": 0.9, "completions/mean_length": 100.0, "completions/clipped_ratio": 0.0}
    trainer.alarms.window = 5
    trainer.alarms.lengths = [100.0] * 8
    for changes in [{}] * 6 + [{"opsd/kl": 2.0}, {"completions/clipped_ratio": 0.75}]:
        trainer.alarms.on_log(trainer.args, trainer.state, trainer.control, logs={**log, **changes})
    assert "20.0 times its recent median" in caplog.text and "75% of the rollouts are truncated" in caplog.text
    caplog.clear()
    trainer.alarms.lengths += [15.0] * 5
    trainer.alarms.on_log(trainer.args, trainer.state, trainer.control, logs=log)
    assert "the rollouts are 15.0 tokens long, at the start they were 100.0" in caplog.text
    assert not trainer.control.should_training_stop
    caplog.clear()
    for name in ("truncated", "length_floor", "kl_spike", "correct_drop"):
        setattr(trainer.alarms, name, None)
    logs = {"opsd/kl": 9.0, "opsd/correct": 0.0, "completions/mean_length": 1.0, "completions/clipped_ratio": 1.0}
    for _ in range(6):
        trainer.alarms.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
    assert not caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_function_that_raises_names_itself_and_the_sample(
    tmp_path, small_model, tokenizer, rows, completions, is_async
):
    bad = rows[17]["prompt"][0]["content"]

    def check(prompts, trainer_state, **kwargs):
        if trainer_state.global_step == 2 and any(prompt[0]["content"] == bad for prompt in prompts):
            raise ZeroDivisionError("division by zero")
        return [1.0] * len(prompts)

    async def check_async(prompts, trainer_state, **kwargs):
        return check(prompts, trainer_state, **kwargs)

    with same_rollouts(completions):
        trainer = build(
            tmp_path,
            small_model(0),
            tokenizer,
            rows,
            reward_funcs=check_async if is_async else check,
            shuffle_dataset=False,
            max_steps=5,
            save_strategy="steps",
            save_steps=2,
        )
        with pytest.raises(RuntimeError) as end:
            trainer.train()
    name = "check_async" if is_async else "check"
    assert f"`{name}` raised ZeroDivisionError (division by zero) in step 3" in str(end.value)
    assert bad in str(end.value)
    assert isinstance(end.value.__cause__, ZeroDivisionError)
    assert (tmp_path / "out" / "checkpoint-2" / "model.safetensors").is_file()
