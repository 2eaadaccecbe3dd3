"""Reads results back: each row with the configuration it was measured in and, where they were saved, its samples."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import UserError
from .estimators import Samples


_LABELS = {"stage": str | None, "checkpoint": str | None, "task": str, "decoding": str, "prompt": str}
# What a row must have for anything to be said about it, and of which type
_ROW = {
    **_LABELS,
    "n": int,
    "accuracy": float,
    "accuracy_low": float,
    "accuracy_high": float,
    "mean_tokens": float,
    "p90_tokens": float,
    "truncated": float,
    "parameters": int,
    "wall_s": float,
}
# What a row may have besides; `pass@k` and `maj@n` too
_NUMBERS = (
    "samples",
    "unverified",
    "accuracy_flexible",
    "strict_only",
    "flexible_only",
    "mean_tokens_low",
    "mean_tokens_high",
    "median_tokens",
    "p99_tokens",
    "mean_thinking_tokens",
    "mean_answer_tokens",
    "markers_per_1000_tokens",
    "non_embedding_parameters",
    "peak_memory_bytes",
    "weights_bytes",
    "generation_s",
)
_SHARES = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_flexible", "truncated")
_POSITIVE = ("n", "mean_tokens", "parameters", "tokens", "concurrency")
_MOST = 2**53  # what is larger is no count, and no number of seconds
_SERVING = {"concurrency": int, "total_p50_s": float, "tokens_per_s": float}
_RECORD = {
    **_LABELS,
    "sample": int,
    "question": str,
    "completion": str,
    "tokens": int,
    "thinking_tokens": int,
    "truncated": bool,
    "correct": bool | None,
    "correct_flexible": bool | None,
    "answer": str | None,
}


@dataclass
class Measurement:
    """
    One row of results.

    Args:
        row (`dict`):
            Labels and numbers.
        run (`dict`):
            Configuration, seed and commit of the run that measured it.
        environment (`dict`):
            Where it was measured.
        file (`Path`):
            The results file.
        samples ([`Samples`], *optional*):
            What the numbers were made of, if the completions were saved.
        questions (`dict`, *optional*):
            Text of every problem by its id, those without a verdict included.
    """

    row: dict[str, Any]
    run: dict[str, Any]
    environment: dict[str, Any]
    file: Path
    samples: Samples | None = None
    questions: dict[Any, str] | None = None

    @property
    def label(self) -> str:
        """How people tell it from others: by its stage, or its checkpoint and prompt, and by its backend."""
        row = self.row
        prompt = "" if row["prompt"] == "plain" else f" + {row['prompt']}"
        label = row["stage"] or Path(row["checkpoint"] or self.file.stem).name + prompt
        backend = row.get("backend", "transformers")
        return label if backend == "transformers" else f"{label}, {backend}"

    @property
    def key(self) -> tuple[str, str]:
        """What it may be compared on."""
        return self.row["task"], self.row["decoding"]

    def setting(self, name: str) -> Any:
        """A setting of the row, or where the row does not say, of its run."""
        return self.row.get(name, self.run["config"].get(name))


def load_results(path: str | Path) -> list[Measurement]:
    """
    Reads a results file and, if they lie beside it, the completions behind it.

    Args:
        path (`str` or `Path`):
            JSON file of the evaluation, with or without its suffix.

    Returns:
        `list[Measurement]`: One for each row.

    Raises:
        UserError: If the file is missing or damaged, or the completions are of another run.
    """
    path = Path(path)
    if not path.is_file() and path.suffix != ".json":
        path = path.with_name(path.name + ".json")
    if not path.is_file():
        raise UserError(f"There is no results file at `{path}`: give the `output` of an evaluation.")
    results = _parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list) or not results["rows"]:
        raise UserError(f"`{path}` is no results file of an evaluation: it has no `rows`.")
    run, environment = results.get("run"), results.get("environment")
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict) or not isinstance(environment, dict):
        raise UserError(f"`{path}` is no results file of an evaluation: it does not say what was run, and where.")
    for number, row in enumerate(results["rows"]):
        where = f"`{path}`, row {number}"
        _check(row, _ROW, where)
        _check(row, {name: float | None for name in row if name in _NUMBERS or "@" in name}, where)
        _check(row, {"serving": list} if "serving" in row else {}, where)
        for level in row.get("serving", []):
            _check(level, _SERVING, f"{where}, `serving`")
    measurements = [Measurement(row, run, environment, path) for row in results["rows"]]
    completions = path.with_suffix(".completions.jsonl")
    if completions.is_file():
        groups = _load_records(completions)
        for measurement in measurements:
            _add_samples(measurement, groups.pop(_labels(measurement.row), []), completions)
        if groups:
            raise UserError(f"`{completions}` holds completions that no row of `{path}` is about: evaluate again.")
    return measurements


def _labels(values: dict[str, Any]) -> tuple:
    return tuple(values[name] for name in _LABELS)


def _add_samples(measurement: Measurement, records: list[dict[str, Any]], completions: Path) -> None:
    row = measurement.row
    try:
        samples = Samples.from_records(records)
    except ValueError as error:
        raise UserError(f"`{completions}`, {measurement.label}: {error}") from None
    counted, accuracy, tokens = len(samples.ids), samples.correct.mean(), samples.tokens.mean()
    same = math.isclose(accuracy, row["accuracy"]) and math.isclose(tokens, row["mean_tokens"])
    if not same or counted != row["n"]:
        raise UserError(
            f"`{completions}` is not of the run in `{measurement.file}` ({measurement.label}, "
            f"{', '.join(measurement.key)}: accuracy {accuracy:.4f} on {counted} problems there, {row['accuracy']:.4f} on "
            f"{row['n']} here): evaluate again, or remove it."
        )
    measurement.samples = samples
    measurement.questions = {record["id"]: record["question"] for record in records}


def _load_records(path: Path) -> dict[tuple, list[dict[str, Any]]]:
    groups = defaultdict(list)
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            where = f"`{path}`, line {number}"
            record = _parse(line, where)
            _check(record, _RECORD, where)
            if not isinstance(record.get("id"), str | int):
                raise UserError(f"{where}: `id` must be a number or a text, and is {record.get('id')!r:.80}.")
            if record["thinking_tokens"] > record["tokens"]:
                raise UserError(f"{where}: more `thinking_tokens` than `tokens`.")
            groups[_labels(record)].append(record)
    return groups


def _parse(text: str, where: str) -> Any:
    def constant(name: str):
        raise UserError(f"{where}: {name} is not a number that JSON has.")

    try:
        return json.loads(text, parse_constant=constant)
    except UserError:
        raise
    except ValueError as error:  # also for a number of thousands of digits
        raise UserError(f"{where}: not valid JSON ({error}); the file may have been cut.") from None
    except RecursionError:
        raise UserError(f"{where}: not a results file, it is nested too deep.") from None


def _check(values: Any, types: dict[str, Any], where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a mapping of names to values, but {values!r:.80}.")
    for name, kind in types.items():
        if name not in values:
            raise UserError(f"{where}: `{name}` is missing.")
        value = values[name]
        number = kind in (int, float, float | None)
        fits = isinstance(value, {float: int | float, float | None: int | float | None}.get(kind, kind))
        if not fits or (number and isinstance(value, bool)):
            raise UserError(f"{where}: `{name}` has a value of the wrong type, {value!r:.80}.")
        most = 1 if name in _SHARES or "@" in name else _MOST
        if number and value is not None and (not 0 <= value <= most or (value == 0 and name in _POSITIVE)):
            raise UserError(f"{where}: `{name}` cannot be {value!r:.80}.")
