"""The pull requests for TRL: computed, applied in turn to a copy of the installed TRL, and tested there."""

import ast
import dataclasses
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_hub
import trl

from scripts import upstream
from scripts.upstream import STEPS, build, without
from trl_opsd import OPSDConfig


ROOT = Path(__file__).parents[1]
# Files of TRL's repository that its package does not carry, and which steps say something there
INSERTED = {"_toctree.yml": ["07-verifiers"], "paper_index.md": ["08-gate", "12-teacher-weights"]}
# As far as the steps need it, what TRL's tests share
TESTING_UTILS = """
import pytest


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def a_folder(self, tmp_path):
        self.tmp_dir = str(tmp_path)


def require_peft(test):
    return test
"""
TEST_OF_EXAMPLE = """
import json
import subprocess
import sys


def test_it_trains_and_saves(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1?"}], "solution": f"$\\\\boxed{{{n + 1}}}$"} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    options = {"model_name_or_path": "trl-internal-testing/tiny-Qwen3ForCausalLM", "dataset_name": tmp_path}
    options |= {"teacher_context": "concise", "gate": "all", "num_generations": 2, "max_completion_length": 4}
    options |= {"per_device_train_batch_size": 2, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    options |= {"output_dir": tmp_path / "trained"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "examples/scripts/opsd.py", *words], check=True)
    assert (tmp_path / "trained" / "model.safetensors").is_file()
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream") / "kit"
    return folder, build(folder)


def names_of(kit):
    return [name for name, _ in kit[1]]


# Leaving out


@pytest.mark.parametrize(
    "source, absent, expected",
    [
        ("a = 1\nb = x\nc = b\nd = a\n", "x", "a = 1\nd = a\n"),  # what follows from it is absent, too
        ("# of x\nx = 1\n# of a\na = 1\n", "x", "# of a\na = 1\n"),
        ("if x is None:\n    a = 1\n", "x", "a = 1\n"),
        ("if x:\n    a = 1\nelse:\n    a = 2\n", "x", "a = 2\n"),
        ("if x:\n    a = 1\nelif b:\n    a = 2\n", "x", "if b:\n    a = 2\n"),
        ("if c:\n    a = 1\nelif x:\n    a = 2\nelif b:\n    a = 3\n", "x", "if c:\n    a = 1\nelif b:\n    a = 3\n"),
        ("if c:\n    a = 1\nelif x:\n    a = 2\nelse:\n    a = 3\n", "x", "if c:\n    a = 1\nelse:\n    a = 3\n"),
        ("if c:\n    a = 1\nelif x:\n    a = 2\n", "x", "if c:\n    a = 1\n"),
        ("if c:\n    a = 1\nelif x:\n    a = 2\nelif b:\n    x()\n", "x", "if c:\n    a = 1\n"),
        ("if not x and b:\n    a = 1\n", "x", "if b:\n    a = 1\n"),
        ("if x > 1 and b:\n    a = 1\n", "x", ""),
        ("if x > 1 or b:\n    a = 1\n", "x", "if b:\n    a = 1\n"),
        ("if b:\n    f(x.y)\n", "x", ""),
        ("a = f(b, c=1, x=2)\n", "x", "a = f(b, c=1, )\n"),
        ("a, b = x, c\n", "x", "b = c\n"),
        ("def f(a, x=None, *, y=1):\n    return a\n", "x", "def f(a, *, y=1):\n    return a\n"),
        ("with x():\n    a = 1\n", "x", "a = 1\n"),
        ("a = {'x': 1, 'b': 2}\n", "x", "a = {'b': 2}\n"),
        ("a = {'b': (1, 'x', 2), 'c': ('x',), 'd': x}\n", "x", "a = {'b': (1, 2), }\n"),
        ("class A:\n    def x(self):\n        pass\n\n    b = 1\n", "A.x", "class A:\n\n    b = 1\n"),
        ("self.x = 1\nx = 2\n", ".x", "x = 2\n"),
        (
            "def f():\n    x = 1\n    return 2\n\n\ndef g():\n    return x\n",
            "f:x",
            "def f():\n    return 2\n\n\ndef g():\n    return x\n",
        ),
    ],
)
def test_what_mentions_an_absent_name_is_left_out(source, absent, expected):
    assert without(source, {absent}) == expected


def test_what_can_neither_go_nor_stay_is_an_error():
    with pytest.raises(ValueError, match="f, line 2: returns what a later step brings: return x"):
        without("def f():\n    return x\n", {"x"})


def test_an_entry_and_a_point_of_a_docstring_go():
    source = '''class A:
    """
    What it is:

    - this (`x`), which
      is long;
    - that.

    Args:
        x (`int`):
            One.

            More of it.
        y (`int`):
            Two.
    """
'''
    assert without(source, {"x"}) == (
        'class A:\n    """\n    What it is:\n\n    - that.\n\n    Args:\n        y (`int`):\n            Two.\n    """\n'
    )


# The pull requests


def test_each_has_a_text_in_the_form_that_is_asked_for(kit):
    folder, listed = kit
    assert len(listed) == len(STEPS) == len(list(upstream.TEXTS.glob("*.md")))
    for name, _ in listed:
        text = (folder / f"{name}.md").read_text()
        described, _, rest = text.partition("## Before submitting")
        assert len(described) > 400 and "- [x]" in rest, name
        for part in ("**Why.**", "**What it costs.**"):
            assert part in described, (name, part)
        assert "trl-opsd" not in text and "trl_opsd" not in text, name


def test_each_is_small(kit):
    lines = dict(kit[1])
    assert {name for name, number in lines.items() if number > 640} == {
        "04-linear",  # the tiles cannot be had without the gradient
        "07-verifiers",  # configuration, trainer, test and documentation page, the first of each
        "16-faults",  # by two lines
    }
    assert max(lines.values()) < 740


def test_the_tests_import_what_those_of_trl_have(kit):
    """Besides TRL's dependencies, their own and those of its tests: a checkout of TRL has nothing else installed."""
    required = {re.match(r"[\w-]+", line)[0].lower() for line in importlib.metadata.requires("trl")}
    own = (
        {name.replace("-", "_") for name in required}
        | {"trl", "torch", "numpy", "tokenizers", "safetensors"}
        | sys.stdlib_module_names
    )
    for path in (kit[0] / "branch" / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= own, path.name


def test_numbers_in_the_texts_are_those_of_the_results():
    known = (ROOT / "recipes" / "results" / "README.md").read_text()
    for file in upstream.TEXTS.glob("*.md"):
        text = re.sub(r"https?://\S+", "", file.read_text())
        for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*[-/])", text):
            if file.stem == "merge" or number in ("0.5", "7.4", "0.05"):
                continue  # of the reproduction, an option, and 7.38 in words
            assert re.search(rf"(?<!\d){re.escape(number)}", known), (file.name, number)


def test_no_step_mentions_what_is_brought_later_or_never(kit):
    """Beside what the formatter sees: comments and docstrings do not promise what is not there."""
    folder, _ = kit
    fields = {field.name for field in dataclasses.fields(OPSDConfig)} & set(upstream.STAYS.split())
    assert {"lmbda", "max_generation_rounds", "teacher_gate"} < fields
    branch = "".join(file.read_text() for file in (folder / "branch" / upstream.PACKAGE).rglob("*.py"))
    assert [name for name in fields if name in branch] == []
    assert "trl_opsd" not in branch and "trl-opsd" not in branch


def test_the_page_says_what_is_there_and_no_more(kit):
    """At each step: no option of a later one, and code that runs as far as it can be had without a model."""
    options = {field.name for field in dataclasses.fields(OPSDConfig)}
    known, later = set(upstream.STAYS.split()), [set(step.brings.split()) for step in STEPS]
    for number, step in enumerate(STEPS):
        page = upstream.sections("opsd_trainer", STEPS[: number + 1])
        to_come = set().union(known, *later[number + 1 :]) & options - {"teacher_model"}
        assert [name for name in to_come if re.search(rf"`{name}\b|\b{name}=", page)] == [], step.name
        assert page.startswith("# OPSD\n") or not page
    assert page.rstrip().endswith("- push_to_hub") and page.count("[[autodoc]]") == 2
    papers = upstream.sections("paper_index", STEPS)
    for block in re.findall(r"```python\n(.*?)```", page + papers, re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "OPSDConfig":
                assert {word.arg for word in call.keywords} <= options


def test_what_no_patch_can_insert_is_in_the_texts(kit):
    texts = {name: (kit[0] / f"{name}.md").read_text() for name in names_of(kit)}
    told = {path: [name for name in texts if f"To insert in `docs/source/{path}`" in texts[name]] for path in INSERTED}
    assert told == INSERTED


def apply(kit, name, checkout):
    command = ["git", "apply", "--whitespace=error-all", str(kit[0] / f"{name}.patch")]
    result = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, (name, result.stderr)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the installed TRL, in the layout of its repository."""
    shutil.copytree(Path(trl.__file__).parent, tmp_path / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("tests", "tests/experimental"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "tests" / "testing_utils.py").write_text(TESTING_UTILS)
    return tmp_path


def test_they_apply_in_turn_and_end_as_the_branch(kit, checkout):
    for name in names_of(kit):
        apply(kit, name, checkout)
        for file in [*(checkout / "trl/experimental/opsd").rglob("*.py"), *(checkout / "tests").rglob("*.py")]:
            ast.parse(file.read_text())
    branch = kit[0] / "branch"
    for file in branch.rglob("*.py"):
        assert (checkout / file.relative_to(branch)).read_text() == file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(STEPS)), ids=[step.name for step in STEPS])
def test_each_passes_its_tests_on_a_copy_of_trl(kit, checkout, number):
    run_tests(kit, checkout, number)


def test_the_first_passes_its_tests_on_a_copy_of_trl(kit, checkout):
    """The cheapest of them, so that the default tier sees the whole way once."""
    run_tests(kit, checkout, 1)


def run_tests(kit, checkout, number):
    names = names_of(kit)
    for name in names[: number + 1]:
        apply(kit, name, checkout)
    changed = re.findall(r"^\+\+\+ b/(tests/\S*test_\w+\.py)$", (kit[0] / f"{names[number]}.patch").read_text(), re.M)
    if STEPS[number].series in ("defects", "example"):  # these are in the form of TRL, whose models are on the Hub
        tiny_hub.build({"zen", "tiny-Qwen3ForCausalLM", "small-Qwen3ForCausalLM"}, checkout)
    if STEPS[number].series == "example":
        changed = ["tests/test_example.py"]
        (checkout / changed[0]).write_text(TEST_OF_EXAMPLE)
    assert changed
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(checkout), *changed]
    probe = [sys.executable, "-c", "import trl; print(trl.__file__)"]
    found = subprocess.run(probe, cwd=checkout, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(checkout)), found
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]
