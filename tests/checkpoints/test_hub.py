"""Exports are pushed to the hub."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, assert_refused, python, tree
from exports import (
    _quiet,  # noqa: F401
    assert_the_same_logits,
)
from small_checkpoints import save_random

from folio.data.tokenizers import Bytes

transformers = pytest.importorskip("transformers")
yaml = pytest.importorskip("yaml")


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to who creates a repository and commits to it."""

    protocol_version = "HTTP/1.1"
    pushed: dict[str, bytes]

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        here = f"http://127.0.0.1:{self.server.server_address[1]}"  # type: ignore[attr-defined]
        answer: dict[str, Any] = {}
        if self.headers.get("Authorization") != "Bearer hf_dummy":
            return self._answer(401, {"error": "no access"})
        if self.path.startswith("/api/repos/create"):
            answer = {"url": f"{here}/me/it", "name": "me/it"}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{here}/me/it/commit/abc", "commitOid": "abc", "success": True}
        return self._answer(200, answer)

    def do_GET(self) -> None:
        self._answer(404, {"error": "nothing"})

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, code: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def push(tmp_path: Path, endpoint: str, token: str = "hf_dummy") -> Any:
    save_random(tmp_path / "out", Bytes())
    argv = ["-m", "folio", "export", f"--out_dir={tmp_path / 'out'}", f"--to={tmp_path / 'hf'}", "--push_to_hub=me/it"]
    env = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    return python(*argv, **env, no_proxy="127.0.0.1", HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1")


@pytest.mark.slow
@pytest.mark.parametrize("token", ["hf_dummy", "hf_wrong"])
def test_push(tmp_path, token) -> None:
    """The whole folder is uploaded with a valid token, and its address is printed."""
    Hub.pushed = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = push(tmp_path, f"http://127.0.0.1:{server.server_address[1]}", token)
    finally:
        server.shutdown()
        server.server_close()
    sent = {name: content for name, content in tree(tmp_path / "hf").items() if not name.startswith(".")}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= sent.keys()
    if token == "hf_dummy":
        assert done.returncode == 0, done.stderr
        assert Hub.pushed == sent
        assert re.search(r"^pushed to .*/me/it$", done.stdout, re.MULTILINE), done.stdout
    else:
        assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "me/it", "was not pushed", "401")
        assert Hub.pushed == {}


@pytest.mark.slow
def test_push_without_a_network(tmp_path) -> None:
    """The folder is there and whole; one line says that it was not pushed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    done = push(tmp_path, f"http://127.0.0.1:{closed}")
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), "hf", "is written", "was not pushed", "me/it")
    assert_the_same_logits(tmp_path / "hf", tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
