"""
What of this package is meant for TRL, as an ordered list of small pull requests.

    python scripts/upstream.py --out upstream

Each is a patch (`01-autocast.patch`, for `git apply` in a checkout of TRL, each on top of those before it) with its text
(`01-autocast.md`, in the form of TRL's template). `README.md` lists them with their lines, and `branch/` has the files as
they are after the last. All of it is computed: from TRL as it is installed, and from our own files, of which each step
takes the definitions that it names, without what a later step brings. [`without`] says how a statement is left out.
"""

import argparse
import ast
import difflib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "scripts" / "pull_requests"
INSTALLED = Path(importlib.util.find_spec("trl").origin).parent
PACKAGE, TESTS = "trl/experimental/opsd", "tests/experimental/opsd"


@dataclass(frozen=True)
class Part:
    """
    A file of ours on its way to TRL.

    Args:
        source (`str`):
            Our file.
        target (`str`):
            Path in TRL's repository. The same one again, in a later step, takes the place of the earlier one.
        only (`tuple[str, ...]`, *optional*):
            Its classes, functions and methods (`Class.method`) that are taken. If `None`, all of them.
        edits (`tuple[tuple[str, str], ...]`):
            What is said otherwise there: text that the file has once, and what stands in its place.
    """

    source: str
    target: str
    only: tuple[str, ...] | None = None
    edits: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Step:
    """
    A pull request.

    Args:
        name (`str`):
            Its name. `scripts/pull_requests/{name}.md` is its text.
        parts (`tuple[Part, ...]`):
            Files of ours.
        mends (`tuple[tuple[str, str, str], ...]`):
            File of TRL's, text that it has once, and what stands in its place.
        texts (`dict[str, str]`):
            Files that are nothing of ours, such as a package's `__init__.py`.
        brings (`str`):
            Names that no earlier step of the same series mentions: fields, attributes, functions; `Class.method` for one
            that others have too, `.name` for an attribute alone, and `function:name` for a name in one function.
        series (`str`):
            Which pull requests it continues.
    """

    name: str
    parts: tuple[Part, ...] = ()
    mends: tuple[tuple[str, str, str], ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    brings: str = ""
    series: str = "trainer"


# ---------------------------------------------------------------------------------------------------------------------
# A file without what comes later
# ---------------------------------------------------------------------------------------------------------------------


class _Without:
    """
    Leaves out of a source what mentions absent names, as if each of them were not there: a statement goes whole, an
    argument, an entry or an operand goes alone where what is left still says something, and a condition is decided as it
    is where the option is off (`x is None` and `not x` hold). What is assigned in a statement that goes is absent, too.
    """

    def __init__(self, source: str, absent: set[str], only: tuple[str, ...] | None):
        self.source, self.only = source, only
        self.names = {name for name in absent if not re.search(r"\w[.:]", name)}
        self.qualified = absent - self.names
        self.follows: set[str] = set()  # what was assigned in a statement that went
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.changes: list[tuple[int, int, str]] = []

    def offset(self, line: int, column: int) -> int:
        # `ast` counts columns in bytes
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        return self.source[slice(*self.span(node))]

    def replace(self, node: ast.AST, text: str) -> None:
        self.changes.append((*self.span(node), text))

    def result(self) -> str:
        tree = ast.parse(self.source)
        self.body(tree.body, "")
        pieces, end = [], 0
        for start, stop, text in sorted(self.changes, key=lambda change: (change[0], -change[1])):
            if start >= end:  # else it lies in a part that goes anyway
                pieces += [self.source[end:start], text]
                end = stop
        return "".join([*pieces, self.source[end:]])

    # Statements

    def drop(self, node: ast.stmt) -> None:
        """Takes out whole lines, and the comment above them, which is about them."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        while first > 1 and re.match(r"\s*#(?! -----| Parameters that )", self.lines[first - 2]):
            first -= 1
        self.changes.append((self.starts[first - 1], self.starts[node.end_lineno], ""))
        for target in self.assigned(node):
            if target not in self.names:
                self.names.add(target)
                self.follows.add(target)

    @staticmethod
    def assigned(node: ast.stmt) -> list[str]:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            return []
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]

    def body(self, statements: list[ast.stmt], where: str) -> bool:
        """Goes through a body, and returns whether anything is left of it."""
        left = [self.statement(node, where) for node in statements]
        return any(left)

    def statement(self, node: ast.stmt, where: str) -> bool:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return self.definition(node, where)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return False  # a docstring, with nothing to document where it is alone
        if isinstance(node, ast.Import | ast.ImportFrom):
            return self.imports(node)
        if isinstance(node, ast.If):
            return self.condition(node, where)
        if isinstance(node, ast.With):
            return self.with_(node, where)
        if isinstance(node, ast.For | ast.While | ast.Try):
            head = node.iter if isinstance(node, ast.For) else node.test if isinstance(node, ast.While) else None
            if head is not None and not self.expression(head):
                self.drop(node)
                return False
            before, names = len(self.changes), set(self.names)
            if not self.body(node.body, where):
                del self.changes[before:]
                self.names = names
                self.drop(node)
                return False
            for handler in getattr(node, "handlers", ()):
                self.body(handler.body, where)
            self.body(getattr(node, "finalbody", []), where)
            return True
        if isinstance(node, ast.Assign) and self.pairs(node):
            return True
        if self.mentions(node) and not self.expression(node):
            if isinstance(node, ast.Return) and node.value is not None:
                raise ValueError(f"{where}, line {node.lineno}: returns what a later step brings: {self.text(node)}")
            self.drop(node)
            return False
        return True

    def pairs(self, node: ast.Assign) -> bool:
        """Takes absent pairs out of `a, b = c, d`, and returns whether that is what there was to do."""
        target, value = node.targets[0], node.value
        if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)) or len(target.elts) != len(value.elts):
            return False
        kept = [pair for pair in zip(target.elts, value.elts, strict=True) if not any(map(self.mentions, pair))]
        if not kept or len(kept) == len(target.elts):
            return False
        self.replace(node, " = ".join(", ".join(map(self.text, side)) for side in zip(*kept, strict=True)))
        return True

    def definition(self, node, where: str) -> bool:
        name = f"{where}.{node.name}".lstrip(".")
        level = where.count(".") + bool(where)
        is_top = level == 0 or (level == 1 and isinstance(node, ast.FunctionDef))
        taken = self.only is None or not is_top
        taken = taken or name in self.only or (level == 1 and not any(n.startswith(f"{where}.") for n in self.only))
        taken = taken or (level == 0 and any(n.startswith(f"{name}.") for n in self.only))
        if not taken or node.name in self.names or name in self.qualified:
            self.drop(node)
            return False
        outside, follows = self.names, self.follows
        self.follows = set(follows)
        self.names = outside | {word.split(":")[1] for word in self.qualified if word.startswith(f"{node.name}:")}
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            text = self.text(node.body[0])
            self.replace(node.body[0], self.docstring(text))
        if not isinstance(node, ast.ClassDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            self.elements([arg for arg in every if arg.arg in self.names], every, node)
        self.body(node.body, name)
        self.names, self.follows = outside, follows
        return True

    def docstring(self, text: str) -> str:
        """Without the entries of absent arguments, and the points of a list that are about absent names."""
        lines, kept, inside, gap = text.splitlines(keepends=True), [], None, ""
        for line in lines:
            indent = len(line) - len(line.lstrip())
            entry, point = re.match(r" +(\w+) \(", line), re.match(r" *- ", line)
            if inside is not None and line.strip() and (indent <= inside or line.strip() == '"""'):
                # A gap within what goes, goes; one that sets off what follows stays
                if indent < inside or not (entry or point):
                    kept.append(gap)
                inside = None
            if inside is None and entry and not self.names.isdisjoint((entry[1], f".{entry[1]}")):
                inside, gap = indent, ""
            elif inside is None and point:
                rest = text[text.index(line) + len(line) :]
                whole = line + re.split(rf"^ {{0,{indent}}}(?:- |\S)|^$", rest, maxsplit=1, flags=re.MULTILINE)[0]
                if any(f"`{name}`" in whole for name in self.names):
                    inside, gap = indent, ""
            if inside is None:
                kept.append(line)
            else:
                gap = "" if line.strip() else line
        text = "".join(kept)
        text = re.sub(r"^ *> Parameters that[^\n]*\n(?: *\n)*(?= *(?:>|\"\"\"))", "", text, flags=re.MULTILINE)
        section = r"^( *)(?:Attributes|Args|Raises):\n\s*?(?=\n\1\w|\s*\"\"\"|\Z)"
        text = re.sub(section, "", text, flags=re.MULTILINE)
        return re.sub(r"\n(?: *\n)+( *\"\"\")$", r"\n\1", re.sub(r"\n(?: *\n){2,}", "\n\n", text))

    def imports(self, node) -> bool:
        gone = [alias for alias in node.names if alias.name in self.names or alias.asname in self.names]
        if len(gone) == len(node.names):
            self.drop(node)
            return False
        if gone:
            kept = ", ".join(self.text(alias) for alias in node.names if alias not in gone)
            self.replace(node, f"from {'.' * node.level}{node.module or ''} import {kept}")
        return True

    def hoist(self, node: ast.stmt, body: list[ast.stmt]) -> None:
        """Puts a body in the place of the statement that it belongs to."""
        first = body[0].lineno
        while re.match(r"\s*#", self.lines[first - 2]):
            first -= 1
        self.changes.append((self.starts[node.lineno - 1], self.starts[first - 1], ""))
        inside = {line for part in body for line in self.string_lines(part)}
        for line in range(first, body[-1].end_lineno + 1):
            if self.lines[line - 1].startswith("    ") and line not in inside:
                self.changes.append((self.starts[line - 1], self.starts[line - 1] + 4, ""))
        if body[-1].end_lineno < node.end_lineno:
            self.changes.append((self.starts[body[-1].end_lineno], self.starts[node.end_lineno], ""))

    @staticmethod
    def string_lines(node: ast.AST) -> set[int]:
        found = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value:
                found |= set(range(part.lineno + 1, part.end_lineno + 1))
        return found

    def condition(self, node: ast.If, where: str) -> bool:
        truth, start = self.truth(node.test), self.span(node)[0]
        is_elif = self.source.startswith("elif", start)
        if truth is True:
            if is_elif:
                raise ValueError(f"{where}, line {node.lineno}: an `elif` that always holds")
            self.hoist(node, node.body)
            return self.body(node.body, where)
        if truth is False and not node.orelse:
            self.drop(node)
            return False
        if truth is False:
            after, before = self.span(node.orelse[0])[0], len(self.changes)
            if self.source.startswith("elif", after):  # the next one takes its place
                self.changes.append((start, after if is_elif else after + len("el"), ""))
            elif is_elif:
                self.changes.append((start, self.source.rindex("else", start, after), ""))
            else:
                self.hoist(node, node.orelse)
            left = self.body(node.orelse, where)
            if not left:
                del self.changes[before:]
                self.drop(node)
            return left
        self.expression(node.test)
        before, names = len(self.changes), set(self.names)
        left = self.body(node.body, where)
        if left:
            is_else = node.orelse and not self.source.startswith("elif", self.span(node.orelse[0])[0])
            if node.orelse and not self.body(node.orelse, where) and is_else:
                raise ValueError(f"{where}, line {node.lineno}: nothing is left of an `else`")
            return True
        if node.orelse:
            raise ValueError(f"{where}, line {node.lineno}: nothing is left of an `if` with an `else`")
        del self.changes[before:]
        self.names = names
        self.drop(node)
        return False

    def with_(self, node: ast.With, where: str) -> bool:
        gone = [item for item in node.items if self.mentions(item.context_expr)]
        if len(gone) == len(node.items):
            self.hoist(node, node.body)
        elif gone:
            raise ValueError(f"{where}, line {node.lineno}: some items of a `with`")
        return self.body(node.body, where)

    # Expressions

    def mentions(self, node: ast.AST) -> bool:
        for part in ast.walk(node):
            words = (
                getattr(part, "id", None),
                getattr(part, "attr", None),
                f".{part.attr}" if isinstance(part, ast.Attribute) else None,
                getattr(part, "arg", None),
                part.value if isinstance(part, ast.Constant) else None,
            )
            if any(isinstance(word, str) and word in self.names for word in words):
                return True
        return False

    def is_absent(self, node: ast.expr) -> bool:
        """Whether it is one of the names itself, whose parameter is absent too, and nothing that is made of one."""
        node = node.value if isinstance(node, ast.Starred) else node
        named = self.names - self.follows
        return (isinstance(node, ast.Name) and node.id in named) or (
            isinstance(node, ast.Attribute) and not named.isdisjoint((node.attr, f".{node.attr}"))
        )

    def truth(self, node: ast.expr) -> bool | None:
        """What a condition comes to, where absent names decide it."""
        if not self.mentions(node):
            return None
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return None if inner is None else not inner
        if isinstance(node, ast.BoolOp):
            values = [self.truth(value) for value in node.values]
            decides = isinstance(node.op, ast.Or)
            if decides in values:
                return decides
            return None if None in values else not decides
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is):
            return True
        return False

    def expression(self, node: ast.AST) -> bool:
        """Takes absent parts out, and returns whether the rest can stay."""
        if not self.mentions(node):
            return True
        if isinstance(node, ast.IfExp):
            truth = self.truth(node.test)
            if truth is not None:
                chosen = node.body if truth else node.orelse
                before = len(self.changes)
                if self.mentions(chosen):
                    del self.changes[before:]
                    return False
                self.replace(node, self.text(chosen))
                return True
        if isinstance(node, ast.BoolOp):
            truths = [self.truth(value) for value in node.values]
            if isinstance(node.op, ast.Or) in truths:
                return False
            gone = [value for value, truth in zip(node.values, truths, strict=True) if truth is not None]
            kept = [value for value in node.values if value not in gone]
            if not kept:
                return False
            if gone:
                words = {ast.And: " and ", ast.Or: " or "}[type(node.op)]
                self.replace(node, words.join(self.text(value) for value in kept))
                return True
        if isinstance(node, ast.Name) and node.id in self.names:
            return False
        if isinstance(node, ast.Attribute) and not self.names.isdisjoint((node.attr, f".{node.attr}")):
            return False
        if isinstance(node, ast.Constant):
            return False
        if isinstance(node, ast.Call):
            gone = [word for word in node.keywords if word.arg in self.names or self.mentions(word.value)]
            gone += [arg for arg in node.args if self.is_absent(arg)]
            rest = [part for part in (node.func, *node.args) if part not in gone]
            if any(self.mentions(part) for part in rest) and not all(self.expression(part) for part in rest):
                return False
            self.elements(gone, [*node.args, *node.keywords], node)
            return True
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            gone = [element for element in node.elts if self.mentions(element)]
            if len(gone) == len(node.elts):
                return False
            self.elements(gone, node.elts, node)
            return True
        if isinstance(node, ast.Dict):
            gone = [
                (key, value)
                for key, value in zip(node.keys, node.values, strict=True)
                if (key is not None and self.mentions(key)) or not self.entry(value)
            ]
            for key, value in gone:
                start = self.span(value if key is None else key)[0] - (2 if key is None else 0)
                self.cut(start, self.span(value)[1])
            return len(gone) < len(node.keys)
        return all(self.expression(child) for child in ast.iter_child_nodes(node))

    def entry(self, value: ast.expr) -> bool:
        """Takes absent elements out of a dictionary's value, and returns whether it can stay."""
        if isinstance(value, ast.Tuple | ast.List | ast.Set):
            return self.expression(value)
        return not self.mentions(value)

    def elements(self, gone: list, every: list, node: ast.AST) -> None:
        for element in gone:
            start, end = self.span(element)
            if isinstance(element, ast.arg):  # with its default
                rest = self.source[end:]
                default = re.match(r"\s*=\s*(?:\([^()]*\)|[^,()\n])+", rest)
                end += default.end() if default else 0
            self.cut(start, end)

    def cut(self, start: int, end: int) -> None:
        """Takes out an element of a list, and the comma behind it."""
        comma = re.match(r"\s*,[ ]*", self.source[end:])
        if comma:
            end += comma.end()
        line = self.source.rfind("\n", 0, start) + 1
        rest = re.match(r"[^\n]*\n", self.source[end:])
        if not self.source[line:start].strip() and rest and not rest[0].split("#")[0].strip():
            start, end = line, end + rest.end()
        self.changes.append((start, end, ""))


def without(source: str, absent: set[str], only: tuple[str, ...] | None = None) -> str:
    """
    A source without what mentions some names.

    Args:
        source (`str`):
            Python source.
        absent (`set[str]`):
            Names that are not there, as if every option by such a name were off. `Class.method` is a method alone,
            `.name` an attribute alone, and `function:name` a name within a function alone.
        only (`tuple[str, ...]`, *optional*):
            Classes, functions and methods (`Class.method`) to take. A class of which no method is named is taken whole.

    Returns:
        `str`: Source, not formatted. Imports that nothing uses are left.

    Raises:
        ValueError: Where a statement can neither go nor stay. The message names it.
    """
    return _Without(source, absent, only).result()


# ---------------------------------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------------------------------

# What stays here: nothing of it is in any step
STAYS = """
    lmbda off_policy_steps .given OPSDConfig.given is_given collect:draw collect:first _given_rows _replace_ungiven
    _check_given completion_lengths _given_of_batch
    max_generation_rounds _refill _ask ask generation_rounds Verdicts.replace
    PassRates pass_rates min_pass_rate max_pass_rate pass_rate_rollouts prompt_key _replace_skipped skips bounds
    CompletionLimit completion_limit_quantile completion_limit_headroom .limit Saved Rollouts.saved
    _save_checkpoint:saved _load_optimizer_and_scheduler:saved
    AlarmCallback.state_dict AlarmCallback.load_state_dict AlarmCallback.load
    rollout_engine finished_rows_dropped FrozenBase awake end_at sync_within
    OPSDConfig.uses_fsdp .uses_fsdp parse_flag_from_env
    OPSDTrainer._generate_single_turn
    log_engine_mismatch engine_mismatch EngineMismatch _engine_logprobs engine_logprobs log_probs is_own
    RolloutLog rollout_log log_completions rollout _check_datasets:columns
    teacher_gate teacher_gate_rollouts TeacherGate _gate_teacher _write_as_teacher _verify_teacher generate_as
    _collect:chosen _tokenize_teacher_prompts:chosen Teacher.hidden
    resolve_teacher_gate_rollouts as_list check_pass_rates check_preference OPSDTrainer._saved ._saved
    current_state never_empty compute_loss:mismatch _accumulate_or_halve:mismatch
"""

_TRAINER = "trl_opsd/opsd/trainer.py"


def _ours(name: str, only: tuple[str, ...] | None = None, edits: tuple = (), target: str | None = None) -> Part:
    return Part(f"trl_opsd/opsd/{name}.py", f"{PACKAGE}/{target or name}.py", only, edits)


def _test(name: str, only: str | None = None, edits: tuple = ()) -> Part:
    return Part(f"tests/{name}.py", f"{TESTS}/{name}.py", only and tuple(only.split()), edits)


def _test_of_trl(name: str) -> Part:
    """A test of what TRL has already, in the form of TRL's: on the models and data that all its tests stand on."""
    return Part(f"scripts/pull_requests/tests/{name}.py", f"tests/{name}.py")


_INIT = """from typing import TYPE_CHECKING

from ..._lazy_module import _LazyModule


_import_structure = {{
{structure}
}}

if TYPE_CHECKING:
{imports}
else:
    import sys

    sys.modules[__name__] = _LazyModule(__name__, __file__, _import_structure, module_spec=__spec__)
"""


def _init(**modules: str) -> tuple[str, str]:
    """The package's `__init__.py`, with the classes of each module."""
    text = _INIT.format(
        structure="\n".join(f'    "{name}": ["{classes}"],' for name, classes in modules.items()),
        imports="\n".join(f"    from .{name} import {classes}" for name, classes in modules.items()),
    )
    return f"{PACKAGE}/__init__.py", text


_ANOTHER_TEACHER = """

def another(model):
    \"\"\"A teacher that differs from the student.\"\"\"
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        teacher.lm_head.weight.copy_(teacher.lm_head.weight.flip(1))
    return teacher


def train(trainer_class, config, **kwargs):
    kwargs.setdefault("teacher_model", another(kwargs["model"]))
    recorder"""

_ABOUT = """    Trainer for on-policy (self-)distillation as compression: the student writes its own rollouts, a verifier decides
    which of them are trained on, and on those the student matches, token by token over the whole vocabulary, a
    teacher that knows more than it does. The self-teacher is that of [Self-Distilled
    Reasoner](https://huggingface.co/papers/2601.18734), its place after RL that of [OPSD Compresses What RLVR
    Teaches](https://huggingface.co/papers/2605.06188).
"""
_OF_TRAINER = (
    # Ours differs in what a resumed run needs, which belongs into TRL's own
    ("from ..sampling import RepeatSampler\n", ""),
    (
        "from trl.trainer.utils import get_config_model_id\n",
        "from trl.trainer.utils import RepeatSampler, get_config_model_id\n",
    ),
    ("            self.train_dataset,\n            self._tokenizer,\n", "            self._tokenizer,\n"),
    (
        """;
      what it rejects can be asked again (`max_generation_rounds`), and prompts that are always or never solved can be
      left out (`min_pass_rate`, `max_pass_rate`);
""",
        " (`gate`);\n",
    ),
    (
        """step by step. It ends on a divergence
    that is not finite on any rollout, and on nothing else: see [`AlarmCallback`] for what else can be watched, and
    [`RolloutPages`] for a page of the rollouts. Single rollouts whose divergence is not finite are left out ([`Faults`]).
""",
        "step by step.\n",
    ),
    (
        "the columns that the\n            reward functions take, and `completion_ids` if `lmbda` is below 1.",
        "and those that the\n            reward functions take.",
    ),
)
_BEFORE_CONTEXTS = (
    (
        "the columns that the teacher context takes, and those that the\n            reward functions take.",
        "and those that the reward functions take.",
    ),
    (
        'args=OPSDConfig(teacher_context="concise", num_generations=4, per_device_train_batch_size=4),',
        'teacher_model="Qwen/Qwen3-8B",',
    ),
    (
        """If the gate needs a verifier and there is none, if teacher and student are the same in weights and
            context, or if the dataset lacks a column that the teacher context takes or has fewer prompts than a batch.
            All of it before a model is loaded.""",
        "If arguments contradict each other, before a model is loaded.",
    ),
)
_BEFORE_WEIGHTS = (
    (" If `None`, the teacher has the student's initial\n            weights.", ""),
    (
        ' With `teacher_weights="initial"` the teacher is then the base\n            model, reached by disabling the adapter.',
        "",
    ),
)
_VERIFIED = (
    (
        _ABOUT,
        """    Trainer for on-policy distillation whose rollouts are verified: reward functions, as [`~trl.GRPOTrainer`] takes them,
    score what the student writes, and the log shows how right it is while it learns from its teacher.
""",
    ),
    (
        """    The only changes with respect to [`~trl.DistillationTrainer`] are:

    - the""",
        """    The only change with respect to [`~trl.DistillationTrainer`] is `reward_funcs`. Without it, it is that trainer.

    - the""",
    ),
    ("    With none of them used, and an external teacher, it is `DistillationTrainer`, step by step.\n\n", ""),
)
_GATED = (
    (
        _ABOUT,
        """    Trainer for on-policy distillation on verified rollouts: the student writes them, a verifier decides which of them are
    trained on, and only those cost a forward pass.
""",
    ),
)
_OF_CONFIG = (
    (
        "are the parameters below: which weights and which\n    context the teacher has, and which rollouts are trained on.",
        "are the parameters below.",
    ),
    (
        """If teacher and student are the same in weights and context, if a gate needs a verifier and there is
            none, if a column is missing, if the data does not fill a batch, or if two of the arguments exclude each other.""",
        "If two of them exclude each other, or the data lacks what they need.",
    ),
    # One context, because nothing chooses among several
    ("teacher_context (`str` or `list[str]`, *optional*):", "teacher_context (`str`, *optional*):"),
    ("teacher_prompt_template (`str` or `list[str]`, *optional*):", "teacher_prompt_template (`str`, *optional*):"),
    (
        " With\n            `teacher_gate` it may be several, in order of preference.\n        sibling_fallback",
        "\n        sibling_fallback",
    ),
    (
        " With\n            `teacher_gate` it may be several, in order of preference.\n        teacher_gate",
        "\n        teacher_gate",
    ),
    (
        "    # A single one may be text: command lines know one type for a field\n    teacher_context: list[str] | None",
        "    teacher_context: str | None",
    ),
    ("teacher_prompt_template: list[str] | None", "teacher_prompt_template: str | None"),
    (" With `teacher_gate` several, in order of preference.", ""),
    (' With "\n            "`teacher_gate` several, in order of preference."', '"'),
    (
        """        for name in ("teacher_context", "teacher_prompt_template"):
            value = vars(self)[name]
            if isinstance(value, list) and len(value) < 2:  # as the command line gives a single one
                setattr(self, name, value[0] if value else None)
""",
        "",
    ),
    (
        """        for name in as_list(self.teacher_context):
            if name not in TEACHER_PROMPT_TEMPLATES:
                raise ValueError(
                    f"`teacher_context` must be one of {list(TEACHER_PROMPT_TEMPLATES)} or None, and is "
                    f"{name!r}: for wording of your own set `teacher_prompt_template`."
                )
""",
        """        if self.teacher_context is not None and self.teacher_context not in TEACHER_PROMPT_TEMPLATES:
            raise ValueError(
                f"`teacher_context` must be one of {list(TEACHER_PROMPT_TEMPLATES)} or None, and is "
                f"{self.teacher_context!r}: for wording of your own set `teacher_prompt_template`."
            )
""",
    ),
    (
        "In order of preference. One, unless a gate chooses; none if the\n            teacher sees the plain prompt.",
        "One, or none if the teacher sees the plain prompt.",
    ),
    (
        """        templates = as_list(self.teacher_prompt_template)
        templates = templates or [TEACHER_PROMPT_TEMPLATES[name] for name in as_list(self.teacher_context)]
        return [TeacherContext(template) for template in templates]
""",
        """        if self.teacher_prompt_template is not None:
            return [TeacherContext(self.teacher_prompt_template)]
        if self.teacher_context is not None:
            return [TeacherContext(TEACHER_PROMPT_TEMPLATES[self.teacher_context])]
        return []
""",
    ),
)
_OWN_TEACHER_LATER = (
    ("teacher_model=None,  # its weights may be the student's: [`Teacher`] has them", "teacher_model=teacher_model,"),
)
_OF_CHOICE = (
    (
        "written, verified, asked again, and those chosen that are trained on",
        "written, verified, and those chosen that are trained on",
    ),
    (
        "Decides which rollouts are trained on, after those that the gate rejects have been written again.",
        "Decides which rollouts are trained on.",
    ),
)
_OF_ROLLOUTS = (
    (
        """        train_dataset ([`~datasets.Dataset`]):
            Where prompts are taken from in the place of those that are skipped.
""",
        "",
    ),
    ("        train_dataset: Dataset,\n", ""),
    ("        self._train_dataset = train_dataset\n", ""),
    (" It may be another one than the sampler drew.", ""),
    ("            # Of the first round: whoever fails is asked again, and whoever does not is not\n", ""),
    (
        """        rewards (`torch.Tensor`, *optional*):
            Reward by each verifier and, last, what they add up to, of shape `(B, functions + 1)`.
        columns (`dict[str, list]`):
            What the verifiers have logged of each.
""",
        "",
    ),
    ("    rewards: torch.Tensor | None = None\n    columns: dict[str, list] = field(default_factory=dict)\n", ""),
    ("        total = verdicts.rewards.where(verdicts.verified, torch.nan)\n", ""),
    (
        "        rollouts.rewards = torch.cat([verdicts.rewards_per_func, total.unsqueeze(1)], dim=1)[mine]\n",
        "",
    ),
    ("        rollouts.columns = dict(self.verifiers.columns)\n", ""),
)
_NONE_IS_LEFT_OUT = (
    ("written, verified, asked again, and those chosen that are trained on", "written and verified"),
    (
        """ With verifiers, `kept`, of shape `(B,)`, says which are trained on, and
            `num_items_in_batch` counts their tokens in the whole global batch.""",
        "",
    ),
    ("Who judges them. If `None`, all of them are trained on.", "Who judges them."),
    ("Has rollouts written, verified and chosen.", "Has rollouts written and verified."),
    (
        "Decides which rollouts are trained on, after those that the gate rejects have been written again.",
        "Has the verifiers judge the rollouts.",
    ),
)
_TESTS_OF_DIVERGENCE = """
    assert_close tiles TestDefinition.test_without_a_clip_it_is_the_textbook_divergence TestDefinition.test_gradcheck
    TestDivergence TestEdges.test_extreme_logits TestEdges.test_one_side_gives_no_probability
    TestEdges.test_nearly_equal_models TestEdges.test_beta_next_to_its_ends TestEdges.test_logits_of_different_shapes
    TestClip
"""
_TESTS_OF_GATE = """
    settings Recorder another train same_rollouts reward_by_length completions test_a_rollout_that_is_not_kept_costs_no_forward
    test_nothing_kept_leaves_the_weights_alone test_gradient_is_the_same_however_the_batch_is_cut
    test_truncated_is_never_correct test_unverifiable_is_neither_correct_nor_incorrect
    test_several_rewards_are_weighted_and_may_be_async test_num_generations_groups_the_rollouts_of_a_prompt
    test_evaluation_goes_through_the_gate_too test_fewer_prompts_than_a_batch_are_named_before_a_model_is_loaded
"""
_TEACHER_OF_TRL = (
    (
        "positions = positions_of(self.teacher.config)",
        "positions = positions_of(self.accelerator.unwrap_model(self.teacher_model).config)",
    ),
    (
        """        teacher_hidden, teacher_head = self.teacher.forward(
            unwrapped_student, self._get_last_hidden_state, *teacher_inputs, **multimodal_inputs
        )
""",
        """        self.teacher_model.eval()
        unwrapped_teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model,
                unwrapped_teacher,
                self._get_last_hidden_state,
                unwrapped_teacher,
                *teacher_inputs,
                **multimodal_inputs,
            )
        teacher_head = Head.of(unwrapped_teacher)
""",
    ),
)
_ALONE = "trainer = OPSDTrainer(model=small_model(0), args=config, train_dataset=rows, processing_class=tokenizer)\n        "
_WITH_ANOTHER = (
    "trainer = OPSDTrainer(\n            model=small_model(0),\n            teacher_model=another(small_model(0)),\n"
    "            args=config,\n            train_dataset=rows,\n            processing_class=tokenizer,\n        )\n        "
)
_GIVEN_TEACHER = (
    ("\n\ndef train(trainer_class, config, **kwargs):\n    recorder", _ANOTHER_TEACHER),
    (
        "        model,\n        model,\n        tokenizer,\n",
        "        model,\n        another(model),\n        tokenizer,\n",
    ),
    *(
        (
            f"model=small_model(0),\n            args=config,\n            train_dataset=rows,\n            {follows}",
            "model=small_model(0),\n            teacher_model=another(small_model(0)),\n            args=config,\n"
            f"            train_dataset=rows,\n            {follows}",
        )
        for follows in (
            "eval_dataset=",
            "processing_class=tokenizer,\n            reward_funcs=reward_by_length(5),\n        )\n        hidden",
        )
    ),
    *((f"{_ALONE}{follows}", f"{_WITH_ANOTHER}{follows}") for follows in ("hidden =", "batch =")),
)
_TESTS_OF_CONTEXT = """
    reference_loss test_loss_is_the_formula_on_the_kept_rollouts
    test_teacher_sees_its_context_and_the_same_completion_tokens test_own_chat_template_arguments_on_each_side
    test_different_generation_prompts_are_an_error
"""

# All but what an engine may write, which is not TRL's there
_TESTS_OF_FAULTS = """
    completions build recorder test_a_rollout_that_is_not_finite_is_left_out test_a_gradient_that_is_not_finite_is_not_followed
    test_too_many_in_a_row_end_the_run NoMemory test_a_step_without_memory_is_made_again_in_halves
    test_what_has_no_memory_in_halves_either_is_named sleeps spins waits test_a_verifier_that_hangs_ends_the_run_in_time
    test_an_interruption_of_the_users_stays_one test_the_time_is_up_where_the_users_interruption_is_ignored
"""

# What all tests of the trainer stand on: a tokenizer and a model of some kilobytes, so that none is downloaded
_FIXTURES = (
    Part(
        "trl_opsd/tiny/tokenizer.py",
        f"{TESTS}/tiny_tokenizer.py",
        edits=(("from .task import LABELS\n", 'LABELS = "abcdefgh"\n'),),
    ),
    Part(
        "trl_opsd/tiny/model.py",
        f"{TESTS}/tiny_model.py",
        edits=(
            ("from .task import TinyConfig\n", ""),
            ("config: TinyConfig, tokenizer", "config: SimpleNamespace, tokenizer"),
            ("config ([`TinyConfig`]):", "config (`SimpleNamespace`):"),
            ("import torch\n", "from types import SimpleNamespace\n\nimport torch\n"),
        ),
    ),
    Part(
        "tests/conftest.py",
        f"{TESTS}/conftest.py",
        edits=(
            ("from trl_opsd.tiny.model import", "from .tiny_model import"),
            ("from trl_opsd.tiny.tokenizer import", "from .tiny_tokenizer import"),
            ("from trl_opsd.tiny.task import TinyConfig, problems, row\n", "from types import SimpleNamespace\n"),
            (
                "SMALL = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, intermediate_size=48)",
                'CONCISE_TEMPLATE, SOLUTION_TEMPLATE = "{prompt} concise", "{prompt} solution {solution}"\n'
                "SMALL = {\n"
                '    "hidden_size": 32,\n    "num_layers": 2,\n    "num_heads": 2,\n    "num_key_value_heads": 1,\n'
                '    "head_dim": 32,\n    "intermediate_size": 48,\n    "tie_word_embeddings": False,\n}',
            ),
            (
                "config = TinyConfig(**{**SMALL.__dict__, **changes})",
                "config = SimpleNamespace(**{**SMALL, **changes})",
            ),
            (
                'return Dataset.from_list([row(problem) for problem in problems(TinyConfig(), "train", 64, seed=0)])',
                "rows = []\n"
                "    for number in range(64):\n"
                "        start, operand = number % 7, number // 7 % 7\n"
                "        result = (start + operand) % 7\n"
                "        rows.append(\n"
                "            {\n"
                '                "prompt": [{"role": "user", "content": f"{start} a:+{operand}"}],\n'
                '                "answer": str(result),\n'
                '                "solution": f"{start} a:+{operand}={result} \\\\boxed{{{result}}}",\n'
                "            }\n"
                "        )\n"
                "    return Dataset.from_list(rows)",
            ),
        ),
    ),
)

# Of a teacher that does not follow its student
_TEACHER = tuple(
    """Teacher.__init__ Teacher.prepare Teacher.config Teacher.forward Teacher.in_student load_external load copy_of_student check_vocabularies shard_teacher""".split()
)
_STILL_TEACHER = (
    (
        '    | `"ema"`, `"snapshot"` | a frozen copy that follows the student | a second adapter that follows the first |\n',
        "",
    ),
    (
        "how they score, how they follow the\nstudent, and how they get into a checkpoint and out of it.",
        "and how they score.",
    ),
)

STEPS = (
    Step(
        "autocast",
        mends=(
            (
                "trl/trainer/distillation_trainer.py",
                """        loss, entropy_sum, num_valid_tokens = self._forward_redirection(
            model, unwrapped_student, self._compute_loss, unwrapped_student, inputs, num_items_in_batch
        )
""",
                """        # Redirected, the wrapper calls `_compute_loss` in the place of the forward that accelerate has patched for mixed
        # precision, so the loss has to enter the autocast context by itself.
        with self.accelerator.autocast():
            loss, entropy_sum, num_valid_tokens = self._forward_redirection(
                model, unwrapped_student, self._compute_loss, unwrapped_student, inputs, num_items_in_batch
            )
""",
            ),
        ),
        parts=(_test_of_trl("test_distillation_mixed_precision"),),
        series="defects",
    ),
    Step(
        "merge",
        mends=(
            (
                "trl/generation/vllm_generation.py",
                "from contextlib import nullcontext\n",
                "from collections.abc import Iterator\nfrom contextlib import contextmanager, nullcontext\n",
            ),
            (
                "trl/generation/vllm_generation.py",
                "from transformers.utils import (\n    is_torch_mlu_available",
                "from transformers.integrations import is_deepspeed_zero3_enabled\n"
                "from transformers.utils import (\n    is_torch_mlu_available",
            ),
            (
                "trl/generation/vllm_generation.py",
                """            with self._dist.gather_params(list(model.parameters())):
                model.merge_adapter()
""",
                """            with self._dist.gather_params(list(model.parameters())), _unchanged_base(model):
                model.merge_adapter()
""",
            ),
            (
                "trl/generation/vllm_generation.py",
                "def extract_logprobs(",
                '''@contextmanager
def _unchanged_base(model: nn.Module) -> Iterator[None]:
    """
    Puts the half-precision weights below an adapter back as they were, bit for bit, after it was merged and taken out.

    `(w + d) - d` is not `w` where both are rounded, and the difference adds up over the syncs of a training. ZeRO-3 merges
    into gathered copies, which are not written back.
    """
    is_half = (torch.bfloat16, torch.float16)
    bases = [p for name, p in model.named_parameters() if ".base_layer." in name and p.dtype in is_half]
    if is_deepspeed_zero3_enabled():
        bases = []
    saved = [_local(p).to("cpu", copy=True) for p in bases]
    try:
        yield
    finally:
        for parameter, value in zip(bases, saved, strict=True):
            _local(parameter).copy_(value)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def extract_logprobs(''',
            ),
        ),
        parts=(_test_of_trl("test_vllm_generation_merge"),),
        series="defects",
    ),
    Step(
        "divergence",
        parts=(
            _ours(
                "divergence",
                only=tuple(
                    """_Statistics _Model _tile_length _blocks _transform_ _log_prob_ _entries_ _drop_clipped_
                    _block_statistics_ _sweep_ _Divergence _check_options divergence""".split()
                ),
                edits=(
                    ("from trl.kernels.chunked_divergence import ChunkedDivergenceFunction\n", ""),
                    (" For logits that do not exist yet, [`linear_divergence`] saves most of the memory.", ""),
                    ("# Matrix products\n", "# Autograd\n"),
                    (
                        "# Vocabulary columns to cast at a time where the head is not already in the dtype of the product\n",
                        "",
                    ),
                    (
                        "# What one call may hold beside its inputs and outputs, at the least; on an accelerator also a share "
                        "of what is free\n",
                        "",
                    ),
                    ("# `torch.mm(..., out_dtype=torch.float32)` of bfloat16 inputs, on CUDA\n", ""),
                ),
            ),
            Part(
                "tests/divergence_reference.py",
                f"{TESTS}/divergence_reference.py",
                only=tuple("entry_divergence reference_metrics reference_divergence naive_clipped_divergence".split()),
                edits=(
                    (
                        "What the divergence is, written for reading: the definition every path is held to, and the dense "
                        "baseline.",
                        "What the divergence is, written for reading: the definition every path is held to.",
                    ),
                ),
            ),
            _test(
                "test_divergence",
                only=_TESTS_OF_DIVERGENCE,
            ),
        ),
        texts=(_init(divergence="divergence"), (f"{TESTS}/__init__.py", "")),
        series="divergence",
    ),
    Step(
        "linear",
        parts=(
            Part("trl_opsd/opsd/divergence.py", f"{PACKAGE}/divergence.py"),
            Part("tests/divergence_reference.py", f"{TESTS}/divergence_reference.py"),
            _test(
                "test_divergence",
                only=_TESTS_OF_DIVERGENCE + " Problem _four TestLinearDivergence",
            ),
        ),
        brings="_MEMORY_BYTES _MEMORY_SHARE _ROUNDED_PANELS _CAST_COLUMNS _MM_OUT_DTYPE",
        series="divergence",
    ),
    Step(
        "triton",
        parts=(
            Part("trl_opsd/opsd/divergence.py", f"{PACKAGE}/divergence.py"),
            _ours("divergence_triton"),
            _test(
                "test_divergence",
                edits=(
                    (
                        'environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}',
                        'environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}\n'
                        f'        package = "{TESTS.replace("/", ".")}.test_divergence"',
                    ),
                    (
                        '"import test_divergence; test_divergence.check_kernels()"',
                        'f"from {package} import check_kernels; check_kernels()"',
                    ),
                ),
            ),
        ),
        brings="_use_triton _TRITON_DEVICES is_triton_available TestTriton check_kernels",
        series="divergence",
    ),
    Step(
        "reward_functions",
        parts=(*_FIXTURES, _ours("verify"), _ours("gate", only=("Verdicts", "judge")), _test("test_verify")),
    ),
    Step(
        "verifiers",
        parts=(
            _ours("batches", only=("unpadded",)),
            _ours("rollouts", edits=(*_OF_ROLLOUTS, *_NONE_IS_LEFT_OUT)),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours(
                "trainer",
                target="opsd_trainer",
                edits=(*_OF_TRAINER, *_VERIFIED, *_BEFORE_CONTEXTS, *_BEFORE_WEIGHTS, *_OWN_TEACHER_LATER),
            ),
            _test(
                "test_opsd_trainer",
                only="settings Recorder another train same_rollouts completions "
                "test_several_rewards_are_weighted_and_may_be_async",
                edits=_GIVEN_TEACHER,
            ),
        ),
        texts=(_init(divergence="divergence", opsd_config="OPSDConfig", opsd_trainer="OPSDTrainer"),),
        brings="Rollouts",
    ),
    Step(
        "gate",
        parts=(
            _ours("gate", only=("Verdicts", "judge", "shortest")),
            _ours("batches", only=("unpadded", "select_rows")),
            _ours("rollouts", edits=(*_OF_ROLLOUTS, *_OF_CHOICE)),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours(
                "trainer",
                target="opsd_trainer",
                edits=(*_OF_TRAINER, *_GATED, *_BEFORE_CONTEXTS, *_BEFORE_WEIGHTS, *_OWN_TEACHER_LATER),
            ),
            _test(
                "test_opsd_trainer",
                only=_TESTS_OF_GATE,
                edits=_GIVEN_TEACHER,
            ),
        ),
        brings="""
            gate passed kept resolve_gate shortest keep_shortest num_generations group_size num_items_in_batch num_tokens
            loss_mask nothing_kept _check_datasets _verify_and_choose:start opsd/kept OPSDTrainer.compute_loss _clip_grad_norm _get_grad_norm select_rows mine
            _get_train_sampler MULTIMODAL_FIELDS PADDED_FIELDS OPSDConfig.global_batch_size global_batch
        """,
    ),
    Step(
        "loss",
        parts=(
            _ours("head"),
            _ours("metrics"),
            _ours("batches", only=("unpadded", "with_completion", "select_rows")),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours(
                "trainer",
                target="opsd_trainer",
                edits=(
                    *_OF_TRAINER,
                    *_GATED,
                    *_BEFORE_CONTEXTS,
                    *_BEFORE_WEIGHTS,
                    *_OWN_TEACHER_LATER,
                    *_TEACHER_OF_TRL,
                ),
            ),
            _test(
                "test_opsd_trainer",
                only=_TESTS_OF_GATE + "test_without_its_own_parameters_it_is_distillation_trainer "
                "test_clip_bounds_the_loss_and_is_logged",
                edits=_GIVEN_TEACHER,
            ),
        ),
        brings="""
            _compute_loss _compute_divergence token_metrics TokenMetrics Head head kl_clip with_completion
            prediction_step evaluation_loop _determine_best_metric _eval_loss DivergenceOutput linear_divergence_with_metrics
            OPSDTrainer.log test_clip_bounds_the_loss_and_is_logged
        """,
    ),
    Step(
        "context",
        parts=(
            _ours("context"),
            Part("trl_opsd/positions.py", f"{PACKAGE}/positions.py"),
            _test("test_teacher_context"),
        ),
        series="context",
    ),
    Step(
        "teacher_context",
        parts=(
            _ours("gate", only=("Verdicts", "judge", "shortest", "shortest_siblings")),
            _ours("batches", only=("padded", "unpadded", "with_completion", "select_rows")),
            _ours("rollouts", edits=(*_OF_ROLLOUTS, *_OF_CHOICE)),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours(
                "trainer",
                target="opsd_trainer",
                edits=(*_OF_TRAINER, *_BEFORE_WEIGHTS, *_OWN_TEACHER_LATER, *_TEACHER_OF_TRL),
            ),
            _test(
                "test_opsd_trainer",
                only=_TESTS_OF_GATE + _TESTS_OF_CONTEXT + "test_without_its_own_parameters_it_is_distillation_trainer "
                "test_clip_bounds_the_loss_and_is_logged",
                edits=_GIVEN_TEACHER,
            ),
            _test(
                "test_opsd_teachers",
                only="completions test_siblings_and_shortest_by_hand test_the_teacher_sees_the_shortest_correct_sibling "
                "test_without_sibling_or_fallback_a_rollout_is_dropped",
                edits=(
                    (
                        "Teachers that follow the student, siblings, padded vocabularies, and prompts that are too long.",
                        "Siblings.",
                    ),
                    *(
                        (
                            f"model=small_model(0),\n            args=config,\n            {follows}",
                            f"model=small_model(0),\n            teacher_model=small_model(1),\n            args=config,\n            {follows}",
                        )
                        for follows in (
                            "train_dataset=rows,\n            processing_class=tokenizer,\n"
                            f"            reward_funcs=lambda completions, **kwargs: {rewards},\n"
                            for rewards in ("right", "[0.0, 0.0, 1.0, 0.0]")
                        )
                    ),
                ),
            ),
        ),
        brings="""
            TeacherContext TeacherPrompts TEACHER_PROMPT_TEMPLATES teacher_context teacher_prompt_template max_teacher_prompt_length build_teacher_context build_teacher_contexts context contexts
            teacher_prompts
            teacher_chat_template_kwargs own_kwargs own_template_kwargs _chat_template_kwargs _tokenize_for_teacher padded
            _apply_chat_template _max_teacher_prompt positions_of _tokenize_teacher_prompts teacher_prompt_ids teacher_prompt_mask
            _VALID_DICT_FIELDS check_text_only sibling siblings sibling_fallback takes_sibling shortest_siblings
            build_sibling_fallback uses_sibling fallbacks
        """,
    ),
    Step(
        "teacher_weights",
        parts=(
            _ours("teacher", only=_TEACHER, edits=_STILL_TEACHER),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours("trainer", target="opsd_trainer", edits=_OF_TRAINER),
            _test("test_opsd_trainer"),
        ),
        brings="""
            Teacher .teacher has_adapter external TEACHER_WEIGHTS teacher_weights resolve_teacher_weights _check_teacher
            valid_vocab
        """,
    ),
    Step(
        "checks",
        parts=(
            _ours(
                "teacher",
                only=(*_TEACHER, "check_identity"),
                edits=_STILL_TEACHER,
            ),
            _ours("ends"),
            _ours("trainer", target="opsd_trainer", edits=_OF_TRAINER),
            _test("test_opsd_trainer"),
            _test(
                "test_opsd_teachers",
                only="completions test_siblings_and_shortest_by_hand test_the_teacher_sees_the_shortest_correct_sibling "
                "test_without_sibling_or_fallback_a_rollout_is_dropped test_another_tokenizer_is_refused_with_a_pointer_to_gold "
                "test_heads_that_differ_in_padding_distil_with_it_masked",
                edits=(
                    (
                        "Teachers that follow the student, siblings, padded vocabularies, and prompts that are too long.",
                        "Siblings, and teachers of other vocabularies.",
                    ),
                ),
            ),
            _test(
                "test_opsd_arguments",
                only="verifier build test_a_completion_has_positions "
                "test_a_teacher_that_ends_where_the_student_does_not_is_refused "
                "test_a_template_that_ends_in_another_token_is_warned_of",
            ),
        ),
        brings="""
            check_ends check_lengths ends check_identity is_external
            test_an_adapter_that_already_changes_the_model_is_no_initial_teacher
        """,
    ),
    Step(
        "followers",
        parts=(
            _ours("teacher"),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours("trainer", target="opsd_trainer", edits=_OF_TRAINER),
            _test("test_opsd_teachers"),
        ),
        brings="""
            follows_student has_second_adapter has_stepped _add_adapter TeacherSyncCallback sharded_parameters __init__:_sums ADAPTER FILE
            teacher_update_rate teacher_sync_steps resolve_teacher_sync_steps OPSDTrainer._save _save_checkpoint
            _load_optimizer_and_scheduler ema snapshot is_fsdp1
        """,
    ),
    Step(
        "micro_batches",
        parts=(
            _ours("batches"),
            _ours("ends"),
            _ours("config", target="opsd_config", edits=_OF_CONFIG),
            _ours("trainer", target="opsd_trainer", edits=_OF_TRAINER),
            _test("test_opsd_microbatch"),
        ),
        brings="""
            max_tokens_per_microbatch OPSDTrainer.training_step _accumulate micro_batches gather_rows balanced_length
            token_budget_batches budget size_of _at_work _out_of_memory _accumulate_under _accumulate_or_halve
        """,
    ),
    Step(
        "faults",
        parts=(
            Part("trl_opsd/faults.py", f"{PACKAGE}/faults.py"),
            _ours("metrics"),
            _ours("verify"),
            _ours("trainer", target="opsd_trainer", edits=_OF_TRAINER),
            _test("test_opsd_faults", only=_TESTS_OF_FAULTS),
        ),
        brings="""
            OPSDAlarm Faults faults finite_rows _finite _loss_without compute_loss:measured
            time_limit _TimeIsUp timeout _timeout ddp_timeout
        """,
    ),
    Step(
        "alarms",
        parts=(
            _ours(
                "alarms",
                edits=(
                    # What a gate of the teacher's leaves out, which is no part of any step
                    (
                        "        self.anchored: list[float] = []  # share on the plain prompt, one entry for each log\n",
                        "",
                    ),
                    (
                        '            if "opsd/kl" in log:\n                self.anchored.append(log.get("opsd/anchored", 0.0))\n',
                        "",
                    ),
                    ('        self.anchored.append(logs.get("opsd/anchored", 0.0))\n', ""),
                    (
                        "        if all(share == 1.0 for share in self.anchored):\n"
                        "            # On an anchor the student starts out as its teacher. Some batches may hold nothing else, but not all\n"
                        "            if state.global_step >= self.window and kl < 1e-9:\n"
                        "                self._stop(\n"
                        "                    control,\n"
                        '                    "The divergence is zero, so nothing is learned: in none of its contexts was the teacher right on any "\n'
                        '                    f"prompt so far (`teacher_gate={self.trainer.args.teacher_gate}`).",\n'
                        "                )\n"
                        "        elif kl < 1e-9 and self.anchored[-1] < 1.0:\n",
                        "        if kl < 1e-9:\n",
                    ),
                    (", and not because some batches are anchors alone", ""),
                    # Nor is what a checkpoint holds beside the weights
                    ("class AlarmCallback(DivergenceCallback, Saved):", "class AlarmCallback(DivergenceCallback):"),
                    ('    file = "alarms.json"\n\n', ""),
                    (
                        "What they have seen is in every\n"
                        "    checkpoint (`alarms.json`). A run that goes on from one without takes it from its log, as well as that says it.\n",
                        "A resumed run takes the start, and the\n    checkpoints it had written, from its log.\n",
                    ),
                ),
            ),
            _ours("metrics"),
            _ours("trainer", target="opsd_trainer", edits=_OF_TRAINER),
            _test("test_opsd_alarms"),
        ),
        texts=(
            _init(
                alarms="AlarmCallback", divergence="divergence", opsd_config="OPSDConfig", opsd_trainer="OPSDTrainer"
            ),
        ),
        brings="AlarmCallback DivergenceCallback compute_loss:metrics",
    ),
    Step(
        "example",
        texts=(("examples/scripts/opsd.py", (TEXTS / "examples" / "opsd.py").read_text()),),
        series="example",
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Putting it together
# ---------------------------------------------------------------------------------------------------------------------

# Modules that TRL names after their trainer
_RENAMED = {"config": "opsd_config", "trainer": "opsd_trainer"}
# And those beside our stages that go with the trainer
_BESIDE = "faults|positions"


def at_home_in_trl(text: str, target: str) -> str:
    """
    A file of ours with the imports, and the names in its docstrings, that it has in TRL.

    Args:
        text (`str`):
            Python source.
        target (`str`):
            Path that it has in TRL's repository.

    Returns:
        `str`: Source.
    """
    for ours, theirs in _RENAMED.items():
        text = re.sub(rf"\bfrom \.{ours} import", f"from .{theirs} import", text)
        text = re.sub(rf"\btrl_opsd\.opsd\.{ours}\b", f"trl_opsd.opsd.{theirs}", text)
    text = re.sub(rf"\bfrom \.\.({_BESIDE}) import", r"from .\1 import", text)
    text = text.replace("[`~trl_opsd.opsd.", "[`~experimental.opsd.")
    text = re.sub(r"\btrl_opsd\.opsd\b|\btrl_opsd(?= import)", "trl.experimental.opsd", text)
    if target.startswith("tests/"):
        text = text.replace("from trl_opsd.tiny.task import", "from .conftest import")
        return re.sub(
            r"^from (test(?:_|ing_)\w+|divergence_reference) import", r"from .\1 import", text, flags=re.MULTILINE
        )
    trainers = {"DistillationTrainer": "distillation_trainer", "DistillationConfig": "distillation_config"}
    for name, module in trainers.items():
        text = re.sub(
            rf"^from trl import {name}$", f"from ...trainer.{module} import {name}", text, flags=re.MULTILINE
        )
    return re.sub(r"^from trl\.", "from ...", text, flags=re.MULTILINE)


def edited(text: str, edits: tuple[tuple[str, str], ...], where: str) -> str:
    """
    Text with some of it said otherwise.

    Args:
        text (`str`):
            Text.
        edits (`tuple[tuple[str, str], ...]`):
            What it has once, and what stands in its place.
        where (`str`):
            Its name, for the message.

    Returns:
        `str`: Text.

    Raises:
        ValueError: If it does not have that once.
    """
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{where} has this {text.count(old)} times and not once, so it cannot be edited:\n{old}")
        text = text.replace(old, new)
    return text


def format_files(folder: Path) -> None:
    """
    Sorts imports, leaves out those that nothing uses, and formats, by the rules of TRL's `pyproject.toml`.

    Args:
        folder (`Path`):
            Folder with the files of a step.

    Raises:
        RuntimeError: If a file names what is not there, or has another fault.
    """
    rules = folder / "ruff.toml"
    rules.write_text(
        'target-version = "py310"\nline-length = 119\nsrc = ["trl"]\n[lint]\nignore = ["B028", "C408", "C901", "E501"]\n'
        'select = ["E", "F", "I", "W", "UP", "B", "T", "C"]\n[lint.isort]\nlines-after-imports = 2\n'
        'known-first-party = ["trl"]\n[lint.per-file-ignores]\n"__init__.py" = ["F401"]\n'
    )
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["format"], ["check", "--fix", "--unsafe-fixes", "--select", "F401,I001"], ["format"], ["check"]):
        result = subprocess.run([*ruff, *command, "."], cwd=folder, capture_output=True, text=True)
        if result.returncode != 0 and "--fix" not in command:
            raise RuntimeError(f"ruff {' '.join(command)}: {result.stdout}{result.stderr}")
    rules.unlink()
    shutil.rmtree(folder / ".ruff_cache", ignore_errors=True)


def files_of(step: Step, before: dict[str, str], absent: set[str], license_header: str) -> dict[str, str]:
    """
    The files that a step writes.

    Args:
        step ([`Step`]):
            Step.
        before (`dict[str, str]`):
            Files as the steps before it have left them, by path.
        absent (`set[str]`):
            Names that later steps bring, or none does.
        license_header (`str`):
            What TRL's files begin with.

    Returns:
        `dict[str, str]`: Text by path.
    """
    files = {}
    for part in step.parts:
        text = edited((ROOT / part.source).read_text(), part.edits, part.source)
        text = without(text, absent, part.only)
        text = re.sub(
            r"^ *# Parameters that [^\n]*\n(?: *\n)*(?= *(?:# Parameters|def |@))", "", text, flags=re.MULTILINE
        )
        text = re.sub(r"(?<=\n\n)    # [A-Z][^\n]*\n\s*\n(?=    # [A-Z][^\n]*\n\n|\S|\Z)", "", text)
        files[part.target] = license_header + at_home_in_trl(text, part.target)
    for path, text in step.texts:
        files[path] = (license_header + text).rstrip() + "\n"
    if sections("opsd_trainer", (step,)):
        files["docs/source/opsd_trainer.md"] = sections("opsd_trainer", STEPS[: STEPS.index(step) + 1])
    for path, old, new in step.mends:
        text = files.get(path) or before.get(path) or (INSTALLED.parent / path).read_text()
        files[path] = edited(text, ((old, new),), path)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        format_files(folder)
        return {path: (folder / path).read_text() for path in files}


def sections(page: str, steps: tuple[Step, ...]) -> str:
    """
    What some steps say on a page of TRL's documentation.

    Args:
        page (`str`):
            Name in `scripts/pull_requests/docs`. What follows the comment `<!-- name -->` there belongs to that step.
        steps (`tuple[Step, ...]`):
            Steps.

    Returns:
        `str`: Markdown, in the order of the page.
    """
    text = (TEXTS / "docs" / f"{page}.md").read_text()
    parts = re.split(r"^<!-- (\w+) -->\n", text, flags=re.MULTILINE)
    names = {step.name for step in steps}
    return "".join(part for name, part in zip(parts[1::2], parts[2::2], strict=True) if name in names)


def absent_in(number: int) -> set[str]:
    """Names that the files of a step do not mention, by its place among the steps."""
    step = STEPS[number]
    later = {name for other in STEPS[number + 1 :] if other.series == step.series for name in other.brings.split()}
    return later | (set(STAYS.split()) if step.series == "trainer" else set())


def changed_lines(old: str, new: str) -> int:
    """How many lines a patch takes out and puts in."""
    changes = difflib.ndiff(old.splitlines(), new.splitlines())
    return sum(line[0] in "+-" for line in changes)


def patch(path: str, old: str | None, new: str) -> str:
    """
    A change of one file, for `git apply`.

    Args:
        path (`str`):
            Path in the repository.
        old (`str`, *optional*):
            Text before, `None` where there is no such file.
        new (`str`):
            Text after.

    Returns:
        `str`: Unified diff, empty where nothing changes.
    """
    if old == new:
        return ""
    names = ("/dev/null" if old is None else f"a/{path}", f"b/{path}")
    lines = list(difflib.unified_diff((old or "").splitlines(keepends=True), new.splitlines(keepends=True), *names))
    mode = "new file mode 100644\n" if old is None else ""
    return f"diff --git a/{path} b/{path}\n{mode}" + "".join(lines)


def to_insert(step: Step) -> str:
    """What a step says in files that are no part of the installed package, so that no patch can know their lines."""
    toctree = "" if step.name != "verifiers" else "  - local: opsd_trainer\n    title: OPSD"
    papers = sections("paper_index", (step,))
    places = (
        ("docs/source/_toctree.yml", "`Experimental`, in its alphabetical place", "yaml", toctree),
        ("docs/source/paper_index.md", "`Knowledge Distillation`", "markdown", papers.strip()),
    )
    return "".join(
        f"\nTo insert in `{path}`, under {where}:\n\n````{kind}\n{text}\n````\n"
        for path, where, kind, text in places
        if text
    )


def pull_request(step: Step) -> str:
    """
    The text of a pull request, in the form of TRL's template. Whoever opens it ticks what it asks for of them.

    Args:
        step ([`Step`]):
            Step.

    Returns:
        `str`: Markdown, the title first.
    """
    title, _, text = (TEXTS / f"{step.name}.md").read_text().partition("\n")
    return f"""{title}

# What does this PR do?

{text.strip()}
{to_insert(step)}
## Before submitting

- [ ] This PR fixes a typo or improves the docs (you can dismiss the other checks if that's the case).
- [ ] Did you read the [contributor guideline](https://github.com/huggingface/trl/blob/main/CONTRIBUTING.md#create-a-pull-request), Pull Request section?
- [ ] Was this discussed/approved via a GitHub issue? Please add a link to it if that's the case.
- [ ] Did you make sure to update the documentation with your changes?
- [x] Did you write any new necessary tests?

## AI writing disclosure

- [ ] No AI usage: the PR was written entirely by a human.
- [ ] AI-assisted: some parts were suggested or improved by AI, but the PR was written and reviewed by a human.
- [ ] AI-generated: the PR was mostly or fully generated by an AI tool.

## Who can review?

Anyone in the community is free to review the PR once the tests have passed.
"""


def build(out: Path) -> list[tuple[str, int]]:
    """
    Writes the pull requests.

    Args:
        out (`Path`):
            Folder to write. One that is there is replaced.

    Returns:
        `list[tuple[str, int]]`: Name and changed lines of each.
    """
    header = (INSTALLED / "trainer" / "distillation_trainer.py").read_text().partition("\n\n")[0] + "\n\n"
    staging = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tree: dict[str, str] = {}
    listed, described = [], ""
    for number, step in enumerate(STEPS, start=1):
        name = f"{number:02d}-{step.name.replace('_', '-')}"
        changes, patches = {}, []
        for path, text in files_of(step, tree, absent_in(number - 1), header).items():
            installed = INSTALLED.parent / path
            old = tree.get(path) or (installed.read_text() if installed.is_file() else None)
            if old != text:
                changes[path] = changed_lines(old or "", text)
                patches.append(patch(path, old, text))
            tree[path] = text
        (staging / f"{name}.patch").write_text("".join(patches))
        (staging / f"{name}.md").write_text(pull_request(step))
        listed.append((name, sum(changes.values())))
        described += f"\n## {name}\n\n" + "".join(f"- `{path}`: {lines}\n" for path, lines in changes.items())
    for path, text in tree.items():
        (staging / "branch" / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / "branch" / path).write_text(text)
    titles = [(TEXTS / f"{step.name}.md").read_text().partition("\n")[0] for step in STEPS]
    rows = [f"| [{name}]({name}.md) | {title} | {n} |" for (name, n), title in zip(listed, titles, strict=True)]
    (staging / "README.md").write_text(
        f"# Pull requests to TRL {importlib.metadata.version('trl')}\n\nEach on top of those before it: `git apply 01-*.patch`, and so on.\n\n"
        "| patch | title | changed lines |\n|---|---|---|\n" + "\n".join(rows) + "\n" + described
    )
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return listed


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Folder to write; one that is there is replaced.")
    for name, lines in build(parser.parse_args(args).out):
        print(f"{lines:5d}  {name}")


if __name__ == "__main__":
    main()
