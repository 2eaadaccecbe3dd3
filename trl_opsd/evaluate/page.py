"""
The report that people read: `report.md`, and `report.html`, one page with everything in it that opens offline.

What models wrote is hostile here: every text is escaped by the template, and the page runs its own script and no other.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from ..cli import UserError
from ..results import write_text
from . import svg
from .compare import Comparison, compare_measurements
from .estimators import MARKERS, Samples, budget_curve, cost_per_1000_correct, flops_per_1000_correct
from .load import Measurement, load_results


TRACES = 2  # pairs of traces for each way in which a verdict may have changed
TRACE_CHARACTERS = 20_000  # of one trace; the rest is counted

Cell = tuple[str, float | str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _interval(key: str, text: Callable[[float], str]) -> Callable[[dict[str, Any]], Cell]:
    def cell(row: dict[str, Any]) -> Cell:
        low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
        bounds = f" ({text(low)} to {text(high)})" if low is not None and high is not None else ""
        return text(row[key]) + bounds, row[key]

    return cell


def _number(key: str, text: Callable[[Any], str]) -> Callable[[dict[str, Any]], Cell]:
    return lambda row: (text(row[key]), row[key])


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _tenth(value: float) -> str:
    return f"{value:,.1f}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.1f}"


# Heading, the key that a row must have for it, and what stands in the cell
_COLUMNS = [
    ("accuracy (95% interval)", "accuracy", _interval("accuracy", _percent)),
    ("tokens, mean", "mean_tokens", _interval("mean_tokens", _tenth)),
    ("truncated", "truncated", _number("truncated", _percent)),
    ("parameters", "parameters", _number("parameters", _whole)),
    ("problems", "n", _number("n", _whole)),
    ("samples each", "samples", _number("samples", _whole)),
    ("not verifiable", "unverified", _number("unverified", _whole)),
    ("flexible", "accuracy_flexible", _number("accuracy_flexible", _percent)),
    ("right by strict only", "strict_only", _number("strict_only", _whole)),
    ("right by flexible only", "flexible_only", _number("flexible_only", _whole)),
    ("tokens, median", "median_tokens", _number("median_tokens", _whole)),
    ("p90", "p90_tokens", _number("p90_tokens", _whole)),
    ("p99", "p99_tokens", _number("p99_tokens", _whole)),
    ("thinking tokens", "mean_thinking_tokens", _number("mean_thinking_tokens", _tenth)),
    ("answer tokens", "mean_answer_tokens", _number("mean_answer_tokens", _tenth)),
    ("markers per 1,000 tokens", "markers_per_1000_tokens", _number("markers_per_1000_tokens", _tenth)),
    ("FLOPs per 1,000 correct", "flops_per_1000_correct", _number("flops_per_1000_correct", "{:.2e}".format)),
    ("cost per 1,000 correct", "cost_per_1000_correct", _number("cost_per_1000_correct", "{:.4g}".format)),
    ("peak memory, MiB", "peak_memory_bytes", _number("peak_memory_bytes", _mebibytes)),
    ("weights, MiB", "weights_bytes", _number("weights_bytes", _mebibytes)),
    ("seconds of generating", "generation_s", _number("generation_s", _whole)),
    ("seconds in all", "wall_s", _number("wall_s", _whole)),
]


def columns(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, Callable[[dict[str, Any]], Cell]]]:
    """
    Returns the columns of the table that at least one row has something for, `pass@k` and `maj@n` among them.

    Args:
        rows (`Sequence[dict]`):
            Result rows.

    Returns:
        `list[tuple]`: Heading, key, and what makes a cell (its text, and what it is sorted by) of a row with that key.
    """
    estimators = sorted(
        {key for row in rows for key in row if "@" in key}, key=lambda key: (key[0] != "p", len(key), key)
    )
    place = next(index for index, (_, key, _) in enumerate(_COLUMNS) if key == "median_tokens")
    known = _COLUMNS[:place] + [(key, key, _number(key, _percent)) for key in estimators] + _COLUMNS[place:]
    # A column of zeros only, or of ones, is noise: nothing was unverifiable, no block of thinking, one sample each
    trivial = {"unverified": 0, "samples": 1, "mean_thinking_tokens": 0}
    shown = []
    for heading, key, cell in known:
        values = [row[key] for row in rows if row.get(key) is not None]
        if values and not (key in trivial and set(values) == {trivial[key]}):
            shown.append((heading, key, cell))
    if all(row.get("mean_thinking_tokens", 0) == 0 for row in rows):
        shown = [column for column in shown if column[1] != "mean_answer_tokens"]
    return shown


def table_of(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[Cell]]]:
    """
    Returns the table of results.

    Args:
        measurements (`Sequence[Measurement]`):
            Its lines.

    Returns:
        `tuple`: Headings, and for each line the cells: a text, and what it is sorted by.
    """
    shown = columns([item.row for item in measurements])
    headings = ["checkpoint", "task", "decoding", *[heading for heading, _, _ in shown]]
    table = []
    for item in measurements:
        row = item.row
        cells = [cell(row) if row.get(key) is not None else ("–", -1.0) for _, key, cell in shown]
        table.append(
            [(item.label, item.label), (row["task"], row["task"]), (row["decoding"], row["decoding"]), *cells]
        )
    return headings, table


def markdown_table(headings: list[str], table: list[list[Cell]]) -> list[str]:
    """Returns what [`table_of`] gives as lines of Markdown."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(markdown_text(text) for text, _ in cells) + " |" for cells in table]


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
        chosen = [pair for pair in pairs if (pair[0]["correct"], pair[1]["correct"]) == verdicts]
        if chosen:
            ratios = np.array([new["tokens"] / old["tokens"] for old, new in chosen])
            order = np.argsort(np.abs(ratios - np.median(ratios)), kind="stable")
            found.append({"kind": kind, "count": len(chosen), "pairs": [chosen[index] for index in order[:TRACES]]})
    return found


def _budget(samples: Samples, most: int) -> tuple[list[float], list[float]]:
    grid = np.unique(np.linspace(0, most, 200).astype(int))
    budgets, accuracies = budget_curve(samples.correct, samples.tokens, grid)
    return budgets.tolist(), (100 * accuracies).tolist()


def _histogram(samples: Samples, most: int) -> tuple[list[float], list[float]]:
    width = math.ceil(most / 30)  # whole tokens, or bins would hold unequal numbers of lengths
    edges = np.arange(0, most + width + 1, width)
    counts, _ = np.histogram(samples.tokens, edges)
    return edges.tolist(), [*(100 * counts / samples.tokens.size).tolist(), 0.0]


def _accuracy_chart(group: Sequence[Measurement], index: dict[str, int], key: str, label: str, **options) -> Markup:
    series = [
        svg.Series(
            item.label,
            index[item.label],
            [item.row[key]],
            [100 * item.row["accuracy"]],
            y_error=[(100 * item.row["accuracy_low"], 100 * item.row["accuracy_high"])],
            x_error=[
                (item.row[f"{key}_low"], item.row[f"{key}_high"])
                for name in [f"{key}_low"]
                if item.row.get(name) is not None
            ],
        )
        for item in group
    ]
    return svg.chart(series, label, "accuracy, %", y_span=10, y_to=100, **options)


def _charts(group: Sequence[Measurement], index: dict[str, int]) -> list[tuple[str, Markup]]:
    charts = [
        (
            "Accuracy against tokens, with 95% intervals",
            _accuracy_chart(group, index, "mean_tokens", "completion tokens, mean", x_from=0),
        )
    ]
    if len({item.row["parameters"] for item in group}) > 1:
        charts.append(
            (
                "Accuracy against parameters, with 95% intervals",
                _accuracy_chart(group, index, "parameters", "parameters", x_from=0),
            )
        )
    sampled = [item for item in group if item.samples is not None]
    if sampled:
        most = max(int(item.samples.tokens.max()) for item in sampled)
        curves = [svg.Series(item.label, index[item.label], *_budget(item.samples, most), "steps") for item in sampled]
        lengths = [svg.Series(item.label, index[item.label], *_histogram(item.samples, most)) for item in sampled]
        charts += [
            (
                "Accuracy at a token budget",
                svg.chart(curves, "token budget", "accuracy, %", x_from=0, y_from=0, y_to=100),
            ),
            (
                "How long completions are",
                svg.ridges(lengths, "completion tokens", "share of completions"),
            ),
        ]
    served = [item for item in group if item.row.get("serving")]
    for key, label in (("total_p50_s", "seconds, p50"), ("tokens_per_s", "tokens per second")):
        series = [
            svg.Series(
                item.label,
                index[item.label],
                [level["concurrency"] for level in item.row["serving"]],
                [level[key] for level in item.row["serving"]],
                "line",
            )
            for item in served
        ]
        if series:
            name = "Latency" if key == "total_p50_s" else "Throughput"
            chart = svg.chart(series, "requests at a time", label, x_from=0, y_from=0)
            charts.append((f"{name} against concurrency", chart))
    return charts


def _clip(text: str) -> str:
    left_out = len(text) - TRACE_CHARACTERS
    return text if left_out <= 0 else f"{text[:TRACE_CHARACTERS]}\n[… {left_out:,} more characters]"


def markdown_text(text: str) -> str:
    """Returns a text as Markdown that shows it and does nothing else, also in a table."""
    return str(escape(" ".join(text.split()))).replace("|", "\\|").replace("`", "'")


def report_results(
    results_files: Sequence[str | Path],
    folder: str | Path,
    before: str | None = None,
    margin: float = 0.01,
    title: str = "trl-opsd",
    price: float | None = None,
) -> list[Measurement]:
    """
    Writes `report.md`, `report.html` and `accuracy_tokens.svg` from results files.

    The page has the comparison of every checkpoint with the first, or the one named, in words; a table that sorts;
    accuracy against tokens and parameters, accuracy at a token budget, and how long completions are, for each task and
    way of decoding; and traces of the same problem before and after. What needs completions is left out where they were
    not saved, and the page says so.

    Args:
        results_files (`Sequence[str]`):
            JSON files of the evaluation; the completions lie beside them.
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

    Returns:
        `list[Measurement]`: What the report is about.

    Raises:
        UserError: If a file is missing or damaged, or two rows cannot be told apart.
    """
    measurements = [item for file in results_files for item in load_results(file)]
    if not measurements:
        raise UserError("A report needs at least one results file.")
    for item in measurements:
        tokens, accuracy = item.row["mean_tokens"], item.row["accuracy"]
        if item.row.get("non_embedding_parameters"):
            parameters = item.row["non_embedding_parameters"]
            item.row["flops_per_1000_correct"] = flops_per_1000_correct(tokens, accuracy, parameters)
        if price is not None:
            item.row["cost_per_1000_correct"] = cost_per_1000_correct(tokens, accuracy, price)
    labels = list(dict.fromkeys(item.label for item in measurements))
    index = {label: number for number, label in enumerate(labels)}
    seen = set()
    for item in measurements:
        if (item.label, item.key) in seen:
            raise UserError(
                f"`{item.file}`: there is another {item.label} on {', '.join(item.key)}; give the runs different values of "
                "`stage`."
            )
        seen.add((item.label, item.key))
    by_name = {item.row["stage"]: item.label for item in reversed(measurements)} | {label: label for label in labels}
    if before is not None and before not in by_name:
        raise UserError(f"There is no `{before}` to compare with: the results hold {', '.join(labels)}.")
    before = labels[0] if before is None else by_name[before]

    groups: dict[tuple[str, str], list[Measurement]] = {}
    for item in measurements:
        groups.setdefault(item.key, []).append(item)
    comparisons, sentences = [], []
    for group in groups.values():
        start = next((item for item in group if item.label == before), None)
        for item in group if start is not None else ():
            if item is start:
                continue
            if item.samples is not None and start.samples is not None:
                comparisons.append(compare_measurements(start, item, margin))
                sentences.append((comparisons[-1].as_accurate, comparisons[-1].sentence()))
            else:
                sentences.append((None, unpaired(start, item)))

    headings, table = table_of(measurements)
    notes = _notes(measurements, margin, price)
    folder = Path(folder)
    pictures = [
        _accuracy_chart(group, index, "mean_tokens", "completion tokens, mean", x_from=0, left=svg.WIDTH * number)
        for number, group in enumerate(groups.values())
    ]
    write_page(folder / "accuracy_tokens.svg", svg.picture(pictures, [", ".join(key) for key in groups], labels))
    write_page(folder / "report.md", _report_md(title, [text for _, text in sentences], headings, table, notes))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("report.html.jinja")
    page = template.render(
        title=title,
        script=Markup(_SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode(),
        style=svg.STYLE,
        sentences=sentences,
        labels=[(label, svg.mark(number, 7, 7)) for label, number in index.items()],
        headings=headings,
        table=table,
        groups=[(", ".join(key), _charts(group, index)) for key, group in groups.items()],
        comparisons=[(item, traces(item)) for item in comparisons],
        clip=_clip,
        notes=notes,
        runs=[
            (str(file), json.dumps({"run": item.run, "environment": item.environment}, indent=1, ensure_ascii=False))
            for file, item in {item.file: item for item in measurements}.items()
        ],
    )
    write_page(folder / "report.html", page)
    return measurements


def write_page(path: Path, text: str) -> None:
    """Writes a text that may hold what a model wrote."""
    # Half of a surrogate pair is a text that Python holds and no file does
    write_text(path, text.encode("utf-8", "replace").decode())


def unpaired(before: Measurement, after: Measurement) -> str:
    """Returns what can be said of two checkpoints without their completions."""
    points = round(100 * (after.row["accuracy"] - before.row["accuracy"]), 1) + 0.0
    ratio = after.row["mean_tokens"] / before.row["mean_tokens"]
    return (
        f"{after.label} against {before.label} on {', '.join(after.key)}: {points:+.1f} points, {ratio:.3f} times the "
        "tokens (no interval, and no answer: the completions were not saved)."
    )


def _notes(measurements: Sequence[Measurement], margin: float, price: float | None) -> list[str]:
    flexible = any(item.row.get("accuracy_flexible") is not None for item in measurements)
    paired = any(item.samples is not None for item in measurements)
    notes = [
        "Accuracy is mean@n: the mean over problems of the share of a problem's n samples that are correct by the strict "
        "scorer. A completion that had not ended at its limit is not correct. Its interval is Wilson's, with the samples "
        "of one problem as a cluster: it is about other problems of the kind, not about these.",
    ]
    if any("@" in key for item in measurements for key in item.row):
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
    if any(item.row.get("markers_per_1000_tokens") is not None for item in measurements):
        notes.append(f"Markers are the words {', '.join(MARKERS)}.")
    if any(item.row.get("flops_per_1000_correct") is not None for item in measurements):
        notes.append(
            "FLOPs are 2 · non-embedding parameters · completion tokens, of right and wrong completions; attention and the "
            "output layer are left out."
        )
    if price is not None:
        notes.append(
            f"Cost is at a price of {price:g} for a million completion tokens, of right and wrong completions."
        )
    sizes = {item.row["parameters"] for item in measurements}
    if len(sizes) == 1:
        notes.append(f"All checkpoints have {sizes.pop():,} parameters, so there is no plot against them.")
    if any(item.samples is None for item in measurements):
        notes.append(
            "Completions were not saved for all: without them there are no paired intervals, budget curves, histograms and "
            "traces (`save_completions: true` saves them)."
        )
    return notes


def _report_md(
    title: str, sentences: list[str], headings: list[str], table: list[list[Cell]], notes: list[str]
) -> str:
    lines = [f"# {markdown_text(title)}", "", *[f"- {markdown_text(sentence)}" for sentence in sentences], ""]
    lines += markdown_table(headings, table)
    lines += ["", "![Accuracy against tokens](accuracy_tokens.svg)", "", *[f"- {note}" for note in notes], ""]
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
