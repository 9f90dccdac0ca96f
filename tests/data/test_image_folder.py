"""An image name is resolved by exactly one rule, and never silently leads to the file of another image."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import num_examples

from llava_simplified.data import image_folder
from llava_simplified.data.image_folder import (
    LocatedFile,
    NameMatches,
    OutsideFolderError,
    check_distinct,
    locate_file,
    split_shard_name,
)
from llava_simplified.data.images import ImageError, locate_image, read_image_bytes
from llava_simplified.data.names import AmbiguousNameError


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())  # the content identifies the file
    return folder


@pytest.mark.parametrize(
    ("name", "found", "rule"),
    [
        ("cats/1.jpg", "cats/1.jpg", "exact"),
        ("./cats/1.jpg", "cats/1.jpg", "exact"),
        ("/home/ann/photos/cats/1.jpg", "cats/1.jpg", "suffix"),
        ("/home/ann/dogs/1.jpg", "dogs/1.jpg", "suffix"),
        ("/home/ann/1.jpg", "1.jpg", "suffix"),
        ("photos/cats/1.jpg", "cats/1.jpg", "suffix"),
        (r"C:\photos\cats\1.jpg", "cats/1.jpg", "suffix"),
        ("cats/img_2.jpg", "cats/IMG_2.JPG", "case"),
        ("Cats/img_2.JPG", "cats/IMG_2.JPG", "case"),
        ("/home/ann/cats/Img_2.jpg", "cats/IMG_2.JPG", "case"),
        ("cats/IMG_2", "cats/IMG_2.JPG", "extension"),
        ("img_2", None, ""),
        ("3", "3.jpeg", "extension"),
        ("gone.jpg", None, ""),
        ("birds/2.jpg", None, ""),
    ],
)
def test_name_is_resolved_by_the_first_rule_that_finds_a_file(
    tmp_path: Path, name: str, found: str | None, rule: str
) -> None:
    make_files(tmp_path, "1.jpg", "cats/1.jpg", "dogs/1.jpg", "cats/IMG_2.JPG", "3.jpeg")
    matches = NameMatches()
    if found is None:
        with pytest.raises(ImageError) as error:
            read_image_bytes(name, tmp_path, matches)
        assert error.value.kind == "missing"
        assert not matches.describe()
        return
    assert read_image_bytes(name, tmp_path, matches) == found.encode()
    assert dict(matches.rules) == {rule: 1}
    assert bool(matches.describe()) == (rule != "exact")


def test_exact_name_wins_over_every_other(tmp_path: Path) -> None:
    make_files(tmp_path, "a/b/1.jpg", "b/1.jpg", "1.jpg", "B/1.JPG")
    assert read_image_bytes("a/b/1.jpg", tmp_path) == b"a/b/1.jpg"
    assert read_image_bytes(str(tmp_path / "b/1.jpg"), tmp_path) == b"b/1.jpg"
    assert read_image_bytes("/x/a/b/1.jpg", tmp_path) == b"a/b/1.jpg", "the longest end"


@pytest.mark.parametrize("name", ["img.jpg", "IMG"])
def test_name_that_matches_several_files_is_ambiguous(tmp_path: Path, name: str) -> None:
    make_files(tmp_path, "IMG.JPG", "Img.jpg", "img.JPEG")
    with pytest.raises(ImageError, match="exact name") as error:
        read_image_bytes(name, tmp_path)
    assert error.value.kind == "ambiguous"


def test_two_names_that_lead_to_one_file_are_ambiguous(tmp_path: Path) -> None:
    """cats/1.jpg and dogs/1.jpg cannot both be the image 1.jpg."""
    make_files(tmp_path, "1.jpg", "2.jpg")
    matches = NameMatches()
    assert read_image_bytes("/home/ann/cats/1.jpg", tmp_path, matches)
    assert read_image_bytes("/home/ann/cats/1.jpg", tmp_path, matches), "the same name again"
    with pytest.raises(ImageError, match="cats/1.jpg.*dogs/1.jpg") as error:
        read_image_bytes("/home/ann/dogs/1.jpg", tmp_path, matches)
    assert error.value.kind == "ambiguous"
    names = ["/home/ann/cats/2.jpg", "/home/ann/cats/1.jpg", "/home/ann/cats/1.jpg"]
    check_distinct(lambda: names, tmp_path)
    with pytest.raises(AmbiguousNameError, match="both names lead"):
        check_distinct(lambda: [*names, "/home/ann/dogs/1.jpg"], tmp_path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1.jpg", "gone/1.jpg"),
        ("cats/IMG_2.JPG", "gone/cats/IMG_2.JPG"),
        ("cats/IMG_2.JPG", "cats/img_2.jpg"),
        ("cats/IMG_2.JPG", "cats/IMG_2"),
        ("x/cats/IMG_2", "y/cats/IMG_2.JPG"),
        ("0.tar#a", "gone/0.tar#a"),
    ],
)
def test_image_that_is_gone_is_not_replaced_by_the_file_of_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    make_files(tmp_path, "1.jpg", "cats/IMG_2.JPG", "0.tar")
    monkeypatch.chdir(tmp_path)
    for names in ([first, second], [second, first], [str(tmp_path / first), second]):
        for folder in (tmp_path, Path()):
            matches = NameMatches()
            locate_image(names[0], folder, matches)
            with pytest.raises(ImageError, match="both names lead") as error:
                locate_image(names[1], folder, matches)
            assert error.value.kind == "ambiguous"
            with pytest.raises(AmbiguousNameError, match="both names lead"):
                check_distinct(lambda names=names: names, folder)


def test_exact_names_may_repeat_a_file(tmp_path: Path) -> None:
    make_files(tmp_path, "cats/1.jpg", "dogs/1.jpg", "0.tar")
    names = ["cats/1.jpg", "cats/1.jpg", "./cats/1.jpg", str(tmp_path / "cats/1.jpg"), "dogs/1.jpg"]
    names += ["0.tar#a", "0.tar#b", "0.tar#a"]
    matches = NameMatches()
    for name in names:
        locate_image(name, tmp_path, matches)
    assert dict(matches.rules) == {"exact": len(names)}
    check_distinct(lambda: names, tmp_path)


def test_check_distinct_looks_up_only_files_that_several_names_may_lead_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "cats/1.jpg", "dogs/1.jpg", "2.jpg", "cats/2.jpg", "cats/3.jpg")
    looked_up: list[str] = []

    def look_up(name: str, folder: Path) -> LocatedFile | None:
        looked_up.append(name)
        return locate_file(name, folder)

    monkeypatch.setattr(image_folder, "locate_file", look_up)
    names = ["cats/1.jpg", "dogs/1.jpg", "2.jpg", "cats/2.jpg", "cats/3.jpg", "cats/3.jpg"]
    check_distinct(lambda: names, tmp_path)
    assert looked_up == ["2.jpg", "cats/2.jpg"]
    check_distinct(list, tmp_path)
    # In a folder with too many files to list them, all names with the same last part are looked up.
    looked_up.clear()
    monkeypatch.setattr(image_folder, "_MAX_LISTED_FILES", 1)
    image_folder._cached_names_in.cache_clear()
    check_distinct(lambda: names, tmp_path)
    image_folder._cached_names_in.cache_clear()
    assert looked_up == names[:4]


def test_nothing_outside_of_the_folder_is_found(tmp_path: Path) -> None:
    make_files(tmp_path, "secret.jpg", "images/a.jpg")
    folder = tmp_path / "images"
    for name in ("../secret.jpg", r"..\secret.jpg", "a/../../secret.jpg"):
        with pytest.raises(ImageError) as error:
            read_image_bytes(name, folder)
        assert error.value.kind == "unsafe"
    for name in (str(tmp_path / "secret.jpg"), "/etc/passwd"):
        with pytest.raises(ImageError) as error:
            read_image_bytes(name, folder)
        assert error.value.kind == "unsafe"
        assert name in str(error.value)
    for name in (str(tmp_path), "/gone.jpg", "", "/", "a\0b", "x" * 5000, "/" + "x" * 5000):
        with pytest.raises(ImageError) as error:
            read_image_bytes(name, folder)
        assert error.value.kind == "missing"


def test_existing_absolute_path_never_leads_to_a_file_of_the_same_name(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "images", "1.jpg", "cats/1.jpg", "0.tar")
    outside = make_files(tmp_path / "other", "1.jpg", "cats/1.jpg", "0.tar")
    matches = NameMatches()
    for name in ("1.jpg", "cats/1.jpg", "0.tar#a"):
        path = str(outside / name)
        with pytest.raises(ImageError, match=r"other.*images") as error:
            read_image_bytes(path, folder, matches)
        assert error.value.kind == "unsafe"
        with pytest.raises(OutsideFolderError):
            locate_file(path, folder)
    check_distinct(
        lambda: [str(outside / "1.jpg"), "1.jpg"], folder
    )  # these are two different files
    assert not matches.rules
    # Once the file is gone, the path is treated as a path of another machine.
    (outside / "cats/1.jpg").unlink()
    assert read_image_bytes(str(outside / "cats/1.jpg"), folder, matches) == b"cats/1.jpg"
    assert dict(matches.rules) == {"suffix": 1}
    # A folder at this path is not an image file, so the path is treated in the same way.
    (outside / "cats/1.jpg").mkdir()
    assert read_image_bytes(str(outside / "cats/1.jpg"), folder, matches) == b"cats/1.jpg"


def test_absolute_path_may_lead_to_the_folder_through_links(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "images", "1.jpg", "cats/1.jpg", "link/images/1.jpg")
    make_files(tmp_path, "outside.jpg")
    (tmp_path / "link").symlink_to(folder)
    (folder / "outside.jpg").symlink_to(tmp_path / "outside.jpg")
    matches = NameMatches()
    for name in ("1.jpg", "cats/1.jpg"):
        assert read_image_bytes(str(tmp_path / "link" / name), folder, matches) == name.encode()
        assert read_image_bytes(str(folder / name), tmp_path / "link", matches) == name.encode()
    # The owner of the folder has linked to this file.
    name = str(tmp_path / "link" / "outside.jpg")
    assert read_image_bytes(name, folder, matches) == b"outside.jpg"
    assert dict(matches.rules) == {"exact": 5}


@pytest.mark.parametrize(
    ("name", "looked_up"),
    [
        (r"C:\photos\1.jpg", True),
        (r"\\?\C:\photos\1.jpg", True),
        (r"\photos\1.jpg", True),
        ("/photos/1.jpg", True),
        ("C:1.jpg", False),
        (r"photos\1.jpg", False),
        (r"\\server\share\1.jpg", False),
        ("//server/share/1.jpg", False),
        (r"\\?\UNC\server\share\1.jpg", False),
    ],
)
def test_only_local_paths_of_windows_are_looked_up(
    monkeypatch: pytest.MonkeyPatch, name: str, looked_up: bool
) -> None:
    """Looking up a network path would send the user's credentials to the server that the path names."""
    asked: list[str] = []

    class WindowsPath(PureWindowsPath):
        def is_file(self) -> bool:
            asked.append(str(self))
            return True

    monkeypatch.setattr(image_folder, "Path", WindowsPath)
    assert image_folder.is_existing_path(name) == looked_up
    assert bool(asked) == looked_up


def test_split_shard_name_splits_names_in_archives_only() -> None:
    assert split_shard_name("a/0.tar#b/c#d") == ("a/0.tar#b/c#d", None)
    assert split_shard_name("a/0.tar#b/c") == ("a/0.tar", "b/c")
    assert split_shard_name("photo#3.jpg") == ("photo#3.jpg", None)


NAMES = st.lists(st.sampled_from(["a", "b", "A", "1.jpg", "2.JPG"]), min_size=1, max_size=3)


@pytest.mark.medium
@given(st.lists(NAMES, min_size=1, max_size=6), NAMES)
@settings(max_examples=num_examples(100), deadline=None)
def test_located_file_always_shares_the_end_of_the_name(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]], name: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("images")
    for parts in files:
        path = folder.joinpath(*parts)
        if not any(parent.is_file() for parent in [path, *path.parents]) and not path.is_dir():
            make_files(folder, "/".join(parts))
    try:
        located = locate_file("/".join(name), folder)
    except AmbiguousNameError:
        return
    if located is None:
        return
    parts = located.path.relative_to(folder).parts
    shared = name[len(name) - len(parts) :]
    if located.rule in ("exact", "suffix"):
        assert list(parts) == shared
    else:
        assert [part.casefold() for part in parts[:-1]] == [part.casefold() for part in shared[:-1]]
        assert parts[-1].casefold().startswith(shared[-1].casefold())
