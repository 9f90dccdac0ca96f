"""What makes training cheaper changes its cost and nothing else: the same loss curve over 50 steps, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run import losses, options, run

from llava_simplified.training.kernels import can_compile

RECORDS = 6
CACHE = {"cache_vision_features": "memory"}
SHARE = {"share_prefix": True, "per_device_train_batch_size": RECORDS}
PACK = {"packing": True, "pack_length": 200, "per_device_train_batch_size": 99}
LEVERS = {
    "apart": {
        "share_prefix": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 99,
    },
    "cache": {**CACHE, "share_prefix": False, "per_device_train_batch_size": 99},
    "share": SHARE,
    "pack": {**PACK, "share_prefix": False, "attn_implementation": "eager"},
    "lengths": {**SHARE, "group_by_length": True},
    "checkpointing": {**SHARE, "gradient_checkpointing": True},
    "all": {**CACHE, **PACK, "group_by_length": True},
}
if can_compile("cpu"):
    LEVERS["all"] |= {"compile_layers": True}


@pytest.fixture(scope="module")
def five_captions(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of one to five captions. A step takes them all, so that no lever can change the order."""
    rows = json.loads((data_folder / "train.json").read_text())[:RECORDS]
    for count, row in enumerate(rows):
        caption = row.pop("response")
        row["responses"] = [" ".join([caption] * (1 + i)) for i in range(1 + count % 5)]
    path = tmp_path_factory.mktemp("five") / "train.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def plain(
    models_folder: Path, data_folder: Path, five_captions: Path, tmp_path_factory
) -> list[float]:
    more = {
        "share_prefix": False,
        "cache_vision_features": "off",
        "per_device_train_batch_size": 99,
    }
    more["attn_implementation"] = "sdpa"  # the others take what a CPU takes by default
    return curve(models_folder, data_folder, five_captions, tmp_path_factory.mktemp("plain"), more)


def curve(models: Path, data: Path, records: Path, folder: Path, more: dict) -> list[float]:
    more = {"train_data_path": records, "max_steps": 50, "lora_dropout": 0, **more}
    seen = losses(run(options(models, data, folder / "out", **more)))
    assert len(seen) == 50
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("lever", LEVERS)
def test_the_curve_is_the_plain_loops(
    models_folder: Path,
    data_folder: Path,
    five_captions: Path,
    tmp_path: Path,
    plain: list[float],
    lever: str,
) -> None:
    seen = curve(models_folder, data_folder, five_captions, tmp_path, LEVERS[lever])
    assert plain[-1] < 0.6 * plain[0], "it learns"
    assert seen == pytest.approx(plain, rel=2e-3)
    assert seen[:5] == pytest.approx(plain[:5], rel=1e-5)
