"""
What people type wrongly, as one table: option by option, each with the one sentence that names it and the fix.

All of it is found before anything is imported. Mistakes that only the data or the checkpoint shows are in the tests of
the stages (`test_opsd_cli`, `test_opsd_arguments`, `test_rlvr`, `test_prune`, `test_evaluate_runs`, `test_data`).
"""

import re
from functools import cache

import pytest
import yaml

from trl_opsd.cli import Parser, UserError
from trl_opsd.compress.__main__ import ARGUMENTS as COMPRESS
from trl_opsd.evaluate.__main__ import ARGUMENTS as EVALUATE
from trl_opsd.export.__main__ import ARGUMENTS as EXPORT
from trl_opsd.opsd.__main__ import ARGUMENTS as OPSD
from trl_opsd.plan.__main__ import ARGUMENTS as PLAN
from trl_opsd.prune.__main__ import ARGUMENTS as PRUNE
from trl_opsd.ranges import RANGES, check_range
from trl_opsd.rlvr.__main__ import ARGUMENTS as RLVR
from trl_opsd.shadows import read_dataclass
from trl_opsd.tiny.__main__ import ARGUMENTS as TINY


STAGES = {"tiny": TINY, "rlvr": RLVR, "prune": PRUNE, "opsd": OPSD, "evaluate": EVALUATE}
STAGES |= {"export": EXPORT, "plan": PLAN, "compress": COMPRESS}


@cache
def shadows(stage):
    return [read_dataclass(name) for name in STAGES[stage]]


def check(stage, args):
    Parser(shadows(stage)).check(args)


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
def test_a_number_out_of_its_range(stage, option, value, expected, tmp_path):
    with pytest.raises(ValueError, match=rf"^`{option}` must be {expected}.*, and is [-\d.einfa]+\.$"):
        check(stage, [f"--{option}={value}"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({option: float(value) if "." in value or value in ("nan", "inf") else value}))
    with pytest.raises(ValueError, match=rf"^`{option}`( in {recipe})? must be {expected}"):
        check(stage, ["--config", str(recipe)])


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
    ("opsd", "--config=nowhere.yaml", "Unknown option `--config`"),
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
def test_a_command_line(stage, line, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        check(stage, line.split())
    assert "\n" not in str(error.value)


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
def test_a_yaml_file(stage, text, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('FILE', str(recipe)))}") as error:
        check(stage, ["--config", str(recipe)])
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_text(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"gate: \xff\xfe")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        check("opsd", ["--config", str(recipe)])


def test_what_is_right_passes(tmp_path):
    """Numbers as strings, as YAML reads `1e-6`, switches in words, and an option that overrides a wrong number."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 1e-6\nmax_steps: '5'\nuse_cpu: 'yes'\nsave_steps: 0.2\nreward_weights: [1, 2.5]\n"
    )
    check("opsd", ["--config", str(recipe)])
    recipe.write_text(
        "max_steps: 0\nreport_to: [none]\nlora_target_modules: [q_proj]\nteacher_chat_template_kwargs: {a: 1}"
    )
    check("opsd", ["--config", str(recipe), "--max_steps", "3", "--lr_scheduler_kwargs", '{"a": 1}'])
