"""The most memory that was held, on the GPU or, where there is none, in this process."""

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Starts a new measurement of [`peak_memory`]."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # What was freed and is still held would count, and how much that is depends on what ran before
        with contextlib.suppress(OSError, AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(PermissionError):  # in some containers: then it is the peak since the process began
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident set


def peak_memory() -> int:
    """
    Returns the most memory held since [`reset_peak_memory`], in bytes: what tensors took on the GPU or, where there is
    none, the resident set of this process (off Linux since the process began). Files that it maps count in the latter.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class WorkerMemory:
    """What each of vLLM's worker processes, which are those that hold the model, is extended by."""

    def reset_worker_memory(self) -> None:
        reset_peak_memory()

    def worker_memory(self) -> int:
        return peak_memory()
