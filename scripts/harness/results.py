"""Where results are, and how they are read and written: one schema, with machine and versions in every file."""

import json
from pathlib import Path

from trl_opsd.results import write_results, write_text


__all__ = ["RESULTS", "ROOT", "read", "read_all", "write_results", "write_text"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "results"


def read(path: str | Path) -> list[dict]:
    """Returns the rows of a results file."""
    return json.loads(Path(path).read_text())["rows"]


def read_all(folder: Path, pattern: str = "seed-*.json") -> list[list[dict]]:
    """Returns the rows of every results file of a folder, in the order of their names: one list for each seed."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise SystemExit(f"error: {folder} has no results yet ({pattern}): run the command that makes them first.")
    return [read(file) for file in files]
