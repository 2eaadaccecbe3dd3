"""What a teacher costs: how often the weights are there, and what the optimizer keeps."""

import gc

import pytest
import torch
from peft import LoraConfig
from test_opsd_trainer import settings

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny.task import CONCISE_TEMPLATE


SHAPE = (44, 32)  # of two weights in each of the two layers, and of nothing else


def tensors_of_that_shape() -> list[torch.Tensor]:
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [thing for thing in gc.get_objects() if type(thing) in kinds and tuple(thing.shape) == SHAPE]


@pytest.mark.parametrize("weights", ["initial", "ema", "snapshot", "live"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_copies_of_the_weights(tmp_path, small_model, tokenizer, rows, peft, weights):
    """With LoRA one, whatever the teacher; without it the student, its two moments, and the teacher's: never moments."""
    before = tensors_of_that_shape()
    trainer = OPSDTrainer(
        args=OPSDConfig(
            **settings(tmp_path, max_steps=2, optim="adamw_torch"),
            teacher_prompt_template=CONCISE_TEMPLATE,
            teacher_weights=weights,
        ),
        model=small_model(0, intermediate_size=SHAPE[0]),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if peft else None,
    )
    trainer.train()
    trainer.optimizer.zero_grad()
    known = {id(tensor) for tensor in before}
    storages = {tensor.data_ptr() for tensor in tensors_of_that_shape() if id(tensor) not in known}
    student, moments, teacher = 4, 0 if peft else 8, 0 if peft or weights == "live" else 4
    assert len(storages) == student + moments + teacher
    trained = {id(p) for name, p in trainer.model.named_parameters() if not peft or ".default." in name}
    assert {id(parameter) for parameter in trainer.optimizer.state} == trained
