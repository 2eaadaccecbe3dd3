"""The trainer: what it is without its own parameters, and what each of them changes."""

import copy
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


def settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


class Recorder(TrainerCallback):
    """Keeps what was logged and the weights after every step."""

    def __init__(self):
        self.logs, self.weights = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(copy.deepcopy(model.state_dict()))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(trainer_class, config, **kwargs):
    recorder = Recorder()
    trainer = trainer_class(args=config, callbacks=[recorder], **kwargs)
    trainer.train()
    return trainer, recorder


def same_rollouts(completions):
    """Makes every trainer write the given completions, row by row of the batch, in place of sampling."""

    def generate(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        return [list(completions[i % len(completions)]) for i in range(len(prompt_ids))]

    return mock.patch.object(DistillationTrainer, "_generate_single_turn", generate)


def reward_by_length(threshold):
    """A verifier that a test can steer: right if the completion has at least `threshold` tokens."""

    def reward(completions, completion_ids, **kwargs):
        return [float(len(ids) >= threshold) for ids in completion_ids]

    return reward


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_without_its_own_parameters_it_is_distillation_trainer(tmp_path, small_model, tokenizer, rows, beta):
    runs = []
    for trainer_class, config_class in ((DistillationTrainer, DistillationConfig), (OPSDTrainer, OPSDConfig)):
        config = config_class(**settings(tmp_path, beta=beta, temperature=0.9, optim="sgd"))
        runs.append(
            train(
                trainer_class,
                config,
                model=small_model(0),
                teacher_model=small_model(1, hidden_size=48),
                train_dataset=rows,
                processing_class=tokenizer,
            )[1]
        )
    theirs, ours = runs
    for their_log, our_log in zip(theirs.logs[:-1], ours.logs[:-1], strict=True):
        assert our_log["loss"] == pytest.approx(their_log["loss"], rel=1e-5)
        assert our_log["entropy"] == pytest.approx(their_log["entropy"], rel=1e-5)
        assert our_log["completions/mean_length"] == their_log["completions/mean_length"]
    for their_weights, our_weights in zip(theirs.weights, ours.weights, strict=True):
        for name, value in their_weights.items():
            torch.testing.assert_close(our_weights[name], value, rtol=1e-4, atol=1e-5)


def reference_loss(student, teacher, tokenizer, batch, completions, kept, template, beta=1.0, temperature=1.0):
    """
    The objective from its formula, in float64, one unpadded sequence at a time: the divergence of the kept rollouts'
    tokens, summed and divided by their number.
    """
    student, teacher = copy.deepcopy(student).double().eval(), copy.deepcopy(teacher).double().eval()

    def probabilities(model, text, completion):
        prompt = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
        return (logits / temperature).softmax(-1)

    total, count = 0.0, 0
    for example, completion, keep in zip(batch, completions, kept, strict=True):
        if not keep:
            continue
        text = example["prompt"][0]["content"]
        q = probabilities(student, text, completion)
        privileged = template.format(prompt=text, solution=example["solution"])
        p = probabilities(teacher, privileged, completion)
        m = (1 - beta) * q + beta * p
        forward, reverse = (p * (p / m).log()).sum(-1), (q * (q / m).log()).sum(-1)
        if beta in (0.0, 1.0):
            forward, reverse = (p * (p / q).log()).sum(-1), (q * (q / p).log()).sum(-1)
            total += (forward if beta == 0 else reverse).sum()
        else:
            total += (beta * forward + (1 - beta) * reverse).sum()
        count += len(completion)
    return (total / count).item()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [(8, 1), (1, 8)])
def test_loss_is_the_formula_on_the_kept_rollouts(tmp_path, small_model, tokenizer, rows, completions, beta, batch):
    model = small_model(0)
    config = OPSDConfig(
        **settings(tmp_path, per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], max_steps=1),
        beta=beta,
        temperature=0.7,
        teacher_prompt_template=SOLUTION_TEMPLATE,
        shuffle_dataset=False,
    )
    kept = [len(completions[i % 4]) >= 5 for i in range(8)]
    assert any(kept) and not all(kept)
    expected = reference_loss(
        model,
        model,
        tokenizer,
        list(rows)[:8],
        [completions[i % 4] for i in range(8)],
        kept,
        SOLUTION_TEMPLATE,
        beta=beta,
        temperature=0.7,
    )
    with same_rollouts(completions):
        _, recorder = train(
            OPSDTrainer,
            config,
            model=model,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=reward_by_length(5),
        )
    assert recorder.logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert recorder.logs[0]["opsd/kl"] == pytest.approx(expected, rel=1e-4)
    assert recorder.logs[0]["opsd/kept"] == sum(kept) / 8


def test_gradient_is_the_same_however_the_batch_is_cut(tmp_path, small_model, tokenizer, rows, completions):
    weights = []
    for per_device, accumulation in ((8, 1), (2, 4), (1, 8)):
        config = OPSDConfig(
            **settings(
                tmp_path, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation, max_steps=1
            ),
            teacher_prompt_template=CONCISE_TEMPLATE,
            shuffle_dataset=False,
            optim="sgd",
        )
        with same_rollouts(completions):
            trainer, _ = train(
                OPSDTrainer,
                config,
                model=small_model(0),
                train_dataset=rows,
                processing_class=tokenizer,
                reward_funcs=reward_by_length(5),
            )
        weights.append(trainer.model.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate, kept", [("correct", 1 / 2), ("incorrect", 1 / 2), ("all", 1.0)])
def test_a_rollout_that_is_not_kept_costs_no_forward(tmp_path, small_model, tokenizer, rows, completions, gate, kept):
    config = OPSDConfig(**settings(tmp_path, max_steps=1), gate=gate, teacher_prompt_template=CONCISE_TEMPLATE)
    completions = [completions[1], completions[2]]
    rows_seen, padding = [], []
    with same_rollouts(completions):
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=reward_by_length(5),
        )
        hidden = trainer._get_last_hidden_state

        def record(model, input_ids, attention_mask, *args):
            rows_seen.append((model is trainer.teacher_model, input_ids.shape[0]))
            padding.append(input_ids.shape[1] - (input_ids != tokenizer.pad_token_id).sum(dim=1).max())
            return hidden(model, input_ids, attention_mask, *args)

        with mock.patch.object(trainer, "_get_last_hidden_state", record):
            trainer.train()
    for is_teacher in (True, False):
        assert sum(count for teacher, count in rows_seen if teacher is is_teacher) == 8 * kept
    # Nor does the padding that it would have imposed on the others
    assert not any(padding)


def test_nothing_kept_leaves_the_weights_alone(tmp_path, small_model, tokenizer, rows, completions, caplog):
    calls = []

    def reward(completions, completion_ids, trainer_state, **kwargs):
        calls.append(trainer_state.global_step)
        return [float(trainer_state.global_step != 1)] * len(completion_ids)

    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE)
    with same_rollouts(completions):
        _, recorder = train(
            OPSDTrainer,
            config,
            model=small_model(0),
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=reward,
        )
    first, second, third = recorder.weights
    # Step 1 trained, so momentum and weight decay would move the weights in step 2
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)
    assert [log["opsd/kept"] for log in recorder.logs[:3]] == [1.0, 0.0, 1.0]
    assert "No rollout of step 2 passed the gate `correct`" in caplog.text


def test_truncated_is_never_correct(tmp_path, small_model, tokenizer, rows, completions):
    finished, truncated = completions[0], completions[2][:-1]
    config = OPSDConfig(**settings(tmp_path, max_steps=1), teacher_prompt_template=CONCISE_TEMPLATE)
    with same_rollouts([finished, truncated]):
        _, recorder = train(
            OPSDTrainer,
            config,
            model=small_model(0),
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        )
    assert recorder.logs[0]["reward"] == 1.0
    assert recorder.logs[0]["opsd/correct"] == recorder.logs[0]["opsd/kept"] == 0.5


def test_unverifiable_is_neither_correct_nor_incorrect(tmp_path, small_model, tokenizer, rows, completions):
    for gate, kept in (("correct", 0.25), ("incorrect", 0.25), ("all", 1.0)):
        config = OPSDConfig(**settings(tmp_path, max_steps=1), gate=gate, teacher_prompt_template=CONCISE_TEMPLATE)
        with same_rollouts(completions):
            _, recorder = train(
                OPSDTrainer,
                config,
                model=small_model(0),
                train_dataset=rows,
                processing_class=tokenizer,
                reward_funcs=lambda completions, **kwargs: [1.0, 0.0, None, None] * (len(completions) // 4),
            )
        assert recorder.logs[0]["opsd/kept"] == kept, gate


def test_several_rewards_are_weighted_and_may_be_async(tmp_path, small_model, tokenizer, rows, completions):
    async def style(completions, **kwargs):
        return [1.0, 0.0] * (len(completions) // 2)

    def verifier(completions, **kwargs):
        return [1.0, 1.0, 0.0, 0.0] * (len(completions) // 4)

    config = OPSDConfig(
        **settings(tmp_path, max_steps=1),
        teacher_prompt_template=CONCISE_TEMPLATE,
        reward_weights=[1.0, 0.5],
        gate_threshold=1.5,
    )
    with same_rollouts(completions):
        _, recorder = train(
            OPSDTrainer,
            config,
            model=small_model(0),
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=[verifier, style],
        )
    assert recorder.logs[0]["opsd/kept"] == 0.25
    assert recorder.logs[0]["rewards/style/mean"] == 0.5


def test_num_generations_groups_the_rollouts_of_a_prompt(tmp_path, small_model, tokenizer, rows):
    config = OPSDConfig(
        **settings(tmp_path, max_steps=2), num_generations=4, teacher_prompt_template=CONCISE_TEMPLATE, gate="all"
    )
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append([prompt[0]["content"] for prompt in prompts])
        return [1.0] * len(completions)

    train(
        OPSDTrainer,
        config,
        model=small_model(0),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward,
    )
    assert len(seen) == 2  # once per optimizer step, not once per accumulation step
    for prompts in seen:
        assert len(prompts) == 8 and [prompts.count(prompt) for prompt in prompts] == [4] * 8
        assert prompts[:4] == [prompts[0]] * 4
    assert set(seen[0]).isdisjoint(seen[1])


def test_teacher_sees_its_context_and_the_same_completion_tokens(tmp_path, small_model, tokenizer, rows, completions):
    config = OPSDConfig(**settings(tmp_path, max_steps=1), teacher_prompt_template=SOLUTION_TEMPLATE)
    inputs = {True: [], False: []}
    with same_rollouts(completions):
        trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)
        hidden = trainer._get_last_hidden_state

        def record(model, input_ids, attention_mask, *args, **kwargs):
            texts = [ids[ids != tokenizer.pad_token_id].tolist() for ids in input_ids]
            inputs[model is trainer.teacher_model] += texts
            return hidden(model, input_ids, attention_mask, *args, **kwargs)

        with mock.patch.object(trainer, "_get_last_hidden_state", record):
            trainer.train()
    solutions = {example["prompt"][0]["content"]: example["solution"] for example in rows}
    assert len(inputs[True]) == len(inputs[False]) == 8
    for teacher_ids, student_ids in zip(inputs[True], inputs[False], strict=True):
        student_prompt, completion = tokenizer.decode(student_ids).split("assistant\n")
        text = student_prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>")
        privileged = SOLUTION_TEMPLATE.format(prompt=text, solution=solutions[text])
        assert tokenizer.decode(teacher_ids) == (
            f"<|im_start|>user\n{privileged}<|im_end|>\n<|im_start|>assistant\n{completion}"
        )
        assert [c for c in completions if teacher_ids[-len(c) :] == c == student_ids[-len(c) :]]


def test_initial_teacher_is_frozen(tmp_path, small_model, tokenizer, rows):
    model = small_model(0)
    before = copy.deepcopy(model.state_dict())
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE)
    trainer, recorder = train(OPSDTrainer, config, model=model, train_dataset=rows, processing_class=tokenizer)
    teacher = trainer.teacher_model.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in before.items())
    assert any(not torch.equal(recorder.weights[-1][name], value) for name, value in before.items())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(id(p) for p in trainer.teacher_model.parameters())


def test_initial_teacher_from_a_path_is_the_student(tmp_path, checkpoint, rows):
    path = checkpoint()
    config = OPSDConfig(**settings(tmp_path, max_steps=1), teacher_prompt_template=CONCISE_TEMPLATE)
    trainer = OPSDTrainer(model=path, args=config, train_dataset=rows)
    student, teacher = trainer.model.state_dict(), trainer.teacher_model.state_dict()
    assert trainer.teacher_model is not trainer.model
    assert all(
        torch.equal(teacher[name], value) and teacher[name].dtype == value.dtype for name, value in student.items()
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora_teacher_is_the_base_model_without_a_copy(
    tmp_path, small_model, tokenizer, rows, completions, gradient_checkpointing
):
    base = small_model(0)
    expected = reference_loss(
        base, base, tokenizer, list(rows)[:8], [completions[i % 4] for i in range(8)], [True] * 8, CONCISE_TEMPLATE
    )
    config = OPSDConfig(
        **settings(tmp_path, gradient_checkpointing=gradient_checkpointing),
        teacher_prompt_template=CONCISE_TEMPLATE,
        shuffle_dataset=False,
    )
    original = copy.deepcopy(base.state_dict())
    with same_rollouts(completions):
        trainer, recorder = train(
            OPSDTrainer,
            config,
            model=base,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5),
        )
    assert trainer.teacher_model is None
    assert recorder.logs[0]["loss"] == pytest.approx(expected, rel=1e-4)
    weights = trainer.model.get_base_model().state_dict()
    for name, value in original.items():
        stored = weights[name] if name in weights else weights[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(stored, value)
    assert trainer.model.training
    # The student has moved and the teacher has not: with the adapter on, both would agree
    assert any(value.any() for name, value in trainer.model.named_parameters() if "lora_B" in name)


def test_it_learns_what_the_context_says(tmp_path, small_model, tokenizer, rows):
    config = OPSDConfig(
        **settings(tmp_path, max_steps=40, learning_rate=2e-3, weight_decay=0.0, per_device_train_batch_size=8),
        teacher_prompt_template=CONCISE_TEMPLATE,
    )
    _, recorder = train(OPSDTrainer, config, model=small_model(0), train_dataset=rows, processing_class=tokenizer)
    losses = [log["loss"] for log in recorder.logs[:-1]]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


def test_own_chat_template_arguments_on_each_side(tmp_path, small_model, tokenizer, rows, completions):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- for message in messages -%}",
        "{%- if hint -%}{{- 'concise' -}}{%- endif -%}{%- for message in messages -%}",
    )
    config = OPSDConfig(**settings(tmp_path, max_steps=1), teacher_chat_template_kwargs={"hint": True})
    with same_rollouts(completions):
        trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)
        batch = trainer._generate_and_score_completions(list(rows)[:4])
    student, teacher = (tokenizer.decode(batch[key][0]) for key in ("prompt_ids", "teacher_prompt_ids"))
    assert "concise" + student.replace("<|pad|>", "") == teacher.replace("<|pad|>", "")


def test_different_generation_prompts_are_an_error(tmp_path, small_model, tokenizer, rows):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{%- if add_generation_prompt and brief -%}{{- 'brief' -}}{%- endif -%}"
    config = OPSDConfig(
        **settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE, teacher_chat_template_kwargs={"brief": True}
    )
    with pytest.raises(ValueError, match=r"student's prompt ends in .* and the teacher's in '.*brief'"):
        OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)


def test_evaluation_goes_through_the_gate_too(tmp_path, small_model, tokenizer, rows, completions):
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE, per_device_eval_batch_size=4)
    with same_rollouts(completions):
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            eval_dataset=rows.select(range(8)),
            processing_class=tokenizer,
            reward_funcs=reward_by_length(5),
        )
        metrics = trainer.evaluate()
    assert metrics["eval_opsd/kept"] == 0.75
    assert metrics["eval_loss"] > 0


class NoModel:
    """Stands where a model would be loaded: whatever is read from it shows that a check came too late."""

    def __getattr__(self, name):
        raise AssertionError(f"a model was used (`{name}`) before the mistake was found")


@pytest.mark.parametrize(
    "changes, kwargs, message",
    [
        ({}, {}, "same in weights and context"),
        ({}, {"teacher_model": "same"}, "same in weights and context"),
        ({"teacher_weights": "external"}, {}, "needs a teacher model"),
        ({"teacher_weights": "initial"}, {"teacher_model": "other"}, "contradict each other"),
        ({"teacher_context": "concise", "gate": "correct"}, {}, "needs a verifier"),
        ({"teacher_context": "concise", "gate": "incorrect"}, {"reward_funcs": []}, "needs a verifier"),
        ({"teacher_context": "concise"}, {"reward_funcs": ["math_reward"]}, "must be a function"),
        ({"teacher_context": "concise", "reward_weights": [1.0]}, {}, "`reward_weights` has 1 entries"),
        ({"teacher_prompt_template": "{prompt} {privileged_context}"}, {}, "needs the column `privileged_context`"),
        ({"teacher_context": "concise", "use_liger_kernel": True, "kl_clip": 0.1}, {}, "exclude each other"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(tmp_path, rows, changes, kwargs, message):
    config = OPSDConfig(**settings(tmp_path), **changes)
    with (
        mock.patch("trl_opsd.opsd.teacher.create_model_from_path", NoModel()),
        mock.patch("trl.trainer.distillation_trainer.create_model_from_path", NoModel()),
        pytest.raises(ValueError, match=message),
    ):
        OPSDTrainer(model="same", args=config, train_dataset=rows, **kwargs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_generations": 3}, r"global batch of 8 rollouts .* not divisible by num_generations 3"),
        ({"num_generations": 0}, "at least 1"),
        ({"gate": "right"}, "`gate` must be"),
        ({"teacher_context": "hints"}, "`teacher_context` must be one of"),
        ({"teacher_weights": "emma"}, "`teacher_weights` must be"),
        ({"teacher_weights": "initial", "teacher_model_name_or_path": "x"}, "contradict each other"),
        ({"teacher_prompt_template": "concise"}, "no `{prompt}`"),
        ({"teacher_prompt_template": "{prompt} {soluton}"}, "unknown placeholder `{soluton}`"),
        ({"teacher_prompt_template": r"{prompt} \boxed{"}, "unbalanced braces"),
        ({"kl_clip": 0.0}, "`kl_clip` must be positive"),
        ({"teacher_context": "concise", "remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_config_mistakes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(**settings(tmp_path, **changes))


def test_an_adapter_that_already_changes_the_model_is_no_initial_teacher(tmp_path, small_model, tokenizer, rows):
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE)
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="merge the adapter first"):
        OPSDTrainer(
            model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
        )


def test_liger_gives_the_same_loss_and_weights(tmp_path, small_model, tokenizer, rows, completions):
    runs = []
    # Liger's loss runs anywhere, the layers that it also swaps need Triton
    layers = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False)
    for liger in ({}, {"use_liger_kernel": True, "liger_kernel_config": layers}):
        config = OPSDConfig(
            **settings(tmp_path, max_steps=2, optim="sgd", **liger), teacher_prompt_template=CONCISE_TEMPLATE, beta=0.5
        )
        with same_rollouts(completions):
            _, recorder = train(
                OPSDTrainer,
                config,
                model=small_model(0),
                train_dataset=rows,
                processing_class=tokenizer,
                reward_funcs=reward_by_length(5),
            )
        runs.append(recorder)
    ours, ligers = runs
    for our_log, liger_log in zip(ours.logs[:2], ligers.logs[:2], strict=True):
        assert liger_log["loss"] == pytest.approx(our_log["loss"], rel=1e-4)
        assert liger_log["opsd/kl"] == pytest.approx(our_log["opsd/kl"], rel=1e-4)
        # What Liger does not measure is missing from the log, not zero
        assert liger_log["opsd/student_entropy"] is None and our_log["opsd/student_entropy"] > 0
    for name, value in ours.weights[-1].items():
        torch.testing.assert_close(ligers.weights[-1][name], value, rtol=1e-4, atol=1e-5)


def test_clip_bounds_the_loss_and_is_logged(tmp_path, small_model, tokenizer, rows, completions):
    logs = {}
    for kl_clip in (None, 0.05):
        config = OPSDConfig(
            **settings(tmp_path, max_steps=1), teacher_prompt_template=CONCISE_TEMPLATE, kl_clip=kl_clip
        )
        with same_rollouts(completions):
            _, recorder = train(
                OPSDTrainer, config, model=small_model(0), train_dataset=rows, processing_class=tokenizer
            )
        logs[kl_clip] = recorder.logs[0]
    assert 0 < logs[0.05]["loss"] < logs[None]["loss"]
    assert logs[0.05]["opsd/kl"] == pytest.approx(logs[None]["opsd/kl"], rel=1e-5)
    assert logs[None]["opsd/clip_fraction"] == 0 < logs[0.05]["opsd/clip_fraction"] < 1


def test_fewer_prompts_than_a_batch_are_named_before_a_model_is_loaded(tmp_path, rows):
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE)
    with pytest.raises(ValueError, match="has 7 prompts and a batch takes 8"):
        OPSDTrainer(model="nowhere", args=config, train_dataset=rows.select(range(7)))
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE, num_generations=4)
    with pytest.raises(ValueError, match="has 1 prompts and a batch takes 2"):
        OPSDTrainer(model="nowhere", args=config, train_dataset=rows.select(range(1)))
