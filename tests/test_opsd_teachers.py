"""Teachers that follow the student, siblings, padded vocabularies, and prompts that are too long."""

import copy
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_opsd_trainer import Recorder, same_rollouts, settings, train
from transformers import AutoTokenizer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.gate import shortest, shortest_siblings
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


SIBLING_TEMPLATE = "{prompt} solution {sibling}"


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def followed(history, initial, rate, every):
    """What a teacher's weights should be after each step, from the definition, in float64."""
    teacher, result = initial.double(), []
    for step, student in enumerate(history, start=1):
        if step % every == 0:
            teacher = (1 - rate) * teacher + rate * student.double()
        result.append(teacher)
    return result


class TeacherRecorder(Recorder):
    """Keeps the teacher's weights after every step too."""

    def __init__(self):
        super().__init__()
        self.teachers = []

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        pairs = self.trainer.teacher.pairs()
        self.teachers.append({name: teacher.detach().clone() for name, (teacher, _) in pairs.items()})


def run(tmp_path, model, tokenizer, rows, resume=None, peft=False, **changes):
    config = OPSDConfig(**settings(tmp_path, **changes), teacher_prompt_template=CONCISE_TEMPLATE)
    recorder = TeacherRecorder()
    trainer = OPSDTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if peft else None,
    )
    trainer.add_callback(recorder)
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "changes, rate, every",
    [
        ({"teacher_weights": "ema", "teacher_update_rate": 0.3}, 0.3, 1),
        ({"teacher_weights": "ema", "teacher_update_rate": 0.3, "teacher_sync_steps": 2}, 0.3, 2),
        ({"teacher_weights": "snapshot", "teacher_sync_steps": 2}, 1.0, 2),
    ],
    ids=["ema", "ema every 2", "snapshot"],
)
def test_the_teacher_follows_the_student(tmp_path, small_model, tokenizer, rows, peft, changes, rate, every):
    trainer, recorder = run(tmp_path, small_model(0), tokenizer, rows, peft=peft, max_steps=4, **changes)
    name = next(name for name in recorder.teachers[0] if ("lora_B" in name if peft else "q_proj" in name))
    history = [weights[name] for weights in recorder.weights]
    initial = torch.zeros_like(history[0]) if peft else small_model(0).state_dict()[name]
    for found, expected in zip(recorder.teachers, followed(history, initial, rate, every), strict=True):
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(history[0], history[-1])
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized.isdisjoint(id(teacher) for teacher, _ in trainer.teacher.pairs().values())
    assert trainer.teacher_model is None if peft else trainer.teacher_model is not None


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("weights", ["initial", "snapshot", "ema", "live"])
def test_what_the_teacher_scores_with(tmp_path, small_model, tokenizer, rows, completions, weights, peft):
    """After two steps, each kind of teacher gives the hidden states of the weights that it should have."""
    changes = {"teacher_sync_steps": 2} if weights == "snapshot" else {}
    with same_rollouts(completions):
        trainer, recorder = (
            run(tmp_path, small_model(0), tokenizer, rows, peft=peft, max_steps=2, teacher_weights=weights, **changes)
            if weights in ("snapshot", "ema")
            else (
                train(
                    OPSDTrainer,
                    OPSDConfig(
                        **settings(tmp_path, max_steps=2),
                        teacher_prompt_template=CONCISE_TEMPLATE,
                        teacher_weights=weights,
                    ),
                    model=small_model(0),
                    train_dataset=rows,
                    processing_class=tokenizer,
                    peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if peft else None,
                )
            )
        )
    inputs = (torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long), 2)

    def hidden(model):
        with torch.no_grad():
            return trainer._get_last_hidden_state(model.eval(), *inputs)

    trainer.model.train()
    found, _ = trainer.teacher.forward(trainer.model, trainer._get_last_hidden_state, *inputs)
    assert trainer.model.training
    initial, student = hidden(small_model(0)), hidden(trainer.model)
    assert not torch.allclose(initial, student, atol=1e-3)
    if weights == "ema":
        between = ((found - initial).norm() / (student - initial).norm()).item()
        assert 0 < between < 0.5
    else:
        expected = initial if weights == "initial" else student
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("weights", ["ema", "snapshot"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, small_model, tokenizer, rows, weights, peft):
    changes = {
        "teacher_weights": weights,
        "teacher_sync_steps": 3 if weights == "snapshot" else 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
    }
    whole, _ = run(tmp_path / "a", small_model(0), tokenizer, rows, peft=peft, **changes)
    checkpoint = tmp_path / "a" / "out" / "checkpoint-4"
    assert load_file(checkpoint / "teacher.safetensors")
    assert not (checkpoint / "teacher").exists()
    resumed, _ = run(tmp_path / "b", small_model(0), tokenizer, rows, peft=peft, resume=str(checkpoint), **changes)
    pairs, expected = resumed.teacher.pairs(), whole.teacher.pairs()
    for name, (teacher, student) in expected.items():
        assert torch.equal(pairs[name][0], teacher), name
        assert torch.equal(pairs[name][1], student), name
    (checkpoint / "teacher.safetensors").unlink()
    with pytest.raises(ValueError, match="has no teacher.safetensors"):
        run(tmp_path / "c", small_model(0), tokenizer, rows, peft=peft, resume=str(checkpoint), **changes)


def test_siblings_and_shortest_by_hand():
    lengths = torch.tensor([5, 3, 3, 9, 4, 2, 7, 1])
    correct = torch.tensor([1, 1, 1, 0, 0, 1, 0, 0]).bool()
    assert shortest_siblings(correct, lengths, 4) == [1, 2, 1, 1, 5, None, 5, 5]
    assert shortest_siblings(correct, lengths, 1) == [None] * 8
    assert shortest(correct, lengths, 4, 1).logical_and(correct).tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
    assert shortest(correct, lengths, 4, 2).logical_and(correct).tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert shortest(correct, lengths, 4, 4).logical_and(correct).tolist() == correct.tolist()


@pytest.mark.parametrize("fallback", [None, "concise"])
def test_the_teacher_sees_the_shortest_correct_sibling(tmp_path, small_model, tokenizer, rows, completions, fallback):
    config = OPSDConfig(
        **settings(tmp_path, gradient_accumulation_steps=1, num_generations=4),
        teacher_prompt_template=SIBLING_TEMPLATE,
        sibling_fallback=fallback,
        gate="all",
    )
    # Right are the first (5 tokens) and the fourth (5 tokens too: the first of two comes first) of the group
    right = [1.0, 0.0, 0.0, 1.0]
    if fallback:
        right = [1.0, 0.0, 0.0, 0.0]  # then the only right one has no sibling
    with (
        same_rollouts(completions),
        mock.patch.dict("trl_opsd.opsd.config.TEACHER_PROMPT_TEMPLATES", {"concise": CONCISE_TEMPLATE}),
    ):
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **kwargs: right,
        )
        trainer.model.train()
        batch = trainer._generate_and_score_completions([rows[0]] * 4)
    problem = rows[0]["prompt"][0]["content"]
    seen = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["teacher_prompt_ids"]]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    expected = [3, 0, 0, 0] if not fallback else [None, 0, 0, 0]
    for text, sibling in zip(seen, expected, strict=True):
        context = CONCISE_TEMPLATE if sibling is None else SIBLING_TEMPLATE
        privileged = context.format(prompt=problem, sibling=None if sibling is None else texts[sibling])
        assert f"user\n{privileged}\n" in text
    assert batch["kept"].all()


def test_without_sibling_or_fallback_a_rollout_is_dropped(tmp_path, small_model, tokenizer, rows, completions):
    config = OPSDConfig(
        **settings(tmp_path, gradient_accumulation_steps=1, num_generations=4),
        teacher_prompt_template=SIBLING_TEMPLATE,
    )
    with same_rollouts(completions):
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **kwargs: [0.0, 0.0, 1.0, 0.0],
        )
        trainer.model.train()
        batch = trainer._generate_and_score_completions([rows[0]] * 4)
    assert not batch["kept"].any()  # the right one has no sibling, the others are not right


def test_keep_shortest(tmp_path, small_model, tokenizer, rows, completions):
    config = OPSDConfig(
        **settings(tmp_path, gradient_accumulation_steps=1, num_generations=4),
        teacher_prompt_template=CONCISE_TEMPLATE,
        keep_shortest=1,
    )
    with same_rollouts(completions):
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **kwargs: [1.0, 0.0, 1.0, 1.0],
        )
        trainer.model.train()
        batch = trainer._generate_and_score_completions([rows[0]] * 4)
    assert batch["kept"].tolist() == [True, False, False, False]


def test_heads_that_differ_in_padding_distil_with_it_masked(tmp_path, small_model, tokenizer, rows, completions):
    """Columns that no token id reaches take no part, whatever a teacher or a student has in them."""
    losses = {}
    for padding in ((0, 0), (7, 0), (3, 9)):
        student, teacher = small_model(0), small_model(1)
        for model, extra in zip((student, teacher), padding, strict=True):
            model.resize_token_embeddings(len(tokenizer) + extra, mean_resizing=False)
            with torch.no_grad():
                model.lm_head.weight[len(tokenizer) :] = 50.0 * torch.randn_like(
                    model.lm_head.weight[len(tokenizer) :]
                )
        tokenizer.save_pretrained(tmp_path / "teacher")
        teacher.config._name_or_path = str(tmp_path / "teacher")
        config = OPSDConfig(**settings(tmp_path, max_steps=1, optim="sgd"), beta=0.5)
        with same_rollouts(completions):
            trainer, recorder = train(
                OPSDTrainer,
                config,
                model=student,
                teacher_model=teacher,
                train_dataset=rows,
                processing_class=tokenizer,
            )
        losses[padding] = recorder.logs[0]["loss"], recorder.logs[0]["grad_norm"]
        assert trainer.teacher.valid_vocab == (None if padding[0] == padding[1] else len(tokenizer))
    assert losses[7, 0] == pytest.approx(losses[0, 0], rel=1e-5)
    assert losses[3, 9] == pytest.approx(losses[0, 0], rel=1e-5)


def test_another_tokenizer_is_refused_with_a_pointer_to_gold(tmp_path, checkpoint, rows):
    student, teacher = checkpoint(0), checkpoint(1)
    other = AutoTokenizer.from_pretrained(teacher)
    other.add_tokens(["hello"])
    other.save_pretrained(teacher)
    with (
        mock.patch("trl_opsd.opsd.teacher.create_model_from_path", side_effect=AssertionError("loaded too early")),
        pytest.raises(ValueError, match="different tokenizers .* GOLDTrainer"),
    ):
        OPSDTrainer(model=student, teacher_model=teacher, args=OPSDConfig(**settings(tmp_path)), train_dataset=rows)


def test_too_long_cuts_the_privileged_text_and_never_the_problem(tmp_path, small_model, tokenizer, rows, caplog):
    example = {**rows[0], "solution": rows[0]["solution"] * 40}
    problem = example["prompt"][0]["content"]
    config = OPSDConfig(**settings(tmp_path, max_teacher_prompt_length=60), teacher_prompt_template=SOLUTION_TEMPLATE)
    trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)
    batch = trainer._tokenize_teacher_prompts([example, rows[0]], [None, None], 12)
    lengths = batch["teacher_prompt_mask"].sum(dim=1).tolist()
    text = tokenizer.decode(batch["teacher_prompt_ids"][0])
    assert lengths[0] == 60 and lengths[1] < 60
    assert text.startswith(f"<|im_start|>user\n{problem} solution {example['solution'][:20]}")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert trainer._metrics["train"]["opsd/privileged_cut"] == [0.5]
    assert "A privileged text was cut to fit 60 tokens" in caplog.text
    trainer.args.max_teacher_prompt_length = 5
    with pytest.raises(ValueError, match="the problem is never cut"):
        trainer._tokenize_teacher_prompts([example], [None], 12)


def test_the_default_limit_leaves_room_for_the_longest_completion(tmp_path, small_model, tokenizer, rows):
    # What counts is not what may be generated but what was
    config = OPSDConfig(**settings(tmp_path, max_completion_length=400), teacher_prompt_template=SOLUTION_TEMPLATE)
    trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)
    example = {**rows[0], "solution": rows[0]["solution"] * 100}
    for completion_length in (12, 400):
        batch = trainer._tokenize_teacher_prompts([example], [None], completion_length)
        assert batch["teacher_prompt_mask"].sum() == 512 - completion_length


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_weights": "live"}, "same in weights and context"),
        ({"teacher_weights": "ema"}, "same in weights and context"),
        ({"teacher_context": "sibling", "num_generations": 4}, "needs a verifier"),
        ({"teacher_context": "concise", "keep_shortest": 1}, "there is no verifier"),
        ({"teacher_context": "concise", "teacher_model_init_kwargs": {"dtype": "float32"}}, "are for an external"),
    ],
)
def test_mistakes(tmp_path, small_model, tokenizer, rows, changes, message):
    with pytest.raises(ValueError, match=message):
        OPSDTrainer(
            model=small_model(0),
            args=OPSDConfig(**settings(tmp_path, **changes)),
            train_dataset=rows,
            processing_class=tokenizer,
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_context": "sibling"}, "`num_generations` is 1: raise it"),
        (
            {"teacher_context": "concise", "sibling_fallback": "answer"},
            "`sibling_fallback` is for the sibling context",
        ),
        ({"teacher_update_rate": 0.0}, "`teacher_update_rate` must be"),
        ({"teacher_sync_steps": 0}, "`teacher_sync_steps` must be"),
        ({"keep_shortest": 0}, "`keep_shortest` must be"),
        ({"max_teacher_prompt_length": 0}, "`max_teacher_prompt_length` must be"),
        ({"teacher_weights": "ema", "teacher_model_name_or_path": "x"}, "contradict each other"),
    ],
)
def test_config_mistakes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(**settings(tmp_path, **changes))


def test_a_teacher_that_keeps_up_is_warned_of(tmp_path, small_model, tokenizer, rows, caplog):
    for changes, warned in (
        ({"teacher_weights": "live"}, True),
        ({"teacher_weights": "snapshot", "teacher_sync_steps": 10}, True),
        ({"teacher_weights": "snapshot"}, False),
        ({"teacher_weights": "initial"}, False),
    ):
        caplog.clear()
        config = OPSDConfig(**settings(tmp_path, **changes), teacher_prompt_template=CONCISE_TEMPLATE)
        OPSDTrainer(model=copy.deepcopy(small_model(0)), args=config, train_dataset=rows, processing_class=tokenizer)
        assert ("keeps up with the student" in caplog.text) == warned, changes
