"""What must not cost an RLVR run: a gradient that is not finite. GRPO's own trainer follows it, and its weights are NaN."""

import json
import math
from unittest import mock

import pytest
import torch
import yaml
from test_rlvr import OPTIONS
from trl import GRPOConfig, GRPOTrainer

from trl_opsd.rlvr import RLVRConfig, RLVRTrainer, faults
from trl_opsd.rlvr.__main__ import main


def by_length(completions, **kwargs):
    """Not above 0, because truncated rollouts earn nothing."""
    return [-float(len(completion[0]["content"]) % 3) for completion in completions]


def spoiling(steps, poison=math.nan):
    """A model whose log-probabilities of the first rollout of a micro-batch are not finite in some steps, from 0."""
    logps = GRPOTrainer._get_per_token_logps_and_entropies

    def spoiled(self, *args, **kwargs):
        found, *more = logps(self, *args, **kwargs)
        if torch.is_grad_enabled() and self.state.global_step in steps:
            found = torch.cat([poison * found[:1], found[1:]])
        return found, *more

    return mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spoiled)


class Recorder:
    def __init__(self, trainer):
        self.weights, step = [], trainer._get_grad_norm

        def watched(*args, **kwargs):
            self.weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
            return step(*args, **kwargs)

        trainer._get_grad_norm = watched


def train(trainer_class, config_class, folder, model, tokenizer, rows, **changes):
    trainer = trainer_class(
        model,
        reward_funcs=by_length,
        args=config_class(str(folder), **{**OPTIONS, "max_steps": 3, **changes}),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    recorder = Recorder(trainer)
    trainer.train()
    return trainer, [*recorder.weights, dict(trainer.model.state_dict())]


@pytest.mark.parametrize("poison, changes", [(math.nan, {}), (math.inf, {"max_grad_norm": 0.0, "loss_type": "grpo"})])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, small_model, tokenizer, rows, poison, changes):
    with spoiling({1}, poison):
        # In a third step it would end in the middle of `generate`
        _, theirs = train(
            GRPOTrainer, GRPOConfig, tmp_path / "trl", small_model(), tokenizer, rows, **{"max_steps": 2, **changes}
        )
        trainer, (first, second, third, last) = train(
            RLVRTrainer, RLVRConfig, tmp_path, small_model(), tokenizer, rows, **changes
        )
    assert not all(value.isfinite().all() for value in theirs[-1].values())  # or there would be nothing to mend
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a)
        for a, b in ((first, second), (second, third), (third, last))
    ]
    assert moved == [True, False, True]
    assert all(value.isfinite().all() for value in last.values())
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["step"] for line in lines} == {2}
    assert all("a:" in line["prompt"] and line["completion_ids"] for line in lines)
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms[1] == 0 and norms[0] > 0 and norms[2] > 0


def test_the_micro_batch_that_is_not_finite_is_written_down(tmp_path, small_model, tokenizer, rows):
    calls = []

    def now_and_then(self, *args, **kwargs):
        found, *more = logps(self, *args, **kwargs)
        if torch.is_grad_enabled():
            calls.append(found)
            if len(calls) == 2:  # the second of the two of the first step
                found = math.nan * found
        return found, *more

    logps = GRPOTrainer._get_per_token_logps_and_entropies
    with mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", now_and_then):
        train(
            RLVRTrainer,
            RLVRConfig,
            tmp_path,
            small_model(),
            tokenizer,
            rows,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["step"] for line in lines} == {1}


def test_too_many_in_a_row_end_the_command_line_in_a_sentence(tmp_path, checkpoint, rows, monkeypatch, capsys):
    monkeypatch.setattr(faults, "IN_A_ROW", 2)
    rows.to_json(tmp_path / "train.jsonl")
    options = {**OPTIONS, "max_steps": 5, "model_name_or_path": checkpoint(), "output_dir": str(tmp_path / "out")}
    options |= {"dataset_name": str(tmp_path / "train.jsonl"), "reward_funcs": ["test_rlvr_faults.by_length"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    with spoiling({0, 2, 3}), pytest.raises(SystemExit) as end:
        main(["--config", str(tmp_path / "recipe.yaml")])
    assert end.value.code == 3
    assert (
        "error: The gradient of each of 2 steps in a row is not finite, the last of them step 4"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()
