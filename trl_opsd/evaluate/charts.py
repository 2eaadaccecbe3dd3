"""What is drawn of measurements, one chart for each question, all of one task and way of decoding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from . import svg
from .estimate import Samples, budget_curve
from .results_file import Measurement


@dataclass(frozen=True)
class Axis:
    """
    What accuracy is drawn against.

    Args:
        field (`str`):
            Field of the rows.
        label (`str`):
            What it is called below the chart.
        name (`str`):
            What it is called in a heading, and in the name of the picture.
    """

    field: str
    label: str
    name: str


TOKENS = Axis("mean_tokens", "completion tokens, mean", "tokens")
PARAMETERS = Axis("parameters", "parameters", "parameters")


def line_of(item: Measurement) -> str:
    """Returns what a measurement is called in a chart: points of one name are joined."""
    return item.row.line or item.label


def accuracy_chart(group: Sequence[Measurement], index: dict[str, int], axis: Axis, left: float = 0) -> Markup:
    """
    Draws accuracy against something, with 95% intervals.

    Args:
        group (`Sequence[Measurement]`):
            What to draw.
        index (`dict[str, int]`):
            Number of each line, by [`line_of`], which chooses its colour.
        axis ([`Axis`]):
            Against what.
        left (`float`, *optional*, defaults to `0`):
            Position inside an SVG that holds several charts.

    Returns:
        [`~markupsafe.Markup`]: An `<svg>` element.
    """
    lines: dict[str, list[Measurement]] = {}
    for item in sorted(group, key=lambda item: vars(item.row)[axis.field]):
        lines.setdefault(line_of(item), []).append(item)
    series = []
    for name in sorted(lines, key=index.__getitem__):
        rows = [item.row for item in lines[name]]
        bounds = [(vars(row).get(f"{axis.field}_low"), vars(row).get(f"{axis.field}_high")) for row in rows]
        series.append(
            svg.Series(
                name,
                index[name],
                [vars(row)[axis.field] for row in rows],
                [100 * row.accuracy for row in rows],
                "points" if len(rows) == 1 else "line",
                y_error=[(100 * row.accuracy_low, 100 * row.accuracy_high) for row in rows],
                x_error=[] if any(None in pair for pair in bounds) else bounds,
                name=name,
            )
        )
    label = f"{axis.label}{_cut(group)}" if axis.field == TOKENS.field else axis.label
    return svg.chart(series, label, "accuracy, %", y_span=10, y_to=100, x_from=0, left=left)


def charts_of(group: Sequence[Measurement], index: dict[str, int], axes: Sequence[Axis]) -> list[tuple[str, Markup]]:
    """
    Draws all there is to draw of one task and way of decoding.

    Args:
        group (`Sequence[Measurement]`):
            What to draw.
        index (`dict[str, int]`):
            Number of each line, by [`line_of`].
        axes (`Sequence[Axis]`):
            What accuracy is drawn against.

    Returns:
        `list[tuple[str, Markup]]`: Captions and charts.
    """
    charts = [
        (f"Accuracy against {axis.name}, with 95% intervals", accuracy_chart(group, index, axis)) for axis in axes
    ]
    if len({line_of(item) for item in group}) < len(group):
        return charts  # lines of several checkpoints: more curves than can be told apart
    sampled = [item for item in group if item.samples is not None]
    if sampled:
        most = max(int(item.samples.tokens.max()) for item in sampled)
        curves = [
            svg.Series(line_of(item), index[line_of(item)], *_budget(item.samples, most), "steps") for item in sampled
        ]
        lengths = [
            svg.Series(line_of(item), index[line_of(item)], *_histogram(item.samples, most)) for item in sampled
        ]
        charts += [
            (
                "Accuracy at a token budget",
                svg.chart(curves, "token budget", "accuracy, %", x_from=0, y_from=0, y_to=100),
            ),
            (
                "How long completions are",
                svg.ridges(lengths, f"completion tokens{_cut(sampled)}", "share of completions"),
            ),
        ]
    served = [item for item in group if item.row.serving]
    for name, label, value in (
        ("Latency", "seconds, p50", lambda level: level.total_p50_s),
        ("Throughput", "tokens per second", lambda level: level.tokens_per_s),
    ):
        series = [
            svg.Series(
                line_of(item),
                index[line_of(item)],
                [level.concurrency for level in item.row.serving],
                [value(level) for level in item.row.serving],
                "line",
            )
            for item in served
        ]
        if series:
            chart = svg.chart(series, "requests at a time", label, x_from=0, y_from=0)
            charts.append((f"{name} against concurrency", chart))
    return charts


def _cut(group: Sequence[Measurement]) -> str:
    """What is added where lengths are, in part, those of the limit."""
    return ", some cut at the limit" if any(item.row.truncated for item in group) else ""


def _budget(samples: Samples, most: int) -> tuple[list[float], list[float]]:
    grid = np.unique(np.linspace(0, most, 200).astype(int))
    budgets, accuracies = budget_curve(samples.correct, samples.tokens, grid)
    return budgets.tolist(), (100 * accuracies).tolist()


def _histogram(samples: Samples, most: int) -> tuple[list[float], list[float]]:
    width = math.ceil(most / 30)  # whole tokens, or bins would hold unequal numbers of lengths
    edges = np.arange(0, most + width + 1, width)
    counts, _ = np.histogram(samples.tokens, edges)
    return edges.tolist(), [*(100 * counts / samples.tokens.size).tolist(), 0.0]
