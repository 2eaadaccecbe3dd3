"""
The report that people read: `report.md`, and `report.html`, one page with everything in it that opens offline.

What models wrote is hostile here: every text is escaped by the template, and the page runs its own script and no other.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..cli import UserError, make_folder
from ..results import write_text
from . import svg
from .charts import PARAMETERS, TOKENS, Axis, accuracy_chart, charts_of, line_of
from .compare import Answer, Comparison, Conclusion, compare_measurements, margin_finder, warnings_of
from .estimate import MARKERS, cost_per_1000_correct, flops_per_1000_correct
from .results_file import Measurement, load_results
from .schema import Column, ResultRow, percent
from .table import Derived, Table, markdown_table, markdown_text, served_table, table_of


TRACES = 2  # pairs of traces for each way in which the verdict may have changed
TRACE_CHARACTERS = 20_000  # of one trace; the rest is counted


@dataclass
class Row:
    """
    A line of the grid: one task, or all together, for every checkpoint.

    Args:
        name (`str`):
            What it is.
        start (`str`):
            Accuracy of the checkpoint that the others are compared with.
        cells (`list[Comparison or Conclusion or None]`):
            What each checkpoint is against it; `None` where it was not measured.
    """

    name: str
    start: str
    cells: list[Comparison | Conclusion | None]


def report_results(
    results_files: Sequence[str | Path],
    folder: str | Path,
    before: str | None = None,
    margins: Mapping[str | None, float] | None = None,
    title: str = "trl-opsd",
    price: float | None = None,
) -> list[Comparison]:
    """
    Writes the report of results files, as [`write_report`] does.

    Args:
        results_files (`Sequence[str]`):
            JSON files of the evaluation; the completions lie beside them.
        folder, before, margins, title, price:
            For [`write_report`].

    Returns:
        `list[Comparison]`: What every checkpoint is against `before`.

    Raises:
        UserError: If a file is missing or damaged, two rows cannot be told apart, or the folder cannot be written.
    """
    measurements = [item for file in results_files for item in load_results(file)]
    make_folder(folder, "output_dir")
    return write_report(measurements, folder, before, margins, title, price)


def write_report(
    measurements: Sequence[Measurement],
    folder: str | Path,
    before: str | None = None,
    margins: Mapping[str | None, float] | None = None,
    title: str = "trl-opsd",
    price: float | None = None,
    axes: Sequence[Axis] = (TOKENS,),
    derived: Sequence[Derived] = (),
    remarks: Sequence[str] = (),
) -> list[Comparison]:
    """
    Writes `report.md`, `report.html` and, for each axis, a picture such as `accuracy_tokens.svg`.

    The page begins with the answer: the last checkpoint against the first, or the one named, in a line. Then come what
    makes it worth less, a grid of tasks and checkpoints, and the statistics: every comparison in words; a table that sorts;
    accuracy against tokens and parameters, accuracy at a token budget, and how long completions are, for each task and
    way of decoding; and traces of the same problem before and after. What needs completions is left out where they were
    not saved, and the page says so.

    Args:
        measurements (`Sequence[Measurement]`):
            What the report is about.
        folder (`str` or `Path`):
            Where to.
        before (`str`, *optional*):
            Label, or stage, of the checkpoint that the others are compared with. Defaults to the first there is.
        margins (`Mapping`, *optional*):
            Loss of accuracy that still counts as none, by task, as [`~trl_opsd.evaluate.compare.margins_of`] reads it.
            Defaults to 0.01 for all.
        title (`str`, *optional*, defaults to `"trl-opsd"`):
            Heading.
        price (`float`, *optional*):
            Price of a million completion tokens, for the cost of 1,000 correct answers.
        axes (`Sequence[Axis]`, *optional*, defaults to tokens):
            What accuracy is drawn against in a picture of its own.
        derived (`Sequence[tuple[Column, Callable]]`, *optional*):
            Columns of the table beside those that the rows declare.
        remarks (`Sequence[str]`, *optional*):
            What a reader should know beside what the report says itself.

    Returns:
        `list[Comparison]`: What every checkpoint is against `before`, task by task.

    Raises:
        UserError: If there is nothing to report on, or two rows cannot be told apart.
    """
    if not measurements:
        raise UserError("A report needs at least one results file.")
    groups = _groups(measurements)
    start = _before(measurements, before)
    findings = _findings(groups, start, margin_finder(margins, [task for task, _ in groups]))
    conclusions = _conclusions(findings)
    grid = _grid(groups, start, conclusions)
    table = table_of(measurements, [*_derived(price), *derived])
    served = served_table(measurements)
    notes = [*remarks, *_notes(measurements, conclusions, price)]
    lines = list(dict.fromkeys(line_of(item) for item in measurements))
    index = {line: number for number, line in enumerate(lines)}
    folder = Path(folder)
    for axis in axes:
        pictures = [
            accuracy_chart(group, index, axis, left=svg.WIDTH * number) for number, group in enumerate(groups.values())
        ]
        picture = svg.picture(pictures, [", ".join(key) for key in groups], lines)
        write_page(folder / f"accuracy_{axis.name}.svg", picture)
    write_page(folder / "report.md", _report_md(title, conclusions, grid, table, served, axes, notes))
    sizes_differ = len({item.row.parameters for item in measurements}) > 1
    shown = dict.fromkeys([*axes, TOKENS, *([PARAMETERS] if sizes_differ else [])])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        script=Markup(_SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
        style=svg.STYLE,
        headlines=list(conclusions.values()),
        warnings=_warnings(conclusions),
        names=list(conclusions),
        start=start,
        grid=grid,
        cell=_cell,
        kinds={answer.sign: answer.name.lower() for answer in Answer},
        labels=[(line, svg.mark(number, 7, 7)) for line, number in index.items()],
        table=table,
        served=served,
        groups=[(", ".join(key), charts_of(group, index, list(shown))) for key, group in groups.items()],
        comparisons=[(item, traces(item)) for item in findings if item.paired],
        clip=_clip,
        notes=notes,
        runs=[
            (str(file), json.dumps({"run": item.run, "environment": item.environment}, indent=1, ensure_ascii=False))
            for file, item in {item.file: item for item in measurements}.items()
        ],
    )
    write_page(folder / "report.html", page)
    return findings


def _groups(measurements: Sequence[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """What may be compared, by task and way of decoding."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for item in measurements:
        group = groups.setdefault(item.key, [])
        if any(other.label == item.label for other in group):
            raise UserError(
                f"`{item.file}`: there is another {item.label} on {', '.join(item.key)}; give the runs different values of "
                "`stage`."
            )
        group.append(item)
    return groups


def _before(measurements: Sequence[Measurement], name: str | None) -> str:
    """The label that the others are compared with."""
    labels = list(dict.fromkeys(item.label for item in measurements))
    by_name = {item.row.stage: item.label for item in reversed(measurements)} | {label: label for label in labels}
    if name is not None and name not in by_name:
        raise UserError(f"There is no `{name}` to compare with: the results hold {', '.join(labels)}.")
    return labels[0] if name is None else by_name[name]


def _findings(
    groups: dict[tuple[str, str], list[Measurement]], before: str, find_margin: Callable[[str], float]
) -> list[Comparison]:
    findings = []
    for (task, _), group in groups.items():
        start = next((item for item in group if item.label == before), None)
        for item in group if start is not None else ():
            if item is not start:
                findings.append(compare_measurements(start, item, find_margin(task), unpaired=True))
    return findings


def _conclusions(findings: Sequence[Comparison]) -> dict[str, Conclusion]:
    """What each checkpoint is, by its label; the last one, which a chain is for, comes first."""
    singles: dict[str, list[Comparison]] = {}
    for item in findings:
        singles.setdefault(item.after.label, []).append(item)
    return {label: Conclusion(items) for label, items in reversed(singles.items())}


def _warnings(conclusions: dict[str, Conclusion]) -> list[tuple[str, list[str]]]:
    """Those of the first line before the others'."""
    return warnings_of([single for item in conclusions.values() for single in item.singles])


def _grid(
    groups: dict[tuple[str, str], list[Measurement]], start: str, conclusions: dict[str, Conclusion]
) -> list[Row]:
    rows = []
    for key, group in groups.items() if conclusions else ():
        accuracy = next((percent(item.row.accuracy) for item in group if item.label == start), "–")
        cells = [
            next((single for single in conclusion.singles if single.before.key == key), None)
            for conclusion in conclusions.values()
        ]
        rows.append(Row(", ".join(key), accuracy, cells))
    if any(conclusion.is_pooled for conclusion in conclusions.values()):
        share = next(iter(conclusions.values())).pooled.accuracy[0][0]
        rows.append(Row("all together", percent(share), list(conclusions.values())))
    return rows


def _cell(item: Comparison | Conclusion) -> tuple[str, str]:
    """What a cell of the grid says: the answer with the difference, and what it saves."""
    numbers = item.pooled if isinstance(item, Conclusion) else item
    points = f"{round(100 * numbers.difference[0], 1) + 0.0:+.1f}".replace("-", "−")
    tokens = "" if numbers.ratio is None else f"{round(100 * (numbers.ratio[0] - 1)) + 0:+d}% tokens".replace("-", "−")
    return f"{item.answer.sign} {points}", tokens


def _derived(price: float | None) -> list[Derived]:
    return [
        (Column("FLOPs per 1,000 correct", "{:.2e}".format), _flops),
        (
            Column("cost per 1,000 correct", "{:.4g}".format),
            lambda row: None if price is None else cost_per_1000_correct(row.mean_tokens, row.accuracy, price),
        ),
    ]


def _flops(row: ResultRow) -> float | None:
    if not row.non_embedding_parameters:
        return None
    # Results of an older version do not say which of the parameters a token passes
    parameters = row.active_parameters or row.non_embedding_parameters
    return flops_per_1000_correct(row.mean_tokens, row.accuracy, parameters)


def traces(comparison: Comparison) -> list[dict[str, Any]]:
    """
    Picks problems to show before and after: for each way in which the verdict may have changed, those whose change in
    length is nearest to the median, so that what is shown is typical and not chosen by hand.

    Args:
        comparison ([`Comparison`]):
            Two checkpoints with samples.

    Returns:
        `list[dict]`: `kind`, `count` of problems of that kind, and `pairs` of records (the first sample of each).
    """
    before, after = comparison.before.samples, comparison.after.samples
    position = {name: index for index, name in enumerate(after.ids)}
    pairs = [
        (before.records[index][0], after.records[position[name]][0])
        for index, name in enumerate(before.ids)
        if name in position
    ]
    kinds = {
        "right before, wrong after": (True, False),
        "wrong before, right after": (False, True),
        "right both times": (True, True),
        "wrong both times": (False, False),
    }
    found = []
    for kind, verdicts in kinds.items():
        chosen = [pair for pair in pairs if (pair[0].correct, pair[1].correct) == verdicts]
        if chosen:
            ratios = np.array([new.tokens / old.tokens for old, new in chosen])
            order = np.argsort(np.abs(ratios - np.median(ratios)), kind="stable")
            found.append({"kind": kind, "count": len(chosen), "pairs": [chosen[index] for index in order[:TRACES]]})
    return found


def _clip(text: str) -> str:
    left_out = len(text) - TRACE_CHARACTERS
    return text if left_out <= 0 else f"{text[:TRACE_CHARACTERS]}\n[… {left_out:,} more characters]"


def write_page(path: Path, text: str) -> None:
    """Writes a text that may hold what a model wrote."""
    # Half of a surrogate pair is a text that Python holds and no file does
    write_text(path, text.encode("utf-8", "replace").decode())


def _notes(measurements: Sequence[Measurement], conclusions: dict[str, Conclusion], price: float | None) -> list[str]:
    flexible = any(item.row.accuracy_flexible is not None for item in measurements)
    singles = [single for conclusion in conclusions.values() for single in conclusion.singles]
    notes = []
    if singles:
        margins = {", ".join(single.before.key): single.margin for single in singles}
        if len(set(margins.values())) == 1:
            margins = {"a margin": next(iter(margins.values()))}
        margins = ", ".join(f"{name} of {100 * margin:g} points" for name, margin in margins.items())
        notes.append(
            f"✓ as good: the 95% interval of the difference in accuracy lies above −margin. ✗ worse: it lies below. "
            f"? undecided: −margin is inside. Margins: {margins}. Either of the first two is said wrongly in about 2.5% of "
            "the cases at most."
        )
        notes.append(
            "As good also needs something to lose: the lower bound of the accuracy compared with is above twice the margin."
        )
    if any(len(conclusion.singles) > 1 for conclusion in conclusions.values()):
        notes.append(
            "“All together” takes the problems of all tasks, each counting once, so that a task weighs as much as it has of "
            "problems; a task decoded both ways counts by sampling; it is worse, too, where one task alone is (Bonferroni)."
        )
    if any(single.paired for single in singles):
        notes.append(
            "Tokens are compared by the correct completions of the problems that both solve: a model that gives up is short "
            "too, and a completion that was cut has no length."
        )
    if any(not single.paired for single in singles):
        notes.append(
            "Where completions were not saved, problems are not paired: the interval is that of independent shares, which is "
            "wider, and tokens are those of all completions, compared where none was cut."
        )
    notes.append(
        "Accuracy is mean@n: the mean over problems of the share of a problem's n samples that are correct by the strict "
        "scorer. A completion that had not ended at its limit is not correct. Its interval is Wilson's, with the samples "
        "of one problem as a cluster: it is about other problems of the kind, not about these."
    )
    if any(item.row.truncated for item in measurements):
        notes.append(
            "≥: completions that were cut at the limit are in this number with the tokens that they had by then, so that it "
            "is what was paid, and less than how long they would have become. Intervals are of what was paid."
        )
    if any(item.row.at_k for item in measurements):
        notes.append(
            "pass@k is the unbiased estimate 1 − C(n − c, k) / C(n, k); maj@n is the verdict on the answer that most of n "
            "samples give, spelled one way or another, a tie counted as a fair draw."
        )
    if flexible:
        notes.append(
            "The flexible scorer takes the answer from elsewhere than where the prompt asked for it. Samples that only one "
            "scorer finds right are counted: where there are many, the number depends on the scorer."
        )
    notes.append("The interval of mean tokens is Student's with Hall's transformation, for lengths have a long tail.")
    if any(single.paired for single in singles):
        notes += [
            "The interval of the difference is of the problems, paired, with the samples of one a cluster, after z² problems "
            "more, half of them won and half lost.",
            "Accuracy at a token budget counts a completion as right if it is correct and no longer than the budget.",
        ]
    if any(item.row.markers_per_1000_tokens is not None for item in measurements):
        notes.append(f"Markers are the words {', '.join(MARKERS)}.")
    if any(_flops(item.row) is not None for item in measurements):
        notes.append(
            "FLOPs are 2 · non-embedding parameters (of experts the active ones) · completion tokens, of right and wrong completions; attention and the "
            "output layer are left out."
        )
    if any(item.row.bytes_per_correct is not None for item in measurements):
        notes.append(
            "Bytes moved per correct answer are parameters (of experts the active ones) · bits / 8 · tokens / accuracy: what a "
            "request by itself takes through the processor, tokens of wrong answers included, prompt and cache left out. Their "
            "interval is of the problems."
        )
    if any(level.correct_per_s is not None for item in measurements for level in item.row.serving):
        notes.append(
            "Under load, correct/s counts the answers of the load itself that the verifiers find correct; as many requests as "
            "are under way come before it and are not measured."
        )
    if price is not None:
        notes.append(
            f"Cost is at a price of {price:g} for a million completion tokens, of right and wrong completions."
        )
    sizes = {item.row.parameters for item in measurements}
    if len(sizes) == 1:
        notes.append(f"All checkpoints have {sizes.pop():,} parameters, so there is no plot against them.")
    if any(item.samples is None for item in measurements):
        notes.append(
            "Completions were not saved for all: without them there are no paired intervals, budget curves, histograms and "
            "traces (`save_completions: true` saves them)."
        )
    return notes


def _report_md(
    title: str,
    conclusions: dict[str, Conclusion],
    grid: Sequence[Row],
    table: Table,
    served: Table,
    axes: Sequence[Axis],
    notes: list[str],
) -> str:
    lines = [f"# {markdown_text(title)}", ""]
    for number, conclusion in enumerate(conclusions.values()):
        headline = f"{conclusion.answer.sign} {markdown_text(conclusion.headline())}"
        lines += [f"**{headline}**" if number == 0 else headline, ""]
    warnings = [f"{what}: {'; '.join(places)}." for what, places in _warnings(conclusions)]
    lines += [*(f"- ! {markdown_text(warning)}" for warning in warnings), ""] if warnings else []
    if grid:
        names = [
            markdown_text(name) for name in ("", next(iter(conclusions.values())).pooled.before.label, *conclusions)
        ]
        lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        for row in grid:
            cells = ["–" if cell is None else ", ".join(filter(None, _cell(cell))) for cell in row.cells]
            lines.append("| " + " | ".join(map(markdown_text, [row.name, row.start, *cells])) + " |")
        lines += ["", *(f"![Accuracy against {axis.name}](accuracy_{axis.name}.svg)" for axis in axes), ""]
        lines += ["## Statistics", ""]
        for conclusion in conclusions.values():
            lines += [f"- {markdown_text(sentence)}" for sentence in conclusion.sentences()]
        lines.append("")
    first = [line[: table.prominent] for line in table.lines]
    lines += [*markdown_table(table.headings[: table.prominent], first), ""]
    lines += [
        "<details><summary>all columns</summary>",
        "",
        *markdown_table(table.headings, table.lines),
        "",
        "</details>",
    ]
    if served.lines:
        lines += ["", "## Under load", "", *markdown_table(served.headings, served.lines)]
    if not grid:
        lines += ["", *(f"![Accuracy against {axis.name}](accuracy_{axis.name}.svg)" for axis in axes)]
    lines += ["", *[f"- {note}" for note in notes], ""]
    lines += ["`report.html` has the other plots, and traces of the same problem before and after.", ""]
    return "\n".join(lines)


# Clicking a heading sorts by it, and clicking it again the other way round
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const down = heading.getAttribute("aria-sort") !== "descending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value, sign = down ? -1 : 1;
    const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    body.append(...[...body.rows].sort((a, b) => sign * order(value(a), value(b))));
  });
}
"""
