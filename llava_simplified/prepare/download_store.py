"""The output of a download: a local folder, or a folder in any file system that fsspec can write to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
import pyarrow as pa
import pyarrow.parquet as pq

SETTINGS_NAME = "download.json"


class Store:
    """The output of a download.

    Args:
        output: A folder, or a URL of fsspec such as "s3://bucket/cc3m". It is created if it does not exist.

    Attributes:
        root: Path of the output in its file system.
        is_local: The output is a folder on this machine.
        work: Local folder for unfinished shards: inside a local output, otherwise in the cache folder.
    """

    def __init__(self, output: str) -> None:
        self.fs, self.root = fsspec.core.url_to_fs(output)
        self.is_local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)
        # Clear the listings that fsspec caches, since other processes write to the output too.
        self.fs.invalidate_cache()
        self.fs.makedirs(self.root, exist_ok=True)
        self.work = Path(self.root, "_work") if self.is_local else self._cache_folder()
        self.work.mkdir(parents=True, exist_ok=True)

    def _cache_folder(self) -> Path:
        """Return the work folder of a remote output."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Include the protocol: without it, s3://a/b and gs://a/b would share a work folder.
        url = self.fs.unstrip_protocol(self.root)
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        return cache / "llava_simplified" / "download" / digest

    def path(self, name: str) -> str:
        """Return the path of a file of the output."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Return whether a file of the output exists. An existing file is complete."""
        return bool(self.fs.exists(self.path(name)))

    def publish(self, local: Path, name: str) -> None:
        """Move a finished local file into the output, atomically."""
        # In a local output, this is a rename: the work folder is in the same file system.
        if self.is_local:
            local.replace(self.path(name))
            return
        # Upload under a temporary name, then rename: some file systems show a file during the upload.
        part = self.path(f".{name}.part{uuid.uuid4().hex[:8]}")
        try:
            self.fs.put_file(str(local), part)
            self.fs.mv(part, self.path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                self.fs.rm(part)
            raise
        local.unlink()

    def fetch(self, name: str, local: Path) -> None:
        """Copy a file of the output to a local path, atomically."""
        # Copy to a temporary name, so that an incomplete copy is not mistaken for the file.
        copy = local.with_name(f"{local.name}.copy")
        self.fs.get_file(self.path(name), str(copy))
        copy.replace(local)

    def settings(self) -> dict[str, Any] | None:
        """Return the contents of `download.json`, or None for a new output."""
        if not self.exists(SETTINGS_NAME):
            return None
        return json.loads(self.fs.cat_file(self.path(SETTINGS_NAME)))

    def manifests(self) -> list[str]:
        """Return the names of the manifests of all finished shards, in order."""
        # Match the manifests of shards only, and not the merged manifest.parquet.
        names = [path.rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        return sorted(name for name in names if re.fullmatch(r"\d{5,}\.parquet", name))

    def read_manifest(self, name: str) -> pa.Table:
        """Return one manifest."""
        with self.fs.open(self.path(name), "rb") as stream:
            return pq.ParquetFile(stream).read()
