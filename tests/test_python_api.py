"""Tests of `from llava_simplified import ...`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llava_simplified
from llava_simplified import (
    CaptionDataset,
    GenerationOptions,
    Llava,
    Message,
    __version__,
    evaluate,
    train,
)

PREDICTIONS = Path(__file__).parent / "fixtures" / "predictions_0_1_0"


def test_public_names_are_listed_and_can_be_imported() -> None:
    for name in llava_simplified.__all__:
        assert getattr(llava_simplified, name) is not None
        assert name in dir(llava_simplified)
    with pytest.raises(AttributeError, match="no_such_name"):
        llava_simplified.no_such_name  # noqa: B018


def test_public_classes_are_those_of_the_modules() -> None:
    assert CaptionDataset.__module__ == "llava_simplified.data.dataset"
    assert GenerationOptions(max_new_tokens=3).max_new_tokens == 3
    assert Message("user", "What?").content == "What?"
    assert __version__.count(".") == 2


@pytest.mark.medium
def test_train_accepts_options_and_returns_a_model_folder(
    models_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: 5\nlora_r: 2\ncache_vision_features: off\n")
    folder = train(
        config,
        model_name_or_path=models_folder / "mistral",
        vision_tower=str(models_folder / "clip"),
        train_data_path=data_folder / "train.json",
        train_image_folder=data_folder / "images",
        output_dir=tmp_path / "out",
        mm_vision_select_layer=[-1, -2],
        max_steps=1,
        eval_data_path=None,
    )
    assert folder == tmp_path / "out"
    model = Llava.from_pretrained(folder)
    assert model.vision_tower.select_layers == (-1, -2)
    assert isinstance(model.caption(data_folder / "images" / "0.jpg", max_new_tokens=2), str)


def test_train_refuses_an_unknown_option() -> None:
    with pytest.raises(ValueError, match="--learnin_rate.*--learning_rate"):
        train(learnin_rate=1e-3)


@pytest.mark.parametrize("name", ["predictions.json", "greedy.jsonl"])
def test_evaluate_gives_the_scores_of_0_1_0(name: str) -> None:
    """The scores are those that 0.1.0 computed."""
    expected = json.loads((PREDICTIONS / "scores.json").read_text())
    result = evaluate(PREDICTIONS / name, java=False, resamples=0)
    scores = {metric: score.value for metric, score in result.mean.items()}
    assert scores == pytest.approx(expected[Path(name).stem])


@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_evaluate_accepts_references_and_training_captions(suffix: str) -> None:
    """The keys of the references are file names, with or without the suffix (ids in COCO files have none)."""
    rows = json.loads((PREDICTIONS / "predictions.json").read_text())
    references = {}
    for row in rows[::3]:
        name = Path(row["image"]).with_suffix(suffix).name
        references[name] = [row["pred_output"]]
    result = evaluate(
        PREDICTIONS / "greedy.jsonl",
        references,
        train_captions=[rows[0]["pred_output"]],
        java=False,
        resamples=0,
    )
    assert result.mean["exact match"].value == 1.0
    assert result.shares["novel captions"] == 0.75


def test_llava_evaluate_reads_prediction_files_of_0_1_0(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from llava_simplified.cli import main

    files = [str(PREDICTIONS / "predictions.json"), str(PREDICTIONS / "greedy.jsonl")]
    assert main(["evaluate", *files, "--no-java", "--resamples", "0"]) == 0
    assert "1.3019" in capsys.readouterr().out  # CIDEr-D of predictions.json in 0.1.0
