"""
Runs a command, and leaves none of its processes behind when it ends, or when this process is told to: `children.guarded`
starts it, since a server that is told to end while it starts may go on, and its workers outlive it when it is killed.
"""

import os
import signal
import subprocess
import sys


def _end(*_) -> None:
    raise SystemExit(143)


def main(patience: float, command: list[str]) -> int:
    """Returns the exit status of the command. `patience` is how many seconds it has to end by itself."""
    signal.signal(signal.SIGTERM, _end)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, ending)
                process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
