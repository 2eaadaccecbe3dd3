"""Quantisation-aware training: what is computed is what quantised weights compute, and what is saved is ordinary."""

from unittest import mock

import pytest
import torch
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import AutoModelForCausalLM

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.__main__ import main
from trl_opsd.opsd.qat import fake_quantise


SCHEMES = {
    "int8": IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_student_trained_for_a_precision_computes_the_same_in_it(tmp_path, small_model, tokenizer, rows, precision):
    student = small_model(0)
    names, plain = set(student.state_dict()), [parameter.clone() for parameter in student.parameters()]
    fake_quantise(student, precision, group_size=16)
    ids = torch.arange(4, 20).view(2, 8)
    assert not torch.equal(student(ids).logits, small_model(0)(ids).logits)
    OPSDTrainer(
        model=student,
        teacher_model=small_model(1),
        args=OPSDConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_completion_length=8, max_steps=2,
            learning_rate=1e-2, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    ).train()  # fmt: skip
    assert any(not torch.equal(a, b) for a, b in zip(plain, student.parameters(), strict=True))
    student.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(saved.state_dict()) == names
    exact = saved(ids).logits
    quantize_(
        saved, SCHEMES[precision], filter_fn=lambda module, name: type(module) is torch.nn.Linear and name != "lm_head"
    )
    torch.testing.assert_close(saved(ids).logits, student.eval()(ids).logits, rtol=0, atol=1e-6)
    assert not torch.equal(saved(ids).logits, exact)


def test_groups_must_divide_the_input_channels(small_model):
    with pytest.raises(ValueError, match="groups of 20 input channels, and `model.layers.0.mlp.down_proj` has 48"):
        fake_quantise(small_model(0), "int4", group_size=20)


def test_the_command_line_trains_for_a_precision(tmp_path, checkpoint, rows, capsys):
    data = tmp_path / "train.jsonl"
    rows.to_json(data)
    args = [
        *("--model_name_or_path", checkpoint(0), "--teacher_model_name_or_path", checkpoint(1)),
        *("--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--qat", "int8", "--probe_prompts", "0"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "8", "--gate", "all"),
        *("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"),
    ]
    with mock.patch.object(OPSDTrainer, "train", autospec=True) as train:
        main(args)
    kinds = {type(module).__name__ for module in train.call_args.args[0].model.modules()}
    assert "FakeQuantizedLinear" in kinds and AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(SystemExit):
        main([*args, "--use_peft"])
    assert "drop LoRA" in capsys.readouterr().err
