"""What must not cost an RLVR run: a rollout that is not finite. GRPO's own trainer follows it, and its weights are NaN."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from rlvr_worker import Spoil
from test_rlvr import OPTIONS
from trl import GRPOConfig, GRPOTrainer

from trl_opsd import faults
from trl_opsd.rlvr import RLVRConfig, RLVRTrainer
from trl_opsd.rlvr import trainer as rlvr_trainer
from trl_opsd.rlvr.__main__ import main


def by_length(completions, **kwargs):
    """Not above 0, because truncated rollouts earn nothing."""
    return [-float(len(completion[0]["content"]) % 3) for completion in completions]


def spoiling(steps, poison=math.nan, rows=1):
    """A model whose log-probabilities of the first rollouts of a micro-batch are not finite in some steps, from 0, where they count."""
    logps = GRPOTrainer._get_per_token_logps_and_entropies

    def spoiled(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        found, *more = logps(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if torch.is_grad_enabled() and self.state.global_step in steps:
            counts = attention_mask[:, -logits_to_keep:].any(dim=1, keepdim=True)
            counts[rows:] = False
            if counts.any():  # else what is multiplied by 0 would be in the gradient all the same
                found = torch.where(counts, poison * found, found)
        return found, *more

    return mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spoiled)


def counting_for_nothing(row):
    """Micro-batches of which one rollout counts for nothing, and in the divisor of the loss all the same."""
    loss = GRPOTrainer._compute_loss

    def counted(self, model, inputs):
        mask = inputs["completion_mask"].clone()
        mask[row] = 0
        return loss(self, model, {**inputs, "completion_mask": mask})

    return mock.patch.object(GRPOTrainer, "_compute_loss", counted)


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


@pytest.mark.parametrize(
    "poison, changes",
    [(math.nan, {}), (math.inf, {"max_grad_norm": 0.0, "loss_type": "grpo"})],
)
def test_a_rollout_that_is_not_finite_is_left_out(tmp_path, small_model, tokenizer, rows, poison, changes):
    """The step is that of a rollout of which no token counts."""
    changes = {"optim": "sgd", "learning_rate": 1.0, **changes}
    with spoiling({0}, poison):
        # In a third step it would end in the middle of `generate`
        _, theirs = train(
            GRPOTrainer, GRPOConfig, tmp_path / "trl", small_model(), tokenizer, rows, **{**changes, "max_steps": 1}
        )
        trainer, weights = train(
            RLVRTrainer, RLVRConfig, tmp_path, small_model(), tokenizer, rows, **{**changes, "max_steps": 2}
        )
    assert not all(value.isfinite().all() for value in theirs[-1].values())  # or there would be nothing to mend
    with counting_for_nothing(0):
        reference = train(
            RLVRTrainer, RLVRConfig, tmp_path / "r", small_model(), tokenizer, rows, **{**changes, "max_steps": 1}
        )
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name, value in reference[1][-1].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)
    assert all(value.isfinite().all() for value in weights[-1].values())
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["step"] == 1 and "a:" in lines[0]["prompt"] and lines[0]["completion_ids"]
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    # What an abandoned forward pass has measured would be there twice, and is not finite
    assert all(math.isfinite(log["entropy"]) and math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in logs)


@pytest.mark.parametrize("changes", [{"beta": 0.1}, {"num_iterations": 2, "mask_truncated_completions": True}])
def test_what_the_log_probabilities_are_compared_with_has_to_be_finite_too(
    tmp_path, checkpoint, tokenizer, rows, changes
):
    """The reference model's, and those of the policy that wrote the rollouts, where its tokens count or do not."""
    logps = GRPOTrainer._get_per_token_logps_and_entropies

    def spoiled(self, *args, **kwargs):
        found, *more = logps(self, *args, **kwargs)
        if not torch.is_grad_enabled() and self.state.global_step == 0:
            found[0] = math.nan
        return found, *more

    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "weight_decay": 0.0, **changes}
    with mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spoiled):
        trainer, weights = train(RLVRTrainer, RLVRConfig, tmp_path, checkpoint(), tokenizer, rows, **options)
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, changes.get("num_iterations", 1) + 1))
    assert all("log-probability" in line["why"] for line in lines)
    assert all(value.isfinite().all() for value in weights[-1].values())
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert all(math.isfinite(norm) for norm in norms)
    if "beta" in changes:
        assert min(norms) > 0 and any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_process_that_has_nothing_left_costs_the_others_nothing(tmp_path, small_model, tokenizer, rows, monkeypatch):
    """All rollouts of a prompt that is not finite, read as they are, would take the step from all."""
    monkeypatch.setattr(rlvr_trainer, "DistributedType", SimpleNamespace(NO=None))  # others wait for a backward
    seen, model = [], small_model()

    def spoil(module, args, output):
        if torch.is_grad_enabled():
            seen.append(args[0])
            if any(torch.equal(args[0], ids) for ids in seen[1:2]):  # the second of two, whatever counts of it
                return output * math.nan

    model.get_input_embeddings().register_forward_hook(spoil)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer, (first, last) = train(RLVRTrainer, RLVRConfig, tmp_path, model, tokenizer, rows, **options)
    assert len(seen) == 3 and all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert next(log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log) > 0


def test_a_gradient_that_is_not_finite_is_not_followed(tmp_path, small_model, tokenizer, rows):
    logps = GRPOTrainer._get_per_token_logps_and_entropies

    def spoiled(self, *args, **kwargs):
        found, *more = logps(self, *args, **kwargs)
        return Spoil.apply(found) if self.state.global_step == 1 else found, *more

    with mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", spoiled):
        trainer, (first, second, third, last) = train(
            RLVRTrainer, RLVRConfig, tmp_path, small_model(), tokenizer, rows
        )
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a)
        for a, b in ((first, second), (second, third), (third, last))
    ]
    assert moved == [True, False, True]
    assert all(value.isfinite().all() for value in last.values())
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["step"] for line in lines} == {2} and "gradient" in lines[0]["why"]
    norms = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert norms[1] == 0 and norms[0] > 0 and norms[2] > 0


def test_a_micro_batch_of_which_nothing_is_finite_is_left_out(tmp_path, small_model, tokenizer, rows):
    calls, logps = [], GRPOTrainer._get_per_token_logps_and_entropies

    def now_and_then(self, *args, **kwargs):
        found, *more = logps(self, *args, **kwargs)
        if torch.is_grad_enabled():
            calls.append(found)
            if len(calls) == 2:  # the second of the two of the first step
                found = math.nan * found
        return found, *more

    with mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", now_and_then):
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
        _, (first, last) = train(RLVRTrainer, RLVRConfig, tmp_path, small_model(), tokenizer, rows, **options)
    assert len(calls) == 2 and all(value.isfinite().all() for value in last.values())
    assert any(not torch.equal(first[name], last[name]) for name in first)
    lines = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["step"] for line in lines} == {1}


@pytest.mark.parametrize(
    "steps, number, message",
    [
        ({0, 2, 3}, 1, "Something was not finite in each of 2 steps in a row, the last of them step 4: see `"),
        ({1}, 8, "The log-probability of step 2 is nan or infinite on every rollout"),
    ],
)
def test_what_does_not_heal_ends_the_command_line_in_a_sentence(
    tmp_path, checkpoint, rows, monkeypatch, capsys, steps, number, message
):
    monkeypatch.setattr(faults, "IN_A_ROW", 2)
    rows.to_json(tmp_path / "train.jsonl")
    options = {**OPTIONS, "max_steps": 5, "model_name_or_path": checkpoint(), "output_dir": str(tmp_path / "out")}
    options |= {"dataset_name": str(tmp_path / "train.jsonl"), "reward_funcs": ["test_rlvr_faults.by_length"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(options))
    with spoiling(steps, rows=number), pytest.raises(SystemExit) as end:
        main(["--config", str(tmp_path / "recipe.yaml")])
    assert end.value.code == 3
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()
