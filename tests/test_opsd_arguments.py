"""What cannot work is said in one sentence, before a model is loaded wherever no model is needed to know it."""

from unittest import mock

import pytest
import torch
from datasets import Dataset
from test_opsd_trainer import NoModel, same_rollouts, settings
from transformers import BloomConfig, BloomForCausalLM
from trl import DistillationConfig

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.config import check_text_only
from trl_opsd.tiny.task import CONCISE_TEMPLATE


def verifier(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keep_shortest": 3, "num_generations": 2}, "`keep_shortest=3` is more than there are rollouts"),
        ({"generation_kwargs": {"stop": ["###"]}}, "`generation_kwargs` has `stop`"),
        ({"generation_kwargs": {"stop_strings": ["###"]}}, "`generation_kwargs` has `stop_strings`"),
        ({"generation_kwargs": {"stop_token_ids": [5]}}, "`generation_kwargs` has `stop_token_ids`"),
        ({"generation_kwargs": {"seed": 1}}, "writes the rollouts of a prompt all alike"),
        (
            {"teacher_context": "solution", "teacher_prompt_template": CONCISE_TEMPLATE},
            "has nothing of that context: drop one of the two, or put {solution} into the template",
        ),
        ({"teacher_context": "concise", "teacher_prompt_template": CONCISE_TEMPLATE}, "drop one of the two\\."),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(**settings(tmp_path, **changes))


def test_a_template_may_be_the_wording_of_a_context(tmp_path):
    config = OPSDConfig(
        **settings(tmp_path), teacher_context="solution", teacher_prompt_template="{prompt} See {solution}"
    )
    assert [context.template for context in config.build_teacher_contexts()] == ["{prompt} See {solution}"]


@pytest.mark.parametrize(
    "changes, kwargs, message",
    [
        (
            {"remove_unused_columns": True, "teacher_prompt_template": None},
            {"reward_funcs": verifier, "teacher_model": "t"},
            "that `reward_funcs` read",
        ),
        ({"lmbda": 0.5}, {"tools": [print]}, "with `tools` one is written turn by turn"),
        ({"lmbda": 0.5}, {"completion_ids": []}, "it is empty in row 3"),
        (
            {"lmbda": 0.5},
            {"completion_ids": [5] * 13},
            "1 of 64 completions of the data set are longer than `max_comp",
        ),
    ],
)
def test_arguments_that_contradict_each_other(tmp_path, rows, changes, kwargs, message):
    kwargs = dict(kwargs)
    if changes.get("lmbda"):
        given = [[5, 6]] * len(rows)
        given[3] = kwargs.pop("completion_ids", [5])
        rows = rows.add_column("completion_ids", given)
    config = OPSDConfig(**settings(tmp_path, **{"teacher_prompt_template": CONCISE_TEMPLATE} | changes))
    with mock.patch("trl.trainer.distillation_trainer.create_model_from_path", NoModel()):
        with mock.patch("trl_opsd.opsd.teacher.create_model_from_path", NoModel()):
            with pytest.raises(ValueError, match=message):
                OPSDTrainer(model="student", args=config, train_dataset=rows, **kwargs)


def test_the_configuration_of_the_base_class_is_refused_by_name(tmp_path, rows):
    with pytest.raises(ValueError, match="`args` is a DistillationConfig, and OPSDTrainer takes an OPSDConfig"):
        OPSDTrainer(model="s", teacher_model="t", args=DistillationConfig(**settings(tmp_path)), train_dataset=rows)


def test_a_prompt_of_the_teachers_own_is_text(tmp_path):
    config = OPSDConfig(**settings(tmp_path), teacher_chat_template_kwargs={"hint": True})
    with pytest.raises(ValueError, match="`teacher_chat_template_kwargs` give the teacher a prompt of its own"):
        check_text_only(config)


def build(tmp_path, model, tokenizer, rows, teacher_model=None, reward_funcs=None, **changes):
    template = None if teacher_model is not None else CONCISE_TEMPLATE
    config = OPSDConfig(**settings(tmp_path, **{"teacher_prompt_template": template} | changes))
    return OPSDTrainer(
        model=model,
        teacher_model=teacher_model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward_funcs,
    )


def test_a_problem_that_does_not_fit_is_found_before_training(tmp_path, small_model, tokenizer, rows):
    rows = rows.to_list()
    rows[5]["prompt"] = [{"role": "user", "content": rows[5]["prompt"][0]["content"] * 40}]
    with pytest.raises(ValueError, match=r"In 1 of 64 rows .* longer than 60 tokens .*the first is row 5"):
        build(tmp_path, small_model(0), tokenizer, Dataset.from_list(rows), max_teacher_prompt_length=60)


def test_a_completion_has_positions(tmp_path, small_model, tokenizer, rows):
    with pytest.raises(ValueError, match="leaves no room for a prompt in the 512 positions"):
        build(tmp_path, small_model(0), tokenizer, rows, max_completion_length=512)


def test_scaled_positions_are_the_teachers_too(tmp_path, small_model, tokenizer, rows):
    student = small_model(0)
    student.config.rope_parameters = {
        **student.config.rope_parameters,
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    }
    trainer = build(tmp_path, student, tokenizer, rows, max_completion_length=512)
    assert trainer._max_teacher_prompt(512) == 4 * 512 - 512


def test_a_model_without_positions_has_no_limit(tmp_path, tokenizer, rows):
    """Also where the teacher's prompt is long: there is nothing that it has to be cut to."""
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2, eos_token_id=tokenizer.eos_token_id
    )
    trainer = build(tmp_path, BloomForCausalLM(config), tokenizer, rows, gate="all", max_steps=1)
    assert trainer._max_teacher_prompt(12) is None
    trainer.train()
    assert trainer.state.log_history[0]["opsd/privileged_cut"] == 0


def test_a_budget_below_one_rollout_is_said(tmp_path, small_model, tokenizer, rows, caplog):
    build(tmp_path, small_model(0), tokenizer, rows, max_tokens_per_microbatch=11)
    assert "`max_tokens_per_microbatch=11` is below `max_completion_length=12`" in caplog.text


# -- how a rollout ends


def test_a_teacher_that_ends_where_the_student_does_not_is_refused(tmp_path, small_model, tokenizer, rows):
    teacher = small_model(1)
    teacher.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    with pytest.raises(ValueError, match=r"The teacher ends in the token 7 .* and the student does not"):
        build(tmp_path, small_model(0), tokenizer, rows, teacher_model=teacher)
    student = small_model(0)
    student.generation_config.eos_token_id = [7]
    build(tmp_path, student, tokenizer, rows, teacher_model=teacher)


def test_a_template_that_ends_in_another_token_is_warned_of(tmp_path, small_model, tokenizer, rows, caplog):
    import copy

    build(tmp_path, small_model(0), tokenizer, rows)
    assert "The chat template ends" not in caplog.text
    other = copy.deepcopy(tokenizer)
    other.eos_token = "9"
    student = small_model(0)
    student.generation_config.eos_token_id = None
    build(tmp_path, student, other, rows)
    assert "The chat template ends an answer in" in caplog.text and "rollouts may never end" in caplog.text


# -- prompts that are plain text


def test_plain_strings_skip_the_chat_template_and_it_is_said(tmp_path, small_model, tokenizer, rows, caplog):
    build(tmp_path, small_model(0), tokenizer, rows)
    assert "plain strings" not in caplog.text
    plain = Dataset.from_list([{**row, "prompt": row["prompt"][0]["content"]} for row in rows])
    build(tmp_path, small_model(0), tokenizer, plain)
    assert "The prompts are plain strings, so the chat template" in caplog.text


# -- what verifiers get


def test_what_verifiers_log_is_the_mean_over_processes(tmp_path, small_model, tokenizer, rows):
    """Each process has values of its own: those of the others are gathered."""
    trainer = build(tmp_path, small_model(0), tokenizer, rows, reward_funcs=logging_verifier)
    completions = [tokenizer("5")["input_ids"] + [tokenizer.eos_token_id]]
    gathered = [{"share": [1.0]}, {"share": [0.0, 0.0]}]
    with same_rollouts(completions), mock.patch("trl_opsd.opsd.rollouts.gather_object", lambda values: gathered):
        trainer.model.train()
        trainer._generate_and_score_completions(list(rows)[:4])
    assert trainer._metrics["train"]["share"] == [pytest.approx(1 / 3)]


def logging_verifier(completions, log_metric, **kwargs):
    log_metric("share", 1.0)
    return [1.0] * len(completions)


def test_with_tools_verifiers_get_messages_as_grpos_do(tmp_path, small_model, tokenizer, rows):
    """What a tool answered and what was written after it are turns of their own."""
    trainer = build(tmp_path, small_model(0), tokenizer, rows, reward_funcs=verifier)
    turns = [
        [
            {"role": "assistant", "content": "a"},
            {"role": "tool", "name": "f", "content": "1"},
            {"role": "assistant", "content": "b"},
        ]
    ] * 4
    seen = []
    trainer.rollouts.verifiers.functions = [lambda completions, **kwargs: seen.extend(completions) or [1.0] * 4]
    trainer.tools = [print]
    trainer.rollouts.messages = turns
    batch = {
        "completion_ids": torch.ones(4, 2, dtype=torch.long),
        "completion_mask": torch.ones(4, 2, dtype=torch.long),
    }
    trainer.rollouts._generate = lambda rows: {**batch, "tool_mask": torch.ones(4, 2, dtype=torch.long)}
    trainer.rollouts.collect(list(rows)[:4], trainer.state, is_training=True)
    assert seen == turns
