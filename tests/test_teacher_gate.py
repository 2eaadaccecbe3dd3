"""The teacher's gate: a context is used where the teacher is verified right in it, and nowhere else."""

import itertools
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from test_opsd_probe import sides
from test_opsd_trainer import NoModel, Recorder, reference_loss, same_rollouts, settings
from transformers import AutoTokenizer, TrainerControl, TrainerState

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.compress.bank import main as fill_bank
from trl_opsd.decoding import generate
from trl_opsd.opsd.__main__ import main
from trl_opsd.opsd.alarms import AlarmCallback
from trl_opsd.opsd.batches import unpadded
from trl_opsd.opsd.config import check_arguments
from trl_opsd.opsd.context import TeacherContext
from trl_opsd.opsd.pass_rates import prompt_key
from trl_opsd.opsd.probe import _warnings, probe
from trl_opsd.opsd.teacher_gate import TeacherGate, generate_as
from trl_opsd.rlvr.bank import RolloutBank, prompt_id
from trl_opsd.rlvr.identity import Writer, hash_vocabulary, hash_weights, read_writer
from trl_opsd.tiny.task import BRIEF_TEMPLATE, CONCISE_TEMPLATE


SIBLING_TEMPLATE = "{prompt} solution {sibling}"
WRITE = "trl_opsd.opsd.trainer.generate_as"  # what the teacher writes by


def gate_of(templates, threshold, num_rollouts=4):
    contexts = [TeacherContext(template) for template in templates]
    return TeacherGate(contexts, threshold, num_rollouts, None, None, None, seed=0)


@pytest.mark.parametrize("source", ["measured", "given", "both"])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_choice_is_its_definition(source, threshold):
    """In float64: the first context whose pass rate is at least the threshold; the plain prompt where there is none."""
    draws = np.random.default_rng(0)
    templates = [CONCISE_TEMPLATE, BRIEF_TEMPLATE, "{prompt} answer {answer}"]
    gate, rows, expected = gate_of(templates, threshold), [], []
    for number in range(400):
        rollouts = draws.integers(1, 11, size=3)
        solved = draws.integers(0, rollouts + 1)
        rates = solved.astype(np.float64) / rollouts.astype(np.float64)
        known = draws.random(3) < 0.8
        expected.append(next((i for i in range(3) if known[i] and rates[i] >= np.float64(threshold)), None))
        prompt = [{"role": "user", "content": f"{number}"}]
        is_given = {"measured": np.zeros(3), "given": np.ones(3), "both": draws.random(3) < 0.5}[source]
        counts = [[int(solved[i]), int(rollouts[i])] if known[i] and not is_given[i] else None for i in range(3)]
        given = [float(rates[i]) if known[i] and is_given[i] else None for i in range(3)]
        if any(count is not None for count in counts):
            gate.counts[prompt_key(prompt)] = counts
        rows.append({"prompt": prompt} | ({} if source == "measured" else {"teacher_pass_rates": given}))
    assert [gate.choice(row, None) for row in rows] == expected
    assert len(set(expected)) == 4  # all of them are reached


@pytest.fixture
def world(tokenizer):
    """
    Stands in for what student and teacher write. The student is always right; the teacher is where `right` says, given the
    text of its prompt and how often it has been asked for it before.
    """

    class World:
        right = staticmethod(lambda text, time: True)
        asked = []

        def teacher(self, trainer_teacher, input_ids, attention_mask, generation_config):
            replies = []
            for ids, mask in zip(input_ids, attention_mask, strict=True):
                text = tokenizer.decode(ids[mask.bool()]).split("\n")[1].removesuffix("<|im_end|>")
                reply = "0" if self.right(text, self.asked.count(text)) else "1"
                self.asked.append(text)
                # What stands behind the end belongs to no rollout
                replies.append(torch.tensor([*tokenizer(reply)["input_ids"], tokenizer.eos_token_id, 5]))
            return torch.cat([input_ids, torch.stack(replies)], dim=1)

        @staticmethod
        def verifier(completions, log_metric, log_extra, **kwargs):
            texts = [completion[0]["content"] for completion in completions]
            log_metric("judged", len(texts))
            log_extra("text", texts)
            return [float(text != "1") for text in texts]

    world = World()
    world.asked = []
    generating = mock.patch(WRITE, lambda teacher, *_, **inputs: world.teacher(teacher, **inputs))
    student = [*tokenizer("6 a:-3=3")["input_ids"], tokenizer.eos_token_id]
    with generating, same_rollouts([student]):
        yield world


def build(tmp_path, model, tokenizer, rows, world, template=CONCISE_TEMPLATE, **changes):
    defaults = {"gradient_accumulation_steps": 1, "shuffle_dataset": False, "optim": "sgd", "max_steps": 1}
    defaults |= {"teacher_gate": 0.5, "teacher_prompt_template": template}
    return OPSDTrainer(
        model=model,
        args=OPSDConfig(**settings(tmp_path, **defaults | changes)),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=world.verifier,
        callbacks=[Recorder()],
    )


def texts_of(rows):
    return [row["prompt"][0]["content"] for row in rows]


def seen_by_teacher(tokenizer, batch):
    prompts = unpadded(batch["teacher_prompt_ids"], batch["teacher_prompt_mask"])
    return [tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>") for ids in prompts]


def test_the_context_is_used_where_the_teacher_is_right(tmp_path, small_model, tokenizer, rows, world):
    """In two contexts: on row 0 in the first, on row 1 in the second alone, on row 2 in neither, on row 3 in both."""
    rows = rows.select(range(4))
    plain = texts_of(rows)
    competent = {f"{plain[0]} brief", f"{plain[1]} concise", f"{plain[3]} brief", f"{plain[3]} concise"}
    world.right = lambda text, time: text in competent
    templates = [BRIEF_TEMPLATE, CONCISE_TEMPLATE]
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world, templates, teacher_gate_rollouts=3)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(list(rows))
    assert seen_by_teacher(tokenizer, batch) == [
        f"{plain[0]} brief",
        f"{plain[1]} concise",
        plain[2],
        f"{plain[3]} brief",
    ]
    # Three times each, and in the weaker context only where the stronger one has failed
    brief = [f"{text} brief" for text in plain for _ in range(3)]
    concise = [f"{text} concise" for text in plain[1:3] for _ in range(3)]
    assert world.asked == brief + concise
    metrics = trainer._metrics["train"]
    assert metrics["opsd/context_1"] == [0.5] and metrics["opsd/context_2"] == [0.25]
    assert metrics["opsd/anchored"] == [0.25]
    # Each wrote its reply and the end; what stands behind that is none of it
    assert metrics["opsd/teacher_gate_tokens"] == [2 * len(world.asked)]
    assert metrics["opsd/teacher_gate_seconds"][0] > 0
    # What the verifiers log of the teacher is not logged of the student
    assert (
        metrics["judged"] == [4] and not trainer.rollouts.verifiers.metrics and not trainer.rollouts.verifiers.columns
    )
    assert trainer.teacher_gate.counts == {
        prompt_key(rows[0]["prompt"]): [[3, 3], None],
        prompt_key(rows[1]["prompt"]): [[0, 3], [3, 3]],
        prompt_key(rows[2]["prompt"]): [[0, 3], [0, 3]],
        prompt_key(rows[3]["prompt"]): [[3, 3], None],
    }
    asked = len(world.asked)
    trainer._generate_and_score_completions(list(rows))
    assert len(world.asked) == asked  # known by now


def test_the_loss_is_that_of_the_contexts_chosen(tmp_path, small_model, tokenizer, rows, world):
    rows, model = rows.select(range(4)), small_model(0)
    plain = texts_of(rows)
    world.right = lambda text, time: text.removesuffix(" concise") in plain[:2]
    student = [*tokenizer("6 a:-3=3")["input_ids"], tokenizer.eos_token_id]
    in_context = [True, True, False, False]
    expected = reference_loss(model, model, tokenizer, list(rows), [student] * 4, in_context, CONCISE_TEMPLATE)
    trainer = build(tmp_path, model, tokenizer, rows, world)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected / 2, rel=1e-4)  # an anchor's is zero: the student is where it began
    assert log["opsd/anchored"] == log["opsd/context_1"] == 0.5


@pytest.mark.parametrize("right, template", [(True, CONCISE_TEMPLATE), (False, "{prompt}")])
def test_a_gate_that_is_open_everywhere_is_none(tmp_path, small_model, tokenizer, rows, right, template):
    """Bit for bit: the teacher's own rollouts take no random numbers from the student's. And closed it is the plain prompt."""
    weights = []

    def finished(*arguments, **inputs):
        written = generate_as(*arguments, **inputs)
        written[:, -1] = tokenizer.eos_token_id
        return written

    for gate in (None, 0.5):
        config = OPSDConfig(
            **settings(tmp_path, optim="sgd"),
            teacher_prompt_template=CONCISE_TEMPLATE if gate else template,
            teacher_gate=gate,
            gate="all",
        )
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **kwargs: [float(right)] * len(completions),
        )
        with mock.patch(WRITE, finished):
            trainer.train()
        weights.append(trainer.model.state_dict())
        assert gate is None or trainer.teacher_gate.tokens > 0
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_prompt_is_asked_once_and_only_if_it_is_trained_on(tmp_path, small_model, tokenizer, rows, world):
    rows = rows.select(range(2))
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world, num_generations=2, teacher_gate_rollouts=4)
    trainer.model.train()
    world.right = lambda text, time: time % 2 == 0  # half of them, which is enough
    # Of the first prompt one rollout is correct, of the second none
    with mock.patch.object(
        trainer.rollouts.verifiers,
        "functions",
        [lambda completions, **kwargs: [0.0, 1.0, 0.0, 0.0]],
    ):
        trainer._generate_and_score_completions([rows[0], rows[0], rows[1], rows[1]])
    first = texts_of(rows)[0]
    assert world.asked == [f"{first} concise"] * 4
    world.asked.clear()
    batch = trainer._generate_and_score_completions([rows[0], rows[0], rows[1], rows[1]])
    assert world.asked == [f"{texts_of(rows)[1]} concise"] * 4
    assert [text.endswith("concise") for text in seen_by_teacher(tokenizer, batch)][2:] == [True, True]


@pytest.mark.parametrize("right", [True, False])
def test_with_a_sibling_its_place_is_taken_when_the_teacher_is_asked(
    tmp_path, small_model, tokenizer, rows, world, right
):
    rows = rows.select(range(2))
    world.right = lambda text, time: right
    trainer = build(
        tmp_path, small_model(0), tokenizer, rows, world, SIBLING_TEMPLATE, num_generations=2, teacher_gate_rollouts=2
    )
    trainer.model.train()

    def judge(completions, **kwargs):
        # Of the second prompt one alone is correct: it has no sibling
        texts = [completion[0]["content"] for completion in completions]
        return [float(text != "1") for text in texts] if len(texts) == 2 else [1.0, 1.0, 1.0, 0.0]

    with mock.patch.object(trainer.rollouts.verifiers, "functions", [judge]):
        batch = trainer._generate_and_score_completions([rows[0], rows[0], rows[1], rows[1]])
    one, two = texts_of(rows)
    assert world.asked == [f"{one} solution 6 a:-3=3"] * 2
    in_context = f"{one} solution 6 a:-3=3" if right else one
    assert seen_by_teacher(tokenizer, batch)[:3] == [in_context, in_context, two]
    assert batch["kept"].tolist() == [True, True, True, False]  # without a sibling it is an anchor, and not dropped


@pytest.mark.parametrize("quantile", [None, 0.9])
def test_the_teacher_may_write_as_long_as_ever(tmp_path, small_model, tokenizer, rows, world, quantile):
    """A limit that follows the student's rollouts is not the teacher's."""
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world, completion_limit_quantile=quantile)
    if quantile is not None:  # as it has been set for the student's rollouts
        trainer.generation_config.max_new_tokens = trainer.generation_kwargs["max_new_tokens"] = 2
    with mock.patch(WRITE, side_effect=lambda *_, **inputs: inputs["input_ids"]) as generated:
        trainer._write_as_teacher(list(rows.select(range(2))), [None] * 2, trainer.teacher_gate.contexts[0])
    assert generated.call_args.kwargs["generation_config"].max_new_tokens == trainer.args.max_completion_length


def test_pass_rates_of_the_data_come_first(tmp_path, small_model, tokenizer, rows, world):
    rows = rows.select(range(4)).add_column("teacher_pass_rates", [[1.0], [0.4], None, [None]])
    plain = texts_of(rows)
    for rollouts, asked, seen in ((None, [], 1), (1, [f"{text} concise" for text in plain[2:]], 3)):
        trainer = build(tmp_path, small_model(0), tokenizer, rows, world, teacher_gate_rollouts=rollouts)
        trainer.model.train()
        batch = trainer._generate_and_score_completions(list(rows))
        assert world.asked == asked
        in_context = [text.endswith("concise") for text in seen_by_teacher(tokenizer, batch)]
        assert sum(in_context) == seen and in_context[:2] == [True, False]
        assert ("opsd/teacher_gate_tokens" in trainer._metrics["train"]) == (rollouts is not None)


def test_refilled_and_skipped_prompts_are_those_that_the_teacher_is_asked(
    tmp_path, small_model, tokenizer, rows, world
):
    rows = rows.select(range(6))
    trainer = build(
        tmp_path, small_model(0), tokenizer, rows, world, max_generation_rounds=2, max_pass_rate=0.9,
        pass_rate_rollouts=1, teacher_gate_rollouts=1,
    )  # fmt: skip
    trainer.model.train()
    tries = itertools.count()

    def judge(completions, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        if any(text in ("0", "1") for text in texts):
            return [1.0] * len(texts)  # the teacher's
        return [1.0, 1.0, 1.0, 0.0] if next(tries) == 0 else [1.0] * len(texts)

    with mock.patch.object(trainer.rollouts.verifiers, "functions", [judge]):
        batch = trainer._generate_and_score_completions([rows[i] for i in range(4)])
        assert batch["kept"].all() and sorted(world.asked) == sorted(f"{text} concise" for text in texts_of(rows)[:4])
        world.asked.clear()
        # The first three are always solved by now, and others stand in for them
        batch = trainer._generate_and_score_completions([rows[i] for i in range(4)])
    assert trainer._metrics["train"]["opsd/skipped"][-1] == 0.75
    known = {f"{text} concise" for text in texts_of(rows)[:4]}
    assert set(world.asked) == set(seen_by_teacher(tokenizer, batch)) - known != set()


@pytest.mark.parametrize("teacher", ["initial", "lora", "ema", "snapshot, lora", "live", "external"])
def test_the_teachers_weights_write(tmp_path, small_model, tokenizer, rows, teacher):
    """Greedy: what it writes is what a model with its weights writes, whatever the student has become."""
    weights, _, lora = teacher.partition(", ")
    options = {"peft_config": LoraConfig(r=4, init_lora_weights=True)} if "lora" in (weights, lora) else {}
    weights = "initial" if weights == "lora" else weights
    trainer = OPSDTrainer(
        model=small_model(0),
        teacher_model=small_model(1) if weights == "external" else None,
        args=OPSDConfig(
            **settings(tmp_path, max_completion_length=24, generation_kwargs={"do_sample": False}),
            teacher_weights=weights,
            teacher_update_rate=0.5,
            teacher_prompt_template=CONCISE_TEMPLATE,
            teacher_gate=0.5,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        **options,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and "opsd_teacher" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    if trainer.teacher.follows_student:
        trainer.teacher.move(0.5 if weights == "ema" else 1.0)
    expected = {"initial": small_model(0), "external": small_model(1)}.get(weights)
    if weights == "ema":
        expected = small_model(0)
        with torch.no_grad():
            for name, parameter in expected.named_parameters():
                parameter.lerp_(trainer.model.state_dict()[name], 0.5)
    elif expected is None:
        expected = trainer.model  # as it is: copied, or live
    trainer.model.train()
    context = trainer.teacher_gate.contexts[0]
    batch = list(rows.select(range(5)))
    written = trainer._write_as_teacher(batch, [None] * 5, context)
    assert trainer.model.training and len(set(map(tuple, written))) > 1
    expected.eval()
    for row, ids in zip(batch, written, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{row['prompt'][0]['content']} concise"}],
            add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        reply = generate(expected, **prompt, do_sample=False, max_new_tokens=24, eos_token_id=tokenizer.eos_token_id)
        reply = reply[0, prompt["input_ids"].size(1) :].tolist()
        assert ids == reply
    if weights != "live":
        student = trainer.model if "peft_config" in options or weights != "initial" else trainer.model
        assert weights == "snapshot" or written != [
            generate(student.eval(), **prompt, do_sample=False, max_new_tokens=24)[
                0, prompt["input_ids"].size(1) :
            ].tolist()
        ]


def test_a_resumed_run_goes_on_as_it_would_have(tmp_path, small_model, tokenizer, rows, world):
    world.right = lambda text, time: len(text) % 2 == 0
    rows = rows.select(range(16))
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    runs = []
    for checkpoint in (None, tmp_path / "out" / "checkpoint-4"):
        world.asked.clear()
        trainer = build(tmp_path, small_model(0), tokenizer, rows, world, **options)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        runs.append((trainer.model.state_dict(), trainer.teacher_gate.counts, trainer.teacher_gate.tokens))
        anchored = [log["opsd/anchored"] for log in trainer.state.log_history if "loss" in log]
        assert 0 < sum(anchored) < len(anchored)
        if checkpoint is None:
            assert len(world.asked) == 4 * 16  # four for each prompt, in the four steps that one pass takes
    assert world.asked == []  # the second pass asks nothing again, and nor does who goes on in it
    whole, resumed = runs
    assert all(torch.equal(whole[0][name], value) for name, value in resumed[0].items())
    assert whole[1:] == resumed[1:]
    other = build(tmp_path, small_model(0), tokenizer, rows, world, BRIEF_TEMPLATE, **options)
    with pytest.raises(ValueError, match="measured the teacher in the contexts .*concise.* and this run has .*brief"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "teacher_gate.json").unlink()
    with pytest.raises(ValueError, match="has no teacher_gate.json"):
        build(tmp_path, small_model(0), tokenizer, rows, world, **options).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_a_batch_of_anchors_alone_is_no_alarm_but_a_run_of_them_is(tmp_path, small_model, tokenizer, rows, world):
    plain = texts_of(rows)
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "weight_decay": 0.0}
    # In the first step nothing but anchors, whose divergence is zero
    world.right = lambda text, time: text.removesuffix(" concise") not in plain[:8]
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world, **options)
    alarms = AlarmCallback(trainer)
    trainer.add_callback(alarms)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["opsd/anchored"] for log in logs] == [1.0, 0.0, 0.0, 0.0] and alarms.stopped_by is None
    assert logs[0]["opsd/kl"] < 1e-9 < logs[1]["opsd/kl"]
    world.right = lambda text, time: False
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world, **options)
    alarms = AlarmCallback(trainer)
    alarms.window = 3
    trainer.add_callback(alarms)
    trainer.train()
    assert trainer.state.global_step == 3 and "in none of its contexts was the teacher right" in alarms.stopped_by


# The probe


@pytest.mark.parametrize("column", ["num_ops", "length", None])
def test_the_probe_sees_where_the_teacher_fails(tmp_path, small_model, tokenizer, rows, column, caplog):
    """The student is right everywhere, in the context on problems of up to three operations."""
    of_each = [[index for index, n in enumerate(rows["num_ops"]) if n == number][:6] for number in range(1, 7)]
    rows = rows.select([index for same in of_each for index in same])
    rows = rows.add_column("length", [100 * number + index for index, number in enumerate(rows["num_ops"])])
    num_ops = dict(zip(texts_of(rows), rows["num_ops"], strict=True))

    def generate(self, prompt_ids, *args):
        texts = [tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>") for ids in prompt_ids]
        replies = []
        for text in texts:
            number = num_ops[text.removesuffix(" concise")]
            reply = "1" if text.endswith("concise") and number > 3 else "0" * number
            replies.append([*tokenizer(reply)["input_ids"], tokenizer.eos_token_id])
        return replies

    trainer = OPSDTrainer(
        model=small_model(0),
        args=OPSDConfig(**settings(tmp_path, per_device_eval_batch_size=5), teacher_prompt_template=CONCISE_TEMPLATE),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **kwargs: [
            float(completion[0]["content"] != "1") for completion in completions
        ],
    )
    with mock.patch("trl.DistillationTrainer._generate_single_turn", generate):
        found = probe(trainer, 36, difficulty=column)
    groups = found["by_difficulty"]
    assert sum(group["num_prompts"] for group in groups) == 36
    assert all(group["student"]["correct"] == 1.0 for group in groups)
    if column == "num_ops":
        assert [group["group"] for group in groups] == [f"`num_ops` {number}" for number in range(1, 7)]
        assert [group["contexts"][0]["correct"] for group in groups] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        assert [group["student"]["tokens"] for group in groups] == [2, 3, 4, 5, 6, 7]
        assert [group["num_prompts"] for group in groups] == [6] * 6
    else:
        which = (
            ("shortest third", "longest third") if column is None else ("lowest third of `length`", "highest third")
        )
        assert groups[0]["group"].startswith(which[0]) and groups[2]["group"].startswith(which[1])
        assert [groups[i]["contexts"][0]["correct"] for i in (0, 2)] == [1.0, 0.0]
        assert [group["num_prompts"] for group in groups] == [12, 12, 12]
    hidden = [warning for warning in found["warnings"] if "set `teacher_gate`" in warning]
    assert len(hidden) == 1 and "right in 100% of the" in hidden[0] and "and in 0% of the" in hidden[0]


def test_the_probe_warns_where_the_mean_hides_a_part():
    def found(*shares, number=11):
        result = sides(0.98, 60.0, 0.95, 20.0)
        result["by_difficulty"] = [
            {
                "group": f"group {index}",
                "num_prompts": number,
                "student": {"correct": 0.98, "tokens": 60.0},
                "contexts": [{"correct": share, "tokens": 20.0}],
            }
            for index, share in enumerate(shares)
        ]
        return result

    (warning,) = _warnings(found(0.97, 0.6, 0.18))
    assert "right in 97% of the group 0, and in 18% of the group 2" in warning and "98% without it" in warning
    assert _warnings(found(0.97, 0.96, 0.9)) == []  # within the error of so few
    assert _warnings(found(0.1, 0.1, 0.1)) == []  # nothing is hidden: it fails everywhere
    assert _warnings(found(0.97, 0.6, 0.18), is_gated=True) == [] == _warnings(found(0.18))


def test_the_probe_does_not_ask_the_gate(tmp_path, small_model, tokenizer, rows, world):
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world, per_device_eval_batch_size=4)
    gate = trainer.teacher_gate
    found = probe(trainer, 6)
    assert trainer.teacher_gate is gate and gate.counts == {} and world.asked == []
    assert found["teacher"]["kl"] > 0  # in the context, and not on the plain prompt
    assert len(found["by_difficulty"]) == 3


# Errors before a model is loaded


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"teacher_gate": None}, "`teacher_prompt_template` has 2 contexts, and which of them"),
        (
            {"teacher_gate": None, "teacher_gate_rollouts": 4, "teacher_prompt_template": CONCISE_TEMPLATE},
            "is not set",
        ),
        ({"teacher_gate": 0.0}, "a pass rate above 0 and at most 1, and is 0.0"),
        ({"teacher_gate": 1.5}, "a pass rate above 0 and at most 1, and is 1.5"),
        ({"teacher_gate_rollouts": -1}, "must be at least 0"),
        ({"teacher_prompt_template": None}, "decides on which prompts the teacher's context is used, and it has none"),
        ({"teacher_prompt_template": [CONCISE_TEMPLATE] * 2}, "has a context twice"),
        ({"teacher_context": "concise"}, "both set, and one of them is an order of preference"),
        ({"teacher_context": ["answer", "brief"], "teacher_prompt_template": None}, "and is 'brief': for wording"),
        (
            {"teacher_prompt_template": SIBLING_TEMPLATE, "num_generations": 2, "sibling_fallback": "concise"},
            "teacher_context: \\[sibling, concise\\]",
        ),
        ({"reward_funcs": None}, "needs a verifier to say where the teacher is right"),
        ({"teacher_gate_rollouts": 0}, "measures nothing, and the training data has no pass rates"),
        ({"use_vllm": True}, "which `use_vllm` excludes: fill a rollout bank"),
        ({"tools": [print]}, "which `tools` excludes"),
        ({"rates": [[0.5]]}, "row 0 is \\[0.5\\]: it must have .* for each of the teacher's 2 contexts"),
        ({"rates": [[0.5, 1.5]]}, "row 0 is \\[0.5, 1.5\\]"),
    ],
)
def test_combinations_that_say_nothing_are_refused(tmp_path, rows, changes, message):
    changes = dict(changes)
    kwargs = {"reward_funcs": changes.pop("reward_funcs", len), "tools": changes.pop("tools", None)}
    rates = changes.pop("rates", None)
    if rates is not None:
        rows = Dataset.from_list([{**row, "teacher_pass_rates": rates[0]} for row in rows])
    defaults = {"teacher_prompt_template": [BRIEF_TEMPLATE, CONCISE_TEMPLATE], "teacher_gate": 0.5}
    with pytest.raises(ValueError, match=message):
        config = OPSDConfig(**settings(tmp_path, **defaults | changes))
        OPSDTrainer(model=NoModel(), args=config, train_dataset=rows, **kwargs)


def test_evaluation_is_not_on_the_plain_prompt_alone(tmp_path, rows):
    """With pass rates for the training data alone the lowest loss would be that of the untrained student."""
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE, teacher_gate=0.5)
    rated = Dataset.from_list([{**row, "teacher_pass_rates": [0.5]} for row in rows])
    for held_out in (rows, {"known": rated, "unknown": rows}):
        with pytest.raises(ValueError, match="the evaluation data has no column `teacher_pass_rates`"):
            check_arguments(config, "model", None, rated, held_out, [len])
    wrong = Dataset.from_list([{**row, "teacher_pass_rates": [0.5, 0.5]} for row in rows])
    with pytest.raises(ValueError, match="row 0 is \\[0.5, 0.5\\]"):
        check_arguments(config, "model", None, rated, wrong, [len])
    check_arguments(config, "model", None, rated, {"known": rated}, [len])
    config.teacher_gate_rollouts = 2
    check_arguments(config, "model", None, rated, rows, [len])


def test_one_context_is_as_simple_as_it_was(tmp_path):
    for value in ("concise", ["concise"]):
        config = OPSDConfig(**settings(tmp_path), teacher_context=value)
        assert config.teacher_context == "concise" and len(config.build_teacher_contexts()) == 1
    config = OPSDConfig(**settings(tmp_path), teacher_context=["answer", "concise"], teacher_gate=0.5)
    assert [context.fields for context in config.build_teacher_contexts()] == [{"answer"}, set()]
    assert OPSDConfig(**settings(tmp_path), teacher_context=["none"]).teacher_context is None


# The command line


def test_a_resumed_run_knows_of_earlier_batches_in_context(tmp_path, small_model, tokenizer, rows, world):
    """A batch of anchors alone, the first one after resuming, says nothing of those before."""
    trainer = build(tmp_path, small_model(0), tokenizer, rows, world)
    batch = {"completions/mean_length": 9.0, "completions/clipped_ratio": 0.0, "opsd/correct": 1.0, "opsd/kept": 1.0}
    for share, stops in ((0.5, False), (1.0, True)):
        alarms = AlarmCallback(trainer)
        alarms.window = 3
        log = {**batch, "opsd/kl": 1.0 - share, "opsd/anchored": share, "step": 10}
        state = TrainerState(global_step=10, log_history=[log])
        alarms.on_train_begin(trainer.args, state, TrainerControl())
        state.global_step = 11
        last = {**batch, "opsd/kl": 0.0, "opsd/anchored": 1.0}
        alarms.on_log(trainer.args, state, TrainerControl(), logs=last)
        assert (alarms.stopped_by is not None) == stops


@pytest.fixture
def command(tmp_path, checkpoint, rows, monkeypatch, capsys):
    """Runs a recipe with banks of the teacher's, up to the trainer, and returns what that is given, or the error."""
    model = checkpoint()
    rows.select(range(8)).to_json(tmp_path / "train.jsonl")

    def bank(name, template, correct, weights=None):
        writer = Writer(
            "writer", weights or hash_weights(model), hash_vocabulary(AutoTokenizer.from_pretrained(model)), template
        )
        attempts = {prompt_id(row["prompt"]): (4, number) for row, number in zip(rows, correct, strict=False)}
        RolloutBank(tmp_path / name, 1, writer).add(0, [], attempts)
        return str(tmp_path / name)

    def run(*words, **changes):
        config = {
            "model_name_or_path": model,
            "dataset_name": str(tmp_path / "train.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "teacher_prompt_template": [BRIEF_TEMPLATE, CONCISE_TEMPLATE],
            "teacher_gate": 0.5,
            "reward_funcs": ["math_reward"],
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "max_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        given = []

        def trainer(**kwargs):
            given.append(kwargs)
            raise SystemExit(0)

        monkeypatch.setattr("trl_opsd.opsd.run.OPSDTrainer", trainer)
        with pytest.raises(SystemExit) as end:
            main(["--config", str(path), *words])
        output = capsys.readouterr()
        return (given[0], output.out) if given else (end.value.code, output.err.strip().splitlines()[-1])

    run.bank = bank
    return run


def test_banks_of_the_teachers_give_the_pass_rates(command, rows):
    brief, concise = (
        command.bank("brief", BRIEF_TEMPLATE, [4, 1, 0, 0]),
        command.bank("concise", CONCISE_TEMPLATE, [0, 2]),
    )
    given, printed = command(teacher_bank=[concise, brief])
    expected = [[1.0, 0.0], [0.25, 0.5], [0.0, None], [0.0, None], *([[None, None]] * 4)]
    assert given["train_dataset"]["teacher_pass_rates"] == expected
    assert "of 8 prompts the banks know 4; 1 have context 1, 1 have context 2, 6 the plain prompt" in printed
    assert given["args"].resolve_teacher_gate_rollouts(given["train_dataset"].column_names) == 0
    given, _ = command(teacher_bank=brief, teacher_prompt_template=BRIEF_TEMPLATE, teacher_gate_rollouts=2)
    assert given["train_dataset"]["teacher_pass_rates"][1] == [0.25]
    assert given["args"].resolve_teacher_gate_rollouts(given["train_dataset"].column_names) == 2


def test_banks_that_say_nothing_of_the_teacher_are_refused(command, tmp_path):
    concise = command.bank("concise", CONCISE_TEMPLATE, [0, 2])
    plain = command.bank("plain", None, [4])
    other = command.bank("other", CONCISE_TEMPLATE, [4], weights="9" * 64)
    again = command.bank("again", CONCISE_TEMPLATE, [4])
    elsewhere = str(tmp_path / "elsewhere")
    writer = Writer("me", hash_weights(str(tmp_path / "model-0-0")), "2" * 64, CONCISE_TEMPLATE)
    RolloutBank(elsewhere, 1, writer).add(0, [], {"another prompt": (4, 4)})
    for changes, words in (
        (
            {"teacher_bank": [concise], "teacher_gate": None, "teacher_prompt_template": CONCISE_TEMPLATE},
            "nothing asks",
        ),
        ({"teacher_bank": [str(tmp_path / "nowhere")]}, "There is no rollout bank at"),
        ({"teacher_bank": [plain]}, "the teacher's contexts are"),
        ({"teacher_bank": [other]}, "another model is right elsewhere"),
        ({"teacher_bank": [concise, again]}, "Two of `teacher_bank`"),
        ({"teacher_bank": [elsewhere]}, "have none of the prompts"),
        ({"probe_difficulty": "depth"}, "`probe_difficulty` needs the column `depth`"),
    ):
        status, error = command(**changes)
        assert status == 2 and words in error, (changes, error)


def test_banks_speak_of_the_evaluation_data_too(command, tmp_path, rows):
    (tmp_path / "data").mkdir()
    rows.select(range(6)).to_json(tmp_path / "data" / "train.jsonl")
    rows.select(range(6, 8)).to_json(tmp_path / "data" / "test.jsonl")
    options = {"dataset_name": str(tmp_path / "data"), "eval_strategy": "steps", "eval_steps": 1}
    both = command.bank("both", CONCISE_TEMPLATE, [4, 1, 0, 0, 0, 0, 3])
    given, printed = command(teacher_bank=both, **options)
    assert given["eval_dataset"]["teacher_pass_rates"] == [[None, 0.75], [None, None]]
    assert "of 6 prompts the banks know 6" in printed and "of 2 prompts the banks know 1" in printed
    trained_on = command.bank("trained_on", CONCISE_TEMPLATE, [4, 1])
    status, error = command(teacher_bank=trained_on, **options)
    assert status == 2 and "the evaluation data has no column `teacher_pass_rates`" in error
    given, _ = command(teacher_bank=trained_on, teacher_gate_rollouts=2, **options)  # measured there in the run
    assert "teacher_pass_rates" not in given["eval_dataset"].column_names


@pytest.mark.parametrize("value", ["concise", ["answer", "concise"]])
def test_contexts_are_one_or_several_in_the_file_and_behind_the_option(command, monkeypatch, value):
    """One in a file may stand without brackets; the option takes as many words as there are."""
    # The tiny reasoner's tokenizer has no words for the contexts of real models
    monkeypatch.setattr("trl_opsd.opsd.run.check_templates", lambda *args: None)
    words = ["--teacher_context", *([value] if isinstance(value, str) else value)]
    for given, _ in (
        command(teacher_prompt_template=None, teacher_context=value),
        command(*words, teacher_prompt_template=None),
        command(*words, teacher_prompt_template=None, teacher_context="sibling"),
    ):
        assert given["args"].teacher_context == value


def test_a_bank_says_what_it_was_asked_in(command, tmp_path, rows):
    """The command that fills it and the one that takes it agree on model, prompts and context."""
    bank = str(tmp_path / "filled")
    fill_bank(
        ["--model_name_or_path", str(tmp_path / "model-0-0"), "--dataset_name", str(tmp_path / "train.jsonl")]
        + ["--dataset_split", "train", "--reward_funcs", "math_reward", "--prompt_template", CONCISE_TEMPLATE]
        + ["--max_completion_length", "4", "--rollouts_per_prompt", "2", "--max_samples", "4", "--bank", bank]
        + ["--output", f"{bank}.json"]
    )
    assert read_writer(bank).context == CONCISE_TEMPLATE
    given, _ = command(teacher_bank=[bank])
    known = [rates for _, rates in given["train_dataset"]["teacher_pass_rates"] if rates is not None]
    assert len(known) == 4 and set(known) <= {0.0, 0.5, 1.0}
    status, error = command(teacher_bank=[bank], teacher_prompt_template=BRIEF_TEMPLATE)
    assert status == 2 and f"asked in `{CONCISE_TEMPLATE}`" in error
    # And what is asked in another way is another bank
    plain = Writer("me", read_writer(bank).weights, read_writer(bank).vocabulary)
    with pytest.raises(ValueError, match="their rollouts are not mixed"):
        RolloutBank(bank, 1, plain)


def test_what_is_saved_is_json(tmp_path):
    gate = gate_of([CONCISE_TEMPLATE], 0.5)
    gate.counts, gate.tokens, gate.seconds = {"a": [[3, 4]], "b": [None]}, 17, 0.25
    gate.save(str(tmp_path))
    other = gate_of([CONCISE_TEMPLATE], 0.5)
    other.load(str(tmp_path))
    assert other.state_dict() == gate.state_dict() == json.loads((tmp_path / "teacher_gate.json").read_text())


def test_the_recipes_of_the_world_differ_from_those_of_the_default_where_they_say():
    def of(name):
        return yaml.safe_load((Path(__file__).parents[1] / "recipes" / "tiny" / f"{name}.yaml").read_text())

    changed = {
        "sft": {"short_ways_max_ops"},
        "rlvr": set(),
        "opsd": {"teacher_gate", "teacher_gate_rollouts", "probe_prompts", "probe_difficulty"},
    }
    chain = of("competence_compress")
    for stage, keys in changed.items():
        default, own = of(stage), of(f"competence_{stage}")
        paths = {"output_dir", "model_name_or_path", "dataset_name"} & own.keys()
        assert {key for key in default | own if default.get(key) != own.get(key)} == keys | paths
        assert all(own[path].startswith("runs/tiny_competence/") for path in paths)
        assert chain[stage] == f"recipes/tiny/competence_{stage}.yaml"
    assert chain["prompt_only_template"] == of("competence_opsd")["teacher_prompt_template"] == CONCISE_TEMPLATE
