"""`llava serve`: its options, the mistakes that it finds at the start, and how it ends."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cli_process import run_code
from live_server import user_message

from llava_simplified import extras
from llava_simplified.cli import main as llava
from llava_simplified.serve import serve_command
from llava_simplified.serve.serve_command import build_parser


def run_serve(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Run `llava serve` for a checkpoint that does not exist; return the status and standard error."""
    try:
        status = llava(["serve", "no-checkpoint", *options])
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--port", "80000"], "--port"),
        (["--port", "0"], "--port"),
        (["--port", "http"], "--port"),
        (["--host", "nowhere.invalid"], "--host"),
        (["--host", "192.0.2.1"], "--host"),  # reserved for documentation, so no machine has it
        (["--examples", "no-such-folder"], "--examples"),
        (["--examples", __file__], "--examples"),
        (["--batch-size", "0"], "--batch-size"),
        (["--queue", "-1"], "--queue"),
        (["--timeout", "nan"], "--timeout"),
        (["--timeout", "0"], "--timeout"),
        (["--context", "many"], "--context"),
        (["--no-page", "--examples", "."], "--no-page"),
        (["--hots", "0.0.0.0"], "--host"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else value,
)
def test_wrong_option_is_named(
    capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    status, error = run_serve(capsys, *options)
    assert status == 2
    assert named in error and "Traceback" not in error
    hint = "`llava serve --help` lists the options."
    lines = [line for line in error.splitlines() if line and line != hint]
    assert len(lines) == 1, "the error must be one line"


def test_unreadable_examples_folder_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> Any:  # the tests may run as root, who can read everything
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    status, error = run_serve(capsys, "--examples", str(tmp_path))
    assert status == 2
    assert f"--examples {tmp_path}" in error


def test_port_in_use_is_named_before_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        status, error = run_serve(capsys, "--port", str(port), "--no-page")
    assert status == 2
    assert f"--port {port}" in error and "in use" in error


@pytest.mark.parametrize(
    ("options", "missing", "extra"),
    [([], "uvicorn", "serve"), (["--allow-image-urls"], "aiohttp", "download")],
)
def test_missing_package_is_named_with_its_extra(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    missing: str,
    extra: str,
) -> None:
    find_spec = extras.find_spec

    def find_others(name: str) -> Any:
        return None if name == missing else find_spec(name)

    monkeypatch.setattr(extras, "find_spec", find_others)
    status, error = run_serve(capsys, *options)
    assert status == 2
    assert missing in error and f"[{extra}]" in error


def test_key_is_read_from_environment_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "s3cret")
    parser = build_parser()
    assert parser.parse_args(["checkpoint"]).api_key == "s3cret"
    assert parser.parse_args(["checkpoint", "--api_key", "other"]).api_key == "other"
    assert "s3cret" not in parser.format_help()


def test_key_has_no_white_space_around_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that was read from a file often ends with a line break, which no client could send."""
    keys: list[str] = []

    def record(args: Any, examples: Any) -> int:
        keys.append(args.api_key)
        return 0

    monkeypatch.setattr(serve_command, "_serve", record)
    monkeypatch.setattr(serve_command, "_check_address", lambda *_: None)
    monkeypatch.setenv("LLAVA_API_KEY", " s3cret \r\n")
    assert run_serve(capsys)[0] == 0
    assert keys == ["s3cret"]
    for wrong in (" \n", "two\nlines", "\udcff"):
        status, error = run_serve(capsys, "--api-key", wrong)
        assert status == 2
        assert "--api-key" in error and "Traceback" not in error
    assert len(keys) == 1


@pytest.mark.medium
def test_server_needs_no_downloader() -> None:
    """The extra `serve` does not install aiohttp."""
    run_code("import llava_simplified.serve.api, llava_simplified.serve.page", missing=["aiohttp"])


@pytest.mark.slow
def test_signal_lets_requests_in_flight_finish(command: Any, photos: list[bytes]) -> None:
    process, url = command("--no-page", "--batch-size", "2")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def count_tokens_of_answer(photo: bytes) -> int:
        completion = client.chat.completions.create(
            model="tiny",
            messages=user_message(photo),
            max_tokens=200,
            extra_body={"repetition_penalty": 1.2},  # otherwise the model repeats one token
        )
        assert completion.usage
        return completion.usage.completion_tokens

    def count_received() -> float:
        """Return the number of requests that are in flight or already answered."""
        received = 0.0
        for line in httpx.get(f"{url}/metrics").text.splitlines():
            if line.startswith(("llava_requests_in_flight ", "llava_requests_total")):
                received += float(line.split()[-1])
        return received

    with ThreadPoolExecutor(6) as clients:
        # Two requests are running, four are waiting.
        answers = [clients.submit(count_tokens_of_answer, photo) for photo in photos[:6]]
        while count_received() < 6:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert all(answer.result() > 0 for answer in answers)
    assert process.wait(20) == 0
