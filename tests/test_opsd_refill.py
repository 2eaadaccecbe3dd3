"""Rejected rollouts are written again, and prompts that are always or never solved are not asked any more."""

import json
from collections import defaultdict
from unittest import mock

import pytest
import torch
from datasets import Dataset
from test_opsd_trainer import NoModel, Recorder, reference_loss, settings
from trl import DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.pass_rates import PassRates, prompt_key
from trl_opsd.tiny.task import CONCISE_TEMPLATE


SIBLING_TEMPLATE = "{prompt} solution {sibling}"


class Script:
    """
    Stands in for sampling: the answer of a row in a round is a text of its own, `<row> a:+0` in the first, and longer with
    every round. The verifier passes the rows of a round that the test names.
    """

    def __init__(self, tokenizer, rows, passing, unfinished=()):
        self.tokenizer, self.passing, self.unfinished = tokenizer, passing, unfinished
        # Rows may have the same prompt: then they are asked in their order
        self.index = defaultdict(list)
        for i, example in enumerate(rows):
            self.index[example["prompt"][0]["content"]].append(i)
        self.asked = []

    def ids(self, row, number):
        ids = self.tokenizer(f"{row} a:" + "+0" * number)["input_ids"]
        return ids if (row, number) in self.unfinished else [*ids, self.tokenizer.eos_token_id]

    def generate(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        self.asked.append([])
        number = len(self.asked)
        for ids in prompt_ids:
            text = self.tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>")
            candidates = [row for row in self.index[text] if row not in self.asked[-1]]
            self.asked[-1].append(candidates[0])
        return [self.ids(row, number) for row in self.asked[-1]]

    def verifier(self, completions, log_extra, log_metric, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        log_extra("text", texts)
        log_metric("plus", sum(text.count("+") for text in texts))
        return [float((int(text.split()[0]), text.count("+")) in self.passing) for text in texts]


def build(tmp_path, model, tokenizer, rows, script, **changes):
    defaults = {"gradient_accumulation_steps": 1, "shuffle_dataset": False, "optim": "sgd", "max_steps": 1}
    defaults["teacher_prompt_template"] = CONCISE_TEMPLATE
    config = OPSDConfig(**settings(tmp_path, **defaults | changes))
    mock.patch.object(DistillationTrainer, "_generate_single_turn", lambda self, *args: script.generate(*args)).start()
    trainer = OPSDTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=script.verifier,
        callbacks=[Recorder()],
    )
    trainer.model.train()
    return trainer


@pytest.fixture(autouse=True)
def unpatched():
    yield
    mock.patch.stopall()


def rollouts(batch):
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]


def test_a_rejected_slot_takes_the_first_rollout_that_passes(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    # Row 0 passes at once, 1 in the third round, 2 never, 3 in the second. Row 0 would pass again, and is not asked
    passing = {(0, 1), (0, 2), (1, 3), (3, 2)}
    script = Script(tokenizer, rows, passing)
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, max_generation_rounds=3)
    batch = trainer._generate_and_score_completions(list(rows))
    assert script.asked == [[0, 1, 2, 3], [1, 2, 3], [1, 2]]
    final = [script.ids(0, 1), script.ids(1, 3), script.ids(2, 1), script.ids(3, 2)]
    assert rollouts(batch) == final
    assert batch["kept"].tolist() == [True, True, False, True]
    assert batch["num_items_in_batch"] == sum(len(final[row]) for row in (0, 1, 3))
    assert batch["completion_ids"].shape == batch["completion_mask"].shape == (4, len(final[1]))
    assert (batch["completion_ids"][batch["completion_mask"] == 0] == tokenizer.pad_token_id).all()

    metrics = trainer._metrics["train"]
    assert metrics["opsd/generation_rounds"] == [3] and metrics["opsd/kept"] == [0.75]
    # Of the first round: one of four was right, and its completions are as long as they were
    assert metrics["opsd/correct"] == metrics["reward"] == metrics["rewards/verifier/mean"] == [0.25]
    assert metrics["plus"] == [4]
    assert metrics["completions/mean_length"] == [len(script.ids(0, 1))]
    # But what was generated was paid for in all of them
    prompts = [int(mask.sum()) for mask in batch["prompt_mask"]]
    paid = sum(
        prompts[row] + len(script.ids(row, number))
        for number, asked in enumerate(script.asked, start=1)
        for row in asked
    )
    assert trainer.state.num_input_tokens_seen == paid and metrics["num_tokens"] == [paid]


def test_rounds_end_when_nothing_is_rejected(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    script = Script(tokenizer, rows, {(0, 1), (1, 1), (2, 2), (3, 1)})
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, max_generation_rounds=9)
    batch = trainer._generate_and_score_completions(list(rows))
    assert script.asked == [[0, 1, 2, 3], [2]] and batch["kept"].all()
    assert trainer._metrics["train"]["opsd/generation_rounds"] == [2]


def test_an_unfinished_rollout_is_asked_again(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    passing = {(row, number) for row in range(4) for number in (1, 2, 3)}
    script = Script(tokenizer, rows, passing, unfinished={(1, 1), (1, 2)})
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, max_generation_rounds=3)
    batch = trainer._generate_and_score_completions(list(rows))
    assert script.asked == [[0, 1, 2, 3], [1], [1]]
    assert rollouts(batch)[1] == script.ids(1, 3) and batch["kept"].all()


@pytest.mark.parametrize("gate, again", [("correct", [1, 2]), ("incorrect", [0])])
def test_what_the_gate_rejects_is_asked_again(tmp_path, small_model, tokenizer, rows, gate, again):
    """Row 2 is judged by no one, so neither gate trains on it."""
    rows = rows.select(range(3))
    script = Script(tokenizer, rows, {(0, 1)})
    judged = script.verifier
    script.verifier = lambda **kwargs: [
        None if completion[0]["content"].startswith("2") else reward
        for completion, reward in zip(kwargs["completions"], judged(**kwargs), strict=True)
    ]
    changes = {"per_device_train_batch_size": 3, "max_generation_rounds": 2, "gate": gate}
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, **changes)
    trainer._generate_and_score_completions(list(rows))
    assert script.asked[1] == (again if gate == "correct" else [0, 2])


def test_the_loss_is_that_of_the_rollouts_that_were_kept(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    script = Script(tokenizer, rows, {(0, 1), (1, 3), (3, 2)})
    model = small_model(0)
    final = [script.ids(0, 1), script.ids(1, 3), script.ids(2, 1), script.ids(3, 2)]
    kept = [True, True, False, True]
    expected = reference_loss(model, model, tokenizer, list(rows), final, kept, CONCISE_TEMPLATE)
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_generation_rounds": 3}
    trainer = build(tmp_path, model, tokenizer, rows, script, **changes)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected, rel=1e-4)
    assert log["opsd/correct"] == 0.25 and log["opsd/kept"] == 0.75 and log["opsd/generation_rounds"] == 3


def test_keep_shortest_chooses_after_the_last_round(tmp_path, small_model, tokenizer, rows):
    rows = Dataset.from_list([rows[0]] * 4)
    # Row 3 fails first. The longer ones that keep_shortest leaves out were not rejected, so they are not asked again
    script = Script(tokenizer, rows, {(0, 1), (1, 1), (2, 1), (3, 2)})
    lengths = {0: 5, 1: 4, 2: 3, 3: 2}
    script.ids = lambda row, number: (
        tokenizer(f"{row} a:" + "+0" * number + "1" * lengths[row])["input_ids"] + [tokenizer.eos_token_id]
    )
    changes = {"num_generations": 4, "max_generation_rounds": 5, "keep_shortest": 2}
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, **changes)
    # In the second round the one that is asked is row 3, whatever the order of rows with one prompt
    script.generate = mock.Mock(side_effect=[[script.ids(row, 1) for row in range(4)], [script.ids(3, 2)]])
    batch = trainer._generate_and_score_completions(list(rows))
    assert [len(call.args[0]) for call in script.generate.call_args_list] == [4, 1]
    assert batch["kept"].tolist() == [False, False, True, True]


def test_siblings_are_those_of_the_last_round(tmp_path, small_model, tokenizer, rows):
    rows = Dataset.from_list([rows[0]] * 2)
    script = Script(tokenizer, rows, {(0, 2), (1, 2)})
    changes = {"per_device_train_batch_size": 2, "num_generations": 2, "max_generation_rounds": 2}
    changes["teacher_prompt_template"] = SIBLING_TEMPLATE
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, **changes)
    batch = trainer._generate_and_score_completions(list(rows))
    assert batch["kept"].all() and rollouts(batch) == [script.ids(0, 2), script.ids(1, 2)]
    teachers = tokenizer.batch_decode(batch["teacher_prompt_ids"])
    assert "solution 1 a:+0+0<" in teachers[0] and "solution 0 a:+0+0<" in teachers[1]


def test_what_the_verifier_logs_goes_with_the_rollout(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    script = Script(tokenizer, rows, {(0, 1), (1, 2), (2, 3)})
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, max_generation_rounds=3, log_completions=True)
    trainer._generate_and_score_completions(list(rows))
    logged = list(trainer.rollout_log.rollouts["train"].values())
    assert [rollout.extra["text"] for rollout in logged] == ["0 a:+0", "1 a:+0+0", "2 a:+0+0+0", "3 a:+0"]
    assert [rollout.completion for rollout in logged] == ["0 a:+0", "1 a:+0+0", "2 a:+0+0+0", "3 a:+0"]
    assert [rollout.rewards["reward"] for rollout in logged] == [1.0, 1.0, 1.0, 0.0]


def test_an_evaluation_asks_once(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    script = Script(tokenizer, rows, {(0, 1)})
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, max_generation_rounds=3, min_pass_rate=0.5)
    trainer.model.eval()
    trainer._generate_and_score_completions(list(rows))
    assert len(script.asked) == 1 and trainer.rollouts.pass_rates.counts == {}


@pytest.fixture
def finished(tokenizer):
    """Real sampling, with every completion brought to an end."""
    sample = DistillationTrainer._generate_single_turn

    def generate(self, *args, **kwargs):
        return [[*ids[:-1], tokenizer.eos_token_id] for ids in sample(self, *args, **kwargs)]

    mock.patch.object(DistillationTrainer, "_generate_single_turn", generate).start()


def test_with_sampling_more_is_kept(tmp_path, small_model, tokenizer, rows, finished):
    """About half of what the untrained model writes passes, and the share of that does not depend on the rounds."""
    shares = {}
    for rounds in (1, 4):
        config = OPSDConfig(
            **settings(
                tmp_path, max_steps=6, learning_rate=0.0, max_completion_length=4, max_generation_rounds=rounds
            ),
            teacher_prompt_template=CONCISE_TEMPLATE,
        )
        trainer = OPSDTrainer(
            model=small_model(0),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=lambda completion_ids, **kwargs: [float(sum(ids) % 2 == 0) for ids in completion_ids],
        )
        trainer.train()
        logs = trainer.state.log_history[:6]
        shares[rounds] = [sum(log[name] for log in logs) / 6 for name in ("opsd/kept", "opsd/correct")]
    assert shares[1][0] == shares[1][1] < 0.7
    assert shares[4][0] > 0.85 and shares[4][1] < 0.7


# Pass rates


def run(tmp_path, model, tokenizer, rows, solved, resume=None, **changes):
    """Trains with real sampling; `solved` says which prompts are. Returns the trainer and the prompts of each step."""

    def verifier(prompts, completions, trainer_state, **kwargs):
        if trainer_state.global_step == len(steps):
            steps.append([])
        texts = [prompt[0]["content"] for prompt in prompts]
        steps[-1] += texts
        return [solved(text, len(steps), i) for i, text in enumerate(texts)]

    steps = [] if resume is None else [[]] * int(resume.split("-")[-1])
    defaults = {"gradient_accumulation_steps": 1, "gate": "all", "shuffle_dataset": False, "max_completion_length": 4}
    config = OPSDConfig(**settings(tmp_path, **defaults | changes), teacher_prompt_template=CONCISE_TEMPLATE)
    trainer = OPSDTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, reward_funcs=verifier
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, steps


@pytest.mark.parametrize(
    "bounds, skipped", [({"min_pass_rate": 0.01}, 0), ({"max_pass_rate": 0.99}, 3), ({"min_pass_rate": 0.6}, None)]
)
def test_a_prompt_is_skipped_once_its_rate_is_known(tmp_path, small_model, tokenizer, rows, finished, bounds, skipped):
    """Four prompts, all in every batch, two rollouts each: one never solved, two by half, one always."""
    rows = rows.select(range(4))
    texts = [example["prompt"][0]["content"] for example in rows]
    reward = {0: (0.0, 0.0), 1: (1.0, 0.0), 2: (0.0, 1.0), 3: (1.0, 1.0)}
    trainer, steps = run(
        tmp_path,
        small_model(0),
        tokenizer,
        rows,
        lambda text, step, i: reward[texts.index(text)][i % 2],
        per_device_train_batch_size=8,
        num_generations=2,
        pass_rate_rollouts=4,
        max_steps=4,
        **bounds,
    )
    expected = [text for text in texts for _ in range(2)]
    assert steps[0] == steps[1] == expected
    gone = {0, 1, 2} if skipped is None else {skipped}
    for prompts in steps[2:]:
        assert len(prompts) == 8 and prompts[::2] == prompts[1::2]  # whole groups
        for slot in range(4):
            if slot not in gone:
                assert prompts[2 * slot] == texts[slot]
        assert not {texts[i] for i in gone} & set(prompts)
    logs = trainer.state.log_history[:4]
    assert [log.get("opsd/skipped") for log in logs] == [0, 0, len(gone) / 4, len(gone) / 4]
    # The student is as good as it was, whoever is asked
    assert [log["opsd/correct"] for log in logs] == [0.5] * 4
    counted = sum(rollouts for _, rollouts in trainer.rollouts.pass_rates.counts.values())
    assert counted == 4 * 8


def test_only_the_first_round_counts_for_the_pass_rate(tmp_path, small_model, tokenizer, rows):
    rows = rows.select(range(4))
    script = Script(tokenizer, rows, {(0, 1), (1, 3), (3, 2)})
    trainer = build(tmp_path, small_model(0), tokenizer, rows, script, max_generation_rounds=3, min_pass_rate=0.01)
    trainer._generate_and_score_completions(list(rows))
    keys = [prompt_key(example["prompt"]) for example in rows]
    assert trainer.rollouts.pass_rates.counts == dict(zip(keys, [[1, 1], [0, 1], [0, 1], [0, 1]], strict=True))


def test_resuming_goes_on_with_the_same_prompts_and_counts(tmp_path, small_model, tokenizer, rows, finished):
    rows = rows.select(range(8))
    texts = [example["prompt"][0]["content"] for example in rows]
    changes = {"per_device_train_batch_size": 8, "num_generations": 2, "pass_rate_rollouts": 2}
    changes |= {"min_pass_rate": 0.4, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    changes |= {"lr_scheduler_type": "constant"}

    def solved(text, step, i):
        return float(texts.index(text) % 3 > 0)

    straight, steps = run(tmp_path / "a", small_model(0), tokenizer, rows, solved, **changes)
    run(tmp_path / "b", small_model(0), tokenizer, rows, solved, **{**changes, "max_steps": 4})
    folder = tmp_path / "b" / "out" / "checkpoint-4"
    assert not list(folder.glob("*.tmp"))
    saved = json.loads((folder / "pass_rates.json").read_text())
    assert saved["position"] > 0
    resumed, rest = run(tmp_path / "b", small_model(0), tokenizer, rows, solved, resume=str(folder), **changes)
    assert rest[4:] == steps[4:] and len(rest) == 8
    assert resumed.rollouts.pass_rates.state_dict() == straight.rollouts.pass_rates.state_dict()
    assert straight.rollouts.pass_rates.position > saved["position"]
    for name, value in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)

    (folder / "pass_rates.json").unlink()
    with pytest.raises(ValueError, match="has no pass_rates.json"):
        run(tmp_path / "b", small_model(0), tokenizer, rows, solved, resume=str(folder), **changes)


def test_when_every_prompt_is_skipped_the_run_says_so(tmp_path, small_model, tokenizer, rows, finished):
    changes = {"per_device_train_batch_size": 8, "pass_rate_rollouts": 1, "min_pass_rate": 0.01, "max_steps": 5}
    with pytest.raises(RuntimeError, match="No prompt is left to ask: all 8 of the training set .* Widen the two"):
        run(tmp_path, small_model(0), tokenizer, rows.select(range(8)), lambda *args: 0.0, **changes)


def test_substitutes_come_in_an_order_of_their_own():
    prompts = [f"prompt {i}" for i in range(10)]
    rates = PassRates(prompts, 0.5, None, 1, seed=0)
    first, second = ([rates.substitute() for _ in prompts] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != list(range(10))
    assert first != torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()  # the sampler's order
    other = PassRates(prompts, 0.5, None, 1, seed=1)
    assert [other.substitute() for _ in prompts] != first
    # A rate is known from `num_rollouts` on, and the bounds themselves are not skipped
    key = prompt_key(prompts[0])
    for counts, rate in (([0, 0], None), ([1, 2], None), ([1, 3], 1 / 3), ([0, 1], 0.0)):
        rates.counts[key] = counts
        assert rates.skipped_rate(key) == rate
    rates.max_rate = 0.75
    for counts, rate in (([3, 4], None), ([4, 5], 0.8)):
        rates.counts[key] = counts
        assert rates.skipped_rate(key) == rate


# Mistakes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_generation_rounds": 0}, "`max_generation_rounds` must be at least 1, and is 0"),
        ({"pass_rate_rollouts": 0}, "`pass_rate_rollouts` must be at least 1, and is 0"),
        ({"min_pass_rate": 0.0}, "`min_pass_rate` must be above 0"),
        ({"min_pass_rate": 1.5}, "`min_pass_rate` must be above 0 and at most 1, and is 1.5"),
        ({"min_pass_rate": float("nan")}, "`min_pass_rate` must be"),
        ({"max_pass_rate": 1.0}, "`max_pass_rate` must be at least 0 and below 1"),
        ({"max_pass_rate": -0.1}, "`max_pass_rate` must be at least 0"),
        ({"min_pass_rate": 0.8, "max_pass_rate": 0.2}, "every prompt would be skipped"),
        ({"max_generation_rounds": 2, "lmbda": 0.0}, "`lmbda=0.0` generates nothing"),
        ({"max_pass_rate": 0.9, "lmbda": 0.0}, "`lmbda=0.0` generates nothing"),
        ({"min_pass_rate": 0.1, "remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_config_mistakes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        OPSDConfig(**settings(tmp_path, **changes))


def verifier(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "changes, kwargs, message",
    [
        ({"max_generation_rounds": 2}, {}, "`gate='all'` rejects none"),
        ({"max_generation_rounds": 2, "gate": "all"}, {"reward_funcs": verifier}, "`gate='all'` rejects none"),
        ({"max_generation_rounds": 2}, {"reward_funcs": verifier, "tools": [verifier]}, "drop the tools"),
        (
            {"max_generation_rounds": 2, "gate": "incorrect", "teacher_context": "sibling", "num_generations": 2},
            {"reward_funcs": verifier},
            "that the sibling context lives on",
        ),
        ({"min_pass_rate": 0.1}, {}, "`min_pass_rate` needs a verifier"),
        ({"max_pass_rate": 0.9}, {}, "`max_pass_rate` needs a verifier"),
        ({"max_pass_rate": 0.9}, {"reward_funcs": verifier, "streaming": True}, "without streaming"),
    ],
)
def test_mistakes_end_before_a_model_is_loaded(tmp_path, rows, changes, kwargs, message):
    config = OPSDConfig(**settings(tmp_path, **{"teacher_context": "concise", **changes}))
    dataset = rows.to_iterable_dataset() if kwargs.pop("streaming", False) else rows
    with (
        mock.patch("trl_opsd.opsd.teacher.create_model_from_path", NoModel()),
        mock.patch("trl.trainer.distillation_trainer.create_model_from_path", NoModel()),
        pytest.raises(ValueError, match=message),
    ):
        OPSDTrainer(model="same", args=config, train_dataset=dataset, **kwargs)
