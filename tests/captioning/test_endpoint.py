"""Captions from a server with OpenAI's API: every image is accounted for, whatever the server does."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_endpoint import FaultyEndpoint, caption_of, faulty_endpoint
from PIL import Image

from llava_simplified.captioning import caption_command, endpoint_captions, endpoint_client
from llava_simplified.captioning.caption_command import caption_main
from llava_simplified.captioning.endpoint_client import EndpointError, error_message
from llava_simplified.captioning.endpoint_options import EndpointOptions, request_fields
from llava_simplified.captioning.runner import CaptionCounts, CaptionJob, caption_file
from llava_simplified.model.config import DEFAULT_INSTRUCTION
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.workers import TaskResult

GREEDY = GenerationOptions(max_new_tokens=6, seed=0)
SAMPLED = GenerationOptions(max_new_tokens=6, temperature=1.0, num_return_sequences=3, seed=5)
NUM_IMAGES = 24


@pytest.fixture
def server() -> Iterator[FaultyEndpoint]:
    with faulty_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(endpoint_client, "MIN_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """24 images, all different."""
    folder = tmp_path_factory.mktemp("endpoint") / "images"
    folder.mkdir()
    files = []
    for number in range(NUM_IMAGES):
        path = folder / f"{number:02}.png"
        Image.new("RGB", (8, 6), (number * 10, 0, 90)).save(path)
        files.append(path)
    return files


@pytest.fixture
def job(server: FaultyEndpoint, image_files: list[Path], tmp_path: Path) -> CaptionJob:
    endpoint = EndpointOptions(server.url, "m", concurrency=6, retries=2, max_wait=20)
    return CaptionJob(
        "", str(image_files[0].parent), str(tmp_path / "out.jsonl"), GREEDY, endpoint=endpoint
    )


def with_endpoint(job: CaptionJob, **changes: Any) -> CaptionJob:
    assert job.endpoint is not None
    return replace(job, endpoint=replace(job.endpoint, **changes))


def read_rows(path: str) -> list[dict[str, Any]]:
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def assert_accounted_for(job: CaptionJob, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Assert that every image has its caption or a failure, in order; return the failures by image."""
    rows = read_rows(job.output)
    failures = read_rows(job.output + ".bad.jsonl")
    for row in rows:
        assert row["pred_output"] == caption_of(files[row["index"]].read_bytes())
        assert row["image"] == files[row["index"]].name
    captioned = [row["index"] for row in rows]
    failed = [row["index"] for row in failures]
    assert captioned == sorted(captioned)
    assert failed == sorted(failed)
    assert sorted(captioned + failed) == list(range(len(files)))
    return {row["image"]: row for row in failures}


# ---- faults ----

# Faults after which a request is sent again, and succeeds.
TEMPORARY = (
    *("429 0", "429", "503", "500", "502", "408", "hang", "cut", "wrong length", "bad json"),
    *("no choices", "a list", "no message", "number", "deep", "not utf-8"),
)


def test_temporary_faults_lose_no_image(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    job = with_endpoint(job, timeout=1.0)
    for path, fault in zip(image_files, TEMPORARY):
        server.faults[path.read_bytes()] = [fault]
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)
    assert not assert_accounted_for(job, image_files)
    # Each of the images with a fault was requested once more.
    assert len(server.requests) == NUM_IMAGES + len(TEMPORARY)


# Faults that do not go away: (fault, kind of the failure, a part of its reason).
LASTING = {
    "500": ("http_error", "failed with 500"),
    "cut": ("connection", "cut off"),
    "bad json": ("bad_answer", "Bad gateway"),
    # The kind depends on whether the extra bytes arrive together with those that Content-Length announces.
    "wrong length": ("connection or bad_answer", ""),
    "no choices": ("bad_answer", "no choices"),
    "endless text": ("bad_answer", "the text has 2000000 characters"),
    "400": ("rejected", "status 400: failed with 400"),
    "413": ("rejected", "413"),
    "refusal": ("refused", "I can't help"),
    "filter": ("refused", "content_filter"),
}


def test_lasting_faults_are_failures_that_name_their_cause(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    for path, fault in zip(image_files, LASTING):
        server.always[path.read_bytes()] = fault
    assert caption_file(job) == CaptionCounts(NUM_IMAGES - len(LASTING), len(LASTING))
    failures = assert_accounted_for(job, image_files)
    for path, (fault, (kind, reason)) in zip(image_files, LASTING.items()):
        failure = failures[path.name]
        assert failure["kind"] in kind.split(" or "), failure
        assert reason in failure["error"], failure
        attempts = len(server.arrivals[path.read_bytes()])
        assert attempts == (3 if failure["kind"] in endpoint_client.SERVER_FAILURES else 1), fault


def test_hanging_image_fails_and_the_others_do_not(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    job = with_endpoint(job, timeout=0.5, retries=0)
    server.always[image_files[0].read_bytes()] = "hang"
    assert caption_file(job) == CaptionCounts(NUM_IMAGES - 1, 1)
    [failure] = assert_accounted_for(job, image_files).values()
    assert failure["kind"] == "timeout"
    assert "--timeout 0.5" in failure["error"]


def test_captions_do_not_shift_when_a_server_sends_an_answer_too_many(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    for path in image_files:
        server.always[path.read_bytes()] = "two answers"
    caption_file(with_endpoint(job, concurrency=2))
    assert not assert_accounted_for(job, image_files)


def test_retry_after_pauses_all_requests(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    first = image_files[0].read_bytes()
    server.faults[first] = ["429 1"]
    assert caption_file(with_endpoint(job, concurrency=1)) == CaptionCounts(NUM_IMAGES, 0)
    refused, repeated = server.arrivals[first]
    assert repeated - refused >= 0.99
    # The images are read in parallel, so another one may have been sent before the pause, but none during it.
    arrivals = [moment for times in server.arrivals.values() for moment in times]
    assert not [moment for moment in arrivals if refused < moment < repeated]
    assert max(arrivals) > repeated
    # A pause does not count as a failure of the image: even without retries, the image is captioned.
    Path(job.output).unlink()
    server.faults[first] = ["429 0", "503", "429"]
    job = with_endpoint(job, retries=0)
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)


def test_unreadable_images_and_rows_are_set_aside_without_a_request(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path], tmp_path: Path
) -> None:
    rows: list[Any] = [{"image": path.name, "instruction": "What?"} for path in image_files[:4]]
    rows[1]["image"] = "gone.png"
    rows[2] = {"image": "02.png"}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = replace(job, source=str(data), image_folder=str(image_files[0].parent))
    assert caption_file(with_endpoint(job, max_failures=0)) == CaptionCounts(2, 2)
    assert [row["index"] for row in read_rows(job.output)] == [0, 3]
    assert [row["index"] for row in read_rows(job.output + ".bad.jsonl")] == [1, 2]
    assert len(server.requests) == 2


# ---- order, concurrency, memory ----


def test_requests_fill_the_concurrency_and_never_exceed_it(
    server: FaultyEndpoint, job: CaptionJob
) -> None:
    # The server answers no request until six are in flight at the same time.
    six = threading.Barrier(6)
    server.before_answer = lambda image: six.wait(20) and None
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)
    assert server.most_in_flight == 6


def test_rows_keep_the_order_when_the_first_answer_comes_last(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    first = image_files[0].read_bytes()
    others_done = threading.Semaphore(0)

    def wait(image: bytes) -> None:
        if image != first:
            others_done.release()
            return
        for _ in range(NUM_IMAGES - 1):
            assert others_done.acquire(timeout=20)

    server.before_answer = wait
    caption_file(job)
    assert not assert_accounted_for(job, image_files)


def test_number_of_requests_after_a_slow_one_is_limited(
    server: FaultyEndpoint,
    job: CaptionJob,
    image_files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint_captions, "WINDOW", 2)
    first = image_files[0].read_bytes()
    requested: list[int] = []

    def wait(image: bytes) -> None:
        if image != first:
            return
        while len(server.requests) < 12:  # WINDOW * concurrency
            assert not server.closing.wait(0.01)
        time.sleep(0.2)  # time in which more requests would arrive
        requested.append(len(server.requests))

    server.before_answer = wait
    caption_file(job)
    assert requested == [12]
    assert not assert_accounted_for(job, image_files)


# ---- the end of a job, and its continuation ----


def test_job_stops_at_max_failures_and_continues(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    job = with_endpoint(job, retries=0, max_failures=2, concurrency=1)
    for path in image_files[5:]:
        server.always[path.read_bytes()] = "500"
    with pytest.raises(EndpointError, match=r"--max-failures 2.*failed with 500.*continue"):
        caption_file(job)
    sent = len(server.requests)
    assert sent - 8 in (0, 1)  # five captions, three failures, perhaps one that was in flight
    done = Path(job.output).read_bytes()
    assert done.count(b"\n") == 5
    server.always = {}
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)
    assert Path(job.output).read_bytes().startswith(done)
    assert not assert_accounted_for(job, image_files)
    assert len(server.requests) == sent + NUM_IMAGES - 5


def test_next_run_retries_only_failures_of_the_server(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    for path, fault in zip(image_files, ("500", "400", "refusal")):
        server.always[path.read_bytes()] = fault
    assert caption_file(job) == CaptionCounts(NUM_IMAGES - 3, 3)
    server.always = {}
    server.requests.clear()
    # The same model may have another address.
    moved = with_endpoint(job, url=server.url.replace("127.0.0.1", "localhost"), concurrency=2)
    assert caption_file(moved) == CaptionCounts(NUM_IMAGES - 2, 2)
    assert server.captioned() == [image_files[0].read_bytes()]
    indices = [row["index"] for row in read_rows(job.output)]
    assert sorted(indices) == [0, *range(3, NUM_IMAGES)]
    with pytest.raises(ValueError, match="endpoint"):
        caption_file(with_endpoint(job, model="other"))


@pytest.mark.parametrize("size", [0, 500, -30])
def test_killed_job_continues_without_repeating_requests(
    server: FaultyEndpoint, job: CaptionJob, size: int
) -> None:
    """The output file is empty, or ends inside a row or between the captions of an image."""
    job = replace(job, options=SAMPLED)
    caption_file(job)
    complete = Path(job.output).read_bytes()
    Path(job.output).write_bytes(complete[:size])
    kept = complete[:size].count(b"\n") // 3
    server.requests.clear()
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)
    assert Path(job.output).read_bytes() == complete
    assert len(server.requests) == NUM_IMAGES - kept


def test_interrupted_job_leaves_few_threads_and_continues(
    server: FaultyEndpoint,
    job: CaptionJob,
    image_files: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answered: list[bytes] = []

    def interrupt(data: bytes) -> Any:
        answered.append(data)
        if len(answered) == 7:
            raise KeyboardInterrupt
        return parse(data)

    parse = endpoint_client.parse_choices
    monkeypatch.setattr(endpoint_client, "parse_choices", interrupt)
    with pytest.raises(KeyboardInterrupt):
        caption_file(job)
    monkeypatch.setattr(endpoint_client, "parse_choices", parse)
    assert threading.active_count() < 20
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)
    assert not assert_accounted_for(job, image_files)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("401", r"401: failed with 401\. .*\$OPENAI_API_KEY is not set"),
        ("403", r"\$OPENAI_API_KEY is not set"),
        ("404", r"404.*--model m .*/v1"),
        ("402", "402"),
        ("307", "redirects to"),
    ],
)
def test_wrong_settings_end_the_job_at_once(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path], status: str, message: str
) -> None:
    for path in image_files:
        server.always[path.read_bytes()] = status
    with pytest.raises(EndpointError, match=message):
        caption_file(with_endpoint(job, concurrency=2))
    assert len(server.requests) <= 4  # the two in flight, and at most one more for each
    assert not list(Path(job.output).parent.iterdir()), "an empty job leaves no files"


def test_unreachable_server_ends_the_job_after_max_wait(
    job: CaptionJob, package_log: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"no connection.*--max-wait 0\.2"):
            caption_file(with_endpoint(job, url=url, max_wait=0.2))
    assert "waiting" in package_log.text


def test_job_waits_for_a_server_that_starts(
    server: FaultyEndpoint, job: CaptionJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first connections fail, because the server is still loading its model."""
    refused: list[float] = []
    connect = endpoint_client.aiohttp.TCPConnector._create_connection

    async def refuse(self: Any, *args: Any, **options: Any) -> Any:
        if len(refused) < 8:
            refused.append(time.monotonic())
            key = args[0].connection_key
            raise endpoint_client.aiohttp.ClientConnectorError(key, ConnectionRefusedError())
        return await connect(self, *args, **options)

    monkeypatch.setattr(endpoint_client.aiohttp.TCPConnector, "_create_connection", refuse)
    assert caption_file(with_endpoint(job, retries=0)) == CaptionCounts(NUM_IMAGES, 0)
    assert len(refused) == 8


def test_image_that_is_always_refused_does_not_end_the_job(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    """Some services answer 429 to a request that is too large for their limits, while they answer others."""
    job = with_endpoint(job, max_wait=0.5)
    server.always[image_files[3].read_bytes()] = "429"
    assert caption_file(job) == CaptionCounts(NUM_IMAGES - 1, 1)
    failures = assert_accounted_for(job, image_files)
    assert failures["03.png"]["kind"] == "http_error"
    assert (
        "status 429: failed with 429; the server has answered other" in failures["03.png"]["error"]
    )


def test_too_long_retry_after_ends_the_job(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path]
) -> None:
    server.always[image_files[0].read_bytes()] = "429 86400"
    with pytest.raises(EndpointError, match="slow down.*86400 s"):
        caption_file(job)


# ---- several captions per image ----


@pytest.mark.parametrize(("max_n", "requests"), [(100, 1), (2, 2), (1, 3), (0, 3)])
def test_several_captions_from_servers_that_accept_limit_or_refuse_n(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path], max_n: int, requests: int
) -> None:
    server.max_n = max_n
    job = with_endpoint(replace(job, options=SAMPLED), concurrency=1, max_failures=0)
    assert caption_file(job) == CaptionCounts(NUM_IMAGES, 0)
    rows = read_rows(job.output)
    expected = [
        (index, caption_of(path.read_bytes(), SAMPLED.seed + number))
        for index, path in enumerate(image_files)
        for number in range(3)
    ]
    assert [(row["index"], row["pred_output"]) for row in rows] == expected
    refused = int(max_n == 0)  # only the first request is refused; later ones ask for one
    assert len(server.requests) <= requests * NUM_IMAGES + 2 * refused
    assert len(server.requests) >= requests * NUM_IMAGES + refused


# ---- the requests ----


def test_generation_options_become_fields_of_the_request() -> None:
    endpoint = EndpointOptions("http://h/v1", "m", stop=("\n", "END"))
    assert request_fields(GREEDY, endpoint) == {
        "model": "m",
        "max_tokens": 6,
        "temperature": 0.0,
        "stop": ["\n", "END"],
    }
    options = GenerationOptions(9, 0, 0.5, 0.9, 40, 1.1, seed=3, num_return_sequences=4)
    extra = '{"min_tokens": 5, "max_tokens": null, "max_completion_tokens": 7}'
    assert request_fields(options, replace(endpoint, stop=(), extra_body=extra)) == {
        "model": "m",
        "max_completion_tokens": 7,
        "min_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "seed": 3,
    }
    for unsupported in ({"num_beams": 2}, {"min_new_tokens": 1}, {"length_penalty": 0.5}):
        [name] = unsupported
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            request_fields(GenerationOptions(**unsupported), endpoint)


def test_conversation_is_sent_with_its_images_in_their_places(
    server: FaultyEndpoint, job: CaptionJob, image_files: list[Path], tmp_path: Path
) -> None:
    turns = [
        ("system", "Be brief."),
        ("human", "<image>\nWhat is it?"),
        ("gpt", "An <image>."),
        ("human", "And\n<image>\nhere?"),
    ]
    row = {
        "images": ["00.png", "01.png"],
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }
    data = tmp_path / "data.json"
    data.write_text(json.dumps([row, {"instruction": "Say it."}]))
    job = replace(job, source=str(data), image_folder=str(image_files[0].parent))
    caption_file(with_endpoint(job, concurrency=1))
    # The record without images needs no preparation, and may overtake the other one.
    requests = sorted((request["messages"] for request in server.requests), key=len)
    [text_only, messages] = requests
    assert text_only == [{"role": "user", "content": "Say it."}]
    shown = []
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        shown.append(
            (
                message["role"],
                [part if isinstance(part, str) else part.get("text") for part in parts],
            )
        )
    assert shown == [
        ("system", ["Be brief."]),
        ("user", [None, "What is it?"]),
        ("assistant", ["An <image>."]),
        ("user", ["And", None, "here?"]),
    ]


def test_large_images_are_shrunk_and_default_instruction_is_sent(
    server: FaultyEndpoint, job: CaptionJob, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((900, 600)).save(folder / "a.png")
    caption_file(with_endpoint(replace(job, source=str(folder)), max_side=300))
    [request] = server.requests
    sent = tmp_path / "sent"
    sent.write_bytes(request["image"])
    with Image.open(sent) as image:
        assert image.size == (300, 200)
        difference = np.asarray(image, float) - np.asarray(
            Image.open(folder / "a.png").resize((300, 200), Image.Resampling.BILINEAR), float
        )
    assert np.abs(difference).mean() < 4
    [message] = request["messages"]
    url = message["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert message["content"][1] == {"type": "text", "text": DEFAULT_INSTRUCTION}


def test_key_comes_from_the_environment_and_is_stored_nowhere(
    server: FaultyEndpoint,
    job: CaptionJob,
    monkeypatch: pytest.MonkeyPatch,
    package_log: pytest.LogCaptureFixture,
) -> None:
    caption_file(job)
    assert "Authorization" not in server.headers
    monkeypatch.setenv("MY_KEY", "secret-123\n")
    Path(job.output).unlink()
    caption_file(with_endpoint(job, api_key_env="MY_KEY"))
    assert server.headers["Authorization"] == "Bearer secret-123"
    written = b"".join(path.read_bytes() for path in Path(job.output).parent.iterdir())
    assert b"secret" not in written
    assert "secret" not in package_log.text
    with pytest.raises(ValueError, match="--api-key-env OTHER"):
        caption_file(with_endpoint(job, api_key_env="OTHER"))


def test_empty_and_cut_captions_are_counted(
    server: FaultyEndpoint,
    job: CaptionJob,
    image_files: list[Path],
    package_log: pytest.LogCaptureFixture,
) -> None:
    for path, fault in zip(image_files, ("null", "blank", "length", "refusal", "500")):
        server.always[path.read_bytes()] = fault
    caption_file(job)
    rows = read_rows(job.output)
    assert [row["pred_output"] for row in rows[:3]] == ["", "", "a long"]
    assert [row.get("finish_reason") for row in rows[:4]] == [None, None, "length", None]
    for count in ("2 x empty", "1 x cut at --max-new-tokens", "1 x refused", "1 x http_error"):
        assert count in package_log.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too\\nlong"}}', "too long"),
        (b'{"error": "no model"}', "no model"),
        (b'{"object": "error", "message": "bad image"}', "bad image"),
        (b'{"detail": [{"msg": "wrong"}]}', '[{"msg": "wrong"}]'),
        (b"<html>502", "<html>502"),
        (b"", ""),
        (b"\xff", "\ufffd"),
    ],
)
def test_error_message_reads_the_forms_of_several_servers(body: bytes, message: str) -> None:
    assert error_message(body) == message


# ---- the command ----


def test_command_captions_a_slice(
    server: FaultyEndpoint, image_files: list[Path], tmp_path: Path
) -> None:
    output = str(tmp_path / "out.jsonl")
    argv = [str(image_files[0].parent), "--endpoint", server.url, "--model", "m"]
    argv += ["--output", output, "--prompt", "What?", "--stop", "."]
    assert caption_main([*argv, "--shards", "1/3"]) == 0
    rows = read_rows(str(tmp_path / "out-1-of-3.jsonl"))
    assert [row["index"] for row in rows] == list(range(1, NUM_IMAGES, 3))
    assert {request["stop"][0] for request in server.requests} == {"."}


def test_command_captions_all_slices_with_ray(
    server: FaultyEndpoint,
    image_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray sends the jobs of the slices to other processes. Here they are pickled as for Ray, but run in this process."""

    def run_tasks(function: Any, specs: list[CaptionJob], engine: str) -> list[Any]:
        assert engine == "ray"
        jobs = [pickle.loads(pickle.dumps(job)) for job in specs]
        return [TaskResult(job, function(job), "") for job in jobs]

    monkeypatch.setattr(caption_command, "run_tasks", run_tasks)
    argv = [str(image_files[0].parent), "--endpoint", server.url, "--model", "m"]
    argv += ["--output", str(tmp_path / "out.jsonl"), "--engine", "ray", "--num-chunks", "2"]
    assert caption_main(argv) == 0
    for slice_index in range(2):
        rows = read_rows(str(tmp_path / f"out-{slice_index}-of-2.jsonl"))
        assert [row["index"] for row in rows] == list(range(slice_index, NUM_IMAGES, 2))


def test_command_prints_the_caption_of_one_image(
    server: FaultyEndpoint, image_files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(image_files[3]), "--endpoint", server.url + "/", "--model", "m"]
    assert caption_main(argv) == 0
    assert capsys.readouterr().out == caption_of(image_files[3].read_bytes()) + "\n"
    server.always[image_files[3].read_bytes()] = "refusal"
    assert caption_main(argv) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model-path is required, or --endpoint"),
        (["--model-path", "m", "--max-side", "100"], "--max-side requires --endpoint"),
        (["--model-path", "m", "--model", "n"], "--model requires --endpoint"),
        (["--endpoint", "http://h/v1"], "--model"),
        (["--endpoint", "http://h/v1", "--model", "m", "--model-path", "p"], "--model-path has no"),
        (["--endpoint", "http://h/v1", "--model", "m", "--bits", "8"], "--bits has no effect"),
        (["--endpoint", "http://h/v1", "--model", "m", "--batch-size", "2"], "--concurrency"),
        (["--endpoint", "h:80", "--model", "m"], "--endpoint h:80: expected a URL"),
        (["--endpoint", "http://h:x/v1", "--model", "m"], "--endpoint http://h:x/v1"),
        (["--endpoint", "http://u:secret@h/v1", "--model", "m"], "contains a password"),
        (["--endpoint", "http://h/v1?a=b", "--model", "m"], "without"),
        (["--endpoint", "http://h/v1", "--model", "m", "--num-beams", "2"], "--num-beams"),
        (["--endpoint", "http://h/v1", "--model", "m", "--start-with", "A"], "--start-with"),
        (["--endpoint", "http://h/v1", "--model", "m", "--concurrency", "0"], "--concurrency 0"),
        (["--endpoint", "http://h/v1", "--model", "m", "--max-side", "70000"], "65500"),
        (["--endpoint", "http://h/v1", "--model", "m", "--timeout", "nan"], "--timeout nan"),
        (["--endpoint", "http://h/v1", "--model", "m", "--stop", ""], "--stop"),
        (["--endpoint", "http://h/v1", "--model", "m", "--extra-body", "[1]"], "JSON object"),
        (["--endpoint", "http://h/v1", "--model", "m", "--extra-body", "{"], "not JSON"),
        (["--endpoint", "http://h/v1", "--model", "m", "--extra-body", '{"n": 2}'], "'n' is set"),
        (["--endpoint", "http://h/v1", "--model", "m", "--extra-body", '{"seed": "1"}'], "integer"),
        (["--endpoint", "http://h/v1", "--model", "m", "--api-key-env", "NOT_SET"], "NOT_SET"),
    ],
)
def test_command_refuses_invalid_and_contradictory_options(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        caption_main(["images", *argv])
    assert "secret" not in str(error.value)


def test_command_writes_sidecar_files_with_prompts_and_prefix(
    server: FaultyEndpoint, image_files: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(image_files[0].parent, folder)
    (folder / "00.txt").write_text("by hand")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is {name}?\nDescribe {name} of {folder}.\n")
    blank, refused, broken = (path.read_bytes() for path in image_files[1:4])
    server.always = {blank: "blank", refused: "refusal", broken: "500"}
    argv = [
        str(folder),
        "--endpoint",
        server.url,
        "--model",
        "m",
        "--retries",
        "0",
        "--write",
        "txt",
    ]
    argv += ["--prompt-file", str(prompts), "--prefix", "sks, "]
    assert caption_main([*argv, "--max-words", "2"]) == 0
    texts = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    assert texts.pop("00") == "by hand"
    expected = {}
    for path in image_files[4:]:
        words = caption_of(path.read_bytes()).split()
        expected[path.stem] = f"sks, {words[0]} {words[1]}\n"
    assert texts == expected
    failures = read_rows(str(folder / ".llava-caption.jsonl.bad.jsonl"))
    assert {row["image"] for row in failures} == {"01.png", "02.png", "03.png"}
    sent = set()
    for request in server.requests:
        name = next(p.stem for p in image_files if p.read_bytes() == request["image"])
        text = request["messages"][0]["content"][1]["text"]
        assert text in (f"What is {name}?", f"Describe {name} of photos.")
        sent.add(text.split()[0])
    assert sent == {"What", "Describe"}
    # The next run captions only the remaining images.
    server.always = {}
    server.requests.clear()
    assert caption_main([*argv, "--max-words", "2"]) == 0
    assert set(server.captioned()) == {blank, refused, broken}
    assert len(list(folder.glob("*.txt"))) == NUM_IMAGES


def test_sidecar_job_that_stopped_continues(
    server: FaultyEndpoint, image_files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "texts"
    argv = [str(image_files[0].parent), "--endpoint", server.url, "--model", "m", "--retries", "0"]
    argv += ["--max-failures", "1", "--concurrency", "1", "--write", "txt", "--output", str(output)]
    for path in image_files[8:]:
        server.always[path.read_bytes()] = "500"
    with pytest.raises(EndpointError, match="--max-failures 1"):
        caption_main(argv)
    assert len(list(output.glob("*.txt"))) == 8
    server.always = {}
    server.requests.clear()
    assert caption_main(argv) == 0
    assert len(server.requests) == NUM_IMAGES - 8
    for path in image_files:
        assert (output / f"{path.stem}.txt").read_text() == caption_of(path.read_bytes()) + "\n"


def test_next_run_appends_only_the_captions_that_failed_at_the_server(
    server: FaultyEndpoint,
    image_files: list[Path],
    tmp_path: Path,
    package_log: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in image_files[:4]:
        shutil.copy(path, folder)
        (folder / f"{path.stem}.txt").write_text("tags")
    argv = [str(folder), "--endpoint", server.url, "--model", "m", "--retries", "0"]
    argv += ["--write", "txt", "--existing", "append"]
    failed, refused = image_files[0].read_bytes(), image_files[1].read_bytes()
    server.always = {failed: "500", refused: "refusal"}
    assert caption_main(argv) == 0
    assert "server: 1. Run the same command again" in package_log.text
    server.always = {}
    server.requests.clear()
    assert caption_main(argv) == 0
    assert server.captioned() == [failed]
    expected = [f"tags, {caption_of(path.read_bytes())}" for path in image_files[:4]]
    expected[1] = "tags"
    assert [path.read_text() for path in sorted(folder.glob("*.txt"))] == expected
    # Another run would find the same refusal again, so the job is complete.
    assert not (folder / ".llava-caption.jsonl").exists()


def test_commands_of_the_documentation_page_run(
    server: FaultyEndpoint,
    image_files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run the commands of docs/captioning-with-vllm.md one after the other, without those that require Ray."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(image_files[0].parent, "photos")
    Path("shards").mkdir()
    with tarfile.open("shards/0.tar", "w") as tar:
        for path in image_files:
            tar.add(path, path.name)
    page = Path(__file__).parents[2] / "docs" / "captioning-with-vllm.md"
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("llava caption")]
    for command in commands:
        argv = shlex.split(command.replace("http://127.0.0.1:8000/v1", server.url))[2:]
        if "ray" in argv:
            continue
        assert caption_main(argv) == 0
    assert len(read_rows("captions.jsonl")) == NUM_IMAGES
    assert len(read_rows("trial.jsonl")) == 20
    assert Path("trial.html").exists()
    assert len(list(Path("photos").glob("*.txt"))) == NUM_IMAGES
    names = [row["image"] for row in read_rows("captions-0-of-4.jsonl")]
    assert names == [f"0.tar#{number:02}" for number in range(0, NUM_IMAGES, 4)]
    assert server.requests[-1]["model"].startswith("Qwen/")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import is an error
from llava_simplified.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.medium
def test_command_runs_without_torch(
    server: FaultyEndpoint, image_files: list[Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"image": "00.png", "instruction": "What?"}]))
    command = [sys.executable, "-c", WITHOUT_TORCH, "caption", str(data), "--endpoint", server.url]
    command += ["--model", "m", "--image-folder", str(image_files[0].parent)]
    command += ["--output", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [row] = read_rows(str(tmp_path / "out.jsonl"))
    assert row["pred_output"] == caption_of(image_files[0].read_bytes())
