"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def spread(values: Iterable[float]) -> str:
    """The mean with the lowest and the highest."""
    values = list(values)
    numbers = (sum(values) / len(values), min(values), max(values))
    return "{:.1f} ({:.1f} to {:.1f})".format(*(round(float(number), 1) + 0.0 for number in numbers))  # no "-0.0"


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without an empty line after it."""
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])
