"""Micro-batches under a budget of tokens: the same numbers, fewer tokens computed, every process as busy as the others."""

import math
import random
import sys
from unittest import mock

import pytest
import torch
from test_opsd_trainer import reward_by_length, same_rollouts, settings, train

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.batches import balanced_length, micro_batches, token_budget_batches
from trl_opsd.tiny.task import CONCISE_TEMPLATE


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


# Drawn by the standard library, because TRL's tests have no hypothesis
@pytest.mark.parametrize("seed", range(100))
def test_every_rollout_once_under_the_budget_and_as_many_micro_batches_on_each_process(seed):
    drawn = random.Random(seed)
    lengths = [drawn.randint(1, 500) for _ in range(drawn.randint(0, 60))]
    budget, processes = drawn.choice([drawn.randint(1, 60), drawn.randint(1, 2000)]), drawn.randint(1, 8)
    steps = token_budget_batches(lengths, budget, processes)
    batches = [batch for step in steps for batch in step]
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(step) == processes for step in steps)
    for batch in batches:
        assert len(batch) <= 1 or len(batch) * max(lengths[row] for row in batch) <= budget
    # Empty ones are few, and only there because no other can be divided
    empty = batches.count([])
    assert empty < processes and (empty == 0 or max(map(len, batches)) == 1)


def test_processes_work_on_about_as_many_tokens_at_a_time():
    generator = torch.Generator().manual_seed(0)
    lengths = (200 * torch.randn(512, generator=generator).exp()).clamp(20, 4000).int().tolist()  # long-tailed
    steps = token_budget_batches(lengths, 8192, 4)
    areas = [[len(batch) * max(lengths[row] for row in batch) for batch in step] for step in steps]
    busy = sum(map(sum, areas)) / sum(4 * max(area) for area in areas)
    padding = 1 - sum(lengths) / sum(map(sum, areas))
    assert busy > 0.9 and padding < 0.1
    # What accumulation steps of four rollouts for each process pay for: each forward as wide as its longest rollout
    padded = sum(4 * max(lengths[start : start + 4]) for start in range(0, 512, 4))
    assert 1 - sum(lengths) / padded > 0.4


def test_the_last_micro_batches_are_not_half_empty():
    """Few rollouts on several processes: filled up to the budget, a third of the time would be waited and padded away."""
    shares = {"in step": [], "in all": [], "of the budget": []}
    for seed in range(50):
        spread = torch.randn(32, generator=torch.Generator().manual_seed(seed)).mul(0.9).exp()
        lengths = (1500 * spread).clamp(16, 8192).int().tolist()
        steps = token_budget_batches(lengths, 20480, 4)
        areas = [[len(batch) * max(lengths[row] for row in batch) for batch in step] for step in steps]
        shares["in step"].append(
            sum(lengths) / sum(4 * max(area) for area in areas)
        )  # all wait for the slowest (FSDP)
        shares["in all"].append(sum(lengths) / (4 * max(map(sum, zip(*areas, strict=True)))))  # at the end only (DDP)
        shares["of the budget"].append(max(map(max, areas)) / 20480)
        filled = math.ceil(count_filled(lengths, 20480) / 4)
        assert len(steps) == filled
    assert {name: sum(values) / 50 for name, values in shares.items()} == {
        "in step": pytest.approx(0.78, abs=0.02),
        "in all": pytest.approx(0.82, abs=0.02),
        "of the budget": pytest.approx(0.66, abs=0.03),
    }


@pytest.mark.parametrize("seed", range(100))
def test_one_process_pays_for_no_more_padding_than_by_filling_up(seed):
    drawn = random.Random(seed)
    lengths = [drawn.randint(1, 500) for _ in range(drawn.randint(1, 60))]
    budget = drawn.choice([drawn.randint(1, 60), drawn.randint(1, 2000)])
    batches = [batch for step in token_budget_batches(lengths, budget) for batch in step]
    computed = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    filled, rest = 0, sorted(lengths, reverse=True)
    while rest:
        size = min(max(budget // rest[0], 1), len(rest))
        filled, rest = filled + size * rest[0], rest[size:]
    assert computed <= filled


def count_filled(lengths: list[int], budget: int) -> int:
    """Micro-batches of rollouts of similar length, each filled as far as it goes."""
    count, width, rows = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        if rows == 0 or (rows + 1) * width > budget:
            count, width, rows = count + 1, length, 0
        rows += 1
    return count


@pytest.mark.parametrize("gate", ["correct", "incorrect", "all"])
@pytest.mark.parametrize("budget", [1, 70, 150, 100_000])
def test_the_same_step_under_every_budget(tmp_path, small_model, tokenizer, rows, completions, gate, budget):
    runs, forwards = [], []
    hidden = OPSDTrainer._get_last_hidden_state

    def record(self, model, input_ids, attention_mask, *args):
        forwards.append((*input_ids.shape, self.args.max_tokens_per_microbatch))
        return hidden(self, model, input_ids, attention_mask, *args)

    for max_tokens in (None, budget):
        config = OPSDConfig(
            **settings(tmp_path, optim="sgd", max_steps=2),
            gate=gate,
            teacher_prompt_template=CONCISE_TEMPLATE,
            max_tokens_per_microbatch=max_tokens,
        )
        with same_rollouts(completions), mock.patch.object(OPSDTrainer, "_get_last_hidden_state", record):
            runs.append(
                train(
                    OPSDTrainer,
                    config,
                    model=small_model(0),
                    train_dataset=rows,
                    processing_class=tokenizer,
                    reward_funcs=reward_by_length(5),
                )[1]
            )
    padded, budgeted = runs
    for name, value in padded.weights[-1].items():
        torch.testing.assert_close(budgeted.weights[-1][name], value, rtol=1e-4, atol=1e-6)
    for theirs, ours in zip(padded.logs[:2], budgeted.logs[:2], strict=True):
        for key in ("loss", "grad_norm", "opsd/kept", "opsd/kl", "opsd/student_entropy", "opsd/top1_agreement"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        assert theirs["num_tokens"] == ours["num_tokens"]
    sizes = [(height, width) for height, width, max_tokens in forwards if max_tokens is not None]
    assert all(height == 1 or height * width <= budget for height, width in sizes)
    kept = {"correct": 12, "incorrect": 4, "all": 16}[gate]
    assert sum(height for height, _ in sizes) == 2 * kept  # student and teacher, two steps of eight rollouts
    forwards_expected = {1: 2 * kept, 100_000: 4}
    assert len(sizes) == forwards_expected.get(budget, len(sizes))


def test_nothing_kept_leaves_the_weights_alone(tmp_path, small_model, tokenizer, rows, completions):
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=CONCISE_TEMPLATE, max_tokens_per_microbatch=100)
    model = small_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with same_rollouts(completions):
        _, recorder = train(
            OPSDTrainer,
            config,
            model=model,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=reward_by_length(99),
        )
    assert all(torch.equal(before[name], value) for name, value in recorder.weights[-1].items())
    assert [log["loss"] for log in recorder.logs[:3]] == [0.0] * 3


def test_without_a_verifier_all_rollouts_are_dealt_out(tmp_path, small_model, tokenizer, rows, completions):
    losses = []
    for max_tokens in (None, 60):
        model = small_model(0).eval()  # as `from_pretrained` leaves it
        config = OPSDConfig(**settings(tmp_path, max_steps=1), max_tokens_per_microbatch=max_tokens)
        with (
            same_rollouts(completions),
            mock.patch.object(sys.modules[OPSDTrainer.__module__], "micro_batches", wraps=micro_batches) as dealing,
        ):
            _, recorder = train(
                OPSDTrainer,
                config,
                model=model,
                teacher_model=small_model(1),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        losses.append(recorder.logs[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    # By what the attention of the model costs, too, which no number that is trained on shows
    assert dealing.call_args.args[1:] == (60, 1, 0, balanced_length(model.config))


def test_a_fixed_shape_and_a_budget_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="`max_tokens_per_microbatch` pads as little .* `pad_to_multiple_of`"):
        OPSDConfig(**settings(tmp_path), max_tokens_per_microbatch=64, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="`max_tokens_per_microbatch` must be at least 1"):
        OPSDConfig(**settings(tmp_path), max_tokens_per_microbatch=0)


def test_long_rollouts_are_dealt_out_by_what_attention_costs():
    """Eight processes, rollouts of up to 32k tokens: how much longer a step takes than if nobody waited for anybody."""
    over = {"tokens": [], "cost": []}
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        lengths = (8.5 + 0.9 * torch.randn(256, generator=draw)).exp().clamp(200, 32_768).int().tolist()
        cost = [length + length**2 / 27_000 for length in lengths]

        def seconds(rows, lengths=lengths, cost=cost):
            return len(rows) * max((cost[row] for row in rows), default=0)

        for name, balanced in (("tokens", math.inf), ("cost", 27_000)):
            steps = token_budget_batches(lengths, 32_768, 8, balanced)
            assert sorted(row for step in steps for rows in step for row in rows) == list(range(256))
            waited = sum(max(map(seconds, step)) for step in steps)
            over[name].append(waited / (sum(cost) / 8) - 1)
    assert max(over["cost"]) < 0.15 and sum(over["cost"]) < 0.75 * sum(over["tokens"]), over


def test_the_length_at_which_attention_costs_as_much_as_the_rest():
    """Counted by torch: of a model at that length, half of the products (with causal skipping) are attention's."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, vocab_size=128, max_position_embeddings=2048,
    )  # fmt: skip
    length = round(balanced_length(config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, length, dtype=torch.long))
    flops = counter.get_flop_counts()["Global"]
    by_kind = {str(name): count for name, count in flops.items()}
    attention = sum(count for name, count in by_kind.items() if "bmm" in name)
    assert attention / 2 == pytest.approx(sum(by_kind.values()) - attention, rel=0.05)
