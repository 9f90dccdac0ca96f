"""Tests of `llava benchmark`: the forms of published data sets, captions, scores, and continuing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faulty_endpoint import caption_of, faulty_endpoint
from PIL import Image

from llava_simplified.captioning import endpoint_client
from llava_simplified.cli import main as llava
from llava_simplified.data.images import load_pixels
from llava_simplified.evaluation.benchmark_command import BENCHMARK_NAMES, main
from llava_simplified.evaluation.benchmark_sets import (
    BENCHMARKS,
    BenchmarkSet,
    images_by_domain,
    read_benchmark,
)
from llava_simplified.evaluation.evaluate_command import main as evaluate_main
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.llava import Llava

REFERENCES = ["a dog on a sofa", "a brown dog", "one dog", "the dog sleeps", "a pet at home"]


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 20), (number * 20 % 256, 90, number * 7 % 256)).save(path)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def karpathy_row(split: str, **keys: Any) -> dict[str, Any]:
    sentences = [{"tokens": text.split(), "raw": text} for text in REFERENCES]
    return {"split": split, "sentences": sentences, **keys}


def coco_name(image_id: int) -> str:
    return f"COCO_val2014_{image_id:012}.jpg"


def write_coco(folder: Path) -> None:
    """Write Karpathy's splits and the images of 2014. The test split has four images."""
    rows = []
    for image_id in range(1, 8):
        split = "test" if image_id <= 4 else "restval"
        name = coco_name(image_id)
        rows.append(karpathy_row(split, filepath="val2014", filename=name, cocoid=image_id))
        write_image(folder / "val2014" / name, image_id)
    write_json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    instances = {
        "images": [{"id": i, "file_name": coco_name(i)} for i in range(1, 8)],
        "annotations": [{"image_id": 1, "category_id": 18}],
        "categories": [{"id": 18, "name": "dog"}],
    }
    write_json(folder / "annotations" / "instances_val2014.json", instances)


def write_flickr(folder: Path) -> None:
    rows = []
    for number in range(1, 7):
        name = f"{1000 + number}.jpg"
        rows.append(karpathy_row("test" if number <= 4 else "train", filename=name, imgid=number))
        write_image(folder / "flickr30k-images" / name, number)
    write_json(folder / "dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})


def write_nocaps(folder: Path) -> None:
    domains = ["near-domain", "out-domain", "in-domain", "near-domain"]
    images = []
    annotations = []
    for number, domain in enumerate(domains):
        name = f"{number:016x}.jpg"
        images.append({"id": number, "file_name": name, "domain": domain})
        annotations += [{"image_id": number, "caption": text} for text in REFERENCES]
        write_image(folder / "images" / name, number)
    content = {"images": images, "annotations": annotations}
    write_json(folder / "nocaps_val_4500_captions.json", content)


def write_textcaps(folder: Path) -> None:
    rows = []
    for number in range(4):
        for text in REFERENCES:
            row = {"image_id": f"{number:016x}", "caption_str": text, "reference_strs": REFERENCES}
            rows.append({**row, "image_path": f"train/{number:016x}.jpg"})
        write_image(folder / "train_images" / f"{number:016x}.jpg", number)
    write_json(folder / "TextCaps_0.1_val.json", {"dataset_name": "textcaps", "data": rows})


WRITERS: dict[str, Callable[[Path], None]] = {
    "coco": write_coco,
    "nocaps": write_nocaps,
    "flickr30k": write_flickr,
    "textcaps": write_textcaps,
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- data sets ----


def test_command_and_tests_know_every_benchmark() -> None:
    assert tuple(BENCHMARKS) == BENCHMARK_NAMES == tuple(WRITERS)


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_read_benchmark_reads_the_published_form(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    benchmark = read_benchmark(name, tmp_path)
    assert len(benchmark.images) == 4
    assert not benchmark.notes
    for image in benchmark.images:
        assert (tmp_path / image.image).is_file()
        assert image.references == tuple(REFERENCES)
    assert benchmark.split == ("test" if name in ("coco", "flickr30k") else "val")
    assert bool(benchmark.instances) == (name == "coco")


def names_of(benchmark: BenchmarkSet) -> list[str]:
    return [image.image for image in benchmark.images]


def test_coco_images_are_found_under_their_names_of_2017(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for image_id in range(1, 5):
        (tmp_path / "train2017").mkdir(exist_ok=True)
        new = tmp_path / "train2017" / f"{image_id:012}.jpg"
        (tmp_path / "val2014" / coco_name(image_id)).rename(new)
    names = names_of(read_benchmark("coco", tmp_path))
    assert names == [f"train2017/{image_id:012}.jpg" for image_id in range(1, 5)]


def test_official_split_of_coco_is_read_if_requested(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 3, "file_name": "000000000003.jpg"}],
        "annotations": [{"image_id": 3, "caption": text} for text in REFERENCES],
    }
    write_json(tmp_path / "annotations" / "captions_val2017.json", content)
    write_image(tmp_path / "val2017" / "000000000003.jpg", 3)
    benchmark = read_benchmark("coco", tmp_path, "val2017")
    assert names_of(benchmark) == ["val2017/000000000003.jpg"]
    # Another split must not silently replace the one that papers report.
    with pytest.raises(ValueError, match=r"dataset_coco\.json.*--split val2017"):
        read_benchmark("coco", tmp_path)


def test_files_may_be_one_folder_deeper(tmp_path: Path) -> None:
    write_flickr(tmp_path)
    (tmp_path / "karpathy").mkdir()
    (tmp_path / "dataset_flickr30k.json").rename(tmp_path / "karpathy" / "dataset_flickr30k.json")
    (tmp_path / "flickr30k-images").rename(tmp_path / "images")
    assert names_of(read_benchmark("flickr30k", tmp_path))[0] == "images/1001.jpg"
    shutil.copytree(tmp_path / "karpathy", tmp_path / "copy")
    with pytest.raises(ValueError, match="dataset_flickr30k.json"):
        read_benchmark("flickr30k", tmp_path)


def test_domains_of_nocaps_are_in_the_order_of_the_literature(tmp_path: Path) -> None:
    write_nocaps(tmp_path)
    by_domain = images_by_domain(read_benchmark("nocaps", tmp_path).images)
    sizes = {domain: len(names) for domain, names in by_domain.items()}
    assert list(sizes.items()) == [("in-domain", 1), ("near-domain", 2), ("out-of-domain", 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [{"id": 1}]}, "form of the published file"),
        ({"images": []}, "no images of the split"),
        ({"annotations": []}, "no reference caption"),
        ({"images": [{"id": 0, "file_name": "../a.jpg"}]}, "leads out of the folder"),
        ({"images": [{"id": 0, "file_name": "gone.jpg"}]}, "none of the 1 images"),
    ],
)
def test_read_benchmark_refuses_what_it_cannot_use(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    annotations = [{"image_id": 0, "caption": "a dog"}]
    content = {"images": [{"id": 0, "file_name": "a.jpg"}], "annotations": annotations}
    if "images" in change and not change["images"]:
        content["annotations"] = []
    write_json(tmp_path / "nocaps_val_4500_captions.json", content | change)
    with pytest.raises(ValueError, match=message):
        read_benchmark("nocaps", tmp_path)


def test_splits_without_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--split test"):
        read_benchmark("nocaps", tmp_path, "test")


# ---- with a server ----


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint_client, "MIN_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


SCORING = ["--no-java", "--resamples", "20"]


def test_nocaps_with_a_server_has_scores_by_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nocaps(tmp_path / "nocaps")
    output = tmp_path / "out"
    with faulty_endpoint() as server:
        argv = ["nocaps", str(tmp_path / "nocaps"), "--endpoint", server.url, "--model", "m"]
        assert main([*argv, "--output", str(output), *SCORING]) == 0
        assert len(server.requests) == 4
        assert {request["max_tokens"] for request in server.requests} == {64}
        # A second call continues the finished job, and sends no requests.
        assert main([*argv, "--output", str(output), *SCORING]) == 0
        assert len(server.requests) == 4
    rows = read_rows(output / "greedy.jsonl")
    for row in rows:
        assert row["instruction"] == DEFAULT_INSTRUCTION
        # The server derives the caption from the bytes of the image, so each image has its own.
        assert row["pred_output"] == caption_of((tmp_path / "nocaps" / row["image"]).read_bytes())
    run = json.loads((output / "scores.json").read_text())["runs"]["greedy"]
    sizes = {domain: scores["images"] for domain, scores in run["domains"].items()}
    assert sizes == {"in-domain": 1, "near-domain": 2, "out-of-domain": 1}
    assert len(run["mean"]["CIDEr-D"]) == 3
    page = (output / "report.html").read_text()
    assert "Scores by domain" in page
    assert page.index("in-domain") < page.index("near-domain") < page.index("out-of-domain")
    assert "greedy, out-of-domain: 1 images" in capsys.readouterr().out


def test_images_without_a_caption_are_named_and_the_status_is_1(tmp_path: Path) -> None:
    write_flickr(tmp_path / "flickr")
    (tmp_path / "flickr" / "flickr30k-images" / "1002.jpg").unlink()
    output = tmp_path / "out"
    with faulty_endpoint() as server:
        argv = ["flickr30k", str(tmp_path / "flickr"), "--endpoint", server.url, "--model", "m"]
        assert main([*argv, "--output", str(output), *SCORING]) == 1
    (failure,) = read_rows(output / "greedy.jsonl.bad.jsonl")
    assert failure["index"] == 1
    run = json.loads((output / "scores.json").read_text())["runs"]["greedy"]
    assert run["images"] == 3
    assert "1 of 4 images of the benchmark are not in" in run["notes"][0]
    assert "1 of 4 images have no caption" in run["notes"][1]


def test_changed_images_are_refused_before_the_records_are_written(tmp_path: Path) -> None:
    """A mistyped command must not change the files of an unfinished benchmark."""
    write_flickr(tmp_path / "flickr")
    output = tmp_path / "out"
    with faulty_endpoint() as server:
        argv = ["flickr30k", str(tmp_path / "flickr"), "--endpoint", server.url, "--model", "m"]
        argv += ["--output", str(output), *SCORING]
        assert main(argv) == 0
        complete = (output / "greedy.jsonl").read_bytes()
        lines = complete.splitlines(keepends=True)
        (output / "greedy.jsonl").write_bytes(b"".join(lines[:2]))
        records = (output / "records.jsonl").read_bytes()
        for change in (["--limit", "2"], ["--instruction", "Where?"]):
            with pytest.raises(ValueError, match=r"records\.jsonl.*--limit"):
                main([*argv, *change])
        assert (output / "records.jsonl").read_bytes() == records
        assert main(argv) == 0
    assert (output / "greedy.jsonl").read_bytes() == complete


@pytest.mark.parametrize(
    "option", ["--limit 0", "--batch-size 0", "--batch-size -1", "--resamples -1", "--seed -1"]
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: must be at least"):
        main(["coco", str(tmp_path), "--model-path", "m", *option.split()])


def test_beam_search_is_refused_with_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["benchmark", "coco", str(tmp_path), "--endpoint", "http://127.0.0.1:1/v1"]
    assert llava([*argv, "--model", "m", "--decoding", "beam"]) == 2
    assert "--decoding beam" in capsys.readouterr().err


# ---- with a checkpoint ----


@pytest.fixture
def curious_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, with another default instruction."""
    folder = tmp_path / "curious"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "llava.json").read_text())
    config["architecture"]["instruction"] = "What is it?"
    (folder / "llava.json").write_text(json.dumps(config))
    return folder


@pytest.mark.medium
def test_coco_with_a_checkpoint_is_captioned_with_both_decodings_and_continues(
    curious_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "coco"
    write_coco(folder)
    output = tmp_path / "out"
    argv = ["coco", str(folder), "--model-path", str(curious_checkpoint), "--output", str(output)]
    argv += ["--limit", "3", *SCORING]
    assert main(argv) == 0

    greedy = read_rows(output / "greedy.jsonl")
    beam = read_rows(output / "beam.jsonl")
    model = Llava.from_pretrained(curious_checkpoint)
    images = [load_pixels(folder / row["image"]) for row in greedy]
    expected = [model.caption([image], "What is it?", max_new_tokens=64)[0] for image in images]
    assert [row["pred_output"] for row in greedy] == expected
    options = {"num_beams": 5, "max_new_tokens": 30}
    expected = [model.caption([image], "What is it?", **options)[0] for image in images]
    assert [row["pred_output"] for row in beam] == expected

    # The scores must equal those that `llava evaluate` computes from the file.
    scores = json.loads((output / "scores.json").read_text())
    separate = tmp_path / "separate.json"
    instances = folder / "annotations" / "instances_val2014.json"
    files = [str(output / "greedy.jsonl"), "--instances", str(instances)]
    assert evaluate_main([*files, "--output", str(separate), *SCORING]) == 0
    run = scores["runs"]["greedy"]
    assert run["mean"] == json.loads(separate.read_text())["greedy"]["mean"]
    assert {"CHAIRs", "CHAIRi"} < set(run["mean"])
    assert scores["settings"]["images"] == "3 of 4"
    assert scores["runs"]["beam"]["compared with"]["run"] == "greedy"
    assert "beam compared with greedy" in (output / "report.html").read_text()

    # If the command is killed after two captions and run again, it writes the same files.
    before = (output / "greedy.jsonl").read_text()
    lines = before.splitlines(keepends=True)
    (output / "greedy.jsonl").write_text("".join(lines[:2]))
    assert main(argv) == 0
    assert (output / "greedy.jsonl").read_text() == before
