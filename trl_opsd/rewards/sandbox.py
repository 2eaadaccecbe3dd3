"""
Runs a program that nobody trusts, and says whether its tests pass.

A program gets kernel namespaces of its own (user, process, mount, network, IPC, host name, cgroup): no network, no host
process, and no host file but the interpreter's libraries, read-only, beside an empty /tmp in memory. It is nobody, has
no capability, cannot gain one, cannot start a process, run another program, open a socket or signal anything, and its
memory, processor time, threads, files and output are limited. When the verdict is in or the time is up, the kernel
ends all of it; nothing was ever on disk. The kernel itself is the wall: this is no protection from a hole in Linux.

The verdict comes from a process that the program cannot reach. Tests run there, and call the program's functions over
a pipe that carries plain data (numbers, strings, lists, ...) by value, and anything else as a handle (`jail.py`). So

- nothing that a program does to its interpreter matters: replacing builtins, `assert`, modules or the tests, reading
  the tests from frames or memory, exiting early, printing or sending a verdict, threads that go on;
- an object that claims to equal everything equals nothing: with data of the tests it is never compared.

What no sandbox can tell from a solution remains: a program may know the answers by heart; a list that a test passes,
and then computes its expectation from, can be changed in place; what the tests themselves take from the program (a
helper function, the equality of two of its own objects, a method given the expected value) is the program's word. It
sees the names that the tests use and the arguments of its calls, nothing else of them.

Tests see plain data in its base type (a `namedtuple` as a `tuple`, a `Counter` as a `dict`), an exception of the
program's own class as the nearest built-in one, and names of builtins as Python's unless it is the `entry_point`.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..cli import UserError


UNSAFE = "TRL_OPSD_UNSAFE_NO_ISOLATION"

_JAIL = Path(__file__).with_name("jail.py")
_MIB = 1 << 20
_STARTUP_SECONDS = 60.0
_VERDICT_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """
    What one program and its tests may use. The program and the process that runs the tests are limited alike.

    Args:
        seconds (`float`, *optional*, defaults to `5.0`):
            Wall time, from when the sandbox stands. Processor time is limited to the next whole second.
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
    memory_bytes: int = 512 * _MIB
    folder_bytes: int = 16 * _MIB
    threads: int = 32
    open_files: int = 64
    output_bytes: int = _MIB


@dataclass(frozen=True)
class Verdict:
    """
    What came out of one program.

    Args:
        status (`str`):
            `"passed"`, `"failed"`, `"timeout"`, `"output"` (it wrote too much), `"died"` (the process that runs the
            tests was ended by a limit) or `"invalid"` (there are no tests, or they are not Python).
        score (`float` or `None`):
            1.0 when the tests pass, else 0.0, or with partial credit the share of asserts that pass. `None` when
            invalid.
        detail (`str` or `None`):
            Why it did not pass, in a few words.
        output (`str`):
            What the program and its tests printed.
    """

    status: str
    score: float | None
    detail: str | None
    output: str


def run_tests(
    program: str,
    tests: str,
    entry_point: str | None = None,
    partial_credit: bool = False,
    limits: Limits | None = None,
) -> Verdict:
    """
    Runs a program, and then tests that use it, in a sandbox of their own.

    Args:
        program (`str`):
            Python source, not trusted. It is a module called `solution`, not `__main__`.
        tests (`str`):
            Python source that raises when the program is wrong. It uses the program's functions by their names.
        entry_point (`str`, *optional*):
            Name of the function that is handed to `check`, if the tests define one.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of asserts at the top level of the tests, and of `check`, that pass.
        limits ([`Limits`], *optional*):
            What it may use. Defaults to `Limits()`.

    Returns:
        [`Verdict`]: The verdict, after everything that was started has ended.

    Raises:
        UserError: If this machine cannot isolate the program and the user has not accepted that.

    Example:
    ```python
    >>> from trl_opsd.rewards.sandbox import run_tests

    >>> run_tests("def double(x):\\n    return x + x", "assert double(4) == 8").status
    'passed'
    ```
    """
    limits = limits or Limits()
    if not sys.platform.startswith("linux"):
        raise UserError(f"Code is only run in a sandbox on Linux, and this is {sys.platform}: use a Linux machine.")
    # A lone surrogate cannot be written, and no Python source has one.
    program, tests = (text.encode("utf-8", "replace") for text in (program, tests))
    isolated = os.environ.get(UNSAFE) != "1"
    with ExitStack() as stack:
        config = {
            "isolated": isolated,
            "folder": None if isolated else stack.enter_context(tempfile.TemporaryDirectory()),
            "parent": os.getpid(),
            "entry_point": entry_point,
            "partial_credit": partial_credit,
            "program_bytes": len(program),
            "tests_bytes": len(tests),
            "wall_seconds": int(limits.seconds) + 1,
            "cpu_seconds": int(limits.seconds) + 1,
            "memory_bytes": limits.memory_bytes,
            "folder_bytes": limits.folder_bytes,
            "threads": limits.threads,
            "open_files": limits.open_files,
        }
        header = json.dumps(config).encode()
        request = stack.enter_context(os.fdopen(os.memfd_create("request"), "wb"))
        request.write(len(header).to_bytes(8, "big") + header + program + tests)
        request.flush()
        process = subprocess.Popen(
            # No environment, no site packages, nothing of the working directory, no bytecode written
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_JAIL)],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            start_new_session=True,
        )
        try:
            messages, output, stopped = _listen(process, limits)
        finally:
            _end(process)
    return _verdict(messages, output, stopped)


def require_isolation() -> None:
    """
    Checks that this machine can isolate a program, by doing it once.

    Raises:
        UserError: If it cannot, and the user has not accepted that.
    """
    run_tests("", "pass")


def _listen(process: subprocess.Popen, limits: Limits) -> tuple[bytes, bytes, str | None]:
    """Reads both pipes until they are closed, the time is up or there is too much; the last one is `stopped`."""
    read = {process.stdout: b"", process.stderr: b""}
    bounds = {process.stdout: _VERDICT_BYTES, process.stderr: limits.output_bytes}
    deadline, started, stopped = time.monotonic() + _STARTUP_SECONDS, False, None
    with selectors.DefaultSelector() as selector:
        for pipe in read:
            selector.register(pipe, selectors.EVENT_READ)
        # The verdict's pipe closes with the judge; then the program has nothing to say any more.
        while process.stdout in selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                stopped = "timeout"
                break
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                read[key.fileobj] += chunk
                if len(read[key.fileobj]) > bounds[key.fileobj]:
                    return read[process.stdout], read[process.stderr][: limits.output_bytes], "output"
            if not started and b"\n" in read[process.stdout]:
                deadline, started = time.monotonic() + limits.seconds, True
    return read[process.stdout], read[process.stderr], stopped


def _end(process: subprocess.Popen) -> None:
    """Ends whatever is left, and waits until it has ended: the last holder of a pipe has gone when it closes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for pipe in (process.stdout, process.stderr):
        while os.read(pipe.fileno(), 1 << 16):
            pass
        pipe.close()
    process.wait()


def _verdict(messages: bytes, output: bytes, stopped: str | None) -> Verdict:
    lines = [json.loads(line) for line in messages.splitlines()]
    text = output.decode("utf-8", "replace")
    if lines and lines[-1]["status"] == "refused":
        raise UserError(
            f"This machine does not let programs be isolated ({lines[-1]['detail']}): allow user namespaces (Linux "
            f"5.14 or newer), or set {UNSAFE}=1 to run them with this user's rights over its files."
        )
    if not lines:
        raise RuntimeError(f"The sandbox did not start: {(text.splitlines() or ['it said nothing'])[-1]}.")
    if lines[-1]["status"] != "ready":
        return Verdict(**lines[-1], output=text)
    status = stopped or "died"
    reason = {"timeout": "the time was up", "output": "too much output", "died": "ended by a limit"}[status]
    return Verdict(status, 0.0, reason, text)
