"""
What people type wrongly, and what is wrong in their files, as one table: each ends in one sentence that names it and the fix.

All of it goes through the command lines themselves, and is found before a model is loaded: loading one fails the test.
"""

import importlib
import json
import re
import shlex
from functools import cache

import pytest
import yaml

from trl_opsd.cli import Parser
from trl_opsd.ranges import RANGES, check_range
from trl_opsd.shadows import read_dataclass
from trl_opsd.tiny.task import CONCISE_TEMPLATE


STAGES = {
    stage: importlib.import_module(f"trl_opsd.{stage}.__main__")
    for stage in ("data", "tiny", "small", "rlvr", "prune", "opsd", "evaluate", "export", "plan", "compress")
}


@cache
def shadows(stage):
    return [read_dataclass(name) for name in STAGES[stage].ARGUMENTS]


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", loaded)
    monkeypatch.setattr("trl_opsd.tiny.sft.make_model", loaded)
    monkeypatch.setattr("trl_opsd.small.sft.make_model", loaded)


@pytest.fixture
def sentence(capsys):
    """Runs a command line that has a mistake, and returns the sentence."""

    def run(stage, args):
        with pytest.raises(SystemExit) as end:
            STAGES[stage].main(list(map(str, args)))
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line[-1] in ".?" and len(line) < 900, line
        return line.removeprefix("error: ")

    return run


# A number that is out of its range: stage, option, value, range
OUT_OF_RANGE = [
    ("opsd", "max_completion_length", "-5", "at least 1"),
    ("opsd", "max_completion_length", "0", "at least 1"),
    ("opsd", "temperature", "0", "above 0"),
    ("opsd", "temperature", "-1", "above 0"),
    ("opsd", "temperature", "nan", "above 0"),
    ("opsd", "temperature", "inf", "above 0"),
    ("opsd", "per_device_train_batch_size", "0", "at least 1"),
    ("opsd", "per_device_train_batch_size", "-8", "at least 1"),
    ("opsd", "per_device_eval_batch_size", "0", "at least 1"),
    ("opsd", "gradient_accumulation_steps", "0", "at least 1"),
    ("opsd", "num_generations", "0", "at least 1"),
    ("opsd", "max_generation_rounds", "0", "at least 1"),
    ("opsd", "keep_shortest", "0", "at least 1"),
    ("opsd", "max_tokens_per_microbatch", "-1", "at least 1"),
    ("opsd", "teacher_sync_steps", "0", "at least 1"),
    ("opsd", "teacher_update_rate", "1.5", "from 0 to 1"),
    ("opsd", "pass_rate_rollouts", "0", "at least 1"),
    ("opsd", "min_pass_rate", "-0.1", "from 0 to 1"),
    ("opsd", "max_pass_rate", "90", "from 0 to 1"),
    ("opsd", "kl_clip", "0", "above 0"),
    ("opsd", "top_p", "0", "above 0 and at most 1"),
    ("opsd", "top_p", "2", "above 0 and at most 1"),
    ("opsd", "min_p", "-0.1", "from 0 to 1"),
    ("opsd", "learning_rate", "-1e-6", "at least 0"),
    ("opsd", "learning_rate", "nan", "at least 0"),
    ("opsd", "weight_decay", "-1", "at least 0"),
    ("opsd", "max_grad_norm", "-1", "at least 0"),
    ("opsd", "warmup_steps", "-3", "at least 0"),
    ("opsd", "adam_beta2", "1.5", "from 0 to 1"),
    ("opsd", "max_steps", "0", "at least 1, or -1"),
    ("opsd", "max_steps", "-2", "at least 1, or -1"),
    ("opsd", "num_train_epochs", "0", "above 0"),
    ("opsd", "logging_steps", "0", "above 0"),
    ("opsd", "save_steps", "0", "above 0"),
    ("opsd", "eval_steps", "-5", "above 0"),
    ("opsd", "seed", "-1", "at least 0"),
    ("opsd", "data_seed", "-1", "at least 0"),
    ("opsd", "dataloader_num_workers", "-1", "at least 0"),
    ("opsd", "qat_group_size", "0", "at least 1"),
    ("opsd", "probe_prompts", "-1", "at least 0"),
    ("opsd", "lora_r", "0", "at least 1"),
    ("opsd", "lora_dropout", "2", "from 0 to 1"),
    ("opsd", "vllm_gpu_memory_utilization", "30", "from 0 to 1"),
    ("opsd", "vllm_tensor_parallel_size", "0", "at least 1"),
    ("rlvr", "max_completion_length", "0", "at least 1"),
    ("rlvr", "num_generations", "-8", "at least 1"),
    ("rlvr", "per_device_train_batch_size", "0", "at least 1"),
    ("rlvr", "gradient_accumulation_steps", "-1", "at least 1"),
    ("rlvr", "num_iterations", "0", "at least 1"),
    ("rlvr", "steps_per_generation", "0", "at least 1"),
    ("rlvr", "temperature", "-0.5", "above 0"),
    ("rlvr", "bank_rollouts_per_prompt", "-1", "at least 0"),
    ("rlvr", "learning_rate", "-1", "at least 0"),
    ("rlvr", "top_p", "1.1", "above 0 and at most 1"),
    ("rlvr", "epsilon", "-0.2", "at least 0"),
    ("tiny", "modulus", "0", "at least 1"),
    ("tiny", "train_size", "0", "at least 1"),
    ("tiny", "test_size", "-1", "at least 1"),
    ("tiny", "hidden_size", "0", "at least 1"),
    ("tiny", "num_layers", "0", "at least 1"),
    ("tiny", "learning_rate", "-1", "at least 0"),
    ("prune", "hidden_size", "-64", "at least 1"),
    ("prune", "num_layers", "0", "at least 1"),
    ("prune", "calibration_samples", "0", "at least 1"),
    ("prune", "max_completion_length", "0", "at least 1"),
    ("prune", "batch_size", "0", "at least 1"),
    ("evaluate", "max_completion_length", "0", "at least 1"),
    ("evaluate", "batch_size", "0", "at least 1"),
    ("evaluate", "num_samples", "0", "at least 1"),
    ("evaluate", "temperature", "0", "above 0"),
    ("evaluate", "top_p", "0", "above 0 and at most 1"),
    ("evaluate", "seed", "-1", "at least 0"),
]


@pytest.mark.parametrize("stage, option, value, expected", OUT_OF_RANGE)
def test_a_number_out_of_its_range(sentence, stage, option, value, expected, tmp_path):
    assert re.match(
        rf"`{option}` must be {expected}.*, and is [-\d.einfa]+\.$", sentence(stage, [f"--{option}={value}"])
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({option: float(value) if "." in value or value in ("nan", "inf") else value}))
    assert re.match(rf"`{option}`( in {recipe})? must be {expected}", sentence(stage, ["--config", recipe]))


def test_the_ranges_are_of_options_that_exist_and_admit_their_defaults():
    seen = set()
    for stage in STAGES:
        for action in Parser(shadows(stage))._actions:
            check_range(action.dest, action.default)
            seen.add(action.dest)
    assert set(RANGES) <= seen, sorted(set(RANGES) - seen)


# What is written on the command line: stage, arguments, message
COMMAND_LINE = [
    ("opsd", "--gatee correct", "Unknown option `--gatee`: did you mean `--gate`?"),
    ("opsd", "--learning-rat=1", "Unknown option `--learning-rat`: did you mean `--learning-rate`?"),
    ("opsd", "--teacher_contxt concise", "Unknown option `--teacher_contxt`: did you mean `--teacher_context`?"),
    ("opsd", "--model runs/rlvr", "Unknown option `--model`"),
    ("opsd", "-lr 1", "Unknown option `-lr`"),
    ("opsd", "runs/rlvr", "`runs/rlvr` belongs to no option"),
    ("opsd", "--gate maybe", "`--gate`: invalid choice: 'maybe'"),
    ("opsd", "--gate", "`--gate`: expected one argument."),
    ("opsd", "--max_steps many", "`--max_steps`: invalid int value: 'many'."),
    ("opsd", "--max_steps 1.5", "`--max_steps`: invalid int value: '1.5'."),
    ("opsd", "--max_steps 1,000", "`--max_steps`: invalid int value: '1,000'."),
    ("opsd", "--learning_rate 1e-6.", "`--learning_rate`: invalid float value: '1e-6.'."),
    ("opsd", "--learning_rate 1e−6", "`--learning_rate`: invalid float value: '1e−6'."),
    ("opsd", "--teacher_weights emma", "`--teacher_weights`: invalid choice: 'emma'"),
    ("opsd", "--teacher_context brief", "`--teacher_context`: invalid choice: 'brief'"),
    ("opsd", "--solution bankk", "`--solution`: invalid choice: 'bankk'"),
    ("opsd", "--qat int2", "`--qat`: invalid choice: 'int2'"),
    ("opsd", "--dtype float31", "`--dtype`: invalid choice: 'float31'"),
    ("opsd", "--optim adamww", "`--optim`: invalid choice: 'adamww'"),
    ("opsd", "--lr_scheduler_type cosin", "`--lr_scheduler_type`: invalid choice: 'cosin'"),
    ("opsd", "--use_vllm perhaps", "`--use_vllm`: Truthy value expected"),
    ("opsd", "--probe_only 2", "`--probe_only`: Truthy value expected"),
    ("opsd", "--config", "`--config` needs the path of a YAML file after it."),
    ("opsd", "--config nowhere.yaml", "There is no config file at `nowhere.yaml`"),
    ("opsd", "--config=nowhere.yaml", "There is no config file at `nowhere.yaml`"),
    ("opsd", "--config trl_opsd", "There is no config file at `trl_opsd`"),
    ("rlvr", "--reward_func math_reward", "Unknown option `--reward_func`: did you mean `--reward_funcs`?"),
    ("rlvr", "--loss_type gspoo --beta x", "`--beta`: invalid float value: 'x'."),
    ("rlvr", "--teacher_weights initial", "Unknown option `--teacher_weights`"),
    ("tiny", "--modulos 7", "Unknown option `--modulos`: did you mean `--modulus`?"),
    ("tiny", "--min_ops two", "`--min_ops`: invalid int value: 'two'."),
    ("prune", "--target_ration 0.5", "Unknown option `--target_ration`: did you mean `--target_ratio`?"),
    ("prune", "--target_ratio half", "`--target_ratio`: invalid float value: 'half'."),
    ("evaluate", "--backend vlm", "`--backend`: invalid choice: 'vlm'"),
    ("evaluate", "--task gsm8k --max_sample 3", "Unknown option `--max_sample`: did you mean `--max_samples`?"),
    ("evaluate", "--concurrency one", "`--concurrency`: invalid int value: 'one'."),
    ("compress", "--smok", "Unknown option `--smok`: did you mean `--smoke`?"),
    ("compress", "--seed zero", "`--seed`: invalid int value: 'zero'."),
]


@pytest.mark.parametrize("stage, line, message", COMMAND_LINE)
def test_a_command_line(sentence, stage, line, message):
    assert sentence(stage, shlex.split(line)).startswith(message)


# What is written into a YAML file: stage, its text, message, in which FILE is its path
YAML = [
    ("opsd", "gate: maybe", "`gate` in FILE is 'maybe', which is none of its values: it takes "),
    ("opsd", "gate: corect", "`gate` in FILE is 'corect', which is none of its values: did you mean `correct`?"),
    ("opsd", "gate: [correct]", "`gate` in FILE is ['correct'], which is none of its values"),
    ("opsd", "teacher_weights: inital", "`teacher_weights` in FILE is 'inital', which is none of its values: did you"),
    ("opsd", "gatee: correct", "Unknown key `gatee` in FILE: did you mean `gate`?"),
    ("opsd", "1: 2", "Unknown key `1` in FILE"),
    ("opsd", "learning_rate: fast", "`learning_rate` in FILE is 'fast', and the option takes a number."),
    ("opsd", "learning_rate: [1.0e-6]", "`learning_rate` in FILE is [1e-06], and the option takes a number."),
    ("opsd", "learning_rate: true", "`learning_rate` in FILE is True, and the option takes a number."),
    ("opsd", "learning_rate: {a: 1}", "`learning_rate` in FILE is {'a': 1}, and the option takes a number."),
    ("opsd", "max_steps: 2.5", "`max_steps` in FILE is 2.5, and the option takes a whole number."),
    ("opsd", "max_steps: '2.5'", "`max_steps` in FILE is '2.5', and the option takes a whole number."),
    ("opsd", "max_steps: yes", "`max_steps` in FILE is True, and the option takes a whole number."),
    (
        "opsd",
        "max_steps: 0",
        "`max_steps` in FILE must be at least 1, or -1 for as many as the epochs have, and is 0.",
    ),
    ("opsd", "use_vllm: perhaps", "`use_vllm` in FILE is 'perhaps', and the option takes true or false."),
    ("opsd", "use_vllm: [true]", "`use_vllm` in FILE is [True], and the option takes true or false."),
    ("opsd", "use_cpu: 2", "`use_cpu` in FILE is 2, and the option takes true or false."),
    ("opsd", "gate: all\ngate: correct", "`gate` stands in FILE 2 times, and only one can count: keep that."),
    ("opsd", "gate: all\nbeta: 1\ngate: all\ngate: all", "`gate` stands in FILE 3 times"),
    ("opsd", "", "`FILE` must hold `key: value` lines, and holds NoneType."),
    ("opsd", "# nothing", "`FILE` must hold `key: value` lines, and holds NoneType."),
    ("opsd", "gate", "`FILE` must hold `key: value` lines, and holds str."),
    ("opsd", "- gate: all", "`FILE` must hold `key: value` lines, and holds list."),
    ("opsd", "gate: all\n beta: 1", "`FILE` is not valid YAML: "),
    ("opsd", "gate: 'all", "`FILE` is not valid YAML: "),
    ("opsd", "gate: all\n\tbeta: 1", "`FILE` is not valid YAML: "),
    ("opsd", "gate: {a", "`FILE` is not valid YAML: "),
    ("opsd", "gate: *nowhere", "`FILE` is not valid YAML: "),
    ("opsd", "gate: a\x00b", "`FILE` is not valid YAML: "),
    ("opsd", "gate: !!python/object/apply:os.system ['true']", "`FILE` is not valid YAML: "),
    ("rlvr", "temperature: hot", "`temperature` in FILE is 'hot', and the option takes a number."),
    ("rlvr", "num_generations: 0", "`num_generations` in FILE must be at least 1, and is 0."),
    ("rlvr", "soft_punish_cache: long", "`soft_punish_cache` in FILE is 'long', and the option takes a whole number."),
    ("tiny", "modulus: seven", "`modulus` in FILE is 'seven', and the option takes a whole number."),
    ("tiny", "train_size: 4k", "`train_size` in FILE is '4k', and the option takes a whole number."),
    ("prune", "target_ratio: 50%", "`target_ratio` in FILE is '50%', and the option takes a number."),
    ("prune", "device: cpu\nlayers: 3", "Unknown key `layers` in FILE: did you mean"),
    ("evaluate", "backend: vlllm", "`backend` in FILE is 'vlllm', which is none of its values: did you mean `vllm`?"),
    ("evaluate", "batch_size: 0", "`batch_size` in FILE must be at least 1, and is 0."),
    ("evaluate", "concurrency: [1, many]", "`concurrency` in FILE is 'many', and the option takes a whole number."),
    ("compress", "smoke: maybe", "`smoke` in FILE is 'maybe', and the option takes true or false."),
    ("compress", "updates: lots", "`updates` in FILE is 'lots', and the option takes a whole number."),
    ("compress", "opsd: a.yaml\nopsd: b.yaml", "`opsd` stands in FILE 2 times"),
]


@pytest.mark.parametrize("stage, text, message", YAML)
def test_a_yaml_file(sentence, stage, text, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert sentence(stage, ["--config", recipe]).startswith(message.replace("FILE", str(recipe)))


def test_a_file_that_is_not_text(sentence, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"gate: \xff\xfe")
    assert "is not text in UTF-8" in sentence("opsd", ["--config", recipe])


def test_what_is_right_passes(tmp_path):
    """Numbers as strings, as YAML reads `1e-6`, switches in words, and an option that overrides a wrong number."""
    recipe, parser = tmp_path / "recipe.yaml", Parser(shadows("opsd"))
    recipe.write_text(
        "learning_rate: 1e-6\nmax_steps: '5'\nuse_cpu: 'yes'\nsave_steps: 0.2\nreward_weights: [1, 2.5]\n"
    )
    parser.check(["--config", str(recipe)])
    recipe.write_text(
        "max_steps: 0\nreport_to: [none]\nlora_target_modules: [q_proj]\nteacher_chat_template_kwargs: {a: 1}"
    )
    parser.check(["--config", str(recipe), "--max_steps", "3", "--lr_scheduler_kwargs", '{"a": 1}'])


# What options say together: stage, arguments beside MORE, message
MORE = {
    "opsd": "--model_name_or_path x --dataset_name y --use_cpu --bf16 false ",
    "rlvr": "--model_name_or_path x --dataset_name y --reward_funcs math_reward --use_cpu --bf16 false ",
    "tiny": "--max_steps 5 --use_cpu --bf16 false ",
    "small": "--max_steps 5 --use_cpu --bf16 false ",
    "prune": "--model_name_or_path x --calibration_dataset y --output_dir z ",
    "evaluate": "--model_name_or_path x --dataset_name y --reward_funcs math_reward ",
    "export": "",
    "plan": "",
    "compress": "",
    "data": "",
}
TOGETHER = [
    ("opsd", "--beta 2", "beta must be in [0.0, 1.0], got 2.0."),
    ("opsd", "--teacher_context concise --teacher_prompt_template '{prompt}x'", "`teacher_prompt_template` takes the place"),
    ("opsd", "--teacher_prompt_template short", "`teacher_prompt_template` has no `{prompt}`"),
    ("opsd", "--teacher_prompt_template '{prompt} {answr}'", "`teacher_prompt_template` has the unknown placeholder"),
    ("opsd", "--teacher_prompt_template '{prompt.__class__}'", "`teacher_prompt_template` has the unknown placeholder"),
    ("opsd", "--teacher_prompt_template '{prompt'", "`teacher_prompt_template` has unbalanced braces"),
    ("opsd", "--keep_shortest 3 --num_generations 2", "`keep_shortest=3` is more than there are rollouts"),
    ("opsd", "--num_generations 3 --per_device_train_batch_size 4", "The global batch of 4 rollouts"),
    ("opsd", "--lmbda 1.5", "`lmbda` must be from 0 to 1, and is 1.5."),
    ("opsd", "--lmbda 0.5 --num_generations 2", "`lmbda=0.5` takes the one completion of a row"),
    ("opsd", "--lmbda 0 --off_policy_steps 3", "`lmbda=0.0` takes every completion from the data set"),
    ("opsd", "--num_iterations 0", "`num_iterations` must be at least 1, and is 0."),
    ("opsd", "--off_policy_steps -1", "`off_policy_steps` must be at least 0, and is -1."),
    ("opsd", "--lmbda 0 --completion_limit_quantile 0.9", "`lmbda=0.0` generates nothing"),
    ("opsd", "--lmbda 0 --max_pass_rate 0.5", "`lmbda=0.0` generates nothing"),
    ("opsd", "--completion_limit_quantile 1.5", "`completion_limit_quantile` must be above 0"),
    ("opsd", "--completion_limit_headroom 0.5", "`completion_limit_headroom` must be at least 1"),
    ("opsd", "--min_pass_rate 0", "`min_pass_rate` must be above 0 and at most 1"),
    ("opsd", "--max_pass_rate 1", "`max_pass_rate` must be at least 0 and below 1"),
    ("opsd", "--min_pass_rate 0.8 --max_pass_rate 0.2", "`min_pass_rate=0.8` is above `max_pass_rate=0.2`"),
    ("opsd", "--log_engine_mismatch", "`log_engine_mismatch` compares vLLM's log-probabilities"),
    ("opsd", "--max_tokens_per_microbatch 100 --pad_to_multiple_of 8", "`max_tokens_per_microbatch` pads as little"),
    ("opsd", "--remove_unused_columns true --gate correct", "`remove_unused_columns=True` drops the columns"),
    ("opsd", """--generation_kwargs '{"stop": ["x"]}'""", "`generation_kwargs` has `stop`"),
    ("opsd", """--generation_kwargs '{"seed": 1}'""", "`generation_kwargs` has `seed`"),
    ("opsd", "--generation_kwargs [1]", "`generation_kwargs` must be a mapping, as JSON on the command line, and is '[1]'."),
    ("opsd", "--generation_kwargs {a", "`generation_kwargs` must be a mapping"),
    ("opsd", "--teacher_chat_template_kwargs 5", "`teacher_chat_template_kwargs` must be a mapping"),
    ("opsd", "--lr_scheduler_kwargs linear", "`lr_scheduler_kwargs` must be a mapping"),
    ("opsd", "--accelerator_config nowhere.json", "There is no file `nowhere.json` for `accelerator_config`"),
    ("opsd", "--fsdp_config nowhere.json", "There is no file `nowhere.json` for `fsdp_config`"),
    ("opsd", "--teacher_gate 2", "`teacher_gate` is a pass rate above 0 and at most 1, and is 2.0"),
    ("opsd", "--teacher_gate 0.5", "`teacher_gate=0.5` decides on which prompts"),
    ("opsd", "--sibling_fallback concise", "`sibling_fallback` is for the sibling context"),
    ("opsd", "--load_best_model_at_end", "--load_best_model_at_end requires the save and eval strategy to match"),
    ("opsd", "--bf16 true --use_cpu false", "Your setup doesn't support bf16/gpu. You need to assign use_cpu"),
    ("opsd", "", "`model_name_or_path`: there is no checkpoint at `x`"),
    ("opsd", "--model_name_or_path runs/no/where", "`model_name_or_path`: there is no folder `runs/no/where`"),
    ("opsd", "--model_name_or_path ./nowhere", "`model_name_or_path`: there is no folder `./nowhere`"),
    ("opsd", "--resume_from_checkpoint nowhere", "`resume_from_checkpoint`: `nowhere` cannot be resumed from"),
    ("rlvr", "--num_generations 1", "GRPO requires at least 2 generations per prompt"),
    ("rlvr", "--num_generations 3", "generation_batch_size (8) must be divisible by num_generations (3)."),
    ("rlvr", "--loss_type gspoo", "`loss_type` must be one of grpo, bnpo"),
    ("rlvr", "--scale_rewards std", "`scale_rewards` must be one of group, batch, none, and is 'std'."),
    ("rlvr", "--importance_sampling_level word", "`importance_sampling_level` must be one of token, sequence"),
    ("rlvr", "--vllm_mode remote", "`vllm_mode` must be one of server, colocate, and is 'remote'."),
    ("rlvr", "--max_generation_rounds 2 --scale_rewards batch", "`max_generation_rounds=2` and `scale_rewards='batch'`"),
    ("rlvr", "--soft_punish_cache 9999", "`soft_punish_cache` must be from 1 to `max_completion_length`"),
    ("rlvr", "--log_engine_mismatch", "`log_engine_mismatch` compares vLLM's log-probabilities"),
    ("rlvr", "--model_name_or_path /nowhere", "`model_name_or_path`: there is no folder `/nowhere`"),
    ("tiny", "--modulus 11", "`modulus` is 11 and must be from 2 to 10"),
    ("tiny", "--min_ops 5 --max_ops 2", "`min_ops` is 5 and `max_ops` is 2"),
    ("tiny", "--max_ops 99", "`min_ops` is 1 and `max_ops` is 99"),
    ("tiny", "--median_ops 90", "`median_ops` is 90.0 and must lie between"),
    ("tiny", "--short_ways_max_ops 90", "`short_ways_max_ops` is 90 and must lie between"),
    ("tiny", "--verbosity 0", "`verbosity` is 0 and must be at least 1"),
    ("tiny", "--target_accuracy 97", "`target_accuracy` is 97.0 and must be from 0 to 1."),
    ("tiny", "--slip_steps -1", "`slip_steps` must be at least 0, and is -1."),
    ("tiny", "--accuracy_problems 0", "`accuracy_problems` must be at least 1, and is 0."),
    ("tiny", "--output_dir tests", "`output_dir`: `tests` exists already"),
    ("tiny", "--output_dir runs/x --max_ops 1 --train_size 9999", "There are only "),
    ("tiny", "--output_dir README.md/x", "`output_dir`: the folder `README.md/x.partial` cannot be written"),
    ("tiny", "--output_dir runs/x --num_heads 4 --num_key_value_heads 3", "`num_heads` is 4 and `num_key_value_heads` is 3"),
    ("small", "--taught sums", "`taught` has `sums`, and the families are"),
    ("small", "--taught_difficulty 9", "`taught_difficulty` is 9 and must be from 0 to 3."),
    ("small", "--posed sums", "`posed` has `sums`, and the families are"),
    ("small", "--posed_difficulty 0", "`posed_difficulty` is 0 and must be from 1 to 3."),
    ("small", "--drill_share 2", "`drill_share` is 2.0 and must be from 0 to 1."),
    ("small", "--accuracy_steps 0", "`accuracy_steps` must be at least 1, and is 0."),
    ("small", "--output_dir README.md/x", "`output_dir`: the folder `README.md/x` cannot be written"),
    ("prune", "", "Nothing to prune: set `target_ratio`, or any of"),
    ("prune", "--target_ratio 1.5", "`target_ratio` is the share of the parameters to remove"),
    ("prune", "--target_ratio 0.5 --num_layers 1", "`target_ratio` chooses the sizes"),
    ("prune", "--num_layers 1 --device moon", "`device`: this machine has no `moon`"),
    ("prune", "--num_layers 1", "`model_name_or_path`: there is no checkpoint at `x`"),
    ("evaluate", "--tasks gsm8k", "`dataset_name` and `tasks` exclude each other"),
    ("evaluate", "--checkpoints a=b", "`checkpoints` excludes `model_name_or_path`"),
    ("evaluate", "--decoding beam", "`decoding` must list 'greedy', 'sampled' or both, and is ['beam']."),
    ("evaluate", "--pass_at_k 8 --decoding sampled", "`pass_at_k` 8 needs as many samples"),
    ("evaluate", "--thinking_budget 2000", "`thinking_budget` 2000 leaves nothing"),
    ("evaluate", "--thinking_budget 5 --concurrency 1", "`thinking_budget` and `concurrency` exclude"),
    ("evaluate", "--thinking_tags a", "`thinking_tags` are what opens and what closes thinking"),
    ("evaluate", "--prompt_only true --prompt_template concise", "`prompt_only` adds a `prompt_template` of its own"),
    ("evaluate", "--prompt_template '{prompt} {x}'", "`prompt_template` has the unknown placeholder"),
    ("evaluate", "--server_url http://localhost:1", "`server_url` is for `backend: server`"),
    ("evaluate", "--rescore", "`rescore` needs the generations of an earlier run"),
    ("evaluate", "--output tests", "`output` must be a JSON file, and `tests` is a folder"),
    ("evaluate", "--device moon", "`device`: this machine has no `moon`"),
    ("evaluate", "--task_options {a", "`task_options` is not valid JSON"),
    ("evaluate", "--vllm_kwargs [1]", "`vllm_kwargs` must be a mapping"),
    ("evaluate", "--stop ''", "`stop` has an empty text"),
    ("export", "", "`formats` is missing: name any of"),
    ("export", "--formats ggufs --output_dir z --dataset_name y", "`formats`"),
    ("export", "--formats gguf --dataset_name y", "`output_dir` is missing"),
    ("export", "--formats w8a8 --output_dir z --dataset_name y", "`bank` is missing, and w8a8 must be calibrated"),
    ("plan", "", "`model_name_or_path` is missing: give the folder of a checkpoint"),
    ("plan", "--model_name_or_path /nowhere", "`model_name_or_path`: there is no folder `/nowhere`"),
    ("plan", "--num_processes 0", "`num_processes` must be at least 1, and is 0."),
    ("compress", "", "`model_name_or_path` is missing: give a checkpoint and prompts"),
    ("compress", "--opsd nowhere.yaml", "`evaluate` is missing: give its recipe, a YAML file."),
    ("compress", "--opsd nowhere.yaml --evaluate b.yaml", "There is no recipe at `nowhere.yaml` for `opsd`"),
    ("compress", "--model_name_or_path x --dataset_name y --updates 5", "`updates` is of a chain of recipes"),
    ("compress", "--model_name_or_path x", "`dataset_name` is missing"),
    ("data", "--train nowhere.jsonl --evaluation nowhere.jsonl", "There is no data at `nowhere.jsonl`: check the path."),
    ("data", "--train x.csv --evaluation y", "There is no data at `x.csv`: check the path."),
]  # fmt: skip


@pytest.mark.parametrize("stage, line, message", TOGETHER)
def test_options_together(sentence, stage, line, message):
    found = sentence(stage, shlex.split(MORE[stage] + line))
    assert found.startswith(message), found


def test_no_arguments_at_all(sentence):
    """What is asked for first is what there is no run without, and not what the machine lacks."""
    for stage in ("opsd", "rlvr"):
        assert sentence(stage, []).startswith(
            "`model_name_or_path` is missing: give the folder of a checkpoint or a model"
        )
        assert sentence(stage, ["--model_name_or_path", "x"]).startswith(
            "`dataset_name` is missing: give a dataset, a file"
        )
    assert sentence("rlvr", ["--model_name_or_path", "x", "--dataset_name", "y"]).startswith(
        "`reward_funcs` is missing"
    )
    for stage in ("tiny", "small"):
        assert sentence(stage, []).startswith("`max_steps` is missing: give the ")


def test_processes_that_are_not_there(sentence, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert sentence("opsd", ["--help"]).startswith(
        "`accelerate launch` was asked for several processes and has started one"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "is missing" in sentence("prune", [])


# What is in the files: stage, rows, arguments, message
GOOD = {"prompt": [{"role": "user", "content": "3 a:-4"}], "answer": "6", "solution": "3 a:-4=6"}
USUAL = {
    "opsd": "--dataset_name DATA --output_dir OUT --use_cpu --bf16 false --report_to none --max_steps 1 "
    "--per_device_train_batch_size 4 --max_completion_length 8 --gradient_checkpointing false "
    f"--reward_funcs math_reward --teacher_prompt_template '{CONCISE_TEMPLATE}' ",
    "rlvr": "--dataset_name DATA --output_dir OUT --use_cpu --bf16 false --report_to none --max_steps 1 "
    "--per_device_train_batch_size 4 --max_completion_length 8 --num_generations 2 --reward_funcs math_reward ",
    "evaluate": "--dataset_name DATA --reward_funcs math_reward --max_completion_length 8 --device cpu ",
    "prune": "--calibration_dataset DATA --output_dir OUT --num_layers 1 --device cpu ",
}


def chat(*turns):
    return {"prompt": [{"role": role, "content": content} for role, content in turns]}


def bad(**changes):
    """Eight rows, the fourth of which has something else in it, or lacks it."""
    rows = [dict(GOOD) for _ in range(8)]
    rows[3] = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    return rows


def without(column):
    return [{name: value for name, value in GOOD.items() if name != column} for _ in range(8)]


LONG = "3 " + "a:-4 " * 1_000_000  # 5 MB
FOURTH = "`DATA`, row 4: "
FILES = [
    # what is no table
    ("opsd", "", "", "`DATA` (split `train`) has no rows"),
    ("opsd", "\n \n", "", "`DATA` (split `train`) has no rows"),
    ("opsd", "[]", "", "`DATA` (split `train`) has no rows"),
    ("opsd", '{"prompt": "a"', "", "`DATA`, line 1: not valid JSON"),
    ("opsd", '{"prompt": "a"}\n{"prompt": }', "", "`DATA`, line 2: not valid JSON"),
    ("opsd", '[{"prompt": "a"}', "", "`DATA` is not valid JSON"),
    ("opsd", '{"prompt": "a", "prompt": "b"}', "", "`DATA`, line 1: not valid JSON ('prompt' is there twice"),
    ("opsd", '{"prompt": "a", "answer": NaN}', "", "`DATA`, line 1: not valid JSON (NaN is not a number that JSON has)"),
    ("opsd", '"text"', "", "`DATA`, row 1: a row must be a JSON object, and this is a str."),
    ("opsd", "[[1]]", "", "`DATA`, row 1: a row must be a JSON object, and this is a list."),
    ("opsd", "prompt,answer\na,1\n", "", "`DATA`, line 1: not valid JSON"),
    ("opsd", "\xff\xfe", "", "`DATA` is not UTF-8 text (byte 0): save it as UTF-8."),
    ("opsd", "PAR1", "", "`DATA`, line 1: not valid JSON"),
    ("opsd", '{"prompt": "a"}\n{"prompt": ["a"]}', "", "`DATA` cannot be read as a table with one type per column"),
    # what is no row
    ("opsd", without("prompt"), "", "The data set `DATA` needs the column `prompt`"),
    ("opsd", without("answer"), "", "The verifier `math_reward` needs the column `answer`"),
    ("rlvr", without("answer"), "", "The verifier `math_reward` needs the column `answer`"),
    ("evaluate", without("answer"), "", "The verifier `math_reward` needs the column `answer`"),
    ("opsd", without("solution"), "--teacher_prompt_template '{prompt} {solution}'", "The teacher context needs the column `sol"),
    ("opsd", without("solution"), "--teacher_prompt_template '{prompt} {privileged_context}'", "The teacher context needs the"),
    ("opsd", bad(prompt=...), "", FOURTH + "`prompt` must be a text, or messages"),
    ("opsd", bad(prompt=[]), "", FOURTH + "`prompt` must be a text, or messages"),
    ("opsd", bad(**chat(("user", ""))), "", FOURTH + "`prompt` must be a text, or messages"),
    ("opsd", bad(**chat(("user", None))), "", FOURTH + "`prompt` must be a text, or messages"),
    ("opsd", bad(prompt=[{"role": "user"}]), "", FOURTH + "`prompt` must be a text, or messages"),
    ("opsd", bad(prompt=[{"content": "3 a:-4"}]), "", FOURTH + "`prompt` must be a text, or messages"),
    ("opsd", [{**GOOD, "prompt": 5}] * 8, "", "`DATA`, row 1: `prompt` must be a text, or messages"),
    ("opsd", [{**GOOD, "prompt": " "}] * 8, "", "`DATA`, row 1: `prompt` must be a text, or messages"),
    ("opsd", bad(**chat(("user", "3 \x00"))), "", FOURTH + "`prompt` must be a text, or messages with `role` and `content`, without null"),
    ("rlvr", bad(**chat(("user", "3 \x00"))), "", FOURTH + "`prompt` must be a text"),
    ("evaluate", bad(**chat(("user", "3 \x00"))), "", FOURTH + "`prompt` must be a text"),
    ("prune", bad(**chat(("user", "3 \x00"))), "", FOURTH + "`prompt` must be a text"),
    ("opsd", bad(answer="\x00"), "", FOURTH + "`answer` must be a text without null bytes or a number"),
    ("opsd", bad(solution="a\x00"), "", FOURTH + "`solution` must be a text without null bytes"),
    ("opsd", [{**GOOD, "answer": True}] * 8, "", "`DATA`, row 1: `answer` must be a text"),
    ("opsd", [{**GOOD, "answer": ["6"]}] * 8, "", "`DATA`, row 1: `answer` must be a text"),
    ("opsd", [{**GOOD, "answer": ""}] * 8, "", "`DATA`: no `answer` can be read as mathematics or words"),
    ("opsd", [{**GOOD, "solution": 5}] * 8, "", "`DATA`, row 1: `solution` must be a text"),
    ("opsd", bad(solution=...), "--teacher_prompt_template '{prompt} {solution}'", "The teacher context needs `solution`, and it is empty"),
    # whose turn it is
    ("opsd", bad(**chat(("usr", "3 a:-4"))), "", FOURTH + "`prompt` has the role 'usr', which is none of system"),
    ("opsd", bad(**chat(("User", "3 a:-4"))), "", FOURTH + "`prompt` has the role 'User'"),
    ("opsd", bad(**chat(("assistant", "3 a:-4"))), "", FOURTH + "the roles of `prompt` are assistant, and the last message"),
    ("opsd", bad(**chat(("user", "3 a:-4"), ("assistant", "6"))), "", FOURTH + "the roles of `prompt` are user, assistant"),
    ("opsd", bad(**chat(("user", "3 a:-4"), ("system", "3"))), "", FOURTH + "the roles of `prompt` are user, system, and the last"),
    ("opsd", bad(**chat(("system", "3"))), "", FOURTH + "the roles of `prompt` are system, and the last message"),
    ("opsd", bad(**chat(("user", "3"), ("tool", "3"))), "", "A teacher context needs prompts that end in a user turn"),
    ("rlvr", bad(**chat(("user", "3 a:-4"), ("assistant", "6"))), "", FOURTH + "the roles of `prompt` are user, assistant"),
    ("rlvr", bad(**chat(("bot", "3 a:-4"))), "", FOURTH + "`prompt` has the role 'bot'"),
    ("rlvr", bad(**chat(("user", "3 a:-4"), ("ipython", "6"), ("assistant", "6"))), "", FOURTH + "the roles of `prompt` are user, ipython"),
    ("evaluate", bad(**chat(("assistant", "3 a:-4"))), "", FOURTH + "the roles of `prompt` are assistant"),
    ("prune", bad(**chat(("user", "3"), ("system", "3"))), "", FOURTH + "the roles of `prompt` are user, system"),
    ("opsd", bad(**chat(("user", "3 a:-4<|im_end|>"))), "", "In 1 of 8 rows the last message of `prompt` spells a special token"),
    # what does not fit the model, or the run
    ("opsd", bad(**chat(("user", LONG))), "", "`DATA`: in 1 of 8 rows `prompt` is longer than the 504 tokens"),
    ("rlvr", bad(**chat(("user", LONG))), "", "`DATA`: in 1 of 8 rows `prompt` is longer than the 504 tokens"),
    ("rlvr", bad(**chat(("user", "héllo"))), "--max_completion_length 500", FOURTH + "the tokenizer of `MODEL` cannot write this"),
    ("opsd", bad(), "--max_completion_length 512", "`max_completion_length=512` leaves no room for a prompt in the 512"),
    ("rlvr", bad(), "--max_completion_length 9999", "`max_completion_length=9999` leaves no room for a prompt"),
    ("opsd", bad(), "--teacher_prompt_template '{prompt} briefly'", "The tokenizer of `MODEL` cannot write the teacher's prompt"),
    ("opsd", bad(), "--qat int4 --qat_group_size 64", "`qat: int4` scales groups of 64 input channels"),
    ("opsd", bad(), "--qat int8 --use_peft", "`qat` rounds the weights of the whole student"),
    ("opsd", bad(), "--use_vllm", "`use_vllm` needs vLLM: run `pip install vllm`"),
    ("rlvr", bad(), "--use_vllm", "`use_vllm` needs vLLM: run `pip install vllm`"),
    ("opsd", bad(), "--per_device_train_batch_size 9", "The training data has 8 prompts and a batch takes 9"),
    ("rlvr", bad(), "--per_device_train_batch_size 32", "The training data has 8 prompts and a batch takes 16"),
    ("opsd", bad(), "--output_dir DATA/x", "`output_dir`: the folder `DATA/x` cannot be written"),
    ("rlvr", bad(), "--output_dir DATA", "`output_dir`: the folder `DATA` cannot be written"),
    ("opsd", bad(), "--output_dir /proc/x", "`output_dir`: the folder `/proc/x` cannot be written"),
    ("prune", bad(), "--output_dir DATA/x", "`output_dir`: the folder `DATA/x` cannot be written"),
    ("evaluate", bad(), "--output DATA/x.json", "`output`: the folder `DATA` cannot be written"),
    ("prune", bad(), "--output_dir MODEL", "`output_dir` is the checkpoint that is to be pruned"),
    ("prune", bad(), "--num_layers 9", "`num_layers`"),
    ("opsd", bad(), "--reward_funcs mathreward", "Unknown reward function `mathreward`"),
    ("opsd", bad(), "--reward_funcs json.nothing", "The reward function `json.nothing` cannot be imported"),
    ("opsd", bad(), "--reward_funcs json.decoder", "The reward function `json.decoder` is a module, not a function."),
    ("opsd", bad(), "--reward_funcs code_reward", "The verifier `code_reward` needs the column `tests`"),
    ("opsd", bad(), "--reward_weights 1 2", "`reward_weights` has 2 entries and `reward_funcs` 1"),
    ("rlvr", bad(), "--reward_weights 1 2", "`reward_weights` has 2 entries and `reward_funcs` 1"),
    ("opsd", bad(), "--probe_difficulty levl", "`probe_difficulty` needs the column `levl`"),
    ("opsd", bad(), "--eval_strategy steps --eval_steps 1 --dataset_name nowhere", "The split `train` of `nowhere` cannot be loaded"),
    ("opsd", bad(), "--probe_only --probe_prompts 0", "`probe_only` needs prompts to probe"),
    ("opsd", bad(), "--solution bank", "`solution: bank` needs a bank"),
    ("opsd", bad(), "--rollout_bank nowhere", "`rollout_bank` is used for nothing"),
    ("opsd", bad(), "--lmbda 0.5", "`lmbda=0.5` takes completions from the column `completion_ids`"),
    ("opsd", bad(), "--use_liger_kernel --kl_clip 1", "`use_liger_kernel=True` and `kl_clip` exclude each other"),
    ("opsd", bad(), "--teacher_weights external", "`teacher_weights='external'` needs a teacher model"),
    ("opsd", bad(), "--teacher_model_name_or_path nowhere/at/all", "`teacher_model_name_or_path`: there is no folder"),
    ("opsd", bad(), "--output_dir MODEL", "`output_dir` is `model_name_or_path` (`MODEL`), which would be overwritten"),
    (
        "opsd",
        bad(),
        "--teacher_model_name_or_path MODEL --output_dir MODEL/.",
        "`output_dir` is `model_name_or_path` (`MODEL`), which would be overwritten",
    ),
    ("rlvr", bad(), "--output_dir MODEL", "`output_dir` is `model_name_or_path` (`MODEL`), which would be overwritten"),
    ("evaluate", bad(), "--system_prompt 3 --dataset_name nowhere.jsonl", "There is no data at `nowhere.jsonl`"),
    ("evaluate", bad(), "--concurrency 9", "`concurrency` 9 needs at least as many requests"),
    ("evaluate", bad(), "--max_completion_length 512", "The shortest prompt of `DATA` has "),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from conftest import SMALL

    from trl_opsd.tiny.model import make_model
    from trl_opsd.tiny.tokenizer import make_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    make_model(SMALL, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage, rows, line, message", FILES)
def test_a_file(sentence, tmp_path, model, stage, rows, line, message):
    data = tmp_path / "rows.jsonl"
    if isinstance(rows, str):
        data.write_bytes(rows.encode("latin-1"))
    else:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"DATA": data, "MODEL": model, "OUT": tmp_path / "out"}

    def fill(text):
        for name, value in names.items():
            text = text.replace(name, str(value))
        return text

    args = shlex.split(fill(f"--model_name_or_path MODEL {USUAL[stage]} {line}"))
    found = sentence(stage, args)
    assert found.startswith(fill(message)), found


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data.__main__", "--train DATA --evaluation DATA --output DATA/x.jsonl"),
        ("compress.__main__", "--config recipes/tiny/compress.yaml --output_dir DATA"),
        ("compress.bank", "--model_name_or_path MODEL --dataset_name DATA --max_completion_length 8 --bank DATA --output x.json"),
        ("compress.bank", "--model_name_or_path MODEL --dataset_name DATA --max_completion_length 8 --bank BANK --output DATA/x"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, model, capsys, module, line):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in bad()))
    for name, value in {"DATA": data, "MODEL": model, "BANK": tmp_path / "bank"}.items():
        line = line.replace(name, str(value))
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"trl_opsd.{module}").main(shlex.split(line))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert f"the folder `{data}` cannot be written" in error


def test_there_are_enough_of_them():
    number = sum(len(set(map(repr, table))) for table in (OUT_OF_RANGE, COMMAND_LINE, YAML, TOGETHER, FILES))
    assert number >= 300, number
