"""
Generations that are kept: an evaluation that was interrupted goes on, and scoring again needs no generation.

A file has a line of JSON for each completion: its key, its token ids, the seconds it took, and a checksum. Lines are only
ever added. One that is cut, or that differs from what was written in any character, is skipped and counted, and its
completion is generated again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def cache_key(**parts: Any) -> str:
    """Returns the key of a completion: a hash of everything that decides it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class GenerationCache:
    """
    The completions in one file.

    Args:
        path (`Path`, *optional*):
            JSON Lines file, which need not exist. If not set nothing is kept.
        process (`int`, *optional*, defaults to `0`):
            Number of this process among those that evaluate together. Each writes a file of its own, and reads all.

    Attributes:
        damaged (`int`):
            Number of lines that were skipped.
    """

    def __init__(self, path: Path | None, process: int = 0):
        self.path, self.damaged, self._entries = path, 0, {}
        if path is None:
            return
        self.path = path.with_suffix(f".{process}.jsonl") if process else path
        for part in (path, *sorted(path.parent.glob(f"{path.stem}.*.jsonl"))):
            if part.is_file():
                self._load(part)

    def _load(self, path: Path) -> None:
        with path.open("rb") as file:
            for line in file:
                entry = self._read(line)
                if entry is None:
                    self.damaged += 1
                else:
                    self._entries[entry[0]] = entry[1:]

    def get(self, key: str) -> tuple[list[int], float] | None:
        """
        Looks a completion up.

        Args:
            key (`str`):
                Its key.

        Returns:
            `tuple[list[int], float]` or `None`: Token ids, and the seconds that they took.
        """
        return self._entries.get(key)

    def add(self, key: str, ids: list[int], seconds: float) -> None:
        """
        Adds a completion, at once to the file too.

        Args:
            key (`str`):
                Its key.
            ids (`list[int]`):
                Token ids.
            seconds (`float`):
                Time that it took.
        """
        if self.path is None:
            return
        body = [key, ids, round(seconds, 4)]
        self._entries[key] = (ids, body[2])
        line = json.dumps([*body, _checksum(body)], separators=(",", ":")).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line  # so that a line that was cut damages no other
            file.write(line)  # one write, which two processes do not mix

    @staticmethod
    def _read(line: bytes) -> tuple[str, list[int], float] | None:
        try:
            *body, checksum = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            return None
        return tuple(body) if len(body) == 3 and checksum == _checksum(body) else None


def _checksum(body: list[Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]
