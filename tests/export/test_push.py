"""`llava push` against a stand-in of the hub on this machine: its API for LFS, as `huggingface_hub` speaks it without Xet."""

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


class Hub(ThreadingHTTPServer):
    """Repositories, by name: private or not, and the files of the last commit; blobs, by their SHA-256."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def do_PUT(
        self,
    ) -> (
        None
    ):  # a large file's bytes; the real hub's storage signs the address instead of asking who it is
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/storage/{hashlib.sha256(data).hexdigest()}"
        self.server.blobs[self.path.removeprefix("/storage/")] = data
        self.answer({})

    def do_POST(self) -> None:
        data = self.read_body()
        if self.headers["Authorization"] == "Bearer hf_of_me":
            self.answer(self.said_to(self.path, data))
        else:
            self.answer({"error": "Invalid username or password."}, 401)

    def said_to(self, path: str, data: bytes) -> dict[str, Any]:
        hub = self.server
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            hub.private[name] = asked.get("private", asked.get("visibility") == "private")
            return {"url": f"{hub.url}/{name}", "name": name}
        assert "me/model" in hub.private, "a repository is made before it is filled"
        if path == "/api/models/me/model/preupload/main":
            names = [file["path"] for file in json.loads(data)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return {
                "files": [
                    {"path": n, "shouldIgnore": False, "uploadMode": mode}
                    for n, mode in modes.items()
                ]
            }
        if path == "/me/model.git/info/lfs/objects/batch":
            objects = json.loads(data)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.url}/storage/{one['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        assert path == "/api/models/me/model/commit/main"
        for line in map(json.loads, data.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.blobs[value["oid"]]
        return {"commitUrl": f"{hub.url}/me/model/commit/{'0' * 40}", "commitOid": "0" * 40}

    def read_body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []  # a commit is streamed
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with all that may lie in it."""
    for name in ("adapter", "trainer_state", "checkpoint-10/trainer_state"):
        (tmp_path / "model" / name).mkdir(parents=True)
    save_file({"weight": torch.arange(1000.0)}, tmp_path / "model" / "projector.safetensors")
    save_file(
        {"weight": torch.ones(10)}, tmp_path / "model" / "adapter" / "adapter_model.safetensors"
    )
    manifest = {
        "format_version": 1,
        "architecture": {"language_model": "/home/me/mistral"},
        "training": {},
    }
    texts = {
        "README.md": "---\nlicense: mit\n---\n# x\n",
        "llava.json": json.dumps(manifest),
        "tokenizer.json": "{}",
    }
    own = {
        "trainer_state/optimizer.pt": "x",
        "checkpoint-10/llava.json": "{}",
        "checkpoint-10/trainer_state/a": "x",
    }
    for name, text in {**texts, **own}.items():
        (tmp_path / "model" / name).write_text(text)
    return tmp_path / "model"


@pytest.fixture
def push(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(url: str, *words: str, token: str = "hf_of_me") -> int:
        monkeypatch.setenv("HF_TOKEN", token)
        for name, value in {
            "ENDPOINT": url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        return cli.main(["push", str(folder), "me/model", *words])

    return call


def test_what_the_dry_run_lists_is_what_the_hub_gets(
    hub: Hub, folder: Path, push: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(hub.url, "--dry-run") == 0 and not hub.private, "nothing was sent"
    listed = capsys.readouterr().out.splitlines()[:-1]
    assert push(hub.url, "--private") == 0
    said = capsys.readouterr()
    assert f"{hub.url}/me/model/commit/" in said.out and "/home/me/mistral" in said.err
    assert hub.private == {"me/model": True}
    texts, weights = (
        {"README.md", "llava.json", "tokenizer.json"},
        {"projector.safetensors", "adapter/adapter_model.safetensors"},
    )
    assert hub.files == {name: (folder / name).read_bytes() for name in texts | weights}
    assert len(hub.blobs) == 2, "weights went as large files"
    assert [line.split()[1] for line in listed] == sorted(hub.files)


def test_what_the_hub_refuses_is_one_line(
    hub: Hub, push: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for url, token, reason in (
        (hub.url, "hf_of_another", "Invalid username"),
        ("http://127.0.0.1:9", "hf_of_me", "refused"),
    ):
        assert push(url, token=token) == 2
        said = capsys.readouterr().err
        assert reason in said and "error: the hub did not take" in said and "hf auth login" in said
    assert not hub.files
