"""The command line of stage 3: what it makes, and how a mistake ends."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from trl_opsd.cli import parse
from trl_opsd.opsd import OPSDConfig
from trl_opsd.opsd.__main__ import main
from trl_opsd.opsd.run import OPSDScriptArguments
from trl_opsd.tiny.task import CONCISE_TEMPLATE


ROOT = Path(__file__).parents[1]


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
            "teacher_prompt_template": CONCISE_TEMPLATE,
            "reward_funcs": ["math_reward"],
            "per_device_train_batch_size": 4,
            "max_completion_length": 8,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "gate": "all",
            **changes,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
        return ["--config", str(path)]

    return write


def test_a_run_leaves_an_ordinary_checkpoint(tmp_path, recipe, checkpoint):
    main([*recipe(), "--max_steps", "3"])
    out = tmp_path / "out"
    trained = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(checkpoint())
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))
    results = json.loads((out / "opsd.json").read_text())
    assert results["run"]["config"]["max_steps"] == 3  # the command line overrides the recipe
    assert not (out / ".saving").exists()


def test_lora_leaves_an_adapter(tmp_path, recipe):
    main(recipe(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "v_proj"]))
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"teacher_contxt": "concise"},
            "Unknown key `teacher_contxt` in {tmp}/recipe.yaml: did you mean `teacher_con",
        ),
        ({"dataset_name": "{tmp}/gone.jsonl"}, "gone.jsonl"),
        ({"dataset_name": None}, "`dataset_name` is missing"),
        ({"model_name_or_path": "{tmp}/empty"}, "the folder `{tmp}/empty` has no config.json"),
        ({"model_name_or_path": "{tmp}/nowhere"}, "there is no checkpoint at `{tmp}/nowhere`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"teacher_model_name_or_path": "{tmp}/nowhere"}, "`teacher_model_name_or_path`: there is no checkpoint"),
        ({"reward_funcs": None, "gate": "correct"}, "needs a verifier"),
        ({"reward_funcs": ["mathreward"]}, "Unknown reward function `mathreward`"),
        ({"teacher_prompt_template": None}, "same in weights and context"),
        ({"teacher_prompt_template": None, "teacher_model_name_or_path": "{model}"}, "same in weights and context"),
        ({"per_device_train_batch_size": 65}, "has 64 prompts and a batch takes 65"),
        ({"num_generations": 3}, "not divisible by num_generations 3"),
        ({"teacher_prompt_template": "{{prompt}} {{privileged_context}}"}, "needs the column `privileged_context`"),
        ({"reward_funcs": ["accuracy_reward", "test_opsd_cli.needs_tests"]}, "`test_opsd_cli.needs_tests`"),
        ({"beta": 2.0}, "beta must be in"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, recipe, checkpoint, monkeypatch, capsys, changes, message):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    (tmp_path / "empty").mkdir()
    names = {"tmp": str(tmp_path), "model": checkpoint()}
    fill = lambda value: value.format(**names) if isinstance(value, str) else value  # noqa: E731
    with pytest.raises(SystemExit) as end:
        main(recipe(**{key: fill(value) for key, value in changes.items()}))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and fill(message) in error, error


def test_a_missing_column_names_what_needs_it(tmp_path, recipe, rows, capsys):
    rows.remove_columns("answer").to_json(tmp_path / "train.jsonl")
    with pytest.raises(SystemExit):
        main(recipe())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The verifier `math_reward` needs the column `answer`" in error and "`solution`" in error


def test_a_config_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["--config", "recipes/opds.yaml"])
    assert "There is no config file at `recipes/opds.yaml`" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipes/opsd.yaml", "recipes/tiny/opsd.yaml"])
def test_the_recipes_parse(name, monkeypatch):
    # No GPU here: everything else is read as on the machine that the recipe is for
    overrides = ["--bf16", "false", "--use_cpu", "true"]
    script_args, config, model_args = parse(
        (OPSDScriptArguments, OPSDConfig, ModelConfig), ["--config", str(ROOT / name), *overrides]
    )
    assert config.gate == "correct" and script_args.reward_funcs == ["math_reward"]
    assert config.build_teacher_context() is not None
    assert model_args.model_name_or_path and script_args.dataset_name


def test_the_tiny_recipe_speaks_the_words_of_the_tiny_reasoner():
    recipe = yaml.safe_load((ROOT / "recipes/tiny/opsd.yaml").read_text())
    chain = yaml.safe_load((ROOT / "recipes/tiny/compress.yaml").read_text())
    assert recipe["teacher_prompt_template"] == chain["prompt_only_template"] == CONCISE_TEMPLATE
