"""Tests of `llava inspect`: it shows what training does, and names the rows that cannot be trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny import CAPTIONS, MISTRAL_TEMPLATE, make_tokenizer
from transformers import AutoTokenizer

from llava_simplified.cli import main

Output = pytest.CaptureFixture[str]


def inspect(*arguments: object) -> int:
    return main(["inspect", *map(str, arguments)])


def write_rows(folder: Path, *rows: object) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def make_row(response: object, **changes: object) -> dict[str, object]:
    return {"image": "0.jpg", "instruction": "What?", "response": response, **changes}


def read_totals(output: str) -> dict[str, tuple[str, ...]]:
    """Return the table of totals: name -> (of the shown samples, of the file)."""
    totals = {}
    for line in output.splitlines():
        cells = line.rsplit(maxsplit=2)
        if len(cells) == 3:
            name, shown, scanned = cells
            totals[name.strip()] = (shown, scanned)
    return totals


# ---- samples ----


def test_inspect_shows_both_answers_of_a_pair(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    row = make_row("", chosen="a red car", rejected="two dogs")
    del row["response"]
    data = write_rows(tmp_path, row, {**row, "rejected": "a red car"})
    options = ["--data", data, "--model_name_or_path", models_folder / "mistral"]
    assert inspect(*options, "--vision_tower", models_folder / "clip") == 1
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    tokens = [line for line in lines if len(line) == 4 and line[0].isdigit()]
    answers = [[line for line in tokens if line[-1] == kind] for kind in ("yes", "rejected")]
    texts = ["".join(line[1] for line in answer) for answer in answers]
    assert texts == ["␣a␣red␣car</s>", "␣two␣dogs</s>"]
    # Both answers follow the same prompt.
    assert answers[0][0][0] == answers[1][0][0]
    assert "row 1: both answers of the pair are equal" in output
    totals = read_totals(output)
    assert totals["preference pairs"] == ("1", "1")
    assert totals["examples"] == ("2", "2")


def test_inspect_shows_a_sample_token_by_token(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    data = write_rows(tmp_path, make_row("a red car </s>"))
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    tokens = [line for line in lines if len(line) >= 3 and line[0].isdigit()]
    assert tokens[0] == ["0", "<s>", "0", "-"]
    assert ["5", "<image>", "image"] in tokens
    assert tokens[6][1] == r"\n"
    trained = [line for line in tokens if line[-1] == "yes"]
    # The first </s> is text of the caption, the second is the end token.
    assert "".join(line[1] for line in trained) == "␣a␣red␣car␣</s></s>"
    assert [line[2] for line in trained].count("1") == 1, "expected the id of the end token once"
    assert [int(line[0]) for line in tokens] == list(range(len(tokens)))


def test_inspect_counts_the_tokens_of_the_vision_tower(
    models_folder: Path, data_folder: Path, capsys: Output
) -> None:
    arguments = [
        *("--data", data_folder / "train.json"),
        *("--model_name_or_path", models_folder / "mistral"),
        *("--image_folder", data_folder / "images"),
        *("--vision_tower", models_folder / "clip"),
    ]
    assert inspect(*arguments, "--count", 2) == 0
    output = capsys.readouterr().out
    assert "5-20      <image> x 16       image" in output
    assert "0.jpg: 48 x 40 pixels" in output
    assert "train.json row 1" in output
    assert "row 2" not in output
    totals = read_totals(output)
    assert totals["rows"] == ("2", "12")
    assert totals["of images"] == ("32", "192")

    assert inspect(*arguments, "--mm_token_pool", 2) == 0
    assert read_totals(capsys.readouterr().out)["of images"] == ("12", "48")


def test_inspect_colors_trained_tokens_and_escapes_control_characters(
    models_folder: Path,
    tmp_path: Path,
    capsys: Output,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caption contains terminal commands, rich's markup and a character that reverses the writing direction."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    data = write_rows(tmp_path, make_row("[red]\x1b[2J\u202ecat[/red]", image="\x1b[2J.jpg"))
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 0
    output = capsys.readouterr().out
    assert "\x1b[2J" not in output
    assert "\u202e" not in output
    assert r"\x1b[2J.jpg" in output
    green = [line for line in output.splitlines() if "\x1b[1;32m" in line]
    assert len(green) > 5
    assert all("yes" in line for line in green)
    (magenta,) = [line for line in output.splitlines() if "\x1b[35m" in line]
    assert "<image>" in magenta


def test_inspect_shows_the_image_token_of_the_template(tmp_path: Path, capsys: Output) -> None:
    """The template writes the image token, which the image replaces; `<image>` is removed from the text."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|start|>", "<|picture|>", "<|stop|>"], special_tokens=True)
    tokenizer.chat_template = MISTRAL_TEMPLATE.replace(
        "[INST] '", "[INST] <|start|><|picture|><|stop|>'"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model", image_token="<|picture|>")
    loaded.save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path, make_row("a cat", image="a.jpg"))
    assert inspect("--data", data, "--model_name_or_path", tmp_path / "model") == 0
    lines = capsys.readouterr().out.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.rstrip().endswith("image")]
    for number, token in ((-1, "<|start|>"), (0, "<|picture|>"), (1, "<|stop|>")):
        assert token in lines[place + number].split()
    assert not any("<image>" in line for line in lines)


# ---- totals ----


def test_inspect_adds_up_the_examples(
    models_folder: Path, data_folder: Path, capsys: Output
) -> None:
    from llava_simplified.model.build import load_tokenizer
    from llava_simplified.prompt import Message, Prompt

    prompt = Prompt(load_tokenizer(str(models_folder / "mistral")))
    turns = [Message("user", "<image>\nGenerate a caption of this image:")]
    examples = [prompt.render(turns, CAPTIONS[i % len(CAPTIONS)]) for i in range(12)]
    lengths = [len(example.input_ids) for example in examples]
    labels = [label for example in examples for label in example.labels]
    num_trained = sum(label != -100 for label in labels)

    limit = sorted(lengths)[5]
    arguments = [
        *("--data", data_folder / "train.json"),
        *("--model_name_or_path", models_folder / "mistral"),
    ]
    assert inspect(*arguments, "--count", 1, "--model_max_length", limit) == 0
    totals = read_totals(capsys.readouterr().out)
    assert totals["examples"] == ("1", "12")
    assert totals["tokens"] == (str(lengths[0]), str(sum(lengths)))
    assert totals["trained"][1] == str(num_trained)
    assert totals["share trained"][1] == f"{num_trained / sum(lengths):.1%}"
    assert totals["mean length"][1] == f"{sum(lengths) / 12:.1f}"
    assert totals["longest"][1] == str(max(lengths))
    num_cut = sum(length > limit for length in lengths)
    assert totals[f"cut at {limit}"][1] == str(num_cut)

    assert inspect(*arguments, "--scan", 5) == 0
    output = capsys.readouterr().out
    assert "5 of 12 rows" in output
    assert read_totals(output)["rows"] == ("3", "5")


def test_inspect_counts_each_response_as_an_example(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    row = {"image": "0.jpg", "instruction": "What?", "responses": CAPTIONS}
    data = write_rows(tmp_path, row)
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 0
    output = capsys.readouterr().out
    assert "(the first of 6 responses)" in output
    assert read_totals(output)["examples"] == ("6", "6")


# ---- problems ----


def test_inspect_names_rows_with_problems(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    problems = [
        (make_row("a cat"), "0.jpg"),  # the image is missing
        (make_row(" "), "empty"),
        ({"image": "0.jpg", "instruction": "What?"}, "no response"),
        (make_row("x", instruction="<image><image>"), "<image>"),
        (make_row(3), "'response'"),
        (make_row("\ud83d"), "Unicode"),
    ]
    data = write_rows(tmp_path, *(row for row, _ in problems))
    arguments = [
        *("--data", data),
        *("--model_name_or_path", models_folder / "mistral"),
        *("--image_folder", tmp_path),
    ]
    assert inspect(*arguments) == 1
    output = capsys.readouterr().out
    lines = output.splitlines()
    for number, (_, reason) in enumerate(problems):
        (line,) = [line for line in lines if line.startswith(f"rows.json row {number}: ")]
        assert reason in line
    assert read_totals(output)["problems"] == ("3", "5")


def test_inspect_opens_the_images_of_the_given_folder(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    """Without --image_folder, it is unclear which of the two images is meant, and the error names the option."""
    data = write_rows(tmp_path, make_row("a cat"))
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 32)).save(tmp_path / name / "0.jpg")
    arguments = ["--data", data, "--model_name_or_path", models_folder / "mistral"]
    assert inspect(*arguments) == 2
    assert "--image_folder" in capsys.readouterr().err
    assert inspect(*arguments, "--image_folder", tmp_path / "val") == 0
    assert "40 x 32" in capsys.readouterr().out


def test_inspect_reads_the_sidecars_that_are_chosen(
    models_folder: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (40, 32)).save(folder / "0.jpg")
    (folder / "0.txt").write_text("a red car")
    (folder / "0.caption").write_text("two dogs")
    arguments = ["--data", folder, "--model_name_or_path", models_folder / "mistral"]
    assert inspect(*arguments) == 2
    assert "--sidecar txt" in capsys.readouterr().err
    assert inspect(*arguments, "--sidecar", "txt") == 0
    assert "car" in capsys.readouterr().out


def test_inspect_names_prompts_that_leave_no_room_for_an_answer(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    """Training sets these rows aside; a long answer is only cut."""
    rows = [make_row("a cat " * 60), make_row("x", instruction="<image>" + "long " * 60)]
    data = write_rows(tmp_path, *rows)
    arguments = ["--data", data, "--model_name_or_path", models_folder / "mistral"]
    assert inspect(*arguments) == 0
    capsys.readouterr()
    assert inspect(*arguments, "--model_max_length", 60) == 1
    output = capsys.readouterr().out
    assert "row 1: the prompt leaves no room" in output
    totals = read_totals(output)
    assert totals["problems"][1] == "1"
    assert totals["cut at 60"][1] == "1"


def test_inspect_names_ten_problems_and_counts_the_others(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    data = write_rows(tmp_path, *[make_row("")] * 30)
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 1
    lines = capsys.readouterr().out.splitlines()
    named = [line for line in lines if line.startswith("rows.json row ")]
    assert len(named) == 10
    assert all("empty" in line for line in named)
    assert any("20 more problems" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "missing.json", "--model_name_or_path", "x"], "missing.json"),
        (["--data", "{rows}", "--model_name_or_path", "no/where"], "no/where"),
        # As vision tower: a language model, and a folder that does not exist.
        (
            ["--data", "{rows}", "--model_name_or_path", "{model}", "--vision_tower", "{model}"],
            "mistral",
        ),
        (
            ["--data", "{rows}", "--model_name_or_path", "{model}", "--vision_tower", "{gone}"],
            "gone",
        ),
    ],
)
def test_inspect_reports_missing_and_unsuitable_models_without_a_traceback(
    arguments: list[str], named: str, models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    paths = {
        "rows": write_rows(tmp_path, make_row("a cat")),
        "model": models_folder / "mistral",
        "gone": tmp_path / "gone",
    }
    assert inspect(*(argument.format(**paths) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error


def test_inspect_names_a_token_without_a_row_in_the_embedding_table(
    models_folder: Path, tmp_path: Path, capsys: Output
) -> None:
    data = write_rows(tmp_path, make_row("a red car"))
    model = tmp_path / "wide"
    shutil.copytree(models_folder / "mistral", model)
    config = json.loads((model / "config.json").read_text())
    for rows, status in ((config["vocab_size"], 0), (50, 1)):
        (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
        assert inspect("--data", data, "--model_name_or_path", model) == status
    output = capsys.readouterr().out
    assert "has the id 50, but the embedding table has only 50 rows" in output
