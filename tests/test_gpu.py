"""
What a GPU adds: its kernels, its casts, its scaler, and a step of the size that people train.

Each test runs on a CPU too, small, in the default tier, so that what is not run here is the device and nothing else.
"""

import copy

import pytest
import torch
from divergence_reference import reference_logits, reference_metrics
from peft import LoraConfig
from test_opsd_trainer import Recorder, reference_loss, same_rollouts, settings
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd import divergence
from trl_opsd.opsd.divergence import linear_divergence_with_metrics
from trl_opsd.tiny.task import CONCISE_TEMPLATE


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def completions(tokenizer):
    texts = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5"]
    return [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]


def build(tmp_path, device, model, tokenizer, rows, reward_funcs=None, peft_config=None, **changes):
    config = OPSDConfig(
        **settings(tmp_path, use_cpu=device == "cpu", shuffle_dataset=False, **changes),
        teacher_prompt_template=CONCISE_TEMPLATE,
    )
    recorder = Recorder()
    trainer = OPSDTrainer(
        model=model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward_funcs,
        peft_config=peft_config,
        callbacks=[recorder],
    )
    return trainer, recorder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("uniform", [True, False], ids=["mean", "weighted"])
@pytest.mark.parametrize(
    "dtype, autocast, tolerance",
    [(torch.float32, False, 2e-4), (torch.bfloat16, False, 6e-2), (torch.float32, True, 6e-2)],
    ids=["fp32", "bf16", "autocast"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 1.0, "temperature": 0.7},
        {"beta": 0.5, "kl_clip": 1e-2},
        {"beta": 1.0, "kl_clip": 1e-3, "student_softcap": 20.0, "teacher_softcap": 20.0},
        {"beta": 0.0, "valid_vocab": 997, "student_logit_scale": 0.5, "teacher_logit_scale": 0.5},
    ],
    ids=str,
)
def test_the_kernels_give_the_definition(device, uniform, dtype, autocast, tolerance, options, monkeypatch):
    """At odd shapes, forward and gradient, in float32 and bfloat16, by several chunks of several panels."""
    torch.manual_seed(0)
    N, H, V = 67, 48, 1003
    for name in ("_LOGITS_BYTES", "_CPU_LOGITS_BYTES"):
        monkeypatch.setattr(divergence, name, 8 * 2 * V * 4)
    inputs = [torch.randn(shape, device=device).mul(0.3).to(dtype) for shape in ((N, H), (V, H), (N, H), (V, H))]
    student_hidden, student_head, teacher_hidden, teacher_head = inputs
    weight = torch.full((N,), 0.3, device=device) if uniform else torch.rand(N, device=device)
    student_hidden.requires_grad_()
    student_head.requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        found = linear_divergence_with_metrics(student_hidden, student_head, teacher_hidden, teacher_head, **options)
    (found.divergence * weight).sum().backward()

    exact = [copy.deepcopy(value.detach()).double().requires_grad_() for value in (student_hidden, student_head)]
    valid = options.get("valid_vocab")
    own = {name: value for name, value in options.items() if name in ("beta", "temperature", "kl_clip")}
    sides = [
        reference_logits(
            hidden,
            head,
            logit_scale=options.get(f"{side}_logit_scale", 1.0),
            softcap=options.get(f"{side}_softcap"),
            valid_vocab=valid,
        )
        for side, hidden, head in (("student", *exact), ("teacher", teacher_hidden.double(), teacher_head.double()))
    ]
    expected = reference_metrics(*sides, **own)
    (expected["divergence"] * weight.double()).sum().backward()
    for name in ("divergence", "student_entropy", "teacher_entropy", "unclipped"):
        value = expected[name].detach()
        assert (found._asdict()[name].detach() - value).abs().max() <= tolerance * value.abs().max(), name
    for value, reference in zip((student_hidden, student_head), exact, strict=True):
        assert (value.grad.double() - reference.grad).norm() <= tolerance * reference.grad.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mixed", ["bf16", "no"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_step_gives_the_formula(
    tmp_path, small_model, tokenizer, rows, completions, device, mixed, checkpointing, peft_config
):
    model = small_model(0)
    expected = reference_loss(
        model, model, tokenizer, list(rows)[:8], [completions[i % 4] for i in range(8)], [True] * 8, CONCISE_TEMPLATE
    )
    changes = {"bf16": mixed == "bf16", "gradient_checkpointing": checkpointing, "max_steps": 1}
    changes["max_tokens_per_microbatch"] = 130
    with same_rollouts(completions):
        trainer, recorder = build(tmp_path, device, model, tokenizer, rows, peft_config=peft_config, **changes)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
    assert recorder.logs[0]["loss"] == pytest.approx(expected, rel=0.05 if mixed == "bf16" else 1e-3)
    moved = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(before[name].to(p.device), p) for name, p in moved.items())


@pytest.mark.parametrize("device", DEVICES)
def test_an_average_in_bf16_follows(tmp_path, small_model, tokenizer, rows, completions, device):
    with same_rollouts(completions):
        trainer, _ = build(
            tmp_path, device, small_model(0).bfloat16(), tokenizer, rows, teacher_weights="ema", max_steps=3
        )
        trainer.train()
    for name, (teacher, student) in trainer.teacher.pairs().items():
        sums = trainer.teacher._sums[name]
        assert sums.dtype == torch.float32 and sums.device == teacher.device
        assert torch.equal(sums.to(teacher.dtype), teacher) and not torch.equal(teacher, student)


@pytest.mark.gpu
def test_fp16_survives_a_batch_of_nothing_on_a_gpu(tmp_path, small_model, tokenizer, rows, completions):
    """On a CPU accelerate makes no scaler: tests/test_opsd_hardware.py gives it one there."""

    def verifier(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step != 1)] * len(completions)

    with same_rollouts(completions):
        trainer, recorder = build(tmp_path, "cuda", small_model(0), tokenizer, rows, verifier, fp16=True)
        trainer.train()
    first, second, third = recorder.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in second)


SHAPES = {
    "cpu": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16},
    # That of Qwen3-1.7B
    "cuda": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128},
}


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_a_model_that_people_train(tmp_path, tokenizer, rows, device):
    """Random weights, eight rollouts, half of them correct; on the GPU of up to 4,096 tokens and 151,936 columns."""
    length, vocab = (64, 512) if device == "cpu" else (4096, 151_936)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**SHAPES[device], **heads, **ends, vocab_size=vocab, max_position_embeddings=2 * length)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    parameters = model.num_parameters()
    draw = torch.Generator().manual_seed(0)
    lengths = [length - 1, length // 2, length // 4, length // 8]
    written = [[*torch.randint(5, 60, (n,), generator=draw).tolist(), tokenizer.eos_token_id] for n in lengths]
    changes = {"max_completion_length": length, "max_tokens_per_microbatch": 2 * length, "max_steps": 2}
    changes |= {"bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-6}
    with same_rollouts(written):
        trainer, recorder = build(
            tmp_path, device, model, tokenizer, rows, lambda prompts, **kw: [1.0, 0.0] * (len(prompts) // 2), **changes
        )
        recorder.on_step_end = lambda *args, **kwargs: None  # no copies of such weights
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    log = recorder.logs[0]
    assert log["opsd/kept"] == 0.5 and 0 < log["loss"] < 1 and log["grad_norm"] > 0
    if device == "cuda":
        # Weights, gradients, two moments and the teacher in float32: 20 bytes each. The rest is one micro-batch, whose
        # logits alone would be 2 × 8,192 × 151,936 × 4 bytes = 9.3 GiB
        assert torch.cuda.max_memory_allocated() < 20 * parameters + 12 * 2**30
