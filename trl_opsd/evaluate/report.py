"""
The report that people read: `report.md`, and `report.html`, one page with everything in it that opens offline.

What models wrote is hostile here: every text is escaped by the template, and the page runs its own script and no other.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..cli import UserError
from ..results import write_text
from . import svg
from .charts import PARAMETERS, TOKENS, Axis, accuracy_chart, charts_of, line_of
from .compare import Comparison, compare_measurements
from .estimate import MARKERS, cost_per_1000_correct, flops_per_1000_correct
from .results_file import Measurement, load_results
from .schema import Column, ResultRow
from .table import Cell, Derived, markdown_table, markdown_text, table_of


TRACES = 2  # pairs of traces for each way in which the verdict may have changed
TRACE_CHARACTERS = 20_000  # of one trace; the rest is counted


@dataclass
class Finding:
    """
    What one checkpoint is against the one that it is compared with, in words.

    Args:
        after ([`~trl_opsd.evaluate.results_file.Measurement`]):
            What is judged.
        sentence (`str`):
            The words.
        comparison ([`~trl_opsd.evaluate.compare.Comparison`], *optional*):
            What they rest on; `None` where the completions were not saved.
    """

    after: Measurement
    sentence: str
    comparison: Comparison | None = None


def report_results(
    results_files: Sequence[str | Path],
    folder: str | Path,
    before: str | None = None,
    margin: float = 0.01,
    title: str = "trl-opsd",
    price: float | None = None,
) -> list[Finding]:
    """
    Writes the report of results files, as [`write_report`] does.

    Args:
        results_files (`Sequence[str]`):
            JSON files of the evaluation; the completions lie beside them.
        folder, before, margin, title, price:
            For [`write_report`].

    Returns:
        `list[Finding]`: What every checkpoint is against `before`.

    Raises:
        UserError: If a file is missing or damaged, or two rows cannot be told apart.
    """
    measurements = [item for file in results_files for item in load_results(file)]
    return write_report(measurements, folder, before, margin, title, price)


def write_report(
    measurements: Sequence[Measurement],
    folder: str | Path,
    before: str | None = None,
    margin: float = 0.01,
    title: str = "trl-opsd",
    price: float | None = None,
    axes: Sequence[Axis] = (TOKENS,),
    derived: Sequence[Derived] = (),
    remarks: Sequence[str] = (),
) -> list[Finding]:
    """
    Writes `report.md`, `report.html` and, for each axis, a picture such as `accuracy_tokens.svg`.

    The page has the comparison of every checkpoint with the first, or the one named, in words; a table that sorts;
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
        margin (`float`, *optional*, defaults to `0.01`):
            Loss of accuracy that still counts as none.
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
        `list[Finding]`: What every checkpoint is against `before`.

    Raises:
        UserError: If there is nothing to report on, or two rows cannot be told apart.
    """
    if not measurements:
        raise UserError("A report needs at least one results file.")
    groups = _groups(measurements)
    findings = _findings(groups, _before(measurements, before), margin)
    headings, table = table_of(measurements, [*_derived(price), *derived])
    notes = [*remarks, *_notes(measurements, margin, price)]
    lines = list(dict.fromkeys(line_of(item) for item in measurements))
    index = {line: number for number, line in enumerate(lines)}
    folder = Path(folder)
    for axis in axes:
        pictures = [
            accuracy_chart(group, index, axis, left=svg.WIDTH * number) for number, group in enumerate(groups.values())
        ]
        picture = svg.picture(pictures, [", ".join(key) for key in groups], lines)
        write_page(folder / f"accuracy_{axis.name}.svg", picture)
    write_page(folder / "report.md", _report_md(title, findings, headings, table, axes, notes))
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
        findings=findings,
        labels=[(line, svg.mark(number, 7, 7)) for line, number in index.items()],
        headings=headings,
        table=table,
        groups=[(", ".join(key), charts_of(group, index, list(shown))) for key, group in groups.items()],
        comparisons=[(item.comparison, traces(item.comparison)) for item in findings if item.comparison is not None],
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


def _findings(groups: dict[tuple[str, str], list[Measurement]], before: str, margin: float) -> list[Finding]:
    findings = []
    for group in groups.values():
        start = next((item for item in group if item.label == before), None)
        for item in group if start is not None else ():
            if item is start:
                continue
            if item.samples is not None and start.samples is not None:
                comparison = compare_measurements(start, item, margin)
                findings.append(Finding(item, comparison.sentence(), comparison))
            else:
                findings.append(Finding(item, unpaired(start, item)))
    return findings


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


def unpaired(before: Measurement, after: Measurement) -> str:
    """Returns what can be said of two checkpoints without their completions."""
    points = round(100 * (after.row.accuracy - before.row.accuracy), 1) + 0.0
    ratio = after.row.mean_tokens / before.row.mean_tokens
    return (
        f"{after.label} against {before.label} on {', '.join(after.key)}: {points:+.1f} points, {ratio:.3f} times the "
        "tokens (no interval, and no answer: the completions were not saved)."
    )


def _notes(measurements: Sequence[Measurement], margin: float, price: float | None) -> list[str]:
    flexible = any(item.row.accuracy_flexible is not None for item in measurements)
    paired = any(item.samples is not None for item in measurements)
    notes = [
        "Accuracy is mean@n: the mean over problems of the share of a problem's n samples that are correct by the strict "
        "scorer. A completion that had not ended at its limit is not correct. Its interval is Wilson's, with the samples "
        "of one problem as a cluster: it is about other problems of the kind, not about these.",
    ]
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
    notes.append("The interval of mean tokens is normal for the logarithm of the mean.")
    if paired:
        notes += [
            f"“As accurate” is a test of non-inferiority: the lower bound of the 95% interval of the paired difference is "
            f"above −{100 * margin:g} points (Newcombe's score interval, samples of one problem a cluster). A no without "
            "“less” says that there were too few problems to tell.",
            "Accuracy at a token budget counts a completion as right if it is correct and no longer than the budget.",
        ]
    if any(item.row.markers_per_1000_tokens is not None for item in measurements):
        notes.append(f"Markers are the words {', '.join(MARKERS)}.")
    if any(_flops(item.row) is not None for item in measurements):
        notes.append(
            "FLOPs are 2 · non-embedding parameters (of experts the active ones) · completion tokens, of right and wrong completions; attention and the "
            "output layer are left out."
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
    findings: Sequence[Finding],
    headings: list[str],
    table: list[list[Cell]],
    axes: Sequence[Axis],
    notes: list[str],
) -> str:
    lines = [f"# {markdown_text(title)}", "", *[f"- {markdown_text(item.sentence)}" for item in findings], ""]
    lines += [*markdown_table(headings, table), ""]
    lines += [f"![Accuracy against {axis.name}](accuracy_{axis.name}.svg)" for axis in axes]
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
