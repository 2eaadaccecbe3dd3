"""
Runs a program that nobody trusts, and says whether its tests pass.

A program gets kernel namespaces of its own (user, process, mount, network, IPC, host name, cgroup): no network, no host
process, and no host file but the interpreter's libraries, read-only, beside an empty /tmp in memory. It is nobody, has
no capability, cannot gain one, cannot start a process, run another program, open a socket, signal anything or limit
another process, and its memory, processor time, threads, files and output are limited; so is the memory of all
programs together. When the verdict is in or the time is up, the kernel ends all of it; nothing was ever on disk. The
kernel itself is the wall: this is no protection from a hole in Linux. Where it allows no namespaces, bubblewrap may, or
a server that speaks SandboxFusion's form runs the same judge; the environment variable `TRL_OPSD_SANDBOX` says which.

The verdict comes from a process that the program cannot reach. Tests run there, and call the program's functions over
a pipe that carries plain data (numbers, strings, lists, ...) by value, and anything else as a handle (`jail.py`). So

- nothing that a program does to its interpreter matters: replacing builtins, `assert`, modules or the tests, reading
  the tests from frames or memory, exiting early, printing or sending a verdict, threads that go on;
- an object that claims to equal everything equals nothing: with data of the tests it is never compared.

What programs should print stays in this process, which compares it.

What no sandbox can tell from a solution remains: a program may know the answers by heart; a list that a test passes,
and then computes its expectation from, can be changed in place; what the tests themselves take from the program (a
helper function, the equality of two of its own objects, a method given the expected value, the arithmetic of a class
that they name) is the program's word. It sees the names that the tests use, the arguments of its calls, and the public
attributes of the tests' own objects among those, nothing else of them.

Tests see plain data in its base type (a subclass of `dict` as a `dict`; what the standard library's `collections` has,
as that), and names of builtins as Python's unless it is the `entry_point`. What cannot cross so is no program's fault:
such tests, where they fail, give no verdict.
"""

import ast
import functools
import importlib.util
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..cli import UserError


SANDBOX = "TRL_OPSD_SANDBOX"
UNSAFE = "unsafe"

_JAIL = Path(__file__).with_name("jail.py")
_MIB = 1 << 20
_STARTUP_SECONDS = 60.0
_VERDICT_BYTES = 1 << 16
_BACKSTOP = 20  # wall time, in units of the processor time that a program may use
_INPUT_BYTES = 16 * _MIB
# Top-level modules beside the standard library that a row may ask for, and what each consists of
_PACKAGES = {
    "numpy": ("numpy", "numpy.libs"),
    "pytest": ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py.py"),
}
_RETRIES = 3
_CHUNK = 50  # rows whose tests one sandbox looks at


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
    memory_bytes: int = 512 * _MIB
    folder_bytes: int = 16 * _MIB
    threads: int = 32
    open_files: int = 64
    output_bytes: int = _MIB

    @property
    def total_bytes(self) -> int:
        """What a sandbox can come to hold: the program, the process that runs the tests, and the folder."""
        return 2 * self.memory_bytes + self.folder_bytes


@dataclass(frozen=True)
class Verdict:
    """
    What came out of one program.

    Args:
        status (`str`):
            `"passed"`, `"failed"`, `"timeout"`, `"output"` (it wrote too much); or without a score `"invalid"` (there are
            no tests, or they are not Python), `"vacuous"` (a program that does nothing passes them too), `"unserved"`
            (they need what the sandbox cannot give them) or `"infrastructure"` (the machine was too busy, or ended it).
        score (`float` or `None`):
            1.0 when the tests pass, else 0.0, or with partial credit the share that passes. `None` where it cannot be
            judged.
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
    setup: str | None = None,
) -> Verdict:
    """
    Runs a program, and then tests that use it, in a sandbox of their own.

    Args:
        program (`str`):
            Python source, not trusted. It is a module called `solution`, not `__main__`.
        tests (`str`):
            Python source that raises when the program is wrong. It uses the program's functions by their names, or
            imports them from `solution`. Functions called `test...`, classes of them and of `unittest` are run, with
            pytest's marks `parametrize` and `skip`, the fixtures `capsys`, `monkeypatch` and `tmp_path`, and its own.
        entry_point (`str`, *optional*):
            Name of the function that is handed to `check`, if the tests define one and do not call it themselves; or
            an expression, such as `Solution().add`.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of tests that pass: of asserts at the top level and of `check`, and of test
            functions.
        limits ([`Limits`], *optional*):
            What it may use. Defaults to `Limits()`.
        setup (`str`, *optional*):
            Python source that comes before both the program and the tests: imports and classes that the prompt promises.

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
    limits, setup = limits or Limits(), setup or ""
    packages, missing = _packages(setup, tests)
    if missing:
        return Verdict("unserved", None, f"the tests import {missing}, which the sandbox does not have", "")
    config = {
        "mode": "tests",
        "entry_point": entry_point,
        "partial_credit": partial_credit,
        "packages": packages,
    }
    parts = {"setup_bytes": setup, "program_bytes": program, "tests_bytes": tests}
    collected = _Collected()
    output = _exchange(config, parts, limits, collected)
    last = collected.last
    if last["status"] == "stopped":
        return _stopped(last["detail"], output)
    return Verdict(**last, output=output)


def run_cases(
    program: str,
    inputs: list[str],
    outputs: list[str],
    partial_credit: bool = False,
    limits: Limits | None = None,
    setup: str | None = None,
) -> Verdict:
    r"""
    Runs a program that reads standard input and prints, once for each input, and compares what it prints.

    Lines are compared after each other, without empty ones at the end, and in a line what stands between spaces: as
    text, or as numbers that differ by a millionth at most where the wanted one has a decimal point. The program never
    meets what it should print: that stays in this process.

    Args:
        program (`str`):
            Python source, not trusted, run as `__main__`.
        inputs (`list[str]`):
            What it reads, in each run.
        outputs (`list[str]`):
            What it should print.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether the score is the share of inputs with the right output.
        limits ([`Limits`], *optional*):
            What it may use. Defaults to `Limits()`.
        setup (`str`, *optional*):
            Python source that comes before the program.

    Returns:
        [`Verdict`]: The verdict, after everything that was started has ended.

    Raises:
        UserError: If this machine cannot isolate the program and the user has not accepted that.

    Example:
    ```python
    >>> from trl_opsd.rewards.sandbox import run_cases

    >>> run_cases("print(int(input()) * 2)", ["4\n"], ["8"]).status
    'passed'
    ```
    """
    limits, setup = limits or Limits(), setup or ""
    packages, missing = _packages(setup, "")
    if missing:
        return Verdict("unserved", None, f"the row asks for {missing}, which the sandbox does not have", "")
    if not inputs or len(inputs) != len(outputs):
        return Verdict("invalid", None, f"{len(inputs)} inputs and {len(outputs)} outputs", "")
    if not any(text.strip() for text in outputs):
        return Verdict("vacuous", None, "no output is wanted: a program that does nothing passes", "")
    encoded = [_encode(text) for text in inputs]
    if max(map(len, encoded)) > min(_INPUT_BYTES, limits.folder_bytes):
        return Verdict("invalid", None, "an input is larger than the folder", "")
    config = {
        "mode": "cases",
        "entry_point": None,
        "partial_credit": partial_credit,
        "packages": packages,
        "input_bytes": [len(data) for data in encoded],
        "case_bytes": limits.output_bytes + 2 * max(len(text.encode()) for text in outputs),
    }
    passed, first = 0, None

    def case(message: dict) -> bool:
        nonlocal passed, first
        if message["status"] != "case":
            return True
        number = case.count = case.count + 1
        is_right = message["ended"] == "done" and same_output(message["printed"], outputs[number - 1])
        passed += is_right
        if not is_right and first is None:
            first = (message["ended"], number)
        return is_right or partial_credit

    case.count = 0
    collected = _Collected(case, config["case_bytes"] * 6 + _VERDICT_BYTES)
    parts = {"setup_bytes": setup, "program_bytes": program}
    output = _exchange(config, parts, limits, collected, encoded)
    last = collected.last
    if last["status"] == "stopped" and last["detail"] not in ("timeout", "output", "mess"):
        return _stopped(last["detail"], output)
    if first is not None and first[0] == "killed":
        return _stopped("killed", output)
    score = passed / len(outputs)
    if score == 1:
        return Verdict("passed", 1.0, None, output)
    if first is None:
        first = (last["detail"] if last["status"] == "stopped" else "error", min(case.count + 1, len(outputs)))
    reason = {
        "mess": "files that cannot be removed",
        "done": "another output",
        "error": "an error",
        "timeout": "the time was up",
        "output": "too much output",
    }
    status = first[0] if first[0] in ("timeout", "output") else "failed"
    score = score if partial_credit else 0.0
    return Verdict(status, score, f"{reason[first[0]]} for input {first[1]} of {len(outputs)}", output)


def pass_without_program(
    tests: list[str], entry_points: list[str | None], partial_credit: bool = False, limits: Limits | None = None
) -> list[int]:
    """
    Finds tests that a program passes which does nothing: they say nothing of any program.

    Args:
        tests (`list[str]`):
            Python source, as for [`run_tests`].
        entry_points (`list[str | None]`):
            What is handed to their `check`.
        partial_credit (`bool`, *optional*, defaults to `False`):
            Whether a part of the score counts too.
        limits ([`Limits`], *optional*):
            What each may use. Defaults to `Limits()`.

    Returns:
        `list[int]`: Their positions.
    """
    limits = limits or Limits()
    packages = _packages("", "import numpy, pytest")[0]

    def look(start: int) -> list[int]:
        encoded = [_encode(text) for text in tests[start : start + _CHUNK]]
        config = {
            "mode": "nothing",
            "entry_points": entry_points[start : start + _CHUNK],
            "partial_credit": partial_credit,
            "packages": packages,
            "tests_bytes": [len(data) for data in encoded],
            "test_seconds": limits.seconds,
        }
        collected = _Collected()
        patient = replace(limits, seconds=60 + limits.seconds * len(encoded))
        _exchange(config, {}, patient, collected, encoded)
        if collected.last["status"] == "stopped":
            raise RuntimeError(f"The sandbox was stopped ({collected.last['detail']}) while it looked at the tests.")
        return [start + index for index in collected.last["passing"]]

    with ThreadPoolExecutor(available_processors()) as pool:
        return [index for found in pool.map(look, range(0, len(tests), _CHUNK)) for index in found]


def same_output(printed: str, wanted: str) -> bool:
    """Whether two texts are the same to a judge of programs: see [`run_cases`]."""
    lines, others = printed.rstrip().splitlines(), wanted.rstrip().splitlines()
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(line: str, other: str) -> bool:
    if line == other:
        return True
    words, others = line.split(), other.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    if max(len(word), len(wanted)) > 40 or not wanted[-1:].isdigit() or not word[-1:].isdigit():
        return False
    try:
        number, target = float(word), float(wanted)
    except ValueError:
        return False
    if "_" in word or not any(mark in wanted for mark in ".eE"):
        return "_" not in word and "." in word and number.is_integer() and f"{number:.0f}" == wanted
    return math.isclose(number, target, rel_tol=1e-6, abs_tol=1e-6)


# ---------------------------------------------------------------------------------------------------------- backends


def require_isolation() -> None:
    """
    Checks that programs can be isolated as the user wants it, by doing it once.

    Raises:
        UserError: If they cannot.
    """
    verdict = run_tests("", "pass")
    if verdict.status == "infrastructure":
        raise UserError(f"No program can be judged here ({verdict.detail}): correct {SANDBOX}, or what it names.")


class _Collected:
    """What the judge says, line by line: the last line is the verdict, unless `follow` wants no more before it."""

    def __init__(self, follow: Callable[[dict], bool] | None = None, bound: int = _VERDICT_BYTES):
        self.follow, self.bound = follow, bound
        self.is_started, self.last, self._rest = False, None, b""

    def feed(self, data: bytes) -> bool:
        """Takes what has come in, and returns whether more is wanted."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self.bound:
            self.last = {"status": "stopped", "detail": "output"}
        for line in lines:
            if self.last is None:
                self._take(json.loads(line))
        return self.last is None

    def _take(self, message: dict) -> None:
        if message["status"] == "ready":
            self.is_started = True
        elif message["status"] == "refused":
            self.last = message
        elif message["status"] == "case":
            if not self.follow(message):
                self.last = {"status": "done"}
        else:
            self.last = message


def _exchange(
    config: dict, parts: dict[str, str], limits: Limits, collected: _Collected, more: list[bytes] | None = None
) -> str:
    """Has the user's sandbox do what `config` says, and returns what was printed there."""
    backend = os.environ.get(SANDBOX) or "namespaces"
    output = _run(backend, config, parts, limits, collected, more)
    if collected.last["status"] == "refused":
        raise UserError(_refused(backend, collected.last["detail"]))
    return output


def _run(
    backend: str,
    config: dict,
    parts: dict[str, str],
    limits: Limits,
    collected: _Collected,
    more: list[bytes] | None = None,
) -> str:
    if not sys.platform.startswith("linux"):
        raise UserError(f"Code is only run in a sandbox on Linux, and this is {sys.platform}: use a Linux machine.")
    encoded = {name: _encode(text) for name, text in parts.items()}
    config = {
        "seconds": limits.seconds,
        "isolated": backend == "namespaces",
        "wipes": True,
        "folder": None,
        "proc": None,
        "parent": os.getpid(),
        "wall_seconds": _BACKSTOP * limits.seconds,
        "cpu_seconds": int(limits.seconds) + 1,
        "memory_bytes": limits.memory_bytes,
        "folder_bytes": limits.folder_bytes,
        "threads": limits.threads,
        "open_files": limits.open_files,
        "output_bytes": limits.output_bytes,
        **config,
        **{name: len(data) for name, data in encoded.items()},
    }
    body = b"".join([*encoded.values(), *(more or [])])
    if backend.startswith(("http://", "https://")):
        output = _over_http(backend, config, body, limits, collected)
    elif backend in ("namespaces", "bubblewrap", UNSAFE):
        with _memory.hold(limits.total_bytes):
            output = _on_this_machine(backend, config, body, limits, collected)
    else:
        raise UserError(
            f"{SANDBOX} is `{backend}`: set it to namespaces, bubblewrap, {UNSAFE}, or the http:// address of a sandbox "
            "server."
        )
    if collected.last is None:
        if collected.is_started:
            collected.last = {"status": "stopped", "detail": "killed"}
        else:
            raise RuntimeError(f"The sandbox did not start: {(output.splitlines() or ['it said nothing'])[-1]}.")
    return output


def _on_this_machine(backend: str, config: dict, body: bytes, limits: Limits, collected: _Collected) -> str:
    # No environment, no site packages, nothing of the working directory, no bytecode written
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_JAIL)]
    with ExitStack() as stack:
        given = []
        if backend == "bubblewrap":
            program = shutil.which("bwrap")
            if program is None:
                collected.last = {"status": "refused", "detail": "bubblewrap is not installed"}
                return ""
            python = os.path.realpath(sys.executable)
            command = [program, *_bubblewrap(config, limits), python, *command[1:-1], "/jail.py"]
            config["proc"] = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, config["proc"])
            given = [config["proc"]]
            config["parent"] = None
        elif backend == UNSAFE:
            config["folder"] = stack.enter_context(tempfile.TemporaryDirectory())
        request = stack.enter_context(os.fdopen(os.memfd_create("request"), "wb"))
        header = json.dumps(config).encode()
        request.write(f"{len(header):08d}".encode() + header + body)
        request.flush()
        request.seek(0)
        process = subprocess.Popen(
            command,
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} if config["packages"] else {},
            cwd="/",
            start_new_session=True,
            pass_fds=given,
        )
        try:
            return _listen(process, config, limits, collected)
        finally:
            _end(process)


def _bubblewrap(config: dict, limits: Limits) -> list[str]:
    """Options for the file view that `jail.py` makes for itself where it may: libraries to read, an empty /tmp."""
    python = os.path.realpath(sys.executable)
    stdlib = os.path.dirname(os.__file__)
    libraries = os.path.dirname(stdlib)
    options = [
        "--unshare-all",
        "--unshare-user",
        "--uid",
        "65534",
        "--gid",
        "65534",
        "--die-with-parent",
        "--new-session",
    ]
    options += ["--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    for path in dict.fromkeys(("/usr/lib", "/usr/lib64", "/lib", "/lib64", libraries)):
        if os.path.islink(path) and not os.path.isabs(os.readlink(path)):
            options += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            options += ["--ro-bind", path, path]
    for path in (f"{stdlib}/site-packages", f"{stdlib}/dist-packages", f"{libraries}/python3/dist-packages"):
        if os.path.isdir(path):
            options += ["--perms", "0755", "--size", "4096", "--tmpfs", path, "--remount-ro", path]
    options += ["--ro-bind", python, python, "--ro-bind", str(_JAIL), "/jail.py"]
    for path in config["packages"]:
        options += ["--ro-bind", path, f"/packages/{os.path.basename(path)}"]
    if config["packages"]:
        options += ["--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"]
    for name in ("null", "zero", "urandom"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    options += ["--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [*options, "--chdir", "/tmp", "--"]


def _over_http(url: str, config: dict, body: bytes, limits: Limits, collected: _Collected) -> str:
    """
    Sends the judge with its request to a server that speaks SandboxFusion's form. The request goes by standard input,
    which is read piece by piece: what the tests are reaches the server's process when the program's has been forked.
    """
    config.update(parent=None, wipes=False)
    header = json.dumps(config)
    question = {
        "language": "python",
        "code": _JAIL.read_text(encoding="utf-8"),
        "stdin": f"{len(header):08d}{header}{body.decode()}",
        "compile_timeout": _STARTUP_SECONDS,
        "run_timeout": config["wall_seconds"] + _STARTUP_SECONDS,
        "files": {},
        "fetch_files": [],
    }
    request = urllib.request.Request(
        f"{url.rstrip('/')}/run_code", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(_RETRIES):
        try:
            with urllib.request.urlopen(request, timeout=question["run_timeout"] + _STARTUP_SECONDS) as response:
                answer = json.load(response)
            if not isinstance(answer, dict) or "status" not in answer:
                raise ValueError("it does not speak SandboxFusion's form")
            result = answer.get("run_result") or {}
            if answer["status"] != "SandboxError" and result:
                break
            problem = answer.get("message") or "it says SandboxError"
        except urllib.error.HTTPError as error:
            problem = f"HTTP status {error.code}"
            if error.code < 500 and error.code != 429:
                raise UserError(f"The sandbox server {url} refuses ({problem}): check {SANDBOX}.") from None
        except (OSError, ValueError) as error:
            problem = str(error)
        time.sleep(attempt)
    else:
        collected.last = {"status": "stopped", "detail": f"unreachable: the sandbox server {url}: {problem}"[:300]}
        return ""
    collected.feed((result.get("stdout") or "").encode())
    if collected.last is None and result.get("status") == "TimeLimitExceeded":
        collected.last = {"status": "stopped", "detail": "starved"}
    return (result.get("stderr") or "")[: limits.output_bytes]


def _refused(backend: str, reason: str) -> str:
    """Says what is in the way, and which other way works here, having tried it."""
    ways = []
    for other in ("namespaces", "bubblewrap"):
        if other != backend:
            collected = _Collected()
            config = {"mode": "tests", "entry_point": None, "partial_credit": False, "packages": []}
            parts = {"setup_bytes": "", "program_bytes": "", "tests_bytes": "pass"}
            try:
                _run(other, config, parts, Limits(), collected)
                problem = collected.last.get("detail")
            except RuntimeError as error:
                problem = str(error)
            ways.append(
                f"{SANDBOX}={other} works here"
                if problem is None
                else f"{SANDBOX}={other} does not either ({problem})"
            )
    what = {
        "namespaces": "This machine does not let programs be isolated",
        "bubblewrap": "bubblewrap does not isolate programs here",
    }.get(backend, f"`{backend}` cannot judge programs")
    return (
        f"{what} ({reason}). {'; '.join(ways)}. Or allow user namespaces (Linux 5.14 or newer), or start a sandbox "
        f"server elsewhere and set {SANDBOX}=http://HOST:PORT, or accept programs with this user's rights over its files "
        f"by {SANDBOX}={UNSAFE}."
    )


def _listen(process: subprocess.Popen, config: dict, limits: Limits, collected: _Collected) -> str:
    """Reads both pipes until the verdict is in, they are closed, or there is too much; returns the second one's text."""
    output = b""
    deadline, is_timed = time.monotonic() + _STARTUP_SECONDS, False
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr):
            selector.register(pipe, selectors.EVENT_READ)
        # The verdict's pipe closes with the launcher; then the program has nothing to say any more.
        while process.stdout in selector.get_map() and collected.last is None:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:  # the launcher has its own, much earlier, limits
                collected.last = {"status": "stopped", "detail": "starved"}
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    collected.feed(chunk)
                else:
                    output += chunk
                    if len(output) > limits.output_bytes:
                        collected.last = {"status": "stopped", "detail": "output"}
            if collected.is_started and not is_timed:
                deadline, is_timed = time.monotonic() + 2 * config["wall_seconds"] + _STARTUP_SECONDS, True
    while _is_readable(process.stderr):  # what was printed before the verdict
        chunk = os.read(process.stderr.fileno(), 1 << 16)
        if not chunk or len(output) > limits.output_bytes:
            break
        output += chunk
    return output[: limits.output_bytes].decode("utf-8", "replace")


def _is_readable(pipe) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(0))


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


def _stopped(reason: str, output: str) -> Verdict:
    if reason == "timeout":
        return Verdict("timeout", 0.0, "the time was up", output)
    if reason == "output":
        return Verdict("output", 0.0, "too much output", output)
    why = {"starved": "the machine was too busy", "killed": "the machine ended it"}.get(reason, reason)
    return Verdict("infrastructure", None, why, output)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate cannot be written, and no Python source has one


def _packages(*sources: str) -> tuple[list[str], str | None]:
    """Folders of the packages that some sources import, and the first import that there is nothing for."""
    found, missing = [], None
    for name in sorted(set().union(*map(_imports, sources))):
        if name in sys.stdlib_module_names or name == "solution":
            continue
        spec = importlib.util.find_spec(name) if name in _PACKAGES else None
        if spec is None or spec.origin is None:
            missing = missing or name
            continue
        site = Path(spec.origin).parents[1]
        found += [os.path.realpath(site / part) for part in _PACKAGES[name] if (site / part).exists()]
    return found, missing


@functools.lru_cache(maxsize=4096)
def _imports(source: str) -> frozenset[str]:
    if "import" not in source:
        return frozenset()
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "solution" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return frozenset(name.partition(".")[0] for name in names)


# --------------------------------------------------------------------------------------------- what the machine has


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


class _Memory:
    """Lets sandboxes start while all of them together stay under what this process may take for them."""

    def __init__(self):
        self._changed = threading.Condition()
        self.held = 0

    @contextmanager
    def hold(self, size: int):
        cap = available_memory()
        if size > cap:
            raise UserError(
                f"A sandbox may take {size // _MIB} MiB, and all together {cap // _MIB} MiB, half of what this process "
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


_memory = _Memory()
os.register_at_fork(after_in_child=lambda: _memory.__init__())
