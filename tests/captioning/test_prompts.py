"""Tests of prompt files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llava_simplified.captioning.prompts import (
    WeightedPrompt,
    choose_prompt,
    fill_prompt,
    prompts_use_tags,
    read_prompt_file,
)

PROMPTS = (WeightedPrompt(3, "a"), WeightedPrompt(0, "never"), WeightedPrompt(1, "b"))


def test_read_prompt_file_reads_weights_comments_and_windows_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b"\xef\xbb\xbf# a comment\r\n3 | Describe it.\r\n\r\n  .5|What | who?\r\n4 dogs | cats?\r\n"
        + "{tags}\u2028{name}".encode()
    )
    prompts = read_prompt_file(path)
    assert prompts == (
        (3.0, "Describe it."),
        (0.5, "What | who?"),
        (1.0, "4 dogs | cats?"),
        (1.0, "{tags}\u2028{name}"),
    )
    assert prompts_use_tags(prompts)
    assert not prompts_use_tags(prompts[:2])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "no prompt"),
        (b"# only\n", "no prompt"),
        (b"0 | a\n", "above 0"),
        (b"a\n2 | \n", "line 2"),
        (b"Describe {image}", "line 1.*{name}"),
        (b"\xff\xfea", "UTF-8"),
        (b"a\n1,5 | b\n", "line 2.*'1,5'"),
        (b"-1 | a\n", "line 1.*'-1'"),
        (b"1e3|a\n", "'1e3'"),
        (b" 50 % | a\n", "'50 %'"),
    ],
)
def test_read_prompt_file_refuses_invalid_files(
    tmp_path: Path, contents: bytes, message: str
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"--prompt-file .*prompts.txt.*{message}"):
        read_prompt_file(path)


def test_read_prompt_file_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--prompt-file"):
        read_prompt_file(tmp_path / "missing.txt")


def test_choose_prompt_follows_the_weights() -> None:
    names = [f"{number}.jpg" for number in range(4000)]
    counts = Counter(choose_prompt(PROMPTS, name, 0).text for name in names)
    assert set(counts) == {"a", "b"}
    assert abs(counts["a"] / 4000 - 0.75) < 0.03  # four standard deviations


def test_choose_prompt_depends_on_seed_and_image_only() -> None:
    names = [f"{number}.jpg" for number in range(50)]
    chosen = [choose_prompt(PROMPTS, name, 1) for name in names]
    assert [choose_prompt(PROMPTS, name, 1) for name in reversed(names)] == chosen[::-1]
    assert [choose_prompt(PROMPTS, name, 2) for name in names] != chosen
    # These are the choices of the first version. A job that it started must continue with the same prompts.
    assert "".join(prompt.text for prompt in chosen[:8]) == "abbaaaaa"


def test_fill_prompt_fills_in_fields_without_adding_placeholders() -> None:
    prompt = WeightedPrompt(1, "<image> {name} in {folder}: {tags}")
    assert fill_prompt(prompt, "dogs/a.jpg", "/photos", "big, red") == (
        "<image> a in dogs: big, red"
    )
    # "<image>" in a file name must not become a placeholder of the prompt.
    assert fill_prompt(prompt, "<image>.jpg", "/photos", "").count("<image>") == 1
    assert fill_prompt(WeightedPrompt(1, "Tags: big, {tags}"), "a.jpg", "/p") == "Tags: big"
