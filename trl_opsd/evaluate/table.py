"""The table of results: columns as the fields of the rows declare them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import escape

from .results_file import Measurement
from .schema import Column, ResultRow


class Table(NamedTuple):
    """
    A table of results.

    Args:
        headings (`list[str]`):
            Its headings.
        lines (`list[list[Cell]]`):
            For each line the cells: a text, and what it is sorted by.
        prominent (`int`):
            Number of columns that people look at first; they come first.
    """

    headings: list[str]
    lines: list[list["Cell"]]
    prominent: int


# A text, and what it is sorted by
Cell = tuple[str, float | str]
# What a row has in a column; `None` where it has nothing
Value = Callable[[ResultRow], Any]
# A column that no field declares
Derived = tuple[Column, Value]


def table_of(
    measurements: Sequence[Measurement],
    derived: Sequence[Derived] = (),
    only: Sequence[str] | None = None,
) -> Table:
    """
    Returns the table of results. A column that no row has something for, or that says nothing, is left out.

    Args:
        measurements (`Sequence[Measurement]`):
            Its lines.
        derived (`Sequence[tuple[Column, Callable]]`, *optional*):
            Columns that follow from a row and from what it does not know, such as a price.
        only (`Sequence[str]`, *optional*):
            Fields of the rows to show, `checkpoint`, `task` and `decoding` among them. Defaults to all.

    Returns:
        [`Table`]: Headings, lines, and how many columns are looked at first.
    """
    rows = [item.row for item in measurements]
    columns = [*_columns(rows, only), *((column, value, None, None) for column, value in derived)]
    columns.sort(key=lambda entry: entry[0].place)  # as they are declared otherwise
    shown = [entry for entry in columns if _says_something(*entry[:2], rows)]
    known = {None, *(column.heading for column, *_ in shown)}
    shown = [entry for entry in shown if entry[0].beside in known]
    names = [name for name in ("checkpoint", "task", "decoding") if only is None or name in only]
    table = []
    for item in measurements:
        labels = {"checkpoint": item.label, "task": item.row.task, "decoding": item.row.decoding}
        table.append(
            [*((labels[name], labels[name]) for name in names), *(_cell(*entry, item.row) for entry in shown)]
        )
    prominent = len(names) + sum(column.place == 0 for column, *_ in shown)
    return Table([*names, *(column.heading for column, *_ in shown)], table, prominent)


def _columns(rows: Sequence[ResultRow], only: Sequence[str] | None) -> list[tuple]:
    """The columns that the rows declare, each with its value and the bounds of its interval, if it has any."""

    def value_of(name: str) -> Value:
        return lambda row: vars(row).get(name)

    def at_k(name: str) -> Value:
        return lambda row: row.at_k.get(name)

    def bound(name: str, place: int) -> Value:
        return lambda row: row.at_k_bounds[name][place] if name in row.at_k_bounds else None

    found = []
    for declared in dataclasses.fields(type(rows[0])):
        name, column = declared.name, declared.metadata.get("column")
        if column is None or (only is not None and name not in only):
            continue
        if name == "at_k":
            names = {key for row in rows for key in row.at_k}
            for key in sorted(names, key=lambda key: (key[0] != "p", len(key), key)):
                found.append((dataclasses.replace(column, heading=key), at_k(key), bound(key, 0), bound(key, 1)))
        else:
            found.append((column, value_of(name), value_of(f"{name}_low"), value_of(f"{name}_high")))
    return found


def _says_something(column: Column, value: Value, rows: Sequence[ResultRow]) -> bool:
    values = {value(row) for row in rows} - {None}
    return bool(values) and values != {column.trivial}


def _cell(column: Column, value: Value, low: Value | None, high: Value | None, row: ResultRow) -> Cell:
    found = value(row)
    if found is None:
        return "–", -1.0
    bounds = [bound(row) for bound in (low, high) if bound is not None]
    cut = "≥ " if column.length is not None and row.is_cut(column.length) else ""
    if not bounds or None in bounds:
        return f"{cut}{column.text(found)}", found
    return f"{cut}{column.text(found)} ({column.text(bounds[0])} to {column.text(bounds[1])})", found


# What a load measures, and how it is shown
_SERVED: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("concurrency", "at a time", str),
    ("requests_per_s", "answers/s", "{:.3g}".format),
    ("correct_per_s", "correct/s", "{:.3g}".format),
    ("tokens_per_s", "tokens/s", "{:,.0f}".format),
    ("first_token_p50_s", "first token, s, p50", "{:.3g}".format),
    ("first_token_p95_s", "p95", "{:.3g}".format),
    ("total_p50_s", "answer, s, p50", "{:.3g}".format),
    ("total_p95_s", "p95", "{:.3g}".format),
)


def served_table(measurements: Sequence[Measurement]) -> Table:
    """
    Returns the table of latency and throughput under load, which has no lines where none was measured.

    Args:
        measurements (`Sequence[Measurement]`):
            What may have been under load, each at several levels of concurrency.

    Returns:
        [`Table`]: A line for each level of each.
    """
    lines = []
    for item in measurements:
        for level in item.row.serving:
            labels = [(name, name) for name in (item.label, *item.key)]
            values = [(vars(level)[name], show) for name, _, show in _SERVED]
            lines.append([*labels, *(("–", -1.0) if v is None else (show(v), v) for v, show in values)])
    headings = ["checkpoint", "task", "decoding", *(heading for _, heading, _ in _SERVED)]
    return Table(headings, lines, len(headings))


def markdown_table(headings: list[str], table: list[list[Cell]]) -> list[str]:
    """Returns what [`table_of`] gives as lines of Markdown."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(markdown_text(text) for text, _ in cells) + " |" for cells in table]


def markdown_text(text: str) -> str:
    """Returns a text as Markdown that shows it and does nothing else, also in a table."""
    return str(escape(" ".join(text.split()))).replace("|", "\\|").replace("`", "'")
