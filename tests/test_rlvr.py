"""Stage 1: what `RLVRTrainer` changes, and its command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer, ModelConfig

from trl_opsd import RLVRConfig, RLVRTrainer
from trl_opsd.cli import parse
from trl_opsd.rewards import math_reward
from trl_opsd.rlvr.__main__ import RLVRScriptArguments, main


ROOT = Path(__file__).parents[1]
OPTIONS = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
}


def rewards(trainer_class, model, tokenizer, rows, folder, ids_per_row, functions=math_reward):
    trainer = trainer_class(
        model,
        reward_funcs=functions,
        args=RLVRConfig(str(folder), **OPTIONS),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    inputs = [rows[0]] * len(ids_per_row)
    texts = tokenizer.batch_decode(ids_per_row, skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    return trainer._calculate_rewards(inputs, [row["prompt"] for row in inputs], completions, ids_per_row)


def test_a_truncated_completion_earns_nothing(small_model, tokenizer, rows, tmp_path):
    right = tokenizer(rows[0]["solution"])["input_ids"]
    wrong = tokenizer(f"\\boxed{{{(int(rows[0]['answer']) + 1) % 7}}}")["input_ids"]
    end = [tokenizer.eos_token_id]
    replies = [right + end, right, wrong + end, wrong]
    arguments = (small_model(), tokenizer, rows, tmp_path, replies)
    assert rewards(GRPOTrainer, *arguments).flatten().tolist() == [1, 1, 0, 0]
    assert rewards(RLVRTrainer, *arguments).flatten().tolist() == [1, 0, 0, 0]


def test_only_positive_rewards_are_taken_away(small_model, tokenizer, rows, tmp_path):
    def punish(completions, **kwargs):
        return [-0.5] * len(completions)

    def abstain(completions, **kwargs):
        return [None] * len(completions)

    right = tokenizer(rows[0]["solution"])["input_ids"]
    arguments = (small_model(), tokenizer, rows, tmp_path, [right], [math_reward, punish, abstain])
    scores = rewards(RLVRTrainer, *arguments)[0]
    assert scores[:2].tolist() == [0, -0.5] and scores[2].isnan()


@pytest.fixture
def recipe(tmp_path, checkpoint, rows):
    """Writes a recipe for two steps on a small model and returns its path, after the given changes."""

    def write(**changes) -> list[str]:
        data = tmp_path / "train.jsonl"
        if not data.exists():
            rows.to_json(data)
        config = {
            "model_name_or_path": checkpoint(),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "out"),
            "reward_funcs": ["math_reward"],
            **OPTIONS,
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return ["--config", str(path)]

    return write


def finishes(completions, **kwargs):
    """A reward that an untrained model gets now and then, so that there is something to learn from."""
    return [len(completion[0]["content"]) % 3 / 2 - 1 for completion in completions]


def test_a_run_leaves_an_ordinary_checkpoint(tmp_path, recipe, checkpoint):
    main([*recipe(reward_funcs=["math_reward", "test_rlvr.finishes"]), "--max_steps", "3"])
    out = tmp_path / "out"
    trained = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(checkpoint())
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).chat_template
    results = json.loads((out / "rlvr.json").read_text())
    assert results["run"]["config"]["max_steps"] == 3  # the command line overrides the recipe
    assert any("rewards/math_reward/mean" in row for row in results["rows"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_generatoins": 4},
            "Unknown key `num_generatoins` in {tmp}/recipe.yaml: did you mean `num_generations`?",
        ),
        ({"dataset_name": "{tmp}/gone.jsonl"}, "gone.jsonl"),
        ({"dataset_name": None}, "`dataset_name` is missing"),
        ({"model_name_or_path": "{tmp}/nowhere"}, "there is no checkpoint at `{tmp}/nowhere`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"reward_funcs": None}, "`reward_funcs` is missing"),
        ({"reward_funcs": ["mathreward"]}, "Unknown reward function `mathreward`"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 entries and `reward_funcs` 1"),
        ({"num_generations": 3}, "must be divisible by num_generations (3)"),
        ({"reward_funcs": ["accuracy_reward"]}, "The verifier `accuracy_reward` needs the column"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, recipe, rows, monkeypatch, capsys, changes, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    fill = lambda value: value.format(tmp=tmp_path) if isinstance(value, str) else value  # noqa: E731
    arguments = recipe(**{key: fill(value) for key, value in changes.items()})
    if changes.get("reward_funcs") == ["accuracy_reward"]:
        rows.remove_columns("solution").to_json(tmp_path / "train.jsonl")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and fill(message) in error, error


@pytest.mark.parametrize("name", ["recipes/rlvr.yaml", "recipes/tiny/rlvr.yaml"])
def test_the_recipes_parse(name):
    # No GPU here: everything else is read as on the machine that the recipe is for
    overrides = ["--bf16", "false", "--use_cpu", "true"]
    script_args, config, model_args = parse(
        (RLVRScriptArguments, RLVRConfig, ModelConfig), ["--config", str(ROOT / name), *overrides]
    )
    assert script_args.reward_funcs == ["math_reward"]
    assert model_args.model_name_or_path and script_args.dataset_name and config.max_steps > 0
