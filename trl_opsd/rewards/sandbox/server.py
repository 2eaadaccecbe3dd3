"""A sandbox on a server that speaks the form of SandboxFusion."""

import json
import time
import urllib.error
import urllib.request

from ...cli import UserError
from .backend import JAIL, SANDBOX, STARTUP_SECONDS, Collected, written
from .limits import Limits


_RETRIES = 3


def on_server(url: str, config: dict, body: bytes, limits: Limits, collected: Collected) -> str:
    """
    Sends the judge with its request to a server that speaks SandboxFusion's form. The request goes by standard input,
    which is read piece by piece: what the tests are reaches the server's process when the program's has been forked.
    """
    config.update(parent=None, wipes=False)
    question = {
        "language": "python",
        "code": JAIL.read_text(encoding="utf-8"),
        "stdin": written(config, body).decode(),
        "compile_timeout": STARTUP_SECONDS,
        "run_timeout": config["wall_seconds"] + STARTUP_SECONDS,
        "files": {},
        "fetch_files": [],
    }
    request = urllib.request.Request(
        f"{url.rstrip('/')}/run_code", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    for attempt in range(_RETRIES):
        try:
            with urllib.request.urlopen(request, timeout=question["run_timeout"] + STARTUP_SECONDS) as response:
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
