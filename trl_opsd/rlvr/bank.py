"""The rollout bank: verified rollouts outlive the reinforcement learning that paid for them."""

import hashlib
import json
import os
from bisect import insort
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from .identity import FILE, Writer, check_writer


_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_ATTEMPTS = pa.schema(
    {"step": pa.int64(), "prompt_id": pa.string(), "attempts": pa.int64(), "correct": pa.int64()},
)


class RolloutBank:
    """
    Verified rollouts of a run, on disk as they come in, and how often each prompt was tried and solved.

    | file | what it holds |
    |---|---|
    | `rollouts/*.parquet` | `prompt`, `completion` (as in TRL's prompt-completion format), `prompt_id`, `completion_ids`, `num_tokens`, `reward`, `step` |
    | `attempts/*.parquet` | `step`, `prompt_id`, `attempts`, `correct` |
    | `bank.json` | whose rollouts they are: the model's name, hashes of its weights and of its vocabulary |

    So `rollouts` is a data set for `load_dataset("parquet", data_dir=...)` and [`~trl.SFTTrainer`], as it is.

    Every [`add`] writes one new part of each, whole or not at all. A completion that the bank has for its prompt is not written
    again, and rollouts that shorter ones of their prompt replace leave the disk with the same `add`. A step that is run
    again, because the run was resumed from before it, is counted once.

    Args:
        folder (`str` or `Path`):
            Where the bank is. One that is there already is gone on with.
        rollouts_per_prompt (`int`):
            Rollouts to keep for each prompt, the shortest in tokens. Of two that are as long the older one stays.
        writer ([`~trl_opsd.rlvr.identity.Writer`]):
            Whose rollouts they are.

    Raises:
        ValueError: If the bank that is there is another model's, or another tokenizer's.
    """

    def __init__(self, folder: str | Path, rollouts_per_prompt: int, writer: Writer):
        check_writer(folder, writer)
        self.folder = Path(folder)
        self.rollouts_per_prompt = rollouts_per_prompt
        # For each prompt what is kept: (tokens, digest of the completion, part that it is in), shortest first
        self._kept: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
        self._outdated: set[str] = set()
        self._step: int | None = None
        for name in ("rollouts", "attempts"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not (self.folder / FILE).is_file():
            writer.save(self.folder)
        parts = sorted((self.folder / "rollouts").glob("*.parquet"))
        for part in parts:
            for row in pq.read_table(part, columns=["prompt_id", "completion", "num_tokens"]).to_pylist():
                self._offer(row, part.name)
        self._next_part = 1 + int(parts[-1].stem) if parts else 0

    def add(self, step: int, rollouts: list[dict[str, Any]], attempts: dict[str, tuple[int, int]]) -> None:
        """
        Adds what one generation has brought.

        Args:
            step (`int`):
                Optimizer step that the rollouts were generated for.
            rollouts (`list[dict]`):
                Verified rollouts: `prompt`, `completion`, `prompt_id`, `completion_ids` and `reward`.
            attempts (`dict[str, tuple[int, int]]`):
                For each prompt id how many rollouts were scored, and how many of them were correct.
        """
        name = f"{self._next_part:08d}.parquet"
        rows = [{**rollout, "num_tokens": len(rollout["completion_ids"]), "step": step} for rollout in rollouts]
        rows = [row for row in rows if self._offer(row, name)]
        rows = [row for row in rows if self._keeps(row, name)]  # one may have replaced another of the same part
        self._outdated.discard(name)
        if rows:
            text = pa.string() if isinstance(rows[0]["prompt"], str) else _MESSAGES
            schema = {
                "prompt_id": pa.string(),
                "prompt": text,
                "completion": text,
                "completion_ids": pa.list_(pa.int32()),
                "num_tokens": pa.int32(),
                "reward": pa.float32(),
                "step": pa.int32(),
            }
            self._write(self.folder / "rollouts" / name, pa.Table.from_pylist(rows, schema=pa.schema(schema)))
            self._next_part += 1
        while self._outdated:
            self._rewrite(self.folder / "rollouts" / self._outdated.pop())

        if self._step is None or step < self._step:  # resumed, or begun anew: what follows is counted again
            for part in (self.folder / "attempts").glob("*.parquet"):
                if int(part.stem.split("-")[0]) >= step:
                    part.unlink()
        self._step = step
        number = len(list((self.folder / "attempts").glob(f"{step:08d}-*.parquet")))
        rows = [
            {"step": step, "prompt_id": prompt, "attempts": tried, "correct": correct}
            for prompt, (tried, correct) in attempts.items()
        ]
        self._write(
            self.folder / "attempts" / f"{step:08d}-{number:08d}.parquet", pa.Table.from_pylist(rows, schema=_ATTEMPTS)
        )

    def _offer(self, row: dict[str, Any], part: str) -> bool:
        """Takes a rollout if it is new and among the shortest of its prompt. Returns whether it was taken."""
        kept, digest = self._kept[row["prompt_id"]], _digest(row["completion"])
        if any(digest == other for _, other, _ in kept):
            return False
        insort(kept, (row["num_tokens"], digest, part), key=lambda item: item[0])
        replaced = kept[self.rollouts_per_prompt :]
        del kept[self.rollouts_per_prompt :]
        self._outdated.update(part for _, _, part in replaced)
        return (row["num_tokens"], digest, part) not in replaced

    def _keeps(self, row: dict[str, Any], part: str) -> bool:
        return (row["num_tokens"], _digest(row["completion"]), part) in self._kept[row["prompt_id"]]

    def _rewrite(self, path: Path) -> None:
        """Takes out of a part what is no longer kept."""
        table = pq.read_table(path)
        rows = table.select(["prompt_id", "completion", "num_tokens"]).to_pylist()
        table = table.filter(pa.array([self._keeps(row, path.name) for row in rows]))
        self._write(path, table) if len(table) else path.unlink()

    @staticmethod
    def _write(path: Path, table: pa.Table) -> None:
        temporary = path.with_name(f".{path.name}.tmp")  # hidden, so that no reader of the folder takes it up
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        os.replace(temporary, path)


def read_rollouts(folder: str | Path) -> Dataset:
    """
    Reads the rollouts of a bank.

    Args:
        folder (`str` or `Path`):
            Folder of the bank.

    Returns:
        [`~datasets.Dataset`]: A row for each rollout, those of a prompt from the shortest to the longest.

    Raises:
        ValueError: If there is no bank in the folder, or no rollout in the bank.
    """
    folder = Path(folder)
    if not (folder / "rollouts").is_dir():
        raise ValueError(
            f"There is no rollout bank at `{folder}`: give the folder `bank` of an RLVR run's `output_dir`."
        )
    if not any((folder / "rollouts").glob("*.parquet")):
        raise ValueError(f"The rollout bank at `{folder}` is empty: no rollout of its run was correct.")
    table = pq.read_table(folder / "rollouts", page_checksum_verification=True)
    return Dataset(table.sort_by([("prompt_id", "ascending"), ("num_tokens", "ascending")]))


def read_attempts(folder: str | Path) -> dict[str, tuple[int, int]]:
    """
    Reads how often each prompt was tried and solved.

    Args:
        folder (`str` or `Path`):
            Folder of the bank.

    Returns:
        `dict[str, tuple[int, int]]`: For each prompt id the number of scored rollouts, and of correct ones.

    Raises:
        ValueError: If there is no bank in the folder.
    """
    folder = Path(folder) / "attempts"
    if not any(folder.glob("*.parquet")):
        raise ValueError(
            f"There is no rollout bank at `{folder.parent}`: give the folder `bank` of an RLVR run's `output_dir`."
        )
    counts = defaultdict(lambda: (0, 0))
    for row in pq.read_table(folder, page_checksum_verification=True).to_pylist():
        attempts, correct = counts[row["prompt_id"]]
        counts[row["prompt_id"]] = (attempts + row["attempts"], correct + row["correct"])
    return dict(counts)


def prompt_id(prompt: list[dict[str, Any]] | str) -> str:
    """
    Identifies a prompt across runs and machines.

    Args:
        prompt (`list[dict]` or `str`):
            Prompt, conversational or not.

    Returns:
        `str`: SHA-256 of its canonical JSON. Fields of a message that are `None` do not count, because a table fills
        in those that only other rows have.
    """
    if not isinstance(prompt, str):
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    return _digest(prompt)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
