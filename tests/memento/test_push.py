"""`memento push` against a hub of our own: an HTTP server on this machine that answers as the hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from memento.errors import UserError
from memento.rl.export import CARD
from memento.rl.hub import plan_push, push
from memento.tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "mine", seed=0, hidden_size=32, layers=1)
    (folder / CARD).write_text("---\nlibrary_name: transformers\n---\n# mine\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("not for anybody")
    return folder


class Hub:
    """What the stub remembers. `there`: files that a repository holds already."""

    def __init__(self) -> None:
        self.there: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse: int | None = None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Hub]]:
    state = Hub()

    class Answers(BaseHTTPRequestHandler):
        def _send(self, value: Any, status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            if state.refuse is not None:
                self._send({"error": "not you"}, state.refuse)
            elif "/tree/" in self.path:
                self._send([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in state.there])
            else:
                siblings = [{"rfilename": name} for name in state.there]
                self._send({"id": "org/mine", "sha": "0" * 40, "private": True, "siblings": siblings, "tags": []})

        def do_POST(self) -> None:
            state.tokens.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if state.refuse is not None:
                self._send({"error": "not you"}, state.refuse)
            elif self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                self._send({"url": f"http://{self.headers['Host']}/org/mine", "id": "org/mine"})
            elif "/preupload/" in self.path:
                files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                self._send({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                url = f"http://{self.headers['Host']}/org/mine/commit/{'1' * 40}"
                self._send({"commitOid": "1" * 40, "commitUrl": url, "success": True})
            else:
                self._send({"errors": [], "warnings": []})  # /api/validate-yaml

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield f"http://127.0.0.1:{server.server_address[1]}", state
    server.shutdown()
    server.server_close()


def test_a_folder_goes_to_the_hub(model: Path, hub: tuple[str, Hub]) -> None:
    address, state = hub
    assert push(model, "org/mine", endpoint=address) == f"{address}/org/mine/commit/{'1' * 40}"
    assert state.created[0]["name"] == "mine" and "private" in (state.created[0].get("visibility"), *state.created[0])
    assert set(state.files) == {name for name, _ in plan_push(model, "org/mine").files}
    assert state.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", CARD} <= set(state.files) and ".cache/junk" not in state.files
    assert state.tokens == {"Bearer hf_test"}


def test_what_is_there_is_not_written_over(model: Path, hub: tuple[str, Hub]) -> None:
    address, state = hub
    state.there = [".gitattributes", "model.safetensors"]
    with pytest.raises(UserError, match=r"holds 1 files already.*--update"):
        push(model, "org/mine", endpoint=address)
    assert state.files == {}
    push(model, "org/mine", update=True, endpoint=address)
    assert "model.safetensors" in state.files


def test_no_right_and_no_network_are_said(model: Path, hub: tuple[str, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    address, state = hub
    state.refuse = 403
    with pytest.raises(UserError, match="no right to write"):
        push(model, "org/mine", endpoint=address)
    with pytest.raises(UserError, match="cannot be reached"):
        push(model, "org/mine", endpoint="http://127.0.0.1:9")


def test_only_whole_models_are_sent(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        plan_push(tmp_path, "org/mine")
    for file in model.iterdir():
        if file.is_file() and file.name != CARD:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no model card"):
        plan_push(tmp_path, "org/mine")
    (tmp_path / CARD).write_text("# mine")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="does not load"):
        plan_push(tmp_path, "org/mine")
