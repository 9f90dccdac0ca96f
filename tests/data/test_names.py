"""Names of images are matched exactly, or by the longest common end of complete path parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_simplified.data.names import (
    AmbiguousNameError,
    NameIndex,
    match_name,
    match_names,
    name_parts,
    name_suffixes,
)

# There are few different parts, so that names often have the same ends.
NAMES = st.lists(st.sampled_from(["a", "b", "1.jpg"]), min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("1.jpg", ("1.jpg",)),
        ("/home/ann/1.jpg", ("home", "ann", "1.jpg")),
        ("./cats//1.jpg", ("cats", "1.jpg")),
        ("../photos/1.jpg", ("photos", "1.jpg")),
        ("a/b/../1.jpg", ("a", "1.jpg")),
        ("C:\\photos\\1.jpg", ("photos", "1.jpg")),
        ("sub/0.tar#cats/1", ("sub", "0.tar#cats/1")),
        ("rows.parquet#7", ("rows.parquet#7",)),
        ("a#b/1.jpg", ("a#b", "1.jpg")),
        ("cafe\u0301/1.jpg", ("caf\u00e9", "1.jpg")),
        ("half \ud83d/1.jpg", ("half \ud83d", "1.jpg")),
        ("", ()),
        ("..", ()),
    ],
)
def test_name_parts_ignores_how_a_path_is_written(name: str, parts: tuple[str, ...]) -> None:
    assert name_parts(name) == parts


def test_name_suffixes_yields_the_longest_first() -> None:
    assert list(name_suffixes("/a/b/1.jpg")) == [("a", "b", "1.jpg"), ("b", "1.jpg"), ("1.jpg",)]


@pytest.mark.parametrize(
    ("name", "candidates", "found", "rule"),
    [
        ("cats/1.jpg", ["1.jpg", "cats/1.jpg", "x/cats/1.jpg"], "cats/1.jpg", "exact"),
        ("./cats/1.jpg", ["1.jpg", "cats/1.jpg", "x/cats/1.jpg"], "cats/1.jpg", "exact"),
        ("/home/ann/cats/1.jpg", ["1.jpg", "cats/1.jpg"], "cats/1.jpg", "suffix"),
        ("cats/1.jpg", ["dogs/1.jpg", "x/cats/1.jpg"], "x/cats/1.jpg", "suffix"),
        ("cats/1.jpg", ["1.jpg", "x/cats/1.jpg"], "x/cats/1.jpg", "suffix"),
        ("D:\\cats\\1.jpg", ["cats/1.jpg"], "cats/1.jpg", "exact"),  # a drive is a root
        ("D:\\x\\cats\\1.jpg", ["cats/1.jpg"], "cats/1.jpg", "suffix"),
        ("x/0.tar#1", ["0.tar#1", "1"], "0.tar#1", "suffix"),
    ],
)
def test_match_name_prefers_the_longest_suffix(
    name: str, candidates: list[str], found: str, rule: str
) -> None:
    assert match_name(name, candidates) == (found, rule)


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        ("cats/1.jpg", "dogs/1.jpg"),
        ("my_cats/1.jpg", "cats/1.jpg"),
        ("11.jpg", "1.jpg"),
        ("1.jpg", "1.png"),
        ("0.tar#cats/1.jpg", "1.jpg"),
        ("0.tar#1", "1.tar#1"),
        ("", "1.jpg"),
    ],
)
def test_match_name_does_not_match_another_image(name: str, candidate: str) -> None:
    assert match_name(name, [candidate]) is None
    assert match_name(candidate, [name]) is None


def test_match_name_rejects_an_ambiguous_name() -> None:
    with pytest.raises(AmbiguousNameError, match=r"'1\.jpg' matches 2 .*'cats/1\.jpg', 'dogs/1"):
        match_name("1.jpg", ["cats/1.jpg", "dogs/1.jpg"])


def test_match_names_rejects_two_images_that_match_one_name() -> None:
    index = NameIndex(["1.jpg"])
    with pytest.raises(AmbiguousNameError, match=r"'cats/1\.jpg' and 'dogs/1\.jpg'.*'1\.jpg'"):
        match_names(["cats/1.jpg", "dogs/1.jpg"], index)
    # Add the same image in another spelling, and a name without a match.
    names = ["cats/1.jpg", "./cats/1.jpg", "cats/1.jpg", "2.jpg"]
    assert list(match_names(names, index)) == ["cats/1.jpg", "./cats/1.jpg"]


@given(name=NAMES, candidates=st.lists(NAMES, max_size=6))
def test_match_name_equals_a_comparison_with_every_candidate(
    name: str, candidates: list[str]
) -> None:
    def shared(candidate: str) -> int:
        """Return the number of shared parts if one name is the end of the other, else 0."""
        ours, theirs = name_parts(name), name_parts(candidate)
        length = min(len(ours), len(theirs))
        return length if ours[-length:] == theirs[-length:] else 0

    distinct = set(candidates)
    longest = max(map(shared, distinct), default=0)
    best = {candidate for candidate in distinct if shared(candidate) == longest}
    if name in distinct:
        assert match_name(name, candidates) == (name, "exact")
    elif longest == 0:
        assert match_name(name, candidates) is None
    elif len(best) == 1:
        assert match_name(name, candidates) == (best.pop(), "suffix")
    else:
        with pytest.raises(AmbiguousNameError):
            match_name(name, candidates)
