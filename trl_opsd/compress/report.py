"""Turns rows into what people read: of the chain a short table and sentences, of a size sweep a table and two plots."""

from pathlib import Path
from typing import Any

from ..results import write_text


#: Columns of the short table of a chain.
CHAIN_COLUMNS = ("stage", "decoding", "accuracy (95% interval)", "tokens, mean", "truncated")


def chain_cells(row: dict[str, Any]) -> list[str]:
    """Returns a cell for each of `CHAIN_COLUMNS`, of a row of the evaluation."""
    return [
        row["stage"],
        row["decoding"],
        _accuracy(row),
        f"{row['mean_tokens']:.1f}",
        f"{100 * row['truncated']:.1f}%",
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


#: Columns of the table of a sweep.
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
        _accuracy(row),
        f"{100 * row['kept']:.1f}%",
        f"{row['mean_tokens']:.1f}",
        f"{row['answer_flops'] / 1e6:.1f}",
        *_serving(row["serving"]),
    ]


def _accuracy(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f}% ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})"


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
