"""`llava push` to a fake hub on this machine.

It implements the part of the hub's API that `huggingface_hub` uses without Xet: create a repository, return how each
file must be sent, accept large files (LFS), commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from llava_simplified import cli

TOKEN = "hf_of_me"
Push = Callable[..., int]  # (url, *argv, token) -> exit status


# ---- the fake hub ----


class Hub(ThreadingHTTPServer):
    """A hub with one repository.

    Attributes:
        url: Its address.
        private: Name of each repository -> whether it is private.
        files: Path -> contents, after the last commit.
        blobs: SHA-256 -> contents of uploaded large files.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    def create_repository(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request to create a repository."""
        name = f"{request['organization']}/{request['name']}"
        is_private = request.get("private", request.get("visibility") == "private")
        self.private[name] = is_private
        return {"url": f"{self.url}/{name}", "name": name}

    def choose_upload_modes(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return how each file must be sent: weights as large files, others within the commit."""
        files = []
        for file in request["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "shouldIgnore": False, "uploadMode": mode})
        return {"files": files}

    def choose_upload_addresses(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return where each large file must be sent."""
        objects = request["objects"]
        for blob in objects:
            blob["actions"] = {"upload": {"href": f"{self.url}/storage/{blob['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Store the files of a commit."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        commit = "0" * 40
        return {"commitUrl": f"{self.url}/me/model/commit/{commit}", "commitOid": commit}


class HubRequestHandler(BaseHTTPRequestHandler):
    """One request to a `Hub`."""

    server: Hub

    def do_PUT(self) -> None:
        """Store a large file. The real address is signed, so no token is sent."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        digest = hashlib.sha256(data).hexdigest()
        assert self.path == f"/storage/{digest}"
        self.server.blobs[digest] = data
        self.answer({})

    def do_GET(self) -> None:
        """Describe the repository, if it exists. The client also asks for it after it was not allowed to create it."""
        is_private = self.server.private.get("me/model")
        if self.path == "/api/models/me/model" and is_private is not None:
            self.answer({"id": "me/model", "private": is_private})
        else:
            self.answer({"error": "Not found"}, 404)

    def do_POST(self) -> None:
        """Answer a request to the API, if the token is right."""
        data = self.read_body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create" and "me/model" in self.server.private:
            url = f"{self.server.url}/me/model"
            self.answer({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.answer(self.call_api(data))

    def call_api(self, data: bytes) -> dict[str, Any]:
        """Return the answer of the API to a POST request."""
        hub = self.server
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if self.path == "/api/repos/create":
            return hub.create_repository(json.loads(data))
        assert "me/model" in hub.private, "the repository must be created first"
        if self.path == "/api/models/me/model/preupload/main":
            return hub.choose_upload_modes(json.loads(data))
        if self.path == "/me/model.git/info/lfs/objects/batch":
            return hub.choose_upload_addresses(json.loads(data))
        assert self.path == "/api/models/me/model/commit/main"
        return hub.commit([json.loads(line) for line in data.splitlines()])

    def read_body(self) -> bytes:
        """Return the body of the request. The body of a commit is sent in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        """Send a JSON value."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Do not log."""


# ---- fixtures ----


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose folder contains every kind of file that can be in it."""
    root = tmp_path / "model"
    for name in ("adapter", "trainer_state", "checkpoint-10/trainer_state"):
        (root / name).mkdir(parents=True)
    save_file({"weight": torch.arange(1000.0)}, root / "projector.safetensors")
    save_file({"weight": torch.ones(10)}, root / "adapter" / "adapter_model.safetensors")
    config = {
        "format_version": 1,
        "architecture": {"language_model": "/home/me/mistral"},
        "training": {"reward_endpoint": "http://10.0.0.1:8000/v1"},
    }
    texts = {
        "README.md": "---\nlicense: mit\n---\n# x\n",
        "llava.json": json.dumps(config),
        "tokenizer.json": "{}",
        # These files are not uploaded: the state of the run, and its intermediate checkpoints.
        "trainer_state/optimizer.pt": "x",
        "checkpoint-10/llava.json": "{}",
        "checkpoint-10/trainer_state/a": "x",
    }
    for name, text in texts.items():
        (root / name).write_text(text)
    return root


@pytest.fixture
def push(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Push:
    """Return a function that runs `llava push` with the address of a hub, more arguments, and a token."""

    def run(url: str, *argv: str, token: str = TOKEN) -> int:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        return cli.main(["push", str(folder), "me/model", *argv])

    return run


# ---- tests ----


def test_push_uploads_what_a_dry_run_lists(
    hub: Hub, folder: Path, push: Push, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    assert push(hub.url, "--dry-run") == 0
    assert not hub.private, "a dry run must not send anything"
    listed = capsys.readouterr().out.splitlines()[:-1]

    assert push(hub.url, "--private") == 0
    captured = capsys.readouterr()
    assert f"{hub.url}/me/model/commit/" in captured.out
    assert "/home/me/mistral" in captured.err
    assert "http://10.0.0.1:8000/v1" in captured.err
    assert hub.private == {"me/model": True}
    texts = {"README.md", "llava.json", "tokenizer.json"}
    weights = {"projector.safetensors", "adapter/adapter_model.safetensors"}
    assert hub.files == {name: (folder / name).read_bytes() for name in texts | weights}
    assert len(hub.blobs) == 2, "weights must be sent as large files"
    assert [line.split()[1] for line in listed] == sorted(hub.files)


@pytest.mark.parametrize("is_private", [True, False])
def test_push_uploads_nothing_private_to_a_public_repository(
    hub: Hub, push: Push, capsys: pytest.CaptureFixture[str], is_private: bool
) -> None:
    """The hub ignores `private` for a repository that exists already."""
    hub.private["me/model"] = is_private
    assert push(hub.url, "--private") == (0 if is_private else 2)
    assert bool(hub.files) == is_private
    assert ("exists already, and is public" in capsys.readouterr().err) == (not is_private)


@pytest.mark.parametrize("failure", ["wrong token", "no server"])
def test_push_reports_a_failed_upload_in_one_line(
    hub: Hub, push: Push, capsys: pytest.CaptureFixture[str], failure: str
) -> None:
    if failure == "wrong token":
        assert push(hub.url, token="hf_of_another") == 2
        reason = "Invalid username"
    else:
        assert push("http://127.0.0.1:9") == 2
        reason = "refused"
    error = capsys.readouterr().err
    assert "error: " in error
    assert reason in error
    assert "hf auth login" in error
    assert not hub.files


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone", "me/model"], "gone: no such folder"),
        ([".", "model"], "model: not a repository.*owner/name"),
    ],
)
def test_push_refuses_a_wrong_folder_or_repository(argv: list[str], message: str) -> None:
    from llava_simplified.export.export_command import push_main

    with pytest.raises(ValueError, match=message):
        push_main(argv)
