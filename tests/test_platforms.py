"""Windows and macOS: missing parts of Python, file names, consoles, Apple GPUs.

`windows_like` runs our code as on Windows. CI runs the quick tests on both systems.
"""

from __future__ import annotations

import asyncio
import functools
import http.server
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import pytest
import torch
import windows_like
from cli_process import ForkedProcess, fork_process
from hypothesis import given
from hypothesis import strategies as st

from llava_simplified import arguments, cli, extras, jobs, options, workers
from llava_simplified.captioning import inputs, sidecars
from llava_simplified.data import image_folder, names
from llava_simplified.data.shards import ShardWriter, read_shard_image
from llava_simplified.training import dry_run, kernels

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "llava_simplified").rglob("*.py"))
WINDOWS_SYS = windows_like.MODULES["sys"]
WINDOWS_OS = windows_like.MODULES["os"]

# Names that Windows lacks, and for which the code has a replacement there.
OPTIONAL_USES = {
    ("jobs.py", "os.pread"),
    ("workers.py", "os.sched_getaffinity"),
    ("process_memory.py", "resource"),
    ("download_shard.py", "resource"),
}


# ---- parts of Python that Windows lacks ----


USES = re.compile(r"\b(os|signal|sys)\.(\w+)")
IMPORTS = re.compile(r"^ *(?:import|from) ([\w.]+)(?: import (.*))?", re.MULTILINE)
TEXT_FILES = re.compile(r"\.(?:read|write)_text\((.*)")


def uses_of_posix(path: Path) -> set[tuple[str, str]]:
    """Return the names in a file that Windows does not have."""
    text = path.read_text(encoding="utf-8")
    found = {f"{module}.{name}" for module, name in USES.findall(text)}
    for module, imported in IMPORTS.findall(text):
        found.add(module)
        found.update(f"{module}.{name.strip()}" for name in imported.split(","))
    missing = set(windows_like.MISSING_MODULES)
    for module, attributes in windows_like.MISSING_ATTRIBUTES.items():
        missing.update(f"{module}.{name}" for name in attributes)
    return {(path.name, name) for name in found & missing}


def test_posix_names_are_used_only_where_there_is_a_replacement() -> None:
    assert set().union(*map(uses_of_posix, SOURCES)) == OPTIONAL_USES


def test_text_files_have_an_encoding() -> None:
    """The default encoding of Windows depends on its language settings."""
    for path in SOURCES:
        for call in TEXT_FILES.findall(path.read_text(encoding="utf-8")):
            assert "encoding" in call or "utf-8" in call, f"{path}: no encoding in {call}"


def run_as_on_windows(*arguments: object, folder: Path) -> None:
    environment = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # The encoding of a pipe in Western Europe.
        "PYTHONIOENCODING": "cp1252",
        "PYTHONUTF8": "0",
    }
    script = ROOT / "tests" / "windows_like.py"
    process = ForkedProcess([script, *arguments], folder, environment=environment)
    status = process.wait(300)
    assert status == 0, process.stdout + process.stderr


@pytest.mark.medium
def test_every_module_is_imported_without_posix() -> None:
    process = fork_process(windows_like.import_everything)
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def mirror(data_folder: Path, tmp_path: Path) -> Iterator[str]:
    """Serve the images of `data_folder`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(data_folder / "images"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_journeys_work_without_posix_and_with_spawned_workers(
    models_folder: Path, data_folder: Path, mirror: str, tmp_path: Path
) -> None:
    """Download, clean, convert, train one step and caption; with a worker process if the command supports it."""
    lines = [f"a caption, 漢字 {number}\t{mirror}/{number}.jpg\n" for number in range(8)]
    (tmp_path / "urls.tsv").write_text("".join(lines), encoding="utf-8")
    folder = tmp_path / "漢字"
    shutil.copytree(data_folder / "images", folder)
    rows = [json.dumps({"image": rf"D:\here\{n}.jpg", "caption": "c"}) for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    tower = models_folder / "clip"
    run_as_on_windows(
        *("download", "urls.tsv", "--output", "cc", "--allow-private", "--workers", "1"),
        *("--", "clean", "cc", "--vision_tower", tower, "--output", "clean.jsonl"),
        *("--compact", "small", "--compact-size", "36", "--workers", "1"),
        *("--", "convert", "rows.jsonl", "--output", "rows.json", "--image-folder", folder),
        *("--", "train", "--model_name_or_path", models_folder / "mistral"),
        *("--vision_tower", tower, "--train_data_path", "clean.jsonl"),
        *("--train_image_folder", "small", "--max_steps", "1", "--output_dir", "model"),
        *("--dataloader_num_workers", "1", "--cache_vision_features", "disk"),
        *("--feature_cache_dir", "features", "--bf16", "False"),
        *(
            "--",
            "caption",
            folder,
            "--model-path",
            "model",
            "--write",
            "txt",
            "--max-new-tokens",
            "2",
        ),
        folder=tmp_path,
    )
    assert len((tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    converted = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["image"] for row in converted] == [f"{number}.jpg" for number in range(6)]
    assert (tmp_path / "model" / "llava.json").is_file()
    assert len(list(folder.glob("*.txt"))) == 16


# ---- files ----


def test_read_at_returns_the_same_bytes_without_pread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(200)))
    with path.open("rb", buffering=0) as file:
        expected = [jobs.read_at(file, 7, start) for start in (100, 0, 196, 300)]
        monkeypatch.setattr(jobs, "os", WINDOWS_OS)
        assert [jobs.read_at(file, 7, start) for start in (100, 0, 196, 300)] == expected


def test_writers_open_files_as_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without O_BINARY, Windows writes two bytes for each line end: the offsets of images would be wrong."""
    flags: list[int] = []
    binary = os.O_CLOEXEC if hasattr(os, "O_CLOEXEC") else 0
    monkeypatch.setattr(os, "O_BINARY", binary, raising=False)
    real_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flag, *rest: flags.append(flag) or real_open(path, flag, *rest)
    )
    writer = ShardWriter(tmp_path / "0.tar")
    writer.add("0", b"\n\r\n\xff", "jpg", ("a",), {})
    writer.close()
    with jobs.Journal(tmp_path / "journal") as journal:
        journal.append([{"index": 0}])
    assert len(flags) == 2
    assert all(flag & binary == binary for flag in flags)
    monkeypatch.undo()
    assert read_shard_image(tmp_path / "0.tar", "0") == b"\n\r\n\xff"


def test_peak_memory_is_known_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert dry_run._peak_memory(torch.device("cpu")) > 10_000_000


# ---- names ----

# Parts of paths that are valid on Windows.
part_letters = st.text("abcABC012_-. éß漢", min_size=1, max_size=8)
parts = part_letters.filter(lambda part: not names.windows_problem(part) and part.strip(" ."))
roots = st.sampled_from(["C:\\", "d:/", "\\\\server\\share\\", "\\\\?\\C:\\", "\\", ""])


@given(roots, st.lists(parts, min_size=1, max_size=4))
def test_names_written_on_windows_are_read_everywhere(root: str, path: list[str]) -> None:
    windows = PureWindowsPath(root, *path)
    found = names.name_parts(str(windows))
    assert found[-len(path) :] == names.name_parts("/".join(path))
    assert names.name_parts(windows.as_posix())[-len(path) :] == found[-len(path) :]
    assert not any(part.endswith(":") for part in found)
    # A record of one system matches the file of another.
    match = names.match_name(str(windows), ["/".join(path)])
    assert match is not None


@given(roots, st.lists(parts, min_size=1, max_size=3))
def test_image_of_a_windows_record_is_found(
    tmp_path_factory: pytest.TempPathFactory, root: str, path: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("images")
    file = folder.joinpath(*path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    located = image_folder.locate_file(str(PureWindowsPath(root, "photos", *path)), folder)
    assert located is not None
    assert located.path.samefile(file)


class WindowsFolder(PureWindowsPath):
    """A folder on Windows, with the methods that `exact_path` calls."""

    def absolute(self) -> WindowsFolder:
        return self


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cats/1.jpg", r"D:\images\cats\1.jpg"),
        (r"cats\1.jpg", r"D:\images\cats\1.jpg"),
        (r"D:\images\cats\1.jpg", r"D:\images\cats\1.jpg"),
        (r"d:\Images\1.jpg", r"d:\Images\1.jpg"),
        (r"C:\photos\1.jpg", None),
        ("/home/ann/1.jpg", None),  # not absolute on Windows, because it has no drive
        ("D:1.jpg", None),  # relative to the current folder of the drive, because it has no root
        ("C:/photos/1.jpg", None),
        (r"\\server\share\1.jpg", None),
    ],
)
def test_no_name_leads_out_of_the_folder_on_windows(
    monkeypatch: pytest.MonkeyPatch, name: str, found: str | None
) -> None:
    monkeypatch.setattr(image_folder, "Path", WindowsFolder)
    path = image_folder.exact_path(name, WindowsFolder(r"D:\images"))  # type: ignore[arg-type]
    assert path == (None if found is None else WindowsFolder(found))


@pytest.mark.parametrize(
    "name",
    [
        *("CON", "nul.txt", "Aux .jpg", "com1", "LPT9.tar.gz", "COM¹", "conin$"),
        *("a.", "a ", "a:b", "a<b", 'a"b', "a|b", "a?", "*", "a\tb", "a/b", "a\\b"),
    ],
)
def test_windows_problem_rejects_names_that_windows_does_not_allow(name: str) -> None:
    assert names.windows_problem(name)


@pytest.mark.parametrize("name", ["console", "nul_.txt", "com", "com10", "a.b c", ".a", "漢字.jpg"])
def test_windows_problem_accepts_other_names(name: str) -> None:
    assert not names.windows_problem(name)


def test_sidecar_is_refused_if_windows_does_not_allow_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer_options = sidecars.SidecarOptions(suffix=".txt", output=str(tmp_path / "captions"))
    writer = sidecars.SidecarWriter(writer_options, tmp_path, [])
    assert writer.path("0.tar#nul").name == "nul.txt"
    monkeypatch.setattr(sidecars, "sys", WINDOWS_SYS)
    assert writer.path("0.tar#a/b").name == "b.txt"
    for key in ("nul", "a/con.1", "a?", "b./c"):
        with pytest.raises(sidecars.SidecarError, match="Windows"):
            writer.path(f"0.tar#{key}")


def test_images_on_several_drives_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raise_error(paths: list[Path]) -> str:
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", raise_error)
    found = [inputs.FoundImages(["1.jpg"], tmp_path, {})]
    with pytest.raises(ValueError, match="several drives"):
        inputs._join_names(found)


def test_error_says_that_a_path_is_too_long_for_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    error = FileNotFoundError(2, "No such file or directory", "a" * 270)
    assert not cli.describe_long_path(error)
    monkeypatch.setattr(cli, "sys", WINDOWS_SYS)
    assert "260 characters" in cli.describe_long_path(error)
    assert not cli.describe_long_path(FileNotFoundError(2, "No such file or directory", "a"))
    assert not cli.describe_long_path(ValueError("a" * 270))


# ---- consoles and shells ----


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "cp932", "ascii"])
def test_print_text_prints_on_every_console(encoding: str) -> None:
    data = io.BytesIO()
    console = io.TextIOWrapper(data, encoding=encoding)
    options.print_text("é 漢 🐈", file=console)
    text = data.getvalue().decode(encoding)
    assert "\\U0001f408" in text
    assert ("漢" in text) == (encoding == "cp932")
    assert ("é" in text) == (encoding in ("cp1252", "cp437"))


def test_print_text_is_unchanged_where_it_can_be_encoded() -> None:
    stream = io.StringIO()
    options.print_text("é 漢 🐈", file=stream)
    assert stream.getvalue() == "é 漢 🐈\n"


def test_commands_are_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["llava", "train", r"C:\My models\a"]
    monkeypatch.setattr(options, "sys", WINDOWS_SYS)
    assert options.quote_arguments(command) == r'llava train "C:\My models\a"'
    monkeypatch.setattr(extras, "sys", WINDOWS_SYS)
    assert extras.install_command("serve").endswith('[serve]"')


# ---- processes and loops ----


def test_event_loop_is_one_that_aiodns_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error() -> None:
        raise AssertionError("a Proactor loop on Windows")

    monkeypatch.setattr(asyncio, "new_event_loop", raise_error)

    async def never() -> None:
        await asyncio.sleep(3600)

    with pytest.raises(KeyError), workers.event_loop(100) as loop:
        assert isinstance(loop, asyncio.SelectorEventLoop)
        task = loop.create_task(never())
        loop.run_until_complete(asyncio.sleep(0))
        raise KeyError
    assert task.cancelled()
    assert loop.is_closed()


def test_too_many_connections_are_refused_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    with workers.event_loop(10_000):
        pass
    monkeypatch.setattr(workers, "sys", WINDOWS_SYS)
    with pytest.raises(ValueError, match="--concurrency 480"), workers.event_loop(10_000):
        pass


def test_worker_checks_the_handle_of_its_parent_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, `os.getppid` returns the id of a parent even if the parent has died."""

    class Parent:
        alive = True

        def is_alive(self) -> bool:
            return self.alive

    parent = Parent()
    monkeypatch.setattr(workers.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(workers, "sys", WINDOWS_SYS)
    assert workers._parent_is_alive(os.getppid())
    parent.alive = False
    assert not workers._parent_is_alive(os.getppid())


def test_signals_of_a_training_run_exist_on_windows() -> None:
    for name in ("SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN"):
        assert hasattr(signal, name)
        assert name not in windows_like.MISSING_ATTRIBUTES["signal"]


# ---- Apple GPUs ----


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("compile_layers", True), ("tf32", True), ("optim", "adamw_bnb_8bit"), ("fsdp", "full")],
)
def test_what_apple_gpus_lack_is_refused_by_name(
    apple_gpu: None, option: str, value: object
) -> None:
    training = object.__new__(arguments.TrainingArguments)
    plain = {"deepspeed": None, "fsdp": None, "tf32": None, "compile_layers": False}
    for name, default in {**plain, "optim": "adamw_torch"}.items():
        setattr(training, name, default)
    training._use_mps()
    assert training.dataloader_pin_memory is False
    setattr(training, option, value)
    with pytest.raises(ValueError, match=f"--{option}.*MPS"):
        training._use_mps()


def test_nothing_is_compiled_for_apple_gpus() -> None:
    assert not kernels.can_compile("mps")


def test_only_known_modules_use_float64() -> None:
    """Apple GPUs have no float64. The trainer checks the device first; the other modules compute on the CPU."""
    uses = {
        path.name
        for path in SOURCES
        if "torch.float64" in path.read_text(encoding="utf-8")
        or ".double()" in path.read_text(encoding="utf-8")
    }
    assert uses == {"trainer.py", "import_checkpoint.py", "answer_scores.py", "int8_linear.py"}
