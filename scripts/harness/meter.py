"""Seconds, and the most memory in use."""

import ctypes
import time
from pathlib import Path

import torch


MIB = 1 << 20


def _resident(name: str) -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024 / MIB


def restart_peak() -> float:
    """Lets the peak of this process start from what is resident now. Returns that, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)  # hands pages that were freed back, so that they count again when used
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> float:
    """The most memory of this process that was resident since [`restart_peak`], in MiB."""
    return _resident("VmHWM")


class Meter:
    """
    Measures a block: `seconds` by the clock, `cpu_seconds` of the processor, and `peak_mib`, the most memory in use above
    what was in use before; on a GPU the GPU's.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __enter__(self):
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
        else:
            self.before = restart_peak()
        self.start, self.start_cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds, self.cpu_seconds = time.perf_counter() - self.start, time.process_time() - self.start_cpu
        most = torch.cuda.max_memory_allocated() / MIB if self.cuda else peak()
        self.peak_mib = most - self.before
