"""
Dataclasses read from their source, without importing the modules that define them.

The configurations of TRL's trainers are dataclasses in modules that import torch, transformers' `Trainer` and peft,
which takes seconds. What a command line has to know of them to print `--help` or to find a misspelt option (names,
types, defaults, choices, help) stands in their source. [`read_dataclass`] makes of it a class with the same fields and
none of the behaviour. Expressions are evaluated with what they name: constants of the same package, read in the same
way, and the standard library, which is imported.
"""

import ast
import builtins
import dataclasses
import enum
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


class Unreadable(Exception):
    """The source of a dataclass is not where it was expected, or needs to be run to be known."""


@dataclass(frozen=True)
class Computed:
    """A default that only running the module can tell."""

    source: str

    def __str__(self) -> str:
        return "computed"


@dataclass(frozen=True, eq=False)
class _Module:
    name: str
    is_package: bool
    definitions: dict[str, list[ast.stmt]]

    def resolve(self, target: ast.ImportFrom) -> str:
        """Absolute name of the module that a `from … import` takes from."""
        if target.level == 0:
            return target.module
        parts = self.name.split(".")
        parts = parts[: len(parts) - target.level + self.is_package]
        return ".".join([*parts, *([target.module] if target.module else [])])


def read_dataclass(name: str) -> type:
    """
    Reads a dataclass and its parents from their source.

    Args:
        name (`str`):
            Dotted path of the class. It may lead through modules that import it from another one.

    Returns:
        `type`: A dataclass of the same name and module with the same fields: names, types (`str` where a type is
        neither of the standard library nor an enumeration), metadata as far as it can be read, and defaults, or
        [`Computed`] in their place.

    Raises:
        Unreadable: If it cannot be read so.
    """
    module_name, _, class_name = name.rpartition(".")
    module, nodes = _find(class_name, module_name)
    node = nodes[0]
    if not isinstance(node, ast.ClassDef):
        raise Unreadable(name)
    bases = tuple(read_dataclass(f"{module.name}.{ast.unparse(base)}") for base in node.bases)
    scope = _definitions(node.body)
    fields = [
        (line.target.id, _annotation(line.annotation, module), _field(line.value, module, scope))
        for line in node.body
        if isinstance(line, ast.AnnAssign)
    ]
    shadow = dataclasses.make_dataclass(class_name, fields, bases=bases)
    shadow.__module__ = module.name  # from Python 3.12 on, one that is given above is overwritten
    return shadow


@cache
def _read_module(name: str) -> _Module:
    root, *rest = name.split(".")
    spec = importlib.util.find_spec(root)  # of a top-level package, which imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise Unreadable(name)
    path = Path(spec.submodule_search_locations[0], *rest)
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_name(f"{path.name}.py")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise Unreadable(name) from error
    return _Module(name, is_package, _definitions(tree.body))


def _definitions(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """The statements that may bind each name of a module or class, those under conditions included."""
    found = {}
    for node in _statements(body):
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        for name in names:
            found.setdefault(name, []).append(node)
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _find(name: str, module_name: str) -> tuple[_Module, list[ast.stmt]]:
    """The module that defines a name, through any number of imports, and the statements that do."""
    module = _read_module(module_name)
    nodes = module.definitions.get(name)
    if nodes is None:
        raise Unreadable(f"{module_name}.{name}")
    node = nodes[0]
    if isinstance(node, ast.ImportFrom):
        source = module.resolve(node)
        if source.split(".")[0] not in sys.stdlib_module_names:
            alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
            return _find(alias.name, source)
    return module, nodes


def _value(name: str, module: _Module, scope: dict[str, list[ast.stmt]]) -> Any:
    """What a name stands for: of the standard library the object itself, of a constant or enumeration its value."""
    home, nodes = (module, scope[name]) if name in scope else _find(name, module.name)
    node = nodes[0]
    if isinstance(node, ast.Import):
        if name not in sys.stdlib_module_names:
            raise Unreadable(name)
        return importlib.import_module(name)
    if isinstance(node, ast.ImportFrom):
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        return importlib.import_module(node.module).__dict__[alias.name]
    if isinstance(node, ast.ClassDef):
        if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
            raise Unreadable(name)
        members = {
            line.targets[0].id: _evaluate(line.value, home) for line in node.body if isinstance(line, ast.Assign)
        }
        return enum.Enum(node.name, members)
    if len(nodes) > 1 or node.value is None:
        raise Unreadable(name)  # which of them holds is known by running the module
    return _evaluate(node.value, home)


def _evaluate(
    expression: ast.expr, module: _Module, scope: dict[str, list[ast.stmt]] | None = None, other: Any = None
) -> Any:
    """Value of an expression. `other` stands for the names that cannot be read; by default they are errors."""
    names = {}
    for node in ast.walk(expression):
        if isinstance(node, ast.Name):
            try:
                names[node.id] = _value(node.id, module, scope or {})
            except Unreadable:
                if other is not None and node.id not in vars(builtins):
                    names[node.id] = other
    try:
        return eval(compile(ast.Expression(expression), module.name, "eval"), names)
    except Exception as error:  # whatever an expression raises whose names are not all known
        raise Unreadable(ast.unparse(expression)) from error


def _annotation(expression: ast.expr, module: _Module) -> Any:
    return _evaluate(expression, module, other=str)


def _field(expression: ast.expr | None, module: _Module, scope: dict[str, list[ast.stmt]]) -> dataclasses.Field:
    if expression is None:
        return dataclasses.field()
    is_call = isinstance(expression, ast.Call) and ast.unparse(expression.func) in ("field", "dataclasses.field")
    arguments = {word.arg: word.value for word in expression.keywords} if is_call else {"default": expression}
    default, metadata = arguments.pop("default", None), arguments.pop("metadata", None)
    values = {name: _evaluate(value, module, scope) for name, value in arguments.items()}
    if default is not None:
        try:
            values["default"] = _evaluate(default, module, scope)
        except Unreadable:
            values["default"] = Computed(ast.unparse(default))
    if isinstance(metadata, ast.Dict):
        values["metadata"] = {}
        for key, value in zip(metadata.keys, metadata.values, strict=True):
            try:
                values["metadata"][_evaluate(key, module)] = _evaluate(value, module, scope)
            except Unreadable:
                continue  # such as choices that are the keys of another module's table: the class itself knows them
    return dataclasses.field(**values)
