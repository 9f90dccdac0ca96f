"""`llava inspect` shows what training does, and names the rows that training could not use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import CAPTIONS

from llava_simplified.cli import main


def inspect(*arguments: object) -> int:
    return main(["inspect", *map(str, arguments)])


def write(folder: Path, *rows: object) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def row(response: object, **others: object) -> dict[str, object]:
    return {"image": "0.jpg", "instruction": "What?", "response": response, **others}


def table(output: str) -> dict[str, tuple[str, ...]]:
    """The totals: name -> (shown, file)."""
    lines = [line.rsplit(maxsplit=2) for line in output.splitlines()]
    return {line[0].strip(): tuple(line[1:]) for line in lines if len(line) == 3}


def test_a_sample_token_by_token(
    models_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, row("a red car </s>"))
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    tokens = [line for line in lines if len(line) >= 3 and line[0].isdigit()]
    assert tokens[0] == ["0", "<s>", "0", "-"]
    assert ["5", "<image>", "image"] in tokens
    assert tokens[6][1] == r"\n"
    trained = [line for line in tokens if line[-1] == "yes"]
    assert (
        "".join(line[1] for line in trained) == "␣a␣red␣car␣</s></s>"
    )  # the first is text, the last the token
    assert [line[2] for line in trained].count("1") == 1  # the id of </s>
    assert [*map(int, (line[0] for line in tokens))] == list(range(len(tokens)))


def test_an_image_takes_the_tokens_its_tower_gives(
    models_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_folder / "train.json"
    model = (
        "--model_name_or_path",
        models_folder / "mistral",
        "--image_folder",
        data_folder / "images",
    )
    assert (
        inspect("--data", data, *model, "--vision_tower", models_folder / "clip", "--count", 2) == 0
    )
    output = capsys.readouterr().out
    assert "5-20      <image> x 16       image" in output
    assert (
        "0.jpg: 48 x 40 pixels" in output and "train.json row 1" in output and "row 2" not in output
    )
    with_tower = table(output)
    assert with_tower["rows"] == ("2", "12") and with_tower["of images"] == ("32", "192")
    assert (
        inspect(
            "--data", data, *model, "--mm_token_pool", 2, "--vision_tower", models_folder / "clip"
        )
        == 0
    )
    assert table(capsys.readouterr().out)["of images"] == ("12", "48")


def test_a_tower_that_is_not_there_is_said_without_a_traceback(
    models_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, row("a red car"))
    model = ("--model_name_or_path", models_folder / "mistral")
    assert inspect("--data", data, *model, "--vision_tower", tmp_path / "gone") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_totals_are_those_of_the_examples(
    models_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llava_simplified.model.build import load_tokenizer
    from llava_simplified.prompt import Message, Prompt

    prompt = Prompt(load_tokenizer(str(models_folder / "mistral")))
    ask = [Message("user", "<image>\nGenerate a caption of this image:")]
    examples = [prompt.render(ask, CAPTIONS[i % len(CAPTIONS)]) for i in range(12)]
    lengths = [len(example.input_ids) for example in examples]
    trained = sum(label != -100 for example in examples for label in example.labels)

    longest = str(sorted(lengths)[5])
    data = ("--data", data_folder / "train.json", "--model_name_or_path", models_folder / "mistral")
    assert inspect(*data, "--count", 1, "--model_max_length", longest) == 0
    totals = table(capsys.readouterr().out)
    assert totals["examples"] == ("1", "12")
    assert totals["tokens"] == (str(lengths[0]), str(sum(lengths)))
    assert totals["trained"][1] == str(trained)
    assert totals["share trained"][1] == f"{trained / sum(lengths):.1%}"
    assert totals["mean length"][1] == f"{sum(lengths) / 12:.1f}" and totals["longest"][1] == str(
        max(lengths)
    )
    assert totals[f"cut at {longest}"][1] == str(sum(length > int(longest) for length in lengths))

    assert inspect(*data, "--scan", 5) == 0
    output = capsys.readouterr().out
    assert "5 of 12 rows" in output and table(output)["rows"] == ("3", "5")


def test_several_responses_are_several_examples(
    models_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, {"image": "0.jpg", "instruction": "What?", "responses": CAPTIONS})
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 0
    output = capsys.readouterr().out
    assert "(the first of 6 responses)" in output and table(output)["examples"] == ("6", "6")


def test_rows_with_problems_are_named(
    models_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(
        tmp_path,
        row("a cat"),
        row(" "),
        {"image": "0.jpg", "instruction": "What?"},
        row("x", instruction="<image><image>"),
        row(3),
        row("\ud83d"),
    )
    folder = ("--image_folder", tmp_path)
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral", *folder) == 1
    output = capsys.readouterr().out
    assert "rows.json row 0: no image" in output
    assert "rows.json row 1: the answer is empty" in output
    assert "rows.json row 2: no response to train on" in output
    assert "rows.json row 3: 1 image(s), but the text contains <image> 2 time(s)" in output
    assert "rows.json row 4: 'response' must be a string" in output
    assert "rows.json row 5: this is not Unicode text" in output
    assert table(output)["rows with a problem"] == ("3", "5")


def test_many_problems_are_counted(
    models_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, *[row("")] * 30)
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 1
    output = capsys.readouterr().out
    assert (
        output.count("the answer is empty") == 10
        and "... and 20 more rows with a problem" in output
    )


def test_colours_tell_what_is_trained_and_data_commands_no_terminal(
    models_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    data = write(tmp_path, row("[red]\x1b[2J\u202ecat[/red]", image="\x1b[2J.jpg"))
    assert inspect("--data", data, "--model_name_or_path", models_folder / "mistral") == 0
    output = capsys.readouterr().out
    assert "\x1b[2J" not in output and "\u202e" not in output and r"\x1b[2J.jpg" in output
    green = [line for line in output.splitlines() if "\x1b[1;32m" in line]
    assert len(green) > 5 and all("yes" in line for line in green)
    magenta = [line for line in output.splitlines() if "\x1b[35m" in line]
    assert len(magenta) == 1 and "<image>" in magenta[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.json", "--model_name_or_path", "x"], "missing.json"),
        (["--data", "{rows}", "--model_name_or_path", "no/where"], "no/where"),
        (
            ["--data", "{rows}", "--model_name_or_path", "{model}", "--vision_tower", "{model}"],
            "mistral",
        ),
    ],
)
def test_what_is_not_there_is_one_line(
    arguments: list[str],
    message: str,
    models_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"rows": write(tmp_path, row("a cat")), "model": models_folder / "mistral"}
    assert inspect(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
