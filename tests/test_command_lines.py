"""How the command lines of the stages answer: at once, in one sentence, and without lines that nobody can act on."""

import importlib
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from trl_opsd import cli
from trl_opsd.cli import Parser, UserError, parse
from trl_opsd.compress.__main__ import ARGUMENTS as COMPRESS
from trl_opsd.data.__main__ import ARGUMENTS as DATA
from trl_opsd.evaluate.__main__ import ARGUMENTS as EVALUATE
from trl_opsd.export.__main__ import ARGUMENTS as EXPORT
from trl_opsd.opsd.__main__ import ARGUMENTS as OPSD
from trl_opsd.opsd.__main__ import main
from trl_opsd.plan.__main__ import ARGUMENTS as PLAN
from trl_opsd.prune.__main__ import ARGUMENTS as PRUNE
from trl_opsd.rlvr.__main__ import ARGUMENTS as RLVR
from trl_opsd.shadows import Computed, Unreadable, read_dataclass
from trl_opsd.small.__main__ import ARGUMENTS as SMALL
from trl_opsd.tiny.__main__ import ARGUMENTS as TINY


ROOT = Path(__file__).parents[1]
STAGES = {
    "data": DATA,
    "tiny": TINY,
    "small": SMALL,
    "rlvr": RLVR,
    "prune": PRUNE,
    "opsd": OPSD,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "plan": PLAN,
    "compress": COMPRESS,
}


def load(name):
    module, _, class_name = name.rpartition(".")
    return getattr(importlib.import_module(module), class_name)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_read_from_the_source_is_what_the_classes_have(stage):
    """Fails with the option's name where an upgrade of TRL or transformers writes something that cannot be read."""
    read, real = (Parser(list(map(get, STAGES[stage]))) for get in (read_dataclass, load))
    plain = lambda value: value.value if isinstance(value, Enum) else value  # noqa: E731
    assert [action.option_strings for action in read._actions] == [action.option_strings for action in real._actions]
    for found, true in zip(read._actions, real._actions, strict=True):
        name = true.option_strings[-1]
        assert (found.dest, found.nargs, found.help) == (true.dest, true.nargs, true.help), name
        if true.dest == "optim":  # depends on the version of torch
            assert isinstance(found.default, Computed)
        else:
            assert plain(found.default) == plain(true.default), name
        if true.dest in ("log_level", "log_level_replica"):  # the keys of a table of transformers' logging
            assert found.choices is None
        else:
            assert (found.choices and list(found.choices)) == (true.choices and list(true.choices)), name
        if true.type in (int, float, str, dict):
            assert found.type is true.type, name
    help_of_shadows = read.format_help().replace(" = computed", "").splitlines()
    assert len(help_of_shadows) == len(real.format_help().splitlines())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("args, code", [(["--help"], 0), (["--xyzzyxyzzy", "1"], 2)])
def test_an_answer_needs_no_heavy_imports(stage, args, code):
    program = (
        f"import sys\nfrom trl_opsd.{stage}.__main__ import main\n"
        f"try:\n    main({args})\nexcept SystemExit as end:\n    assert end.code == {code}, end.code\n"
        "print('imported', *{'torch', 'transformers', 'datasets', 'peft', 'pandas'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].split() == ["imported"]
    expected = (
        "" if code == 0 else "error: Unknown option `--xyzzyxyzzy`: remove it, or see --help for those there are.\n"
    )
    assert result.stderr == expected


@pytest.mark.parametrize(
    "args, message",
    [
        (["--gatee", "correct"], "Unknown option `--gatee`: did you mean `--gate`?"),
        (["--learning-rat=1"], "Unknown option `--learning-rat`: did you mean `--learning-rate`?"),
        (["--gate", "maybe"], "`--gate`: invalid choice: 'maybe' (choose from "),
        (["--lr_scheduler_type", "cosin"], "`--lr_scheduler_type`: invalid choice: 'cosin' (choose from "),
        (["--max_steps"], "`--max_steps`: expected one argument."),
        (["--max_steps", "many"], "`--max_steps`: invalid int value: 'many'."),
        (["--probe_only", "perhaps"], "`--probe_only`: Truthy value expected"),
        (["--gate", "all", "correct"], "`correct` belongs to no option"),
        (["--config"], "`--config` needs the path of a YAML file after it."),
        (["--config=nowhere.yaml"], "There is no config file at `nowhere.yaml`"),
    ],
)
def test_a_mistake_is_one_sentence_and_found_first(args, message, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_load", lambda name: pytest.fail("the classes were imported first"))
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}"), lines


def test_without_sources_the_classes_answer(monkeypatch):
    def unreadable(name):
        raise Unreadable(name)

    monkeypatch.setattr(cli, "read_dataclass", unreadable)
    with pytest.raises(UserError, match="Unknown option `--gatee`: did you mean `--gate`?"):
        parse(OPSD, ["--gatee", "correct"])


def test_every_way_of_writing_an_option_reaches_the_configuration(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gate: all\nlmbda: 0.5\nlearning_rate: 1e-3\nuse_cpu: true\nbf16: false\nmin_p: 0.5\n")
    script_args, config, model_args = parse(
        OPSD,
        [f"--config={recipe}", "--output_dir", str(tmp_path), "--reward_funcs", "first", "second", "--probe_only"]
        + [
            "--no_average_tokens_across_devices",
            "--no-shuffle-dataset",
            "--max-steps",
            "-1",
            "--learning_rate=0.5",
            "--gate_threshold=-0.5",
        ]
        + ["--teacher_chat_template_kwargs", '{"a": 1}', "--lora_r=4", "--beta", "0.25"],
    )
    assert script_args.reward_funcs == ["first", "second"] and script_args.probe_only is True
    assert config.average_tokens_across_devices is False and config.shuffle_dataset is False
    assert (config.gate, config.lmbda, config.learning_rate, config.gate_threshold, config.max_steps) == (
        "all",
        0.5,
        0.5,
        -0.5,
        -1,
    )
    assert (config.teacher_chat_template_kwargs, config.beta, config.min_p) == ({"a": 1}, 0.25, 0.5)
    assert model_args.lora_r == 4 and type(config).__mro__[1].__name__ == "DistillationConfig"


def test_the_help_text_puts_what_is_ours_first(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = Parser([read_dataclass(name) for name in OPSD], prog="trl_opsd.opsd").format_help().splitlines()
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert heads[-7:] == [
        "OPSDScriptArguments",
        "OPSDConfig",
        "Inherited from ScriptArguments of trl",
        "Inherited from DistillationConfig of trl",
        "Inherited from _BaseConfig of trl",
        "Inherited from TrainingArguments of transformers",
        "Inherited from ModelConfig of trl",
    ]
    assert "  --gate correct|incorrect|all" in lines[: lines.index(heads[-5])]
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(set(names)) == len(names) > 150


def test_a_command_prints_nothing_that_nobody_can_act_on(tmp_path):
    command = [sys.executable, "-m", "trl_opsd.tiny", "--config", "recipes/tiny/sft.yaml", "--train_size", "64"]
    command += ["--test_size", "8", "--accuracy_problems", "4", "--accuracy_steps", "1", "--target_accuracy", "0"]
    command += [
        "--max_steps",
        "1",
        "--slip_steps",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
        "--disable_tqdm",
        "true",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("Writing model shards")] == []


def test_only_those_lines_are_left_out():
    program = (
        "import logging, warnings\nfrom trl_opsd.cli import silence\n{}"
        "logging.getLogger('torchao').warning('Failed to load x.so')\n"
        "logging.getLogger('torchao').warning('int4 is slow here')\n"
        "for module in ('transformers.training_args', 'mine'):\n"
        "    for name in ('gradient_checkpointing', 'warmup_ratio'):\n"
        "        text = f'`{{name}}` is deprecated'\n"
        "        warnings.warn_explicit(text, FutureWarning, module, len(name), module=module)\n"
    )
    for silenced, expected in (("silence()\n", 4), ("", 6)):
        result = subprocess.run(
            [sys.executable, "-c", program.format(silenced)], capture_output=True, text=True, cwd=ROOT
        )
        assert result.returncode == 0 and len(result.stderr.splitlines()) == expected, result.stderr
