"""Data flow down the stages, and so do imports: no circle, and no stage that knows of one after it."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# In the order of the chain; what is beside the stages comes first
ORDER = [
    "shadows",
    "ranges",
    "cli",
    "guard",
    "children",
    "hub",
    "results",
    "adapters",
    "rollout_engine",
    "resuming",
    "decoding",
    "sampling",
    "positions",
    "faults",
    "data",
    "rewards",
    "tiny",
    "small",
    "rlvr",
    "prune",
    "opsd",
    "evaluate",
    "export",
    "plan",
    "compress",
]


def imports_of(package: str) -> dict[str, set[str]]:
    """Modules of a package, and which of them each imports, inside functions too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {}
    for name, path in files.items():
        parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        graph[name] = set()
        tree = ast.parse(path.read_text())
        hidden = {  # names of types, which nothing is imported for
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(ast.Module(node.body, []))
        }
        for node in ast.walk(tree):
            if node in hidden:
                continue
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = parents[: len(parents) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                found = [module, *(f"{module}.{alias.name}" for alias in node.names)]
            else:
                continue
            graph[name] |= {other for other in found if other in files and other != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A way back to itself from each module that has one."""
    found = []
    for start in graph:
        paths, seen = [[start]], set()
        while paths:
            path = paths.pop()
            for other in graph[path[-1]]:
                if other == start:
                    found.append([*path, start])
                elif other not in seen:
                    seen.add(other)
                    paths.append([*path, other])
    return found


@pytest.mark.parametrize("package", ["trl_opsd", "scripts"])
def test_the_import_graph_has_no_circle(package):
    assert circles(imports_of(package)) == []


def test_no_stage_imports_one_that_comes_after_it():
    graph = imports_of("trl_opsd")
    assert {name.split(".")[1] for name in graph if "." in name} == set(ORDER)
    back = [
        (name, other)
        for name, others in graph.items()
        for other in others
        if name.count(".") and other.count(".") and ORDER.index(other.split(".")[1]) > ORDER.index(name.split(".")[1])
    ]
    assert back == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]
