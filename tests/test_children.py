"""What a stage has started does not outlive it, whatever ends it and however it takes that."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


STARTER = """
import sys, time
from trl_opsd import children

process = children.guarded([sys.executable, "-c", {server!r}], patience=1.0, start_new_session=True)
if {by_itself}:
    time.sleep(1)  # until it does not listen any more
    process.terminate()
    raise SystemExit(process.wait())
time.sleep(600)
"""
# It goes on when it is told to end, and so does its worker
SERVER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(worker.pid, flush=True)
time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends what a killed process has started")
@pytest.mark.parametrize("how", [None, signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_does_not_listen_is_ended_with_its_workers(how):
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER.format(server=SERVER, by_itself=how is None)], stdout=subprocess.PIPE, text=True
    )
    worker = int(starter.stdout.readline())
    assert is_running(worker)
    if how is not None:
        starter.send_signal(how)
    starter.wait(60)
    until = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(worker)
    starter.stdout.close()


@pytest.mark.parametrize(
    ("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 11)", 139)]
)
def test_it_ends_as_its_command_does(code, status):
    starter = (
        "import sys; from trl_opsd import children; sys.exit(children.guarded([sys.executable, '-c', {!r}]).wait())"
    )
    assert subprocess.run([sys.executable, "-c", starter.format(code)]).returncode == status
