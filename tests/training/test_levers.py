"""Options that make training cheaper change its cost and nothing else: the same losses over 25 steps, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch._dynamo.utils import counters
from training_runs import read_log, run_training, training_options

from llava_simplified.model.checkpoint import load_checkpoint
from llava_simplified.training.kernels import can_compile

pytestmark = pytest.mark.xdist_group("levers")

RECORDS = 6
STEPS = 25
# More than the number of examples: each step uses all of them, so that no option can change their order.
ALL_EXAMPLES = 99

CACHE = {"cache_vision_features": "memory"}
SHARE = {"share_prefix": True, "per_device_train_batch_size": RECORDS}
PACK = {"packing": True, "pack_length": 200, "per_device_train_batch_size": ALL_EXAMPLES}
OPTIONS: dict[str, dict[str, object]] = {
    "accumulation": {
        "share_prefix": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ALL_EXAMPLES,
    },
    "cache": {**CACHE, "share_prefix": False, "per_device_train_batch_size": ALL_EXAMPLES},
    "share_prefix": SHARE,
    "packing": {**PACK, "share_prefix": False, "attn_implementation": "eager"},
    "group_by_length": {**SHARE, "group_by_length": True},
    "checkpointing": {**SHARE, "gradient_checkpointing": True},
    "all": {**CACHE, **PACK, "group_by_length": True, "compile_layers": can_compile("cpu")},
}


@pytest.fixture(scope="module")
def records(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with one to five captions, which are of different lengths."""
    rows = json.loads((data_folder / "train.json").read_text())[:RECORDS]
    for index, row in enumerate(rows):
        caption = row.pop("response")
        captions = 1 + index % 5
        row["responses"] = [" ".join([caption] * (1 + number)) for number in range(captions)]
    path = tmp_path_factory.mktemp("records") / "train.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def plain_losses(
    models_folder: Path,
    data_folder: Path,
    records: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[float]:
    """Losses without any of the options, and with sdpa in place of the CPU's own attention."""
    changes: dict[str, object] = {
        "share_prefix": False,
        "cache_vision_features": "off",
        "per_device_train_batch_size": ALL_EXAMPLES,
        "attn_implementation": "sdpa",
    }
    output = tmp_path_factory.mktemp("plain") / "out"
    return train_losses(models_folder, data_folder, records, output, changes)


def train_losses(
    models_folder: Path,
    data_folder: Path,
    records: Path,
    output: Path,
    changes: dict[str, object],
) -> list[float]:
    options = training_options(
        models_folder,
        data_folder,
        output,
        train_data_path=records,
        max_steps=STEPS,
        **changes,
    )
    losses = read_log(run_training(options))
    assert len(losses) == STEPS
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_option_does_not_change_the_losses(
    models_folder: Path,
    data_folder: Path,
    records: Path,
    tmp_path: Path,
    plain_losses: list[float],
    name: str,
) -> None:
    output = tmp_path / "out"
    graphs_before = counters["stats"]["unique_graphs"]
    losses = train_losses(models_folder, data_folder, records, output, OPTIONS[name])
    assert plain_losses[-1] < 0.6 * plain_losses[0], "the model must learn"
    assert losses == pytest.approx(plain_losses, rel=2e-3)
    assert losses[:5] == pytest.approx(plain_losses[:5], rel=1e-5)
    if name == "all":
        # All layers must share one compiled graph, because compiling takes most of the time of a short run.
        assert counters["stats"]["unique_graphs"] - graphs_before == int(can_compile("cpu"))
        # A checkpoint can be loaded even if its layers were compiled.
        assert load_checkpoint(output).caption(data_folder / "images" / "0.jpg", max_new_tokens=4)
