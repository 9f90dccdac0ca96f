"""Every output of a command can be read by the other commands. The models and data are tiny."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sampling import IS_COMPLETE
from tiny import CAPTIONS

from llava_simplified.cli import main as llava
from llava_simplified.training import plan_command

pytestmark = pytest.mark.xdist_group("handover")

NUM_RECORDS = 6


class Written(NamedTuple):
    """The output of a command: records or predictions, and the folder of their images."""

    path: Path
    images: Path


def call(*arguments: object) -> None:
    """Run a command in this process; it must succeed."""
    assert llava([str(argument) for argument in arguments]) == 0, " ".join(map(str, arguments))


class Workshop:
    """Creates the output of a writer (a command that writes records or predictions) when it is first needed.

    Args:
        folder: Folder of the outputs.
        models: Folder of tiny models.
        data: Folder with `images/*.jpg` and `val.json`.
        server: Address of a server with the images.
    """

    def __init__(self, folder: Path, models: Path, data: Path, server: str) -> None:
        self.folder = folder
        self.models = models
        self.data = data
        self.server = server
        self.images = data / "images"
        self._written: dict[str, Written] = {}
        self._checkpoint: Path | None = None
        rows = []
        for index in range(NUM_RECORDS):
            rows.append(f"{index}.jpg\t{CAPTIONS[index]}\t{server}/{index}.jpg\n")
        # One more caption of the first image, which becomes a record with two responses.
        rows.append(f"0.jpg\tanother caption\t{server}/0.jpg\n")
        self.table = folder / "captions.tsv"
        self.table.write_text("image\tcaption\turl\n" + "".join(rows))

    def written(self, writer: str) -> Written:
        """Return the output of a writer, such as "convert.json": the command, and the form of its output."""
        if writer not in self._written:
            command, _, form = writer.partition(".")
            self._written[writer] = getattr(self, f"_{command}")(form)
        return self._written[writer]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of one training step."""
        if self._checkpoint is None:
            self._checkpoint = self.folder / "checkpoint"
            records = self.written("convert.json")
            call("train", *self.training(records), "--output_dir", self._checkpoint)
        return self._checkpoint

    def training(self, records: Written) -> list[object]:
        """Return the options of a run of one step."""
        return [
            *("--model_name_or_path", self.models / "mistral"),
            *("--vision_tower", self.models / "clip"),
            *("--train_data_path", records.path, "--train_image_folder", records.images),
            *("--feature_cache_dir", self.folder / "features", "--max_steps", 1),
        ]

    # ---- writers of records ----

    def _convert(self, form: str) -> Written:
        output = self.folder / f"converted.{form}"
        call("convert", self.table, "--output", output, "--image-folder", self.images)
        return Written(output, self.images)

    def _download(self, form: str) -> Written:
        output = self.folder / f"downloaded-{form}"
        format_options = ("--output-format", form, "--shard-size", 4, "--allow-private")
        call("download", self.table, "--output", output, *format_options)
        return Written(output, output)

    def _clean(self, form: str) -> Written:
        source = self.written("convert.json")
        if form == "compact":
            output, compact = self.folder / "compacted.jsonl", self.folder / "compact"
            call(
                "clean",
                source.path,
                "--image-folder",
                source.images,
                "--output",
                output,
                "--compact",
                compact,
            )
            return Written(output, compact)
        output = self.folder / f"cleaned.{form}"
        call("clean", source.path, "--image-folder", source.images, "--output", output)
        return Written(output, source.images)

    def _reduce(self, form: str) -> Written:
        output = self.folder / f"reduced.{form}"
        call("reduce", self.written("convert.json").path, "--count", 4, "--output", output)
        return Written(output, self.images)

    # ---- writers of predictions ----

    def _predict(self, form: str) -> Written:
        records = self._mixed_records()
        output = self.folder / f"predicted.{form}"
        self._predict_records(records, output)
        return Written(output, self.images)

    def _mixed_records(self) -> Path:
        """Write records with one answer, with several, with none, without an image, and with unusual line breaks."""
        records = [
            {"image": "0.jpg", "instruction": "a", "response": "one caption"},
            {"image": "1.jpg", "instruction": "a", "responses": ["one caption", "another"]},
            {"image": "2.jpg", "instruction": "a"},
            {"image": None, "instruction": "Say hi", "response": "hi there"},
            {"image": "3.jpg", "instruction": "a\u2028b\x85c", "response": "a\u2028b\x85c\u2029d"},
        ]
        path = self.folder / "mixed.json"
        path.write_text(json.dumps(records))
        return path

    def _predict_records(self, records: Path, output: Path, *options: object) -> None:
        call(
            "predict",
            "--model-path",
            self.checkpoint,
            "--data-path",
            records,
            "--image-folder",
            self.images,
            "--max-new-tokens",
            3,
            "--output",
            output,
            *options,
        )

    def _caption(self, source: str) -> Written:
        writer = {"records": "convert.json", "shards": "download.shards"}.get(source)
        written = self.written(writer) if writer else Written(self.images, self.images)
        output = self.folder / f"captioned-{source}.jsonl"
        options: list[object] = ["--max-new-tokens", 3, "--output", output]
        if source == "records":
            options += ["--image-folder", written.images]
        call("caption", written.path, "--model-path", self.checkpoint, *options)
        return Written(output, written.images)


@pytest.fixture(scope="module", autouse=True)
def matrices_are_small() -> Iterator[None]:
    """Let `llava plan` measure the speed of this machine with a small product, since no test looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_command, "MATMUL_SIZES", (64,))
        yield


@pytest.fixture(scope="module")
def workshop(
    tmp_path_factory: pytest.TempPathFactory, models_folder: Path, data_folder: Path
) -> Iterator[Workshop]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(data_folder / "images"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        folder = tmp_path_factory.mktemp("handover")
        yield Workshop(folder, models_folder, data_folder, address)
        server.shutdown()


# ---- records ----

RECORD_WRITERS = (
    *("convert.json", "convert.jsonl", "convert.parquet"),
    *("download.shards", "download.files"),
    *("clean.json", "clean.jsonl", "clean.parquet", "clean.compact"),
    *("reduce.json", "reduce.jsonl"),
)


def read_by_convert(workshop: Workshop, records: Written, output: Path) -> None:
    call("convert", records.path, "--output", output / "again.json")
    assert json.loads((output / "again.json").read_text())


def read_by_clean(workshop: Workshop, records: Written, output: Path) -> None:
    cleaned = output / "again.json"
    call("clean", records.path, "--image-folder", records.images, "--output", cleaned)
    assert json.loads(cleaned.read_text()), "no image was found"


def read_by_reduce(workshop: Workshop, records: Written, output: Path) -> None:
    call("reduce", records.path, "--count", 2, "--output", output / "again.json")
    assert len(json.loads((output / "again.json").read_text())) == 2


def read_by_inspect(workshop: Workshop, records: Written, output: Path) -> None:
    call(
        "inspect",
        "--data",
        records.path,
        "--image-folder",
        records.images,
        "--model_name_or_path",
        workshop.models / "mistral",
    )


def read_by_plan(workshop: Workshop, records: Written, output: Path) -> None:
    call("plan", *workshop.training(records), "--output_dir", output)


def read_by_encode(workshop: Workshop, records: Written, output: Path) -> None:
    options = workshop.training(records)
    options[options.index("--feature_cache_dir") + 1] = output / "features"
    call("encode", *options, "--cache_vision_features", "disk", "--output_dir", output)


def read_by_train(workshop: Workshop, records: Written, output: Path) -> None:
    call("train", *workshop.training(records), "--output_dir", output / "model")


def read_by_predict(workshop: Workshop, records: Written, output: Path) -> None:
    call(
        "predict",
        "--model-path",
        workshop.checkpoint,
        "--data-path",
        records.path,
        "--image-folder",
        records.images,
        "--max-new-tokens",
        2,
        "--trials",
        1,
        "--output",
        output / "p.json",
    )
    assert json.loads((output / "p.json").read_text()), "no image was found"


def read_by_caption(workshop: Workshop, records: Written, output: Path) -> None:
    call(
        "caption",
        records.path,
        "--image-folder",
        records.images,
        "--max-new-tokens",
        2,
        "--model-path",
        workshop.checkpoint,
        "--output",
        output / "c.jsonl",
    )


def read_as_references(workshop: Workshop, records: Written, output: Path) -> None:
    """The predictions are made for these records, so all of them must have references."""
    predictions = output / "p.json"
    read_by_predict(workshop, records, output)
    scores = output / "scores.json"
    call(
        "evaluate",
        predictions,
        "--references",
        records.path,
        "--train-captions",
        records.path,
        "--no-java",
        "--resamples",
        0,
        "--output",
        scores,
    )
    counts = json.loads(scores.read_text())["p"]["counts"]
    assert counts["predictions without a reference"] == 0
    assert counts["references without a prediction"] == 0


Reader = Callable[[Workshop, Written, Path], None]
RECORD_READERS: tuple[Reader, ...] = (
    *(read_by_convert, read_by_clean, read_by_reduce, read_by_inspect, read_by_plan),
    *(read_by_encode, read_by_train, read_by_predict, read_by_caption, read_as_references),
)


def record_pairs() -> list[Any]:
    """Return pairs of a reader and a writer.

    Each reader is paired with one writer per form, the part of a writer's name after the dot (`json`, `shards`, ...).
    Successive readers get different writers of a form. With FUZZ=1, every reader is paired with every writer.
    """
    by_form: dict[str, list[str]] = {}
    for writer in RECORD_WRITERS:
        by_form.setdefault(writer.partition(".")[2], []).append(writer)
    pairs = []
    for number, reader in enumerate(RECORD_READERS):
        for writers in by_form.values():
            chosen = writers if IS_COMPLETE else [writers[number % len(writers)]]
            for writer in chosen:
                pairs.append(pytest.param(reader, writer, id=f"{reader.__name__}-{writer}"))
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize(("reader", "writer"), record_pairs())
def test_records_of_a_writer_are_read_by_a_reader(
    workshop: Workshop, tmp_path: Path, reader: Reader, writer: str
) -> None:
    reader(workshop, workshop.written(writer), tmp_path)


# ---- predictions ----

PREDICTION_WRITERS = (
    "predict.json",
    "predict.jsonl",
    "caption.folder",
    "caption.records",
    "caption.shards",
)


@pytest.mark.slow
@pytest.mark.parametrize("has_references", [False, True])
@pytest.mark.parametrize("writer", PREDICTION_WRITERS)
def test_predictions_of_every_writer_are_read_by_evaluate(
    workshop: Workshop, tmp_path: Path, writer: str, has_references: bool
) -> None:
    predictions = workshop.written(writer)
    options: list[object] = ["--no-java", "--resamples", 0]
    options += ["--image-folder", predictions.images, "--report", tmp_path / "report.html"]
    if has_references:
        source = "download.shards" if "shards" in writer else "convert.json"
        options += ["--references", workshop.written(source).path]
    argv = [str(argument) for argument in ("evaluate", predictions.path, *options)]
    if not has_references and writer in ("caption.folder", "caption.shards"):
        assert llava(argv) == 2, "images alone have no references, so the command must fail"
    else:
        assert llava(argv) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "reader", [read_by_convert, read_by_clean, read_by_reduce, read_by_predict, read_by_train]
)
@pytest.mark.parametrize("writer", ["predict.jsonl", "caption.folder"])
def test_predictions_are_read_as_records(
    workshop: Workshop, tmp_path: Path, reader: Reader, writer: str
) -> None:
    """For example, a small model can be trained on the captions that a large one has generated."""
    reader(workshop, workshop.written(writer), tmp_path)


# ---- checkpoints and scores ----


@pytest.mark.slow
def test_checkpoints_and_scores_are_read_by_the_commands_that_use_them(
    workshop: Workshop, tmp_path: Path
) -> None:
    checkpoint = workshop.checkpoint
    predictions = workshop.written("predict.json")
    scores = tmp_path / "scores.json"
    call(
        "evaluate",
        predictions.path,
        "--model-path",
        checkpoint,
        "--no-java",
        "--output",
        scores,
        "--log",
        checkpoint / "trainer_log.jsonl",
        "--report",
        tmp_path / "report.html",
        "--image-folder",
        predictions.images,
    )
    for form in ("hf", "peft"):
        call(
            "export", checkpoint, "--format", form, "--output", tmp_path / form, "--scores", scores
        )
        call("push", tmp_path / form, "owner/name", "--dry-run")
    call("merge", checkpoint, "--output", tmp_path / "merged")
    call("push", checkpoint, "owner/name", "--dry-run")
    call("import", tmp_path / "hf", "--output", tmp_path / "imported")
    for model in (tmp_path / "merged", tmp_path / "imported"):
        records = workshop.written("convert.json")
        call(
            "caption",
            records.images,
            "--model-path",
            model,
            "--max-new-tokens",
            2,
            "--limit",
            2,
            "--output",
            tmp_path / f"{model.name}.jsonl",
        )
        call("inspect", "--data", records.path, "--model_name_or_path", model)
