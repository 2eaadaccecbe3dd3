"""The probe measures what it says, and leaves no trace."""

import pytest
import torch
from test_opsd_trainer import reference_loss, same_rollouts, settings, train

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.__main__ import main
from trl_opsd.opsd.probe import _warnings, probe
from trl_opsd.tiny.task import CONCISE_TEMPLATE, SOLUTION_TEMPLATE


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def test_the_numbers_are_those_of_the_rollouts(tmp_path, small_model, tokenizer, rows, completions):
    model = small_model(0)
    completions[3] = completions[3][:-1]  # truncated, so not correct whatever the verifier says
    config = OPSDConfig(
        **settings(tmp_path, per_device_eval_batch_size=4), teacher_prompt_template=SOLUTION_TEMPLATE, beta=0.0
    )

    def verifier(prompts, completions, **kwargs):
        # In the teacher's context one more is right
        in_context = "solution" in prompts[0][0]["content"]
        return [1.0, float(in_context), 0.0, 1.0]

    with same_rollouts(completions):
        trainer = OPSDTrainer(
            model=model, args=config, train_dataset=rows, processing_class=tokenizer, reward_funcs=verifier
        )
        found = probe(trainer, 8)
    tokens = sum(map(len, completions)) / 4
    assert found["student"] == {"correct": 0.25, "tokens": tokens, "truncated": 0.25}
    assert found["prompt_only"] == {"correct": 0.5, "tokens": tokens, "truncated": 0.25}
    sample = list(rows.shuffle(seed=config.seed))[:8]
    expected = reference_loss(
        model, model, tokenizer, sample, [*completions, *completions], [True] * 8, SOLUTION_TEMPLATE, beta=0.0
    )
    assert found["teacher"]["kl"] == pytest.approx(expected, rel=1e-4)
    # One quarter after the other: each is the reference on a completion that is that quarter of a trace of four tokens
    with same_rollouts([tokenizer("1234")["input_ids"]]):
        found = probe(trainer, 8)
    by_part = found["teacher"]["kl_by_part"]
    assert len(set(by_part)) == 4 and sum(by_part) / 4 == pytest.approx(found["teacher"]["kl"], rel=1e-5)
    first = reference_loss(
        model, model, tokenizer, sample, [tokenizer("1")["input_ids"]] * 8, [True] * 8, SOLUTION_TEMPLATE, beta=0.0
    )
    assert by_part[0] == pytest.approx(first, rel=1e-4)


def test_a_run_after_the_probe_is_the_run_without_it(tmp_path, small_model, tokenizer, rows):
    weights = []
    for with_probe in (False, True):
        config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE)
        trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)
        if with_probe:
            probe(trainer, 6)
            assert not trainer._metrics["eval"] and not trainer._metrics["train"]
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_what_has_no_number_is_none(tmp_path, small_model, tokenizer, rows):
    teacher = small_model(1)
    config = OPSDConfig(**settings(tmp_path))
    trainer = OPSDTrainer(
        model=small_model(0), teacher_model=teacher, args=config, train_dataset=rows, processing_class=tokenizer
    )
    with same_rollouts([[tokenizer.eos_token_id]]):  # one token has no second quarter
        assert [value is None for value in probe(trainer, 4)["teacher"]["kl_by_part"]] == [False, True, True, True]
    with torch.no_grad():
        trainer.teacher_model.lm_head.weight.fill_(torch.nan)
    found = probe(trainer, 4)
    assert found["teacher"]["kl"] is None and "not finite" in found["warnings"][0]


def test_without_a_context_there_is_no_prompt_only(tmp_path, small_model, tokenizer, rows):
    trainer, _ = train(
        OPSDTrainer,
        OPSDConfig(**settings(tmp_path, max_steps=1)),
        model=small_model(0),
        teacher_model=small_model(1),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    found = probe(trainer, 4)
    assert found["prompt_only"] is None and found["student"]["correct"] is None
    assert found["teacher"]["kl"] > 0 and found["warnings"] == []


def sides(student_correct, student_tokens, context_correct, context_tokens, kl=0.1, num_prompts=100):
    return {
        "num_prompts": num_prompts,
        "student": {"correct": student_correct, "tokens": student_tokens},
        "prompt_only": {"correct": context_correct, "tokens": context_tokens},
        "by_difficulty": [],
        "teacher": {"kl": kl},
    }


@pytest.mark.parametrize(
    "result, words",
    [
        (sides(0.9, 100.0, 0.89, 40.0), []),
        (sides(0.9, 100.0, 0.5, 40.0), ["worse: 50% correct in it, 90% without"]),
        (sides(0.9, 100.0, 0.8, 40.0, num_prompts=10), []),  # within the error of so few
        (sides(0.9, 100.0, 0.95, 99.0), ["no shorter: 99 tokens in it, 100 without"]),
        (sides(0.9, 100.0, 0.9, 40.0, kl=0.0), ["nothing can be learned"]),
        (sides(0.9, 100.0, 0.9, 40.0, kl=None), ["not finite"]),
    ],
)
def test_warnings_name_the_number(result, words):
    found = _warnings(result)
    assert len(found) == len(words) and all(word in warning for word, warning in zip(words, found, strict=True))


def test_probe_only_from_the_command_line(tmp_path, checkpoint, rows, capsys):
    rows.to_json(tmp_path / "train.jsonl")
    options = {
        "model_name_or_path": checkpoint(),
        "dataset_name": tmp_path / "train.jsonl",
        "output_dir": tmp_path / "out",
        "teacher_prompt_template": CONCISE_TEMPLATE,
        "max_completion_length": 8,
        "probe_only": True,
        "probe_prompts": 8,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    out = capsys.readouterr().out
    assert "probe, student:" in out and "nats per token (by quarter of the trace:" in out
    assert (tmp_path / "out" / "probe.json").is_file()
    assert not (tmp_path / "out" / "config.json").exists()

    # What trains another model into that folder without a probe leaves none that speaks of this one
    options |= {"probe_only": False, "probe_prompts": 0, "gate": "all", "max_steps": 1, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    assert (tmp_path / "out" / "config.json").is_file()
    assert not [*(tmp_path / "out").glob("probe.*")]
