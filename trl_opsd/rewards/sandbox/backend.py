"""What the backends share: the file that runs in each of them, how it is asked, and what it says."""

import json
from collections.abc import Callable
from pathlib import Path


SANDBOX = "TRL_OPSD_SANDBOX"
UNSAFE = "unsafe"

JAIL = Path(__file__).with_name("jail.py")
STARTUP_SECONDS = 60.0
VERDICT_BYTES = 1 << 16


def written(config: dict, body: bytes) -> bytes:
    """Returns what the jail reads on its standard input."""
    header = json.dumps(config).encode()
    return f"{len(header):08d}".encode() + header + body


class Collected:
    """What the judge says, line by line: the last line is the verdict, unless `follow` wants no more before it."""

    def __init__(self, follow: Callable[[dict], bool] | None = None, bound: int = VERDICT_BYTES):
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
