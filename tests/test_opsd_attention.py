"""
The same step whatever computes attention: eager, SDPA, FlexAttention and FlashAttention-2 under a budget of tokens, against
the padded batches of SDPA.
"""

from unittest import mock

import pytest
import torch
from test_opsd_trainer import reward_by_length, same_rollouts, settings, train
from transformers import MistralConfig, MistralForCausalLM

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny.task import SOLUTION_TEMPLATE


def step(tmp_path, model, tokenizer, rows, completions, budget, **changes):
    config = OPSDConfig(
        **settings(tmp_path, optim="sgd", max_steps=2, **changes),
        teacher_prompt_template=SOLUTION_TEMPLATE,  # rows differ in length before the completion too
        max_tokens_per_microbatch=budget,
    )
    with same_rollouts(completions):
        return train(
            OPSDTrainer,
            config,
            model=model,
            train_dataset=rows,
            processing_class=tokenizer,
            reward_funcs=reward_by_length(5),
        )


def assert_same_step(ours, theirs, rtol=1e-4, atol=2e-6):
    assert 0 < theirs.logs[0]["opsd/kept"] < 1
    for our_log, their_log in zip(ours.logs[:2], theirs.logs[:2], strict=True):
        for key in ("loss", "grad_norm", "opsd/kl", "opsd/student_entropy", "opsd/teacher_entropy"):
            assert our_log[key] == pytest.approx(their_log[key], rel=10 * rtol, abs=atol), key
    for before, after in zip(theirs.weights, ours.weights, strict=True):
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=rtol, atol=atol)


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5 c:+1=6", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


@pytest.mark.parametrize("budget", [None, 130])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_same_step(tmp_path, small_model, tokenizer, rows, completions, implementation, budget):
    padded = step(tmp_path, small_model(0), tokenizer, rows, completions, None)[1]
    model = small_model(0)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(implementation)
    trainer, ours = step(tmp_path, model, tokenizer, rows, completions, budget)
    assert {m.config._attn_implementation for m in (trainer.model, trainer.teacher_model)} == {implementation}
    assert_same_step(ours, padded)


@pytest.mark.slow  # compiles for a minute
def test_flex_attention_scores_the_same(tmp_path, small_model, tokenizer, rows, completions):
    """On a CPU FlexAttention has no backward: what the step computes before it."""
    measured = []
    for implementation in ("sdpa", "flex_attention"):
        model = small_model(0)
        model.set_attn_implementation(implementation)
        config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=SOLUTION_TEMPLATE, gate="all")
        trainer = OPSDTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
        with same_rollouts(completions), torch.no_grad():
            batch = trainer._generate_and_score_completions([rows[index] for index in range(4)])
            tokens, valid = trainer._compute_divergence(trainer.model, batch)
        assert valid.sum() == len(tokens.divergence) < valid.numel()
        measured.append(tokens.divergence)
    torch.testing.assert_close(measured[1], measured[0], rtol=1e-4, atol=1e-5)
    assert measured[0].mean() > 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_the_same_step_on_a_gpu(tmp_path, small_model, tokenizer, rows, completions, implementation):
    """FlashAttention-2 needs the package flash-attn, and knows no float32."""
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    bf16 = implementation == "flash_attention_2"
    changes = {"use_cpu": False, "bf16": bf16}
    runs = []
    for name, budget in (("sdpa", None), (implementation, 130)):
        model = small_model(0).to(torch.bfloat16 if bf16 else torch.float32)
        model.set_attn_implementation(name)
        runs.append(step(tmp_path, model, tokenizer, rows, completions, budget, **changes)[1])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bf16 else {"rtol": 1e-3, "atol": 1e-5}
    assert_same_step(runs[1], runs[0], **tolerance)


@pytest.mark.parametrize("window", [None, 4])
def test_without_a_mask_the_positions_that_count_are_the_same(tmp_path, small_model, tokenizer, rows, window):
    """Rows of different lengths, padded on the right: hidden states and gradients with the mask and without."""
    config = OPSDConfig(**settings(tmp_path), teacher_prompt_template=SOLUTION_TEMPLATE)
    model = small_model(0)
    if window is not None:
        torch.manual_seed(0)
        sizes = {name: vars(model.config)[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=window))
    # In float64, in which two orders of the same sums differ by nothing that could be mistaken for a mask
    trainer = OPSDTrainer(model=model.double(), args=config, train_dataset=rows, processing_class=tokenizer)
    ids = torch.randint(5, 40, (3, 12))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    found = {}
    for name, given in (("mask", mask), ("none", None)):
        hidden = trainer._get_last_hidden_state(model, ids, given, 11)[mask[:, :-1].bool()]
        hidden.square().sum().backward()
        found[name] = (
            hidden.detach(),
            {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None},
        )
        model.zero_grad()
    torch.testing.assert_close(found["none"][0], found["mask"][0], rtol=1e-5, atol=1e-6)
    for key, grad in found["mask"][1].items():
        torch.testing.assert_close(found["none"][1][key], grad, rtol=1e-4, atol=1e-5)


def test_text_of_a_causal_model_takes_no_mask(tmp_path, small_model, tokenizer, rows):
    """And where the shape is fixed, the padding lies where it lies, and it does."""
    for changes, expected in (({}, {True}), ({"pad_to_multiple_of": 8}, {False})):
        config = OPSDConfig(**settings(tmp_path, max_steps=1, **changes), teacher_prompt_template=SOLUTION_TEMPLATE)
        trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)
        seen, hidden = set(), trainer._get_last_hidden_state

        def record(model, ids, mask, *args, seen=seen, hidden=hidden):
            seen.add(mask is None)
            return hidden(model, ids, mask, *args)

        with mock.patch.object(trainer, "_get_last_hidden_state", record):
            trainer.train()
        assert seen == expected
