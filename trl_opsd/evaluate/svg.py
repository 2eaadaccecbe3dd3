"""Small charts as SVG, drawn in the colours of the page that they stand on: light or dark, as the reader has it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


WIDTH, HEIGHT = 340, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 42

# One colour for each checkpoint, told apart by lightness too, and for dark pages the same hues lighter
STYLE = Markup("""
:root { --ink: #1d2129; --soft: #5d6673; --line: #d9dde3;
  --s0: #6b7280; --s1: #1f5fbf; --s2: #c26a00; --s3: #0f8a5f; --s4: #a6308f; --s5: #b3261e; --s6: #007f99; --s7: #7a5c00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #a3acb8; --line: #343b45;
  --s0: #a7afbb; --s1: #7db2ff; --s2: #ffb057; --s3: #56d6a4; --s4: #ee8fdb; --s5: #ff8f87; --s6: #5fd3ea; --s7: #dcc05a; } }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .axis { stroke: var(--line); } svg .error { stroke-width: 1.5; } svg .mark { fill-opacity: .35; stroke-width: 1.6; }
svg .label { font-weight: 600; paint-order: stroke; stroke: var(--behind, transparent); stroke-width: 3px; }
svg .leader { stroke: var(--soft); stroke-width: .8; }
svg .curve { fill: none; stroke-width: 2; } svg .ridge { fill-opacity: .35; stroke-width: 1.2; }
""")
COLORS = 8
LETTER = 6.6  # width of a letter of a label, on average, and rather more


@dataclass
class Series:
    """
    What one checkpoint has in a chart.

    Args:
        label (`str`):
            Name of the checkpoint.
        index (`int`):
            Its number, which chooses colour and mark.
        x (`Sequence[float]`):
            Horizontal positions.
        y (`Sequence[float]`):
            Vertical positions.
        kind (`str`, *optional*, defaults to `"points"`):
            `"points"`, `"line"` (points that are joined) or `"steps"` (each value holds until the next).
        y_error (`Sequence[tuple[float, float]]`, *optional*):
            Lower and upper bound of each y.
        x_error (`Sequence[tuple[float, float]]`, *optional*):
            The same of each x.
        name (`str`, *optional*):
            What stands beside one of its points, short. Nothing does if not set.
    """

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "points"
    y_error: Sequence[tuple[float, float]] = field(default_factory=list)
    x_error: Sequence[tuple[float, float]] = field(default_factory=list)
    name: str = ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """
    Returns round numbers from `low` to `high`, about `count` of them.

    Args:
        low (`float`):
            Start of the axis.
        high (`float`):
            Its end, above `low`.
        count (`int`, *optional*, defaults to `4`):
            How many there should be.

    Returns:
        `list[float]`: Multiples of 1, 2 or 5 times a power of ten.
    """
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.75 * raw)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Returns a number short enough for an axis: `0.5`, `20`, `1.5k`, `135M`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def _style(index: int) -> int:
    """Which of four shapes or dashes: another one when the colours begin again."""
    return (index + index // COLORS) % 4


def mark(index: int, x: float, y: float, title: str = "") -> Markup:
    """Returns the mark of a checkpoint, its shape as telling as its colour."""
    shapes = (
        f"M{x - 4.5:.1f} {y:.1f}a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
        f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        f"M{x:.1f} {y - 5.5:.1f}l5 9h-10z",
        f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    )
    color = index % COLORS
    return Markup('<path class="mark" fill="var(--s{})" stroke="var(--s{})" d="{}"><title>{}</title></path>').format(
        color, color, Markup(shapes[_style(index)]), title
    )


# Left, top, right and bottom
Box = tuple[float, float, float, float]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def place_labels(
    labels: Sequence[tuple[str, Sequence[tuple[float, float]]]], taken: Sequence[Box], inside: Box
) -> list[tuple[Box, tuple[float, float]] | None]:
    """
    Finds a place beside one of its points for each label, such that it covers no other label and nothing else.

    Args:
        labels (`Sequence[tuple[str, Sequence[tuple[float, float]]]]`):
            Texts, each with the points that it may stand at.
        taken (`Sequence[Box]`):
            What must not be covered: marks and error bars.
        inside (`Box`):
            Where labels have to be.

    Returns:
        `list`: For each label its box and the point that it is at, `None` where there is no room.
    """
    taken, found = list(taken), []
    for text, points in labels:
        width, place = LETTER * len(text), None
        for distance in (12, 20, 28, 44, 64, 90, 120):
            steps = [
                (math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)) for turn in (0, 8, 4, 12, 2, 14, 6, 10)
            ]
            for (x, y), (right, down) in ((point, step) for point in points for step in steps):
                # the side of the box that looks at the point is `distance` away from it
                left = x + distance * right - width * (1 - right) / 2
                top = y + distance * down - 12 * (1 - down) / 2
                box = (left, top, left + width, top + 12)
                fits = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
                if fits and not any(_meet(box, other) for other in taken):
                    place = (box, (x, y))
                    break
            if place is not None:
                taken.append(place[0])
                break
        found.append(place)
    return found


def chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_from: float | None = None,
    y_from: float | None = None,
    y_span: float = 0.0,
    y_to: float | None = None,
    left: float = 0,
) -> Markup:
    """
    Draws a chart.

    Args:
        series (`Sequence[Series]`):
            What to draw, one for each checkpoint.
        x_label (`str`):
            What is on the horizontal axis.
        y_label (`str`):
            What is on the vertical axis.
        x_from (`float`, *optional*):
            Where the horizontal axis begins. Defaults to a little below what there is.
        y_from (`float`, *optional*):
            Where the vertical axis begins. Defaults to a little below what there is.
        y_span (`float`, *optional*, defaults to `0.0`):
            How much the vertical axis shows at least, so that noise does not fill it.
        y_to (`float`, *optional*):
            Where the vertical axis ends at most. Defaults to a little above what there is.
        left (`float`, *optional*, defaults to `0`):
            Position inside an SVG that holds several charts.

    Returns:
        [`~markupsafe.Markup`]: An `<svg>` element.
    """

    def limits(values: list[float], start: float | None, most: float | None) -> tuple[float, float]:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        low = low - room if start is None else start
        high = high + room
        return low, high if most is None or high < most else most + 0.01 * (most - low)

    xs = [x for item in series for x in [*item.x, *(bound for pair in item.x_error for bound in pair)]]
    ys = [y for item in series for y in [*item.y, *(bound for pair in item.y_error for bound in pair)]]
    (x_low, x_high), (y_low, y_high) = limits(xs, x_from, None), limits(ys, y_from, y_to)

    y_low = min(y_low, y_high - y_span)
    if y_low < 0 <= min(ys):  # nothing is below zero, so neither is the axis
        y_high = max(y_high, y_span)
        y_low = -0.01 * y_high

    def x_at(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    bottom, middle = HEIGHT - _BOTTOM, (HEIGHT - _BOTTOM + _TOP) / 2
    parts = []
    for tick in ticks(y_low, y_high):
        parts.append(
            Markup(
                '<path class="axis" d="M{:.1f} {:.1f}H{:.1f}"/><text x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, y_at(tick), WIDTH - _RIGHT, _LEFT - 5, y_at(tick) + 4, number(tick))
        )
    for tick in ticks(x_low, x_high):
        parts.append(
            Markup(
                '<path class="axis" d="M{:.1f} {:.1f}v4"/><text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>'
            ).format(x_at(tick), bottom, x_at(tick), bottom + 17, number(tick))
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, WIDTH - _RIGHT))
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label
        )
    )
    parts.append(
        Markup('<text transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(middle, y_label)
    )
    for item in series:
        color = f"var(--s{item.index % COLORS})"
        places = [(x_at(x), y_at(y)) for x, y in zip(item.x, item.y, strict=True)]
        if item.kind != "points":
            path = f"M{places[0][0]:.1f} {places[0][1]:.1f}"
            for x, y in places[1:]:
                path += f"H{x:.1f}V{y:.1f}" if item.kind == "steps" else f"L{x:.1f} {y:.1f}"
            dash = ("none", "7 3", "2 3", "9 3 2 3")[_style(item.index)]
            parts.append(
                Markup('<path class="curve" stroke="{}" stroke-dasharray="{}" d="{}"><title>{}</title></path>').format(
                    color, dash, path, item.label
                )
            )
        for (x, _), (low, high) in zip(places, item.y_error, strict=bool(item.y_error)):
            path = f"M{x - 4:.1f} {y_at(low):.1f}h8m-4 0V{y_at(high):.1f}m-4 0h8"
            parts.append(Markup('<path class="error" fill="none" stroke="{}" d="{}"/>').format(color, path))
        for (_, y), (low, high) in zip(places, item.x_error, strict=bool(item.x_error)):
            path = f"M{x_at(low):.1f} {y - 4:.1f}v8m0 -4H{x_at(high):.1f}m0 -4v8"
            parts.append(Markup('<path class="error" fill="none" stroke="{}" d="{}"/>').format(color, path))
        if item.kind != "steps":
            for x, y, value_x, value_y in zip(*zip(*places, strict=True), item.x, item.y, strict=True):
                parts.append(mark(item.index, x, y, f"{item.label}: {number(value_x)}, {number(value_y)}"))
    parts += _labels(series, x_at, y_at)
    return Markup('<svg x="{}" width="{}" height="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        left, WIDTH, HEIGHT, WIDTH, HEIGHT, f"{y_label} against {x_label}", Markup("").join(parts)
    )


def _labels(series: Sequence[Series], x_at: Callable[[float], float], y_at: Callable[[float], float]) -> list[Markup]:
    """The names of the series beside their points."""
    points = [[(x_at(x), y_at(y)) for x, y in zip(item.x, item.y, strict=True)] for item in series]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for places in points for x, y in places]
    for item, places in zip(series, points, strict=True):
        for (x, _), (low, high) in zip(places, item.y_error, strict=bool(item.y_error)):
            taken.append((x - 4, y_at(high), x + 4, y_at(low)))
        for (_, y), (low, high) in zip(places, item.x_error, strict=bool(item.x_error)):
            taken.append((x_at(low), y - 4, x_at(high), y + 4))
    named = [(item, places) for item, places in zip(series, points, strict=True) if item.name]
    texts = [item.name if len(item.name) <= 24 else f"{item.name[:23]}…" for item, _ in named]
    inside = (_LEFT + 2, _TOP - 8, WIDTH - 2, HEIGHT - _BOTTOM - 2)
    found = place_labels([(text, places) for text, (_, places) in zip(texts, named, strict=True)], taken, inside)
    parts = []
    for (item, _), text, place in zip(named, texts, found, strict=True):
        if place is None:
            continue  # the legend has it
        (left, top, right, bottom), (x, y) = place
        near = (min(max(x, left), right), min(max(y, top), bottom))
        if math.dist(near, (x, y)) > 14:
            leader = f"M{near[0]:.1f} {near[1]:.1f}L{x:.1f} {y:.1f}"
            parts.append(Markup('<path class="leader" fill="none" d="{}"/>').format(leader))
        parts.append(
            Markup('<text class="label" style="fill:var(--s{})" x="{:.1f}" y="{:.1f}">{}</text>').format(
                item.index % COLORS, left, top + 10, text
            )
        )
    return parts


def ridges(series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """
    Draws histograms one above the other, each filling its row, on one horizontal axis that begins at 0.

    Args:
        series (`Sequence[Series]`):
            Histograms: `x` are the edges of the bins, `y` the heights and a 0 after the last.
        x_label (`str`):
            What is on the horizontal axis.
        y_label (`str`):
            What the heights are, for who cannot see them.

    Returns:
        [`~markupsafe.Markup`]: An `<svg>` element.
    """
    x_high, bottom = max(x for item in series for x in item.x), HEIGHT - _BOTTOM
    row = (bottom - _TOP) / len(series)

    def x_at(x: float) -> float:
        return _RIGHT + x / x_high * (WIDTH - 2 * _RIGHT)

    parts = []
    for tick in ticks(0, x_high):
        parts.append(
            Markup(
                '<path class="axis" d="M{:.1f} {}V{}"/><text x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
            ).format(x_at(tick), _TOP, bottom, x_at(tick), bottom + 17, number(tick))
        )
    for place, item in enumerate(series, start=1):
        base, top = _TOP + place * row, max(item.y)
        path = f"M{x_at(0):.1f} {base:.1f}"
        for x, y in zip(item.x, item.y, strict=True):
            path += f"H{x_at(x):.1f}V{base - 0.9 * row * y / top:.1f}"
        color = f"var(--s{item.index % COLORS})"
        parts.append(
            Markup('<path class="ridge" fill="{}" stroke="{}" d="{}"><title>{}</title></path>').format(
                color, color, path, item.label
            )
        )
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(WIDTH / 2, HEIGHT - 6, x_label))
    return Markup('<svg width="{}" height="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, WIDTH, HEIGHT, f"{y_label} against {x_label}", Markup("").join(parts)
    )


def picture(charts: Sequence[Markup], titles: Sequence[str], labels: Sequence[str]) -> Markup:
    """
    Joins charts, made with `left` at multiples of `WIDTH`, into one SVG file with a legend.

    Args:
        charts (`Sequence[Markup]`):
            Charts.
        titles (`Sequence[str]`):
            What stands above each.
        labels (`Sequence[str]`):
            Names of the checkpoints, in the order of their numbers.

    Returns:
        [`~markupsafe.Markup`]: What the file holds.
    """
    width, height = WIDTH * len(charts), 24 + HEIGHT + 18 * len(labels) + 8
    parts = [
        Markup('<text x="{}" y="16" text-anchor="middle">{}</text>').format(WIDTH * (index + 0.5), title)
        for index, title in enumerate(titles)
    ]
    parts.append(Markup('<svg y="24">{}</svg>').format(Markup("").join(charts)))
    for index, label in enumerate(labels):
        y = 24 + HEIGHT + 12 + 18 * index
        parts.append(Markup('{}<text x="66" y="{}">{}</text>').format(mark(index, 54, y - 4), y, label))
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" viewBox="0 0 {} {}">'
        "<style>{} svg {{ background: none }}</style>{}</svg>\n"
    ).format(width, height, width, height, STYLE, Markup("").join(parts))
