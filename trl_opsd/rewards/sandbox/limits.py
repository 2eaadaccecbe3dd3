"""What one program may use, and what all programs together may take of this machine."""

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...cli import UserError


MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """
    What one program and its tests may use. The program and the process that runs the tests are limited alike.

    Args:
        seconds (`float`, *optional*, defaults to `5.0`):
            Processor time, and apart from it the time that the program may sleep; of a program with tests on standard
            input and output, for each of them, and 12 times as much for all. The time that a busy machine makes it
            wait for a processor does not count: it ends after 20 times as much, without a verdict.
        memory_bytes (`int`, *optional*, defaults to 512 MiB):
            Address space of the process. A program is one process, so this is all of its memory.
        folder_bytes (`int`, *optional*, defaults to 16 MiB):
            Size of the writable folder and of each file. It is memory too.
        threads (`int`, *optional*, defaults to `32`):
            Threads at a time, of the program and its tests together.
        open_files (`int`, *optional*, defaults to `64`):
            Open files at a time.
        output_bytes (`int`, *optional*, defaults to 1 MiB):
            Standard output and error together. A program that writes more is stopped.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 * MIB
    folder_bytes: int = 16 * MIB
    threads: int = 32
    open_files: int = 64
    output_bytes: int = MIB

    @property
    def total_bytes(self) -> int:
        """What a sandbox can come to hold: the program, the process that runs the tests, and the folder."""
        return 2 * self.memory_bytes + self.folder_bytes


def available_processors() -> int:
    """
    Processors that this process may use: those it is bound to, within the quota of its control groups, and its share of
    them where it is one of several of a distributed run on this machine.
    """
    number = float(len(os.sched_getaffinity(0)))
    for folder in _control_groups("cpu"):
        quota = _read(folder / "cpu.max")  # version 2: quota and period, or the word `max`
        if quota is None and (number_of := _read(folder / "cpu.cfs_quota_us")) is not None:
            quota = f"{number_of} {_read(folder / 'cpu.cfs_period_us')}"
        if quota is not None and quota.split()[0].lstrip("-").isdigit() and int(quota.split()[0]) > 0:
            number = min(number, int(quota.split()[0]) / int(quota.split()[1]))
    return max(1, int(number / _local_processes()))


def available_memory() -> int:
    """Bytes that all sandboxes of this process may take together: half of its share of the machine, or of its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name)
            if limit is not None and limit.isdigit():
                total = min(total, int(limit))
    return total // 2 // _local_processes()


def _local_processes() -> int:
    number = os.environ.get("LOCAL_WORLD_SIZE", "1")  # as torchrun and accelerate set it
    return max(1, int(number)) if number.isdigit() else 1


def _control_groups(controller: str) -> list[Path]:
    """Folders of this process's control groups and of all above them, of both versions."""
    folders = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root = Path("/sys/fs/cgroup", controller if names else "")
        here = root / path.lstrip("/")
        folders += [folder for folder in (here, *here.parents) if folder == root or root in folder.parents]
    return folders


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


class Memory:
    """Lets sandboxes start while all of them together stay under what this process may take for them."""

    def __init__(self):
        self._changed = threading.Condition()
        self.held = 0

    @contextmanager
    def hold(self, size: int):
        cap = available_memory()
        if size > cap:
            raise UserError(
                f"A sandbox may take {size // MIB} MiB, and all together {cap // MIB} MiB, half of what this process "
                "has: lower `memory_bytes` of its limits."
            )
        with self._changed:
            self._changed.wait_for(lambda: self.held + size <= cap)
            self.held += size
        try:
            yield
        finally:
            with self._changed:
                self.held -= size
                self._changed.notify_all()


memory = Memory()
os.register_at_fork(after_in_child=lambda: memory.__init__())
