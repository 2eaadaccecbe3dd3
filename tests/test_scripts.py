"""What benchmarks and experiments share, and the order in which they import each other."""

import ast
import graphlib
import os
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # commands are run from the root, where `-m` finds `scripts`

from scripts.harness.meter import Meter  # noqa: E402
from scripts.harness.processes import process, run_alone, run_distributed  # noqa: E402
from scripts.harness.shapes import small  # noqa: E402
from scripts.harness.tables import markdown, spread  # noqa: E402


def test_scripts_import_each_other_in_one_direction_only():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in (ROOT / "scripts").rglob("*.py")
    }
    graph = {}
    for name, module in modules.items():
        found = [alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names]
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports are absolute"
                found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        graph[name] = modules.keys() & set(found) - {"scripts"}
    assert "scripts.benchmarks.step" in graph["scripts.benchmarks.scaling"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle
    for name, imported in graph.items():
        if name.startswith("scripts.harness"):
            assert all(other.startswith("scripts.harness") for other in imported), name


def test_a_process_is_another_one_and_stays_the_same():
    with process() as call:
        first = call(os.getpid)
        assert call(os.getpid) == first != os.getpid()
    assert run_alone(os.getpid) not in (first, os.getpid())
    with pytest.raises(ZeroDivisionError):
        run_alone(divmod, 1, 0)


def test_a_process_that_dies_says_what_it_printed(capfd):
    with pytest.raises(RuntimeError, match="(?s)`exec` died after printing:.*last words"):
        run_alone(exec, "import os; os.write(1, b'last words'); os._exit(3)")
    assert "last words" not in capfd.readouterr().out


def test_distributed_processes_have_ranks():
    assert run_distributed(2, os.getenv, "RANK") == ["0", "1"]
    assert run_distributed(1, os.getenv, "RANK") == [None]


def test_the_peak_is_that_of_the_block():
    import torch

    with Meter("cpu") as meter:
        torch.ones(16 << 20).sum()
    assert 60 < meter.peak_mib < 80  # 64 MiB, freed by now
    assert meter.seconds > 0


def test_shapes_count_what_is_built():
    from transformers import Qwen3ForCausalLM

    for tied in (True, False):
        shape = small(128, 2, 320, tied=tied)
        matrices = [parameter for parameter in Qwen3ForCausalLM(shape.config()).parameters() if parameter.ndim == 2]
        assert sum(matrix.numel() for matrix in matrices) == shape.total


def test_tables_in_markdown():
    assert spread([-0.04, 0.01]) == "0.0 (0.0 to 0.0)"
    assert spread([1, 2, 6]) == "3.0 (1.0 to 6.0)"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
