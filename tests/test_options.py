"""Tests of command-line options, generated from the parsers of all commands."""

from __future__ import annotations

import argparse
import logging
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_simplified.cli import COMMANDS, resolve, run_command
from llava_simplified.options import (
    CommandParser,
    configure_logging,
    escape_control_characters,
    normalize_spelling,
)

TRAINING_COMMANDS = {"train", "encode", "plan"}  # their texts describe training

# Options that have another meaning or default in some commands, and why.
DIFFERENT_BY_COMMAND = {
    "--concurrency": "requests for images, or for captions",
    "--retries": "of an image, or of a caption",
    "--data-path": "records to caption, or records that have been captioned",
    "--reward": "the demo's reinforcement learning, or the rewards that choose pairs",
    "--output": "every command has its own kind of output",
    "--temperature": "predictions are sampled, as in LLaVA; other captions are greedy",
    "--trials": "predictions have three captions per image, as in LLaVA",
    "--num-return-sequences": "another name of --trials",
    "--model-path": "optional for the report of llava evaluate",
    "--model-base": "llava import reads checkpoints of other codebases",
    "--vision-tower": "llava import reads checkpoints of other codebases",
    "--image-aspect-ratio": "llava import takes it from the source by default",
    "--instruction": "llava import stores the default instruction",
    "--template": "llava import stores the template",
    "--seed": "a bootstrap in llava evaluate",
    "--image-folder": "llava convert keeps only rows whose image is there",
    "--split": "of the rows in llava convert, of the benchmark in llava benchmark",
    "--count": "samples in llava inspect, records in llava reduce",
    "--limit": "the demo counts images",
    "--cache-dir": "llava doctor reports its disk space",
    "--batch-size": "llava serve counts sequences",
    "--timeout": "of a request in llava serve, of an image in llava download",
}


def build(name: str) -> CommandParser:
    parser: CommandParser = resolve(COMMANDS[name].parser)()
    return parser


def options_of(name: str) -> list[argparse.Action]:
    return [action for action in build(name)._actions if action.option_strings]


def example_value(action: argparse.Action) -> list[str]:
    """Return command-line arguments that an option accepts as its value."""
    if action.nargs == 0:
        return []
    if action.choices:
        return [str(next(iter(action.choices)))]
    if action.type in (int, float):
        return ["1"]
    return ["x"]


def required_arguments(parser: argparse.ArgumentParser, without: argparse.Action) -> list[str]:
    """Return the shortest command line that a parser accepts, without one option."""
    argv = []
    for action in parser._actions:
        if not action.option_strings and action.nargs not in ("?", "*"):
            argv += example_value(action)
        elif action.required and action.dest != without.dest:
            argv += [action.option_strings[0], *example_value(action)]
    for group in parser._mutually_exclusive_groups:
        if group.required and without not in group._group_actions:
            action = group._group_actions[0]
            argv += [action.option_strings[0], *example_value(action)]
    return argv


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_accepted_in_both_spellings(name: str) -> None:
    parser = build(name)
    for action in parser._actions:
        if action.dest in ("help", "version", "verbose", "quiet"):
            continue
        for option in action.option_strings:
            if not option.startswith("--"):
                continue
            for spelling in {option.replace("_", "-"), "--" + option[2:].replace("-", "_")}:
                argv = required_arguments(parser, action)
                args = parser.parse_args([*argv, spelling, *example_value(action)])
                assert hasattr(args, action.dest), spelling


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_misspelt_options_suggest_the_nearest(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Abbreviations are refused too. They are reported even if required options are missing."""
    parser = build(name)
    for action in options_of(name):
        option = action.option_strings[-1]
        if len(option) < 6:
            continue
        for misspelt in (option[:-1], f"{option[:4]}x{option[4:]}"):
            with pytest.raises(SystemExit) as exit_:
                parser.parse_args([misspelt])
            assert exit_.value.code == 2
            printed = capsys.readouterr().err
            assert f"unknown option {misspelt}; did you mean --" in printed


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_has_a_help_text(name: str) -> None:
    parser = build(name)
    assert parser.prog == f"llava {name}"
    assert parser.description
    for action in parser._actions:
        assert action.help, action.dest
        # Help texts are phrases, not sentences.
        assert not action.help.endswith("."), f"llava {name} {action.dest}: ends with a full stop"
    parser.format_help()


def test_options_shared_by_commands_have_one_help_text_and_default() -> None:
    """An option has one help text and one default; training commands have their own."""
    seen: dict[str, set[Any]] = defaultdict(set)
    for name in sorted(COMMANDS):
        if name in TRAINING_COMMANDS:
            continue
        for action in options_of(name):
            # A default that is described in words, such as "the current folder", may differ.
            text = re.sub(r" \(default: .*\)", "", action.help or "")
            for option in action.option_strings:
                if option not in DIFFERENT_BY_COMMAND:
                    seen[option].add((text, str(action.default)))
    different = {option: texts for option, texts in seen.items() if len(texts) > 1}
    assert not different


# ---- CommandParser ----


@pytest.fixture
def parser() -> CommandParser:
    parser = CommandParser("llava test", "Test.")
    parser.add_argument("source")
    parser.add_argument("--image-folder")
    parser.add_argument("--lora_r", type=int)
    return parser


def test_parser_accepts_values_with_equals_signs_and_dashes(parser: CommandParser) -> None:
    args = parser.parse_args(["x", "--image_folder=a_b-c=d", "--lora-r=8"])
    assert (args.image_folder, args.lora_r) == ("a_b-c=d", 8)
    assert parser.parse_args(["--", "--image_folder"]).source == "--image_folder"
    assert parser.parse_args(["x", "--image-folder", "--two words"]).image_folder == "--two words"


def test_parser_reports_a_misspelling_before_what_is_missing(
    parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--image-foldr", "x"])
    printed = capsys.readouterr().err
    assert "--image-folder" in printed
    assert "source" not in printed
    assert "llava test --help" in printed


def test_parser_refuses_an_extra_argument(
    parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["x", "stray"])
    assert "'stray'" in capsys.readouterr().err


def test_normalize_spelling_keeps_unknown_options_and_values() -> None:
    argv = ["--lora-r", "a_b", "--no_such", "--", "--lora-r"]
    expected = ["--lora_r", "a_b", "--no_such", "--", "--lora-r"]
    assert normalize_spelling(argv, ["--lora_r"]) == expected


@pytest.mark.parametrize(
    ("argv", "level"),
    [([], logging.INFO), (["--verbose"], logging.DEBUG), (["--quiet"], logging.WARNING)],
)
def test_parser_sets_the_log_level(
    parser: CommandParser, argv: list[str], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    args = parser.parse_args(["x", *argv])
    assert logging.getLogger("llava_simplified").level == level
    assert not hasattr(args, "verbose")
    assert ("TQDM_DISABLE" in os.environ) == (argv == ["--quiet"])


def test_configure_logging_writes_each_message_once_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("llava_simplified.test")
    configure_logging(verbose=True)
    configure_logging()
    logger.info("a message")
    logger.debug("a detail")
    captured = capsys.readouterr()
    assert captured.err == "a message\n"
    assert captured.out == ""


# ---- help texts ----


def test_help_texts_do_not_write_out_numeric_defaults() -> None:
    """Defaults are inserted with %(default)s. A default that is written out could differ from the real one."""
    for name in sorted(COMMANDS):
        if name in TRAINING_COMMANDS:
            continue
        for action in options_of(name):
            stated = re.search(r"\(default: ([\d.]+)\)", action.help or "")
            assert not stated, f"llava {name} {action.option_strings[0]}: write %(default)s"


# ---- control characters, which a terminal would execute ----

ATTACK = "\x1b]0;title\x07\x1b[2J\x9b31m\rover\x08\u202egpj\ud83d"


@given(st.text(st.characters(codec=None)))
def test_escape_control_characters_leaves_text_and_no_controls(text: str) -> None:
    escaped = escape_control_characters(text)
    categories = {
        unicodedata.category(character) for character in escaped.replace("\n", "").replace("\t", "")
    }
    assert not categories & {"Cc", "Cs"}
    printable = "".join(character for character in text if character.isprintable())
    assert escape_control_characters(printable) == printable
    assert escape_control_characters(escaped) == escaped


def test_errors_and_logs_do_not_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("convert", [str(tmp_path / ATTACK), "--output", "x.json"]) == 2
    with pytest.raises(SystemExit):
        run_command("convert", ["a", "--output", "b", ATTACK])
    configure_logging()
    logger = logging.getLogger("llava_simplified.test")
    # Leave out the surrogate: pytest captures the log, and pytest-xdist cannot send a text with a surrogate.
    logged = ATTACK.removesuffix("\ud83d")
    logger.error("image %s", logged)
    try:
        raise ValueError(logged)
    except ValueError:
        logger.exception("failed")
    printed = capsys.readouterr().err
    assert not set("\x1b\x07\x9b\r\x08\u202e") & set(printed)
    assert printed.count(r"\x1b]0;title") >= 4


# ---- training ----


@pytest.mark.parametrize("value", ["no", "FALSE", "f", "0"])
def test_old_boolean_options_accept_every_spelling_of_false(value: str) -> None:
    from llava_simplified.arguments import parse_arguments

    argv = ["--group_by_length", value, "--mm_use_im_start_end", value]
    _, _, training = parse_arguments(argv)
    assert training.train_sampling_strategy == "random"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"group_by_length: off", "--group_by_length off: expected True or False"),
        (b"run_name: caf\xe9", r"config\.yaml: not a YAML file"),
        (b"config: other.yaml", r"config\.yaml: a file cannot name another one"),
        (b"lora_r: [8, 16]", "unexpected argument '16'"),
    ],
)
def test_training_names_what_is_wrong_with_a_config(
    tmp_path: Path, content: bytes, message: str
) -> None:
    from llava_simplified.arguments import parse_arguments

    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(path)])


def test_log_level_of_training_can_be_set_in_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llava_simplified.arguments import parse_arguments

    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = tmp_path / "config.yaml"
    path.write_text("quiet: true")
    parse_arguments(["--config", str(path)])
    assert logging.getLogger("llava_simplified").level == logging.WARNING
    parse_arguments(["--config", str(path), "--quiet", "false"])
    assert logging.getLogger("llava_simplified").level == logging.INFO
