"""Records, images and datasets work without the packages of optional dependency groups."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_process import run_code

from llava_simplified.data.shards import ShardWriter

# Packages of optional dependency groups.
EXTRAS = ["pyarrow", "fsspec", "aiohttp", "aiodns", "matplotlib"]


def run_without_extras(code: str, *arguments: str | Path) -> None:
    """Run code in a process that cannot import optional packages; the arguments are in `sys.argv[1:]`."""
    run_code(code, *arguments, missing=EXTRAS)


@pytest.mark.medium
def test_data_modules_are_imported_without_extras() -> None:
    run_without_extras(
        """
        import llava_simplified.data.collate
        import llava_simplified.data.dataset
        import llava_simplified.data.images
        import llava_simplified.data.packing
        import llava_simplified.data.records
        import llava_simplified.data.rows
        import llava_simplified.data.samplers
        import llava_simplified.data.shards
        import llava_simplified.data.transforms
        """
    )


@pytest.mark.medium
def test_dataset_reads_json_records_without_extras(models_folder: Path, data_folder: Path) -> None:
    run_without_extras(
        """
        from transformers import AutoTokenizer
        from llava_simplified.data.collate import Collator
        from llava_simplified.data.dataset import CaptionDataset
        from llava_simplified.data.open_data import open_data
        from llava_simplified.data.transforms import ImageTransform
        from llava_simplified.prompt import Prompt

        models, data = sys.argv[1:]
        records, folder = open_data(f"{data}/train.json", f"{data}/images", "--image-folder")
        assert len(records) == 12
        prompt = Prompt(AutoTokenizer.from_pretrained(f"{models}/mistral"))
        transform = ImageTransform.from_pretrained(f"{models}/clip")
        dataset = CaptionDataset(records, prompt, folder, transform)
        batch = Collator(tokens_per_image=16, pad_token_id=0)([dataset[0], dataset[1]])
        assert batch["pixel_values"].shape == (2, 3, 32, 32)
        """,
        models_folder,
        data_folder,
    )


@pytest.mark.medium
def test_shard_without_a_manifest_is_read_without_extras(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0.tar")
    writer.add("a", b"image", "jpg", (), {})
    writer.close()
    run_without_extras(
        """
        from llava_simplified.data.images import read_image_bytes

        assert read_image_bytes("0.tar#a", sys.argv[1]) == b"image"
        """,
        tmp_path,
    )


@pytest.mark.medium
def test_parquet_error_names_the_extra(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": b"image"}, "instruction": "?", "response": "a"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    manifest = [{"key": "a", "offset": 512, "length": 5}]
    pq.write_table(pa.Table.from_pylist(manifest), tmp_path / "0.parquet")
    writer = ShardWriter(tmp_path / "0.tar")
    writer.add("a", b"image", "jpg", (), {})
    writer.close()
    run_without_extras(
        """
        from llava_simplified.data.images import read_image_bytes
        from llava_simplified.data.records import open_records
        from llava_simplified.extras import MissingExtraError

        folder = sys.argv[1]
        for read in (
            lambda: open_records(f"{folder}/rows.parquet"),
            lambda: read_image_bytes("rows.parquet#0", folder),
            lambda: read_image_bytes("0.tar#a", folder),
        ):
            try:
                read()
            except MissingExtraError as error:
                assert "pyarrow" in str(error)
                assert "download]" in str(error)
            else:
                raise AssertionError("no error")
        """,
        tmp_path,
    )
