"""The command line of stage 3: what it makes, and how a mistake ends."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from trl_opsd.cli import parse
from trl_opsd.opsd import OPSDConfig
from trl_opsd.opsd.__main__ import main
from trl_opsd.opsd.run import OPSDScriptArguments
from trl_opsd.prune.__main__ import main as prune
from trl_opsd.rlvr.__main__ import main as rlvr_main
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
    # what cards and provenance say of where it comes from
    assert results["run"]["config"]["model_name_or_path"] == checkpoint()
    assert results["run"]["config"]["dataset_name"] == str(tmp_path / "train.jsonl")
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
        ({"model_name_or_path": "{tmp}/nowhere"}, "there is no folder `{tmp}/nowhere`"),
        ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ({"teacher_model_name_or_path": "{tmp}/nowhere"}, "`teacher_model_name_or_path`: there is no folder"),
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
    assert config.build_teacher_contexts()
    assert model_args.model_name_or_path and script_args.dataset_name


def test_the_tiny_recipe_speaks_the_words_of_the_tiny_reasoner():
    recipe = yaml.safe_load((ROOT / "recipes/tiny/opsd.yaml").read_text())
    chain = yaml.safe_load((ROOT / "recipes/tiny/compress.yaml").read_text())
    assert recipe["teacher_prompt_template"] == chain["prompt_only_template"] == CONCISE_TEMPLATE


def test_a_run_that_trained_on_nothing_saves_nothing(tmp_path, recipe, capsys):
    with pytest.raises(SystemExit) as end:
        main([*recipe(gate="correct"), "--probe_prompts", "0"])
    assert end.value.code == 3
    assert (
        "No optimizer step was made: of the rollouts of 2 steps none passed the gate `correct`"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_probe_of_which_nothing_is_correct_ends_the_run(tmp_path, recipe, capsys):
    with pytest.raises(SystemExit) as end:
        main([*recipe(gate="correct"), "--probe_prompts", "8"])
    assert end.value.code == 3
    assert "None of the 8 rollouts of the probe is correct" in capsys.readouterr().err
    assert (tmp_path / "out" / "probe.html").is_file() and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_verifier_may_stand_without_brackets(recipe, capsys):
    main([*recipe(reward_funcs="math_reward", max_steps=1)])
    assert "Unknown" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "dtype, rate, warned", [("bfloat16", 1e-6, True), ("bfloat16", 1e-2, False), ("float32", 1e-6, False)]
)
def test_a_rate_that_the_weights_cannot_hold_is_warned_of(recipe, caplog, dtype, rate, warned):
    main([*recipe(dtype=dtype, learning_rate=rate, max_steps=1)])
    assert ("most steps are rounded away" in caplog.text) == warned


def test_an_adapter_of_one_stage_leads_into_the_next(tmp_path, recipe, checkpoint, rows):
    """What LoRA has left is merged: the next stage starts from base and adapter, and so does pruning."""
    main([*recipe(use_peft=True, lora_r=4, lora_target_modules=["q_proj", "down_proj"], learning_rate=0.1)])
    first = tmp_path / "out"
    assert (first / "adapter_config.json").is_file()
    adapted = AutoPeftModelForCausalLM.from_pretrained(first).merge_and_unload()
    base = AutoModelForCausalLM.from_pretrained(checkpoint())
    assert not torch.allclose(adapted.model.layers[0].mlp.down_proj.weight, base.model.layers[0].mlp.down_proj.weight)
    main(
        [*recipe(model_name_or_path=str(first), output_dir=str(tmp_path / "second"), learning_rate=1e-30, max_steps=1)]
    )
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    prune(
        ["--model_name_or_path", str(first), "--output_dir", str(tmp_path / "small"), "--num_layers", "1"]
        + ["--calibration_dataset", str(tmp_path / "train.jsonl"), "--calibration_samples", "4", "--device", "cpu"]
    )
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").state_dict()[
        "model.layers.0.mlp.down_proj.weight"
    ]
    assert any(
        torch.allclose(small, adapted.state_dict()[f"model.layers.{layer}.mlp.down_proj.weight"], atol=1e-6)
        for layer in range(2)
    )
    rlvr = ["--model_name_or_path", str(first), "--output_dir", str(tmp_path / "third"), "--learning_rate", "1e-30"]
    options = {"dataset_name": tmp_path / "train.jsonl", "reward_funcs": "math_reward", "num_generations": 2}
    options |= {"per_device_train_batch_size": 4, "max_completion_length": 8, "max_steps": 1, "use_cpu": True}
    options |= {"bf16": False, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False}
    rlvr_main([*rlvr, *[word for name, value in options.items() for word in (f"--{name}", str(value))]])
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "third").state_dict()
    torch.testing.assert_close(
        third["model.layers.0.mlp.down_proj.weight"], adapted.state_dict()["model.layers.0.mlp.down_proj.weight"]
    )


def test_an_adapter_without_its_base_is_named(tmp_path, recipe, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "' + str(tmp_path / "gone") + '"}')
    with pytest.raises(SystemExit) as end:
        main(recipe(model_name_or_path=str(folder)))
    assert end.value.code == 2 and "the base of the adapter" in capsys.readouterr().err


def test_a_stopped_run_leaves_nothing_under_the_final_name(tmp_path, recipe, capsys):
    with pytest.raises(SystemExit) as end:
        main(recipe(teacher_prompt_template="{prompt}", reward_funcs=None, gate=None, max_steps=5, logging_steps=1))
    assert end.value.code == 3
    assert "error: Stopped at step 1: The divergence is" in capsys.readouterr().err
    out = tmp_path / "out"
    assert not (out / "config.json").exists() and not (out / "model.safetensors").exists()
