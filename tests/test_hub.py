"""Uploads to the Hub, up to the requests that a server of its kind gets."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl_opsd.cli import UserError
from trl_opsd.hub import check_hub, push


class FakeHub(BaseHTTPRequestHandler):
    """Makes repositories, and takes every file as it is into a commit."""

    status, requests = 200, []

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        self.requests.append((self.path, self.headers["Authorization"], body))
        if self.path == "/api/repos/create":
            name = json.loads(body)
            answer = {"url": f"http://{self.headers['Host']}/{name.get('organization') or 'me'}/{name['name']}"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        else:
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/me/short/commit/1",
                "commitOid": "1",
                "success": True,
                "errors": [],
                "warnings": [],
            }
        self.answer(answer)

    def do_GET(self):
        self.answer({"name": "me", "orgs": []})

    def answer(self, body):
        text = json.dumps(body if self.status == 200 else {"error": "You have no right to this"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    FakeHub.status, FakeHub.requests = 200, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield FakeHub
    server.shutdown()


@pytest.fixture
def folder(tmp_path):
    for name in ("model.safetensors", "config.json", "README.md", "training_args.bin", "checkpoint-5/optimizer.pt"):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("---\nlicense: mit\n---\ntext" if name == "README.md" else name)
    return tmp_path / "model"


def committed(hub) -> dict[str, str]:
    """Files of the commit, by name."""
    (body,) = (body for path, _, body in hub.requests if "/commit/" in path)
    lines = [json.loads(line) for line in body.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]).decode() for file in files}


def test_a_folder_is_one_commit(hub, folder):
    push(folder, "me/short", private=True)
    path, token, body = hub.requests[0]
    assert (path, token) == ("/api/repos/create", "Bearer hf_secret")
    made = json.loads(body)
    assert (made["name"], made["organization"]) == ("short", "me")
    assert made.get("private") is True or made.get("visibility") == "private"
    files = committed(hub)
    assert set(files) == {"model.safetensors", "config.json", "README.md"}  # nothing of the trainer's own
    assert files["config.json"] == "config.json"


def test_a_refusal_is_one_sentence(hub, folder):
    hub.status = 403
    with pytest.raises(UserError, match="`push_to_hub`: `.*model` is not at `me/short`"):
        push(folder, "me/short")


def test_without_a_connection_too(monkeypatch, folder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="is not at `me/short`"):
        push(folder, "me/short")


@pytest.mark.parametrize("given", [(True, None), (False, "me/short")])
def test_both_options_or_neither(given):
    with pytest.raises(UserError, match="`hub_model_id` belong together"):
        check_hub(*given)
