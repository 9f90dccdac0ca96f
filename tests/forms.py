"""Folders of Hugging Face `datasets`, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa


def save_to_disk(folder: Path, tables: list[pa.Table], rows_per_batch: int = 2) -> None:
    """Write what `Dataset.save_to_disk` writes (compared with `datasets` 5.2)."""
    folder.mkdir(exist_ok=True)
    files = []
    for number, table in enumerate(tables):
        name = f"data-{number:05d}-of-{len(tables):05d}.arrow"
        files.append({"filename": name})
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows_per_batch)
    state = {"_data_files": files, "_fingerprint": "483d7490994b6476", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
