"""TRL's vLLM engine under our trainers: how often it is woken and given weights, and what a push leaves of the model."""

import pytest
import torch
from fake_engine import fake_engine, spread_adapter
from peft import LoraConfig
from test_opsd_trainer import settings

from trl_opsd import OPSDConfig, OPSDTrainer, RLVRConfig, RLVRTrainer
from trl_opsd.rollout_engine import EngineError
from trl_opsd.tiny.task import CONCISE_TEMPLATE


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
COLLECTION = ["wake weights", "push", "wake kv_cache"]


def only_the_third(completions, **kwargs):
    """In every third call all are right, else the second one."""
    only_the_third.calls += 1
    if only_the_third.calls % 3 == 0:
        return [1.0] * len(completions)
    return [float(i == 1) for i in range(len(completions))]


def opsd(tmp_path, model, tokenizer, rows, reward=only_the_third, **changes):
    defaults = {"max_steps": 2, "gradient_accumulation_steps": 1, "max_generation_rounds": 3, "use_vllm": True}
    defaults |= {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "learning_rate": 0.05}
    peft_config = changes.pop("peft_config", None)
    only_the_third.calls = 0
    return OPSDTrainer(
        model=model,
        args=OPSDConfig(**settings(tmp_path, **defaults | changes), teacher_prompt_template=CONCISE_TEMPLATE),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward,
        peft_config=peft_config,
    )


def rlvr(tmp_path, model, tokenizer, rows, reward, **changes):
    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, "max_steps": 2}
    options |= {"learning_rate": 0.05, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": 0.0}
    options |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "use_vllm": True}
    options |= {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}
    peft_config = changes.pop("peft_config", None)
    return RLVRTrainer(
        model=model,
        args=RLVRConfig(str(tmp_path / "rlvr"), **options | changes),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward,
        peft_config=peft_config,
    )


@pytest.fixture
def write(tokenizer):
    """Another completion each time."""
    count = 0

    def write(prompt_ids):
        nonlocal count
        count += 1
        return [*tokenizer(f"{count % 7} a:+{count % 5}")["input_ids"], tokenizer.eos_token_id]

    return write


def test_a_collection_is_one_waking_one_push_and_one_sleep(tmp_path, small_model, tokenizer, rows, write):
    with fake_engine(write):
        trainer = opsd(tmp_path, small_model(0), tokenizer, rows)
        engine = trainer.vllm_generation
        own = engine.generate
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer.train()
    generated = ["generate 4", "generate 3", "generate 2"]
    assert engine.llm.calls == ["sleep", *2 * [*COLLECTION, *generated, "sleep"]]
    assert engine.enable_sleep_mode and engine._llm_weights_sleeping
    assert engine.generate == own  # else each collection would wrap it once more
    assert any((value != before[name]).any() for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("build", [opsd, rlvr])
def test_the_engine_writes_with_the_weights_of_the_step(tmp_path, small_model, tokenizer, rows, write, build):
    seen = []

    def reward(completions, trainer_state, **kwargs):
        weights = trainer.vllm_generation.llm.wrote_with
        own = {name: value.clone() for name, value in trainer.model.named_parameters()}
        seen.append((trainer_state.global_step, weights, own))
        return [float(i % 2) for i in range(len(completions))]

    with fake_engine(write):
        trainer = build(tmp_path, small_model(0), tokenizer, rows, reward, max_generation_rounds=2)
        trainer.train()
    assert {step for step, *_ in seen} == {0, 1}
    for _, weights, own in seen:
        assert weights.keys() == own.keys()
        assert all(torch.equal(weights[name], value) for name, value in own.items())
    assert not torch.equal(seen[0][1]["lm_head.weight"], seen[-1][1]["lm_head.weight"])


def test_a_second_evaluation_at_a_step_is_written_with_weights(tmp_path, small_model, tokenizer, rows, write):
    """The trainer pushes them once a step, and the sleep after the first evaluation has forgotten them."""
    with fake_engine(write):
        trainer = opsd(tmp_path, small_model(0), tokenizer, rows)
        for _ in range(2):
            trainer.evaluate(rows.select(range(4)))
    assert trainer.vllm_generation.llm.calls == ["sleep", *2 * [*COLLECTION, "generate 4", "sleep"]]


@pytest.mark.parametrize("build", [opsd, rlvr])
def test_rollouts_end_where_the_trainer_says(tmp_path, small_model, tokenizer, rows, write, build):
    """Not where the files of the checkpoint say, which a model in memory may not have."""
    model = small_model(0)
    [another] = tokenizer("5")["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, another]
    given = {"repetition_penalty": 1.1}
    with fake_engine(write):
        trainer = build(tmp_path, model, tokenizer, rows, only_the_third, max_steps=1, generation_kwargs=given)
        trainer.train()
    assert sorted(trainer.vllm_generation.llm.stop_token_ids) == sorted({tokenizer.eos_token_id, another})
    assert trainer.args.generation_kwargs == given  # which are the user's


def test_between_the_rounds_of_rlvr_the_engine_sleeps(tmp_path, small_model, tokenizer, rows, write):
    """Each ends in a forward pass of the model, which may need the memory of the engine."""

    def flat(completions, **kwargs):  # no group has variance, so all are replaced
        return [0.0] * len(completions)

    with fake_engine(write):
        trainer = rlvr(tmp_path, small_model(0), tokenizer, rows, flat, max_generation_rounds=3)
        trainer.train()
    assert trainer.vllm_generation.llm.calls == ["sleep", *6 * [*COLLECTION, "generate 4", "sleep"]]


def test_an_engine_sleeps_after_an_error_too(tmp_path, small_model, tokenizer, rows, write):
    def broken(**kwargs):
        raise KeyError("answer")

    with fake_engine(write):
        trainer = opsd(tmp_path, small_model(0), tokenizer, rows, broken)
        with pytest.raises(RuntimeError, match="KeyError"):
            trainer.train()
    assert trainer.vllm_generation.llm.calls[-1] == "sleep"
    assert trainer.vllm_generation.enable_sleep_mode and trainer.vllm_generation._llm_weights_sleeping


def test_an_engine_that_has_died_is_not_put_to_sleep(tmp_path, small_model, tokenizer, rows):
    """It would fail once more, and hide what it died of."""

    def dead(prompt_ids):
        raise RuntimeError("gone")

    with fake_engine(dead):
        trainer = opsd(tmp_path, small_model(0), tokenizer, rows)
        with pytest.raises(EngineError, match="gone"):
            trainer.train()
    assert trainer.vllm_generation.llm.calls == ["sleep", *COLLECTION, "generate 4"]


def test_an_engine_that_never_sleeps_is_left_alone(tmp_path, small_model, tokenizer, rows, write):
    with fake_engine(write):
        trainer = opsd(tmp_path, small_model(0), tokenizer, rows, vllm_enable_sleep_mode=False)
        trainer.train()
    assert trainer.vllm_generation.llm.calls == [
        word for _ in range(2) for word in ("push", "generate 4", "generate 3", "generate 2")
    ]


@pytest.mark.parametrize("sleeps", [False, True])
@pytest.mark.parametrize("build", [opsd, rlvr])
def test_the_base_under_an_adapter_is_the_same_bit_for_bit(
    tmp_path, small_model, tokenizer, rows, write, build, sleeps
):
    """After pushes for training and, where the engine sleeps, for an evaluation at the same step."""

    def reward(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    with fake_engine(write):
        changes = {"max_steps": 6, "vllm_enable_sleep_mode": sleeps, "peft_config": LoraConfig(**LORA)}
        trainer = build(tmp_path, small_model(0).bfloat16(), tokenizer, rows, reward, **changes)
        spread_adapter(trainer.model)
        original = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if ".base_layer." in n}
        trainer.train()
        trainer.evaluate(rows.select(range(4)))
    calls = trainer.vllm_generation.llm.calls
    assert calls.count("push") >= 7
    pushed = trainer.vllm_generation.llm.weights
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in original.items())
    if not sleeps:
        # And what is pushed is the base with the adapter in it
        name = "model.layers.0.self_attn.q_proj.weight"
        base = original[f"base_model.model.{name.replace('.weight', '.base_layer.weight')}"]
        assert pushed.keys() == set(dict(small_model(0).named_parameters()))
        assert not torch.equal(pushed[name], base)
