"""Plots, drawn without a screen."""

import os
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


__all__ = ["plt", "save"]


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Writes a plot whole or not at all."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=dpi)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)
