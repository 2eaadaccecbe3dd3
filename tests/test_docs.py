"""What the documentation names is there: links, files, commands, options, columns and numbers."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

import trl_opsd.rewards
from trl_opsd.data import load_prompts
from trl_opsd.opsd.config import OPSDConfig
from trl_opsd.rewards import required_columns


ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
).stdout.split()
PAGES = [ROOT / name for name in LISTED]
STAGES = sorted(path.parent.name for path in ROOT.glob("trl_opsd/*/__init__.py"))
# Pages that people write. Reports and tables of experiments are written by what measured them
WRITTEN = [page for page in PAGES if page.name in ("README.md", "CONTRIBUTING.md")]
COMMANDS_OF = {stage: (f"trl_opsd.{stage}",) for stage in STAGES if stage != "rewards"}
COMMANDS_OF["compress"] = ("trl_opsd.compress", "trl_opsd.compress.bank")
# What `evaluate` does with results that are there, each with options of its own
MODES = {"--compare": ("--compare", "A", "B"), "--report": ("--report", "A"), "--card": ("--card", "A")}
# Options of `accelerate launch`
LAUNCH = {f"--{name}" for name in vars(launch_command_parser().parse_args(["script.py"]))}
COMMANDS_OF["rewards"] = ("trl_opsd.opsd", "trl_opsd.rlvr")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("python", "bash", "accelerate", "pip")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    return _FENCE.sub("", page.read_text())


def blocks(page, language):
    return [text for kind, text in _FENCE.findall(page.read_text()) if kind == language]


def spans(page):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page):
    found = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.append(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-"))
    return found


def broken_links(page, text):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page, prose(page)) == []


def test_a_link_that_leads_nowhere_is_found():
    page = ROOT / "README.md"
    links = "[a](recipes/none.md) [b](#no-such-heading) [c](recipes/README.md#recipes) [`d`](recipes#recipes)"
    assert broken_links(page, links) == ["recipes/none.md", "#no-such-heading", "recipes#recipes"]


def test_the_page_is_short_and_every_stage_has_one_of_a_screen():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for stage in STAGES:
        page = ROOT / "trl_opsd" / stage / "README.md"
        assert f"({name_of(page)})" in readme
        assert stage == "opsd" or len(page.read_text().splitlines()) <= 75, page


def test_numbers_of_the_readme_are_those_of_the_results():
    section = (ROOT / "README.md").read_text().partition("## What has been measured\n")[2].partition("\n## ")[0]
    numbers = set(re.findall(r"\d+\.\d+", section))
    assert len(numbers) > 10
    results = (ROOT / "recipes" / "results" / "README.md").read_text()
    assert numbers <= set(re.findall(r"\d+\.\d+", results))


# Commands


@functools.cache
def options_of(module, *first):
    """Options that the `--help` of a command lists."""
    name = module if module.endswith(".bank") else f"{module}.__main__"
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main([*first, "--help"])
    assert ended.value.code in (None, 0)
    # Where it lists them, and not where it speaks of others
    return frozenset(re.findall(r"(?:^  |, )(--\w+)", output.getvalue(), re.MULTILINE))


def all_options_of(stage):
    modes = MODES.values() if stage == "evaluate" else ()
    sets = [options_of(module) for module in COMMANDS_OF[stage]]
    return frozenset().union(*sets, *(options_of("trl_opsd.evaluate", *mode) for mode in modes))


def commands(page):
    """The commands of a page, as words: those in blocks, and those in the text."""
    lines = [line for text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(page) if span.split()[0] in _PROGRAMS and " " in span and "<" not in span]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def mistakes(words):
    """What a command names that is not there."""
    program, *words = words
    if program == "trl":
        program, words = "python", ["-m", f"trl.scripts.{words[0]}", *words[1:]]
    if program not in _PROGRAMS:
        return [program]
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\.\[([\w,-]+)\]", " ".join(words))
        return [extra for extra in ",".join(named).split(",") if extra and extra not in extras]
    found = [word for word in words if re.match(r"(recipes|scripts|tests)/", word) and not (ROOT / word).is_file()]
    if program == "accelerate":
        mine = words[: words.index("-m")] if "-m" in words else words
        found += [word for word in mine if word.startswith("--") and word not in LAUNCH]
        words = words[len(mine) :]
    if not words or words[0] != "-m" or len(words) < 2:
        return found
    module, options = words[1], [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
    if importlib.util.find_spec(module) is None:
        return [*found, module]
    if module.startswith("trl_opsd."):
        mode = next((MODES[option] for option in options if option in MODES), ())
        known = options_of(module, *mode) | {"--config"}
    elif module.startswith("trl.scripts."):
        known = importlib.import_module(module).make_parser()._option_string_actions.keys() | {"--config"}
    else:
        known = re.findall(r"--\w+", Path(importlib.util.find_spec(module).origin).read_text()) + ["--config"]
    return found + [option for option in options if option not in known]


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_commands_name_what_is_there(page):
    assert {shlex.join(words): mistakes(words) for words in commands(page) if mistakes(words)} == {}


def test_a_command_that_names_what_is_not_there_is_found():
    wrong = "accelerate launch --no_such 2 -m trl_opsd.opsd --config recipes/none.yaml --gates all --gate all"
    assert mistakes(shlex.split(wrong)) == ["recipes/none.yaml", "--no_such", "--gates"]
    assert mistakes(shlex.split("python -m trl_opsd.evaluate --compare A B --tasks gsm8k")) == ["--tasks"]


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_files_in_the_text_are_there(page):
    paths = [span for span in spans(page) if re.fullmatch(r"(recipes|scripts|tests|trl_opsd)/[\w./*-]+", span)]
    assert [path for path in paths if not any(ROOT.glob(path))] == []


# The page of results speaks of options of scripts: tests/test_scripts.py runs their commands
@pytest.mark.parametrize("page", [page for page in WRITTEN if page.parent.name != "results"], ids=name_of)
def test_options_in_the_text_are_there(page):
    stage = page.parent.name if page.parent.parent.name == "trl_opsd" else None
    known = frozenset().union(*(all_options_of(name) for name in ([stage] if stage else COMMANDS_OF)))
    words = [word for span in spans(page) if span.startswith("--") for word in span.split() if word.startswith("--")]
    assert set(words) <= known | LAUNCH | {"--config", "--help", "--trl-tests", "--trl-control"}


@pytest.mark.parametrize("stage", STAGES)
def test_tables_of_options_list_options(stage):
    page = ROOT / "trl_opsd" / stage / "README.md"
    table = re.search(r"^\| option \|.*\n\|---.*\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
    assert (table is None) == (stage in ("data", "rewards", "opsd"))
    names = []
    for row in table[1].splitlines() if table else ():
        cell = re.findall(r"`([^`]+)`", row.split("|")[1])
        names += [span.split()[0] for span in cell if span.startswith("--")] or [f"--{span}" for span in cell]
    assert set(names) <= all_options_of(stage)


def test_every_parameter_of_opsd_is_in_its_table():
    text = (ROOT / "trl_opsd" / "opsd" / "README.md").read_text()
    (table,) = re.findall(r"^\| parameter \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    names = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    own = [field.name for field in dataclasses.fields(OPSDConfig) if field.name in vars(OPSDConfig)["__annotations__"]]
    assert sorted(names) == sorted([*own, "reward_funcs"])


# Code and data


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "python")], ids=name_of)
def test_python_names_what_is_there(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if alias.name not in dir(module)] == []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "OPSDConfig":
                assert {word.arg for word in node.keywords} <= {field.name for field in dataclasses.fields(OPSDConfig)}


@pytest.mark.parametrize("page", [page for page in WRITTEN if blocks(page, "yaml")], ids=name_of)
def test_yaml_names_options(page):
    for text in blocks(page, "yaml"):
        assert {f"--{key}" for key in yaml.safe_load(text)} <= all_options_of("opsd")


def test_example_rows_are_rows(tmp_path):
    examples = blocks(ROOT / "trl_opsd" / "data" / "README.md", "json")
    columns = []
    for number, text in enumerate(examples):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(text)
        columns.append(set(load_prompts(str(file)).column_names))
    assert columns == [
        {"prompt", "answer"},
        {"prompt", "tests", "entry_point"},
        {"prompt", "answer", "solution"},
        {"prompt", "answer"},
    ]


def test_every_verifier_is_listed_with_its_columns():
    text = (ROOT / "trl_opsd" / "rewards" / "README.md").read_text()
    listed = {
        name: set(re.findall(r"`(\w+)`", columns))
        for name, columns in re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", text, re.MULTILINE)
    }
    names = [name for name in trl_opsd.rewards.__all__ if name.endswith("_reward")]
    needed = {name: required_columns(vars(trl_opsd.rewards)[name]) for name in names}
    assert listed == {**needed, "code_reward": {"tests", "entry_point", "setup"}}  # which may be missing
