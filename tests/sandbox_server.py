"""
A small server that speaks the form of SandboxFusion: `POST /run_code` runs a Python file, with what comes on its
standard input, and says what it printed. It isolates nothing; what is tested with it is the other side.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(question)
        status, answer = self.server.answer(question) if self.path == "/run_code" else (404, {})
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def run_code(question):
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "main.py")
        with open(path, "w") as file:
            file.write(question["code"])
        process = subprocess.Popen(
            [sys.executable, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            start_new_session=True,
        )
        status = "Finished"
        try:
            out, err = process.communicate((question["stdin"] or "").encode(), timeout=question["run_timeout"])
        except subprocess.TimeoutExpired:
            status = "TimeLimitExceeded"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if status != "Finished":
            out, err = process.communicate()
    code = process.returncode if status == "Finished" else None
    result = {
        "status": status,
        "execution_time": time.monotonic() - start,
        "return_code": code,
        "stdout": out[: 1 << 20].decode("utf-8", "replace"),
        "stderr": err[: 1 << 20].decode("utf-8", "replace"),
    }
    return 200, {
        "status": "Success" if code == 0 else "Failed",
        "message": "",
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


@contextmanager
def serve(answer=run_code):
    """Yields the server; `url` is its address, `asked` what it was asked, and `answer` may be replaced."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.answer = [], answer
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
