"""
A frozen teacher of full size, kept off the device and fetched layer by layer: accelerate's own offloading, reached through
`teacher_model_init_kwargs`. Where there is only a CPU its weights lie on disk, by the same hooks.
"""

import pytest
import torch
from test_opsd_trainer import same_rollouts, settings, train

from trl_opsd import OPSDConfig, OPSDTrainer
from trl_opsd.tiny.task import CONCISE_TEMPLATE


@pytest.mark.parametrize("path", ["external", "initial"])
def test_an_offloaded_teacher_gives_the_same_step(tmp_path, checkpoint, tokenizer, rows, path):
    completions = [tokenizer("6 a:-3=3")["input_ids"] + [tokenizer.eos_token_id], tokenizer("5")["input_ids"]]
    # The initial weights are the student's own folder: the teacher is another model only in that it lies elsewhere
    teacher = {"external": checkpoint(1), "initial": checkpoint(0)}[path]
    # The loss needs the head beside the student's
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    offload = {"device_map": {**places, "lm_head": "cpu"}, "offload_folder": str(tmp_path / "offload")}
    runs = []
    for init_kwargs in (None, offload):
        config = OPSDConfig(
            **settings(tmp_path, optim="sgd"),
            teacher_prompt_template=CONCISE_TEMPLATE,
            teacher_model_init_kwargs=init_kwargs,
        )
        arguments = {"model": checkpoint(0), "teacher_model": teacher, "train_dataset": rows}
        with same_rollouts(completions):
            trainer, recorder = train(OPSDTrainer, config, processing_class=tokenizer, **arguments)
        layers = trainer.teacher_model.model.layers
        devices = {parameter.device.type for parameter in layers.parameters()}
        assert devices == ({"cpu"} if init_kwargs is None else {"meta"})
        runs.append(recorder)
    kept, offloaded = runs
    assert kept.logs[0]["loss"] > 0.01
    for theirs, ours in zip(kept.weights, offloaded.weights, strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
