"""Turns the rows of a size sweep into what people read: a table and two plots."""

from pathlib import Path
from typing import Any

from ..results import write_text


#: Columns of the table.
COLUMNS = {
    "ratio": "removed",
    "method": "method",
    "parameters": "parameters",
    "non_embedding_parameters": "without embeddings",
    "weights_bytes": "weights, MB",
    "updates": "updates",
    "generated": "generated in training, k tokens",
    "decoding": "decoding",
    "accuracy": "accuracy (95% interval)",
    "kept": "of the teacher's",
    "mean_tokens": "tokens, mean",
    "flops": "MFLOPs per answer",
    "latency": "an answer alone, ms",
    "throughput": "tokens/s in a batch",
}


def table_cells(row: dict[str, Any]) -> list[str]:
    """
    One line of the table.

    Args:
        row (`dict`):
            Row of [`~trl_opsd.compress.sweep.sweep_rows`].

    Returns:
        `list[str]`: A cell for each of `COLUMNS`.
    """
    return [
        f"{100 * row['ratio']:g}%",
        row["method"],
        f"{row['parameters']:,}",
        f"{row['non_embedding_parameters']:,}",
        f"{row['weights_bytes'] / 1e6:.2f}",
        f"{row['updates']:,}",
        f"{row['generated_tokens'] / 1e3:.0f}",
        row["decoding"],
        f"{100 * row['accuracy']:.1f}% ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})",
        f"{100 * row['kept']:.1f}%",
        f"{row['mean_tokens']:.1f}",
        f"{row['answer_flops'] / 1e6:.1f}",
        *_serving(row["serving"]),
    ]


def _serving(levels: list[dict[str, Any]]) -> tuple[str, str]:
    """Median seconds of an answer at the lowest concurrency measured, and tokens per second at the highest."""
    if not levels:  # measured for one way of decoding only
        return "–", "–"
    return f"{1e3 * levels[0]['total_p50_s']:.0f}", f"{levels[-1]['tokens_per_s']:,.0f}"


def plot(rows: list[dict[str, Any]], x: str, label: str, path: str | Path) -> None:
    """
    Plots accuracy, with its interval, against a size: one panel for each decoding, one line for each method.

    Args:
        rows (`list[dict]`):
            Rows of [`~trl_opsd.compress.sweep.sweep_rows`].
        x (`str`):
            Field of the horizontal axis.
        label (`str`):
            Its label.
        path (`str` or `Path`):
            PNG file to write, whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    decodings = list(dict.fromkeys(row["decoding"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, len(decodings), figsize=(5 * len(decodings), 4.2), sharey=True, squeeze=False)
    for axis, decoding in zip(axes[0], decodings, strict=True):
        for index, method in enumerate(methods):
            chosen = sorted(
                (row for row in rows if (row["decoding"], row["method"]) == (decoding, method)),
                key=lambda row: row["parameters"],
            )
            low, high = (
                [100 * abs(row["accuracy"] - row[bound]) for row in chosen]
                for bound in ("accuracy_low", "accuracy_high")
            )
            axis.errorbar(
                [row[x] for row in chosen],
                [100 * row["accuracy"] for row in chosen],
                yerr=[low, high],
                fmt="*" if method == "teacher" else "o-",
                markersize=12 if method == "teacher" else 5,
                capsize=3,
                color=f"C{index}",
                label=method,
            )
        axis.set_title(decoding)
        axis.set_xlabel(label)
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, % (95% interval)")
    axes[0][-1].legend(loc="best")
    figure.tight_layout()
    path = Path(path)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    plt.close(figure)


def write_report(folder: str | Path, rows: list[dict[str, Any]], title: str, conditions: str) -> None:
    """
    Writes `report.md`, `accuracy_parameters.png` and `accuracy_flops.png`.

    Args:
        folder (`str` or `Path`):
            Where to.
        rows (`list[dict]`):
            Rows of [`~trl_opsd.compress.sweep.sweep_rows`].
        title (`str`):
            Heading.
        conditions (`str`):
            What all methods had in common.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, "parameters", "parameters", folder / "accuracy_parameters.png")
    plot(rows, "answer_flops", "FLOPs per answer (2 × parameters × tokens)", folder / "accuracy_flops.png")
    lines = [f"# {title}", "", conditions, ""]
    lines += ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(table_cells(row)) + " |" for row in rows]
    lines += ["", "![Accuracy against parameters](accuracy_parameters.png)", ""]
    lines += ["![Accuracy against the FLOPs of an answer](accuracy_flops.png)", ""]
    lines += ["Every number is in `results.json`, with the configuration, the machine and the versions.", ""]
    write_text(folder / "report.md", "\n".join(lines))
