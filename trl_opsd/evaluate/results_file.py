"""
The results file of an evaluation and the completions beside it: written for the rows and records of
[`trl_opsd.evaluate.schema`], and read back with the configuration that they were measured in.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import UserError
from ..results import write_results, write_text
from .estimate import Samples
from .schema import CompletionRecord, ResultRow, from_json, to_json


@dataclass
class Measurement:
    """
    One row of results, read back.

    Args:
        row ([`~trl_opsd.evaluate.schema.ResultRow`]):
            Labels and numbers.
        run (`dict`):
            Configuration, seed and commit of the run that measured it.
        environment (`dict`):
            Where it was measured.
        file (`Path`):
            The results file.
        samples ([`~trl_opsd.evaluate.estimate.Samples`], *optional*):
            What the numbers were made of, if the completions were saved.
        questions (`dict`, *optional*):
            Text of every problem by its id, those without a verdict included.
    """

    row: ResultRow
    run: dict[str, Any]
    environment: dict[str, Any]
    file: Path
    samples: Samples | None = None
    questions: dict[Any, str] | None = None

    @property
    def label(self) -> str:
        """How people tell it from others: by its stage, or its checkpoint and prompt, and by its backend."""
        row = self.row
        prompt = "" if row.prompt == "plain" else f" + {row.prompt}"
        label = row.stage or Path(row.checkpoint or self.file.stem).name + prompt
        return label if row.backend == "transformers" else f"{label}, {row.backend}"

    @property
    def key(self) -> tuple[str, str]:
        """What it may be compared on."""
        return self.row.task, self.row.decoding

    def setting(self, name: str) -> Any:
        """A setting of the row, or where the row does not say, of its run."""
        value = vars(self.row).get(name)
        return self.run["config"].get(name) if value is None else value


def write_rows(path: str | Path, rows: Sequence[ResultRow], config: Any) -> None:
    """
    Writes a results file.

    Args:
        path (`str` or `Path`):
            JSON file.
        rows (`Sequence[ResultRow]`):
            What was measured.
        config (dataclass):
            What was run.
    """
    write_results(path, [to_json(row) for row in rows], config)


def write_completions(path: str | Path, records: Sequence[CompletionRecord]) -> None:
    """
    Writes the completions file that lies beside a results file.

    Args:
        path (`str` or `Path`):
            The results file.
        records (`Sequence[CompletionRecord]`):
            Completions of all its rows.
    """
    lines = "".join(json.dumps(to_json(record), ensure_ascii=False) + "\n" for record in records)
    write_text(Path(path).with_suffix(".completions.jsonl"), lines)


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
    rows = [from_json(ResultRow, row, f"`{path}`, row {number}") for number, row in enumerate(results["rows"])]
    measurements = [Measurement(row, run, environment, path) for row in rows]
    completions = path.with_suffix(".completions.jsonl")
    if completions.is_file():
        groups = _load_completions(completions)
        for measurement in measurements:
            _add_samples(measurement, groups.pop(measurement.row.labels, []), completions)
        if groups:
            raise UserError(f"`{completions}` holds completions that no row of `{path}` is about: evaluate again.")
    return measurements


def _add_samples(measurement: Measurement, records: list[CompletionRecord], completions: Path) -> None:
    row = measurement.row
    try:
        samples = Samples.from_records(records)
    except ValueError as error:
        raise UserError(f"`{completions}`, {measurement.label}: {error}") from None
    counted, accuracy, tokens = len(samples.ids), samples.correct.mean(), samples.tokens.mean()
    same = math.isclose(accuracy, row.accuracy) and math.isclose(tokens, row.mean_tokens)
    if not same or counted != row.n:
        raise UserError(
            f"`{completions}` is not of the run in `{measurement.file}` ({measurement.label}, "
            f"{', '.join(measurement.key)}: accuracy {accuracy:.4f} on {counted} problems there, {row.accuracy:.4f} on "
            f"{row.n} here): evaluate again, or remove it."
        )
    measurement.samples = samples
    measurement.questions = {record.id: record.question for record in records}


def _load_completions(path: Path) -> dict[tuple, list[CompletionRecord]]:
    groups = defaultdict(list)
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            where = f"`{path}`, line {number}"
            record = from_json(CompletionRecord, _parse(line, where), where)
            if record.thinking_tokens > record.tokens:
                raise UserError(f"{where}: more `thinking_tokens` than `tokens`.")
            groups[record.labels].append(record)
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
