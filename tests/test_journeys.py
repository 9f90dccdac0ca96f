"""Run all commands of a documentation page one after the other, with tiny models.

The pages about folders and servers are tested in tests/captioning.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from checkpoints import train_checkpoint
from foreign_llava import LLAVA_HF_TEMPLATE, TEMPLATES, run_stock, write_original, write_stock
from PIL import Image

from llava_simplified.cli import main
from llava_simplified.export.import_checkpoint import import_checkpoint
from llava_simplified.export.merge import merge_checkpoint
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.llava import Llava

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[1] / "docs"
BY_HAND = {"5": "a red car parked on the street", "9": "two dogs run over a green field"}
# Options that are added to the commands of the pages: few steps, short captions.
SMALL = {
    "train": [
        "--max_steps",
        "2",
        "--lora_r",
        "4",
        "--cache_vision_features",
        "off",
        "--disable_tqdm",
        "True",
    ],
    "caption": ["--max-new-tokens", "6"],
}


def commands_of(page: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"(?m)^llava .+$", text)


def run_documented(command: str) -> None:
    argv = shlex.split(command, comments=True)[1:]
    assert main([*argv, *SMALL.get(argv[0], [])]) == 0, command


@pytest.fixture
def photos(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `photos` of the pages, in the current folder: 16 images, two of which have captions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(data_folder / "images", "photos")
    for name, caption in BY_HAND.items():
        Path("photos", f"{name}.txt").write_text(caption)
    return tmp_path / "photos"


def captions_in(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text().strip() for path in folder.glob("*.txt")}


def training_captions() -> dict[str, str]:
    """Return the captions of the newest training data that `--data` has converted."""
    files = Path("cache").rglob("records.jsonl")
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    return records_in(newest)


def records_in(path: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {Path(row["image"]).stem: row["response"] for row in rows}


def test_captions_are_drafted_corrected_and_trained_on(models_folder: Path, photos: Path) -> None:
    write_stock(models_folder, Path("stock"), adds_bos=True, **TEMPLATES["joycaption"])
    import_checkpoint(Path("stock"), Path("ours"))
    commands = commands_of("tune-and-caption.md")
    assert [command.split()[1] for command in commands] == [
        *("train", "caption", "train", "convert", "caption")
    ]
    tune, draft, retrain, keep, finish = commands

    run_documented(tune)
    assert training_captions() == BY_HAND
    run_documented(draft.replace("--limit 100", "--limit 3"))
    drafts = captions_in(photos)
    assert len(drafts) == 5 and BY_HAND.items() < drafts.items()
    page = Path("round1.html").read_text()
    accepted, corrected, rejected = sorted(drafts.keys() - BY_HAND.keys())
    assert all(f"{name}.jpg" in page for name in (accepted, corrected, rejected))

    (photos / f"{corrected}.txt").write_text("a bedroom with a double bed")
    (photos / f"{rejected}.txt").unlink()
    approved = captions_in(photos)
    run_documented(retrain)
    assert training_captions() == approved
    assert approved[accepted] == drafts[accepted]
    assert approved[corrected] == "a bedroom with a double bed"
    # The second round begins where the first one began.
    assert json.loads(Path("round2/llava.json").read_text())["training"]["init_from"] == "ours"

    run_documented(keep)
    assert records_in(Path("approved.jsonl")) == approved
    run_documented(finish)
    finished = captions_in(photos)
    assert finished.keys() == {path.stem for path in photos.glob("*.jpg")}
    assert approved.items() < finished.items()
    model = Llava.from_pretrained("round2")
    assert finished[rejected] == model.caption(photos / f"{rejected}.jpg", max_new_tokens=6)


def test_foreign_models_are_imported_tuned_and_exported(
    models_folder: Path, data_folder: Path, photos: Path, tmp_path: Path
) -> None:
    # The three folders that the page begins with.
    joycaption = Path("llama-joycaption-beta-one-hf-llava")
    write_stock(models_folder, joycaption, adds_bos=True, **TEMPLATES["joycaption"])
    write_stock(models_folder, Path("llava-1.5-7b-hf"), adds_bos=True, template=LLAVA_HF_TEMPLATE)
    clip = Path("clip-vit-large-patch14-336")
    shutil.copytree(models_folder / "clip", clip)
    trained = train_checkpoint(
        data_folder,
        tmp_path / "trained",
        model_name_or_path=models_folder / "llama",
        vision_tower=models_folder / "clip",
        mm_projector_type="mlp2x_gelu",
    )
    merge_checkpoint(trained, tmp_path / "merged")
    write_original(tmp_path / "merged", models_folder / "clip", Path("llava-v1.5-7b"))

    for command in commands_of("bring-your-model.md"):
        run_documented(command)

    assert captions_in(Path("captions")).keys() == {path.stem for path in photos.glob("*.jpg")}
    assert captions_in(photos) == BY_HAND
    assert Path("trial.html").exists() and Path("tuned.html").exists()
    assert {path.suffix for path in Path("llava15-tuned-gguf").glob("*.gguf")} == {".gguf"}
    # Use an image of the tower's size, because Transformers' resize rounds differently.
    image = tmp_path / "a.png"
    Image.open(photos / "0.jpg").resize((32, 32)).save(image)
    content = [{"type": "image"}, {"type": "text", "text": DEFAULT_INSTRUCTION}]
    for name in ("joycaption-tuned", "llava15-tuned"):
        _, caption = run_stock(Path(f"{name}-hf"), [{"role": "user", "content": content}], image)
        assert caption == Llava.from_pretrained(name).caption(image, max_new_tokens=8)
    for name, aspect_ratio in (("joycaption", "crop"), ("llava15", "pad"), ("llava15-hf", "pad")):
        architecture = json.loads(Path(name, "llava.json").read_text())["architecture"]
        assert architecture.get("image_aspect_ratio", "crop") == aspect_ratio
