"""Processes that stages start, and that are not to outlive them."""

import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from . import guard


_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def start(command: list[str], **options) -> subprocess.Popen:
    """
    Starts a process that, on Linux, the system ends when this one is killed, which then cannot do it itself.

    Args:
        command (`list[str]`):
            Program and arguments.
        **options:
            For [`subprocess.Popen`].

    Returns:
        [`subprocess.Popen`]: Process. It ends with the thread that has started it, too, so that is to be one that stays.
    """
    ending = None
    if sys.platform == "linux":
        ending = functools.partial(_end_with, os.getpid(), ctypes.CDLL(None).prctl)
    return subprocess.Popen(command, preexec_fn=ending, **options)


def guarded(command: list[str], patience: float = 45.0, **options) -> subprocess.Popen:
    """
    Starts a process that is ended with all that it has started, by `terminate` and, on Linux, when this one is killed.

    Args:
        command (`list[str]`):
            Program and arguments.
        patience (`float`, *optional*, defaults to `45.0`):
            Seconds that they have to end by themselves, before they are killed.
        **options:
            For [`subprocess.Popen`].

    Returns:
        [`subprocess.Popen`]: Process that runs the command, and ends as it does. It is not to be killed, or nobody ends the
        others.
    """
    return start([sys.executable, "-I", "-S", guard.__file__, str(patience), *command], **options)


def _end_with(parent: int, prctl: Callable) -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # that was before this
        os.kill(os.getpid(), signal.SIGTERM)
