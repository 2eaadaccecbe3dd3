"""
Sandboxes on this machine: in namespaces that `jail.py` makes itself, in those that bubblewrap makes, or, where the user
accepts that, in none.
"""

import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

from .backend import JAIL, STARTUP_SECONDS, UNSAFE, Collected, written
from .limits import Limits


def on_this_machine(backend: str, config: dict, body: bytes, limits: Limits, collected: Collected) -> str:
    # No environment, no site packages, nothing of the working directory, no bytecode written
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(JAIL)]
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
        request.write(written(config, body))
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
    options += ["--ro-bind", python, python, "--ro-bind", str(JAIL), "/jail.py"]
    for path in config["packages"]:
        options += ["--ro-bind", path, f"/packages/{os.path.basename(path)}"]
    if config["packages"]:
        options += ["--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "OMP_NUM_THREADS", "1"]
    for name in ("null", "zero", "urandom"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    options += ["--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp", "--remount-ro", "/"]
    return [*options, "--chdir", "/tmp", "--"]


def _listen(process: subprocess.Popen, config: dict, limits: Limits, collected: Collected) -> str:
    """Reads both pipes until the verdict is in, they are closed, or there is too much; returns the second one's text."""
    output = b""
    deadline, is_timed = time.monotonic() + STARTUP_SECONDS, False
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
                deadline, is_timed = time.monotonic() + 2 * config["wall_seconds"] + STARTUP_SECONDS, True
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
