"""Turns result rows into what people read: a Markdown table, a comparison in words, and a plot."""

from pathlib import Path
from typing import Any

from ..results import write_text


COLUMNS = {
    "stage": "stage",
    "decoding": "decoding",
    "n": "n",
    "accuracy": "accuracy (95% interval)",
    "mean_tokens": "tokens, mean",
    "p90_tokens": "tokens, p90",
    "truncated": "truncated",
    "parameters": "parameters",
    "wall_s": "seconds",
}


def table_cells(row: dict[str, Any]) -> list[str]:
    """
    One line of the table.

    Args:
        row (`dict`):
            Result row of the evaluation.

    Returns:
        `list[str]`: A cell for each of `COLUMNS`.
    """
    return [
        row["stage"],
        row["decoding"],
        f"{row['n']:,}",
        f"{100 * row['accuracy']:.1f}% ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})",
        f"{row['mean_tokens']:.1f}",
        f"{row['p90_tokens']:.0f}",
        f"{100 * row['truncated']:.1f}%",
        f"{row['parameters']:,}",
        f"{row['wall_s']:.0f}",
    ]


def compare(rows: list[dict[str, Any]], before: str, after: str) -> list[str]:
    """
    What a stage changed, one sentence for each decoding.

    Args:
        rows (`list[dict]`):
            Result rows of the evaluation.
        before (`str`):
            Stage to compare with.
        after (`str`):
            Stage that is judged.

    Returns:
        `list[str]`: Sentences with the change in tokens, in percent, and in accuracy, in percentage points.
    """
    by_key = {(row["stage"], row["decoding"]): row for row in rows}
    sentences = []
    for stage, decoding in by_key:
        if stage != after or (before, decoding) not in by_key:
            continue
        old, new = by_key[before, decoding], by_key[after, decoding]
        tokens = 100 * (new["mean_tokens"] / old["mean_tokens"] - 1)
        points = round(100 * (new["accuracy"] - old["accuracy"]), 1) + 0.0  # no "-0.0"
        sentences.append(
            f"{after} against {before}, {decoding}: {tokens:+.1f}% tokens ({old['mean_tokens']:.1f} to "
            f"{new['mean_tokens']:.1f}), {points:+.1f} percentage points of accuracy."
        )
    return sentences


def plot_accuracy_tokens(rows: list[dict[str, Any]], path: str | Path) -> None:
    """
    Plots accuracy, with its interval, against mean tokens: one panel for each decoding, one point for each stage.

    Args:
        rows (`list[dict]`):
            Result rows of the evaluation.
        path (`str` or `Path`):
            PNG file to write, whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    decodings = list(dict.fromkeys(row["decoding"] for row in rows))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure, axes = plt.subplots(1, len(decodings), figsize=(4.6 * len(decodings), 4), sharey=True, squeeze=False)
    for axis, decoding in zip(axes[0], decodings, strict=True):
        for row in rows:
            if row["decoding"] != decoding:
                continue
            low, high = row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]
            axis.errorbar(
                row["mean_tokens"],
                100 * row["accuracy"],
                yerr=[[100 * low], [100 * high]],
                fmt="o",
                capsize=3,
                color=f"C{stages.index(row['stage'])}",
                label=row["stage"],
            )
        axis.set_title(decoding)
        axis.set_xlabel("completion tokens, mean")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, % (95% interval)")
    axes[0][-1].legend(loc="best")
    figure.tight_layout()
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    plt.close(figure)


def write_report(folder: str | Path, rows: list[dict[str, Any]], title: str, comparisons: list[str]) -> None:
    """
    Writes `report.md` and `accuracy_tokens.png`.

    Args:
        folder (`str` or `Path`):
            Where to.
        rows (`list[dict]`):
            Result rows of the evaluation.
        title (`str`):
            Heading.
        comparisons (`list[str]`):
            Sentences to put above the table.
    """
    folder = Path(folder)
    plot_accuracy_tokens(rows, folder / "accuracy_tokens.png")
    lines = [f"# {title}", "", *[f"- {sentence}" for sentence in comparisons], ""]
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(table_cells(row)) + " |" for row in rows]
    lines += ["", "![Accuracy against tokens](accuracy_tokens.png)", ""]
    lines += ["Every number is in `results.json`, with the configuration, the machine and the versions.", ""]
    write_text(folder / "report.md", "\n".join(lines))
