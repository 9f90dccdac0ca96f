"""OpenAI's own client, and clients that misbehave, against a live server on loopback."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import openai
import pytest
import uvicorn
from PIL import Image
from starlette.routing import Route

from llava_simplified.cli import main as llava
from llava_simplified.model.llava import Llava
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prompt import Message
from llava_simplified.serve.api import Limits, Turn, create_app
from llava_simplified.serve.engine import Worker
from llava_simplified.serve.page import page_routes

CHAT = "/v1/chat/completions"
DEFAULTS = Limits()


@dataclass
class Live:
    url: str
    worker: Worker

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + CHAT, json=body, timeout=60, **more)

    def metric(self, name: str) -> float:
        found = re.search(
            rf"^{re.escape(name)} (\S+)$", httpx.get(f"{self.url}/metrics").text, re.MULTILINE
        )
        return float(found[1]) if found else 0.0

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("it never came true")


@contextmanager
def live(
    model: Llava,
    key: str = "",
    limits: Limits = DEFAULTS,
    examples: Sequence[bytes] | None = None,
    allowed_hosts: Sequence[str] = (),
    **batching: Any,
) -> Iterator[Live]:
    """Run a server in a thread; with the page if `examples` is given."""
    worker = Worker(model, **batching)
    page: list[Route] = []
    if examples is not None:
        page = page_routes(
            "tiny", model.instruction, limits, worker.batch_size, bool(key), examples
        )
    app = create_app(worker, "tiny", key, limits, page, allowed_hosts)
    server = uvicorn.Server(
        uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        time.sleep(0.01)
    here = Live(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", worker)
    try:
        yield here
        here.wait(lambda: not worker.places and not worker.rows)
        assert worker._decoding is None or not (
            worker._decoding.generated_ids or worker._decoding.active
        )
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(model: Llava) -> Iterator[Live]:
    with live(model, queue=100) as here:
        yield here


@contextmanager
def endless(model: Llava) -> Iterator[None]:
    """No answer ends by itself."""
    stop_ids, model.prompt.stop_ids = model.prompt.stop_ids, [10**6]
    try:
        yield
    finally:
        model.prompt.stop_ids = stop_ids


def uri(photo: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(photo).decode()


def shown(*photos: bytes, text: str = "What?") -> list[Any]:
    """A message in the order in which most clients write it: first the text."""
    pictures = [{"type": "image_url", "image_url": {"url": uri(photo)}} for photo in photos]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *pictures]}]


def asked(photo: bytes, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": shown(photo), **more}


# ---- what OpenAI's client sees ----


def test_text_and_pictures(server: Live, model: Llava, photos: list[bytes]) -> None:
    complete = server.client().chat.completions.create

    def content(messages: list[Any], **more: Any) -> str | None:
        return (
            complete(model="tiny", messages=messages, max_tokens=7, **more)
            .choices[0]
            .message.content
        )

    conversation: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Look at this."},
        {"role": "assistant", "content": "I do."},
        *shown(photos[0], photos[1], text="Which of <image> and <image> is it?"),
    ]
    turns = [
        Message("system", "Be brief."),
        Message("user", "Look at this."),
        Message("assistant", "I do."),
    ]
    turns.append(Message("user", "Which of <image> and <image> is it?"))
    assert content(conversation) == model.chat(turns, photos[:2], max_new_tokens=7)
    assert content(shown(*photos[:2])) == model.chat(
        "<image>\n<image>\nWhat?", photos[:2], max_new_tokens=7
    )
    assert content(shown(photos[2], text="")) == model.caption(photos[2], max_new_tokens=7), (
        "as it was trained"
    )
    assert content([{"role": "user", "content": "Say it."}]) == model.chat(
        "Say it.", max_new_tokens=7
    )


def test_usage_and_the_reason_of_the_end(server: Live, model: Llava, photos: list[bytes]) -> None:
    complete = server.client().chat.completions.create
    prompt = model.prompt.render([Message("user", "<image>\nWhat?")], None).input_ids
    ended = complete(model="tiny", messages=shown(photos[1]), max_completion_tokens=60)
    assert ended.choices[0].finish_reason == "stop" and ended.usage
    assert ended.usage.prompt_tokens == len(prompt) - 1 + model.vision_tower.num_tokens
    assert ended.usage.total_tokens == ended.usage.prompt_tokens + ended.usage.completion_tokens
    most = ended.usage.completion_tokens - 1  # all but the end token
    cut = complete(model="tiny", messages=shown(photos[1]), max_tokens=most)
    assert cut.choices[0].finish_reason == "length" and cut.usage
    assert cut.usage.completion_tokens == most
    assert cut.choices[0].message.content == ended.choices[0].message.content


def test_samples_and_seeds(server: Live, model: Llava, photos: list[bytes]) -> None:
    def texts(**more: Any) -> list[str | None]:
        answer = server.client().chat.completions.create(
            model="tiny", messages=shown(photos[0]), max_tokens=8, **more
        )
        assert [choice.index for choice in answer.choices] == list(range(more["n"]))
        return [choice.message.content for choice in answer.choices]

    sampled = {"n": 3, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    assert texts(**sampled) == model.caption(
        photos[0],
        "What?",
        num_return_sequences=3,
        temperature=1.0,
        top_p=0.9,
        seed=3,
        max_new_tokens=8,
    )
    assert texts(**{**sampled, "seed": 4}) != texts(**sampled)
    assert len(set(texts(n=16))) > 1, "several are sampled, also where no temperature is given"
    like_greedy = texts(n=1, temperature=1e-40)  # would be infinite scores
    assert like_greedy == [model.caption(photos[0], "What?", max_new_tokens=8)]


def test_streaming(server: Live, model: Llava, photos: list[bytes]) -> None:
    options: Any = {"max_tokens": 30, "n": 2, "temperature": 1.0, "seed": 5}
    stream = server.client().chat.completions.create(
        model="tiny",
        messages=shown(photos[1]),
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    said, ends, usage = ["", ""], [None, None], None
    for chunk in stream:
        assert usage is None, "the usage comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            assert ends[choice.index] is None
            said[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    whole = server.client().chat.completions.create(
        model="tiny", messages=shown(photos[1]), **options
    )
    assert said == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage

    with endless(model):  # the pieces come while it speaks, not all at the end
        stream = server.client().chat.completions.create(
            model="tiny", messages=shown(photos[1]), stream=True, max_tokens=512, stop="\n\n"
        )
        first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert first.choices[0].delta.content and server.worker.rows
        stream.close()
        server.wait(lambda: not server.worker.rows)


def test_the_models(server: Live) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


# ---- what is wrong with a request ----

PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"temperature": -1}, 400, "temperature: .*greater than or equal to 0"),
    ({"temperature": "0.5"}, 400, "temperature: .*valid number"),
    ({"temperature": float("nan")}, 400, "temperature: .*finite"),
    ({"top_p": 0}, 400, "top_p: .*greater than 0"),
    ({"n": 0}, 400, "n: .*greater than or equal to 1"),
    ({"n": 17}, 400, "16 answers at most"),
    ({"n": 2, "temperature": 0}, 400, "different captions.* temperature > 0"),
    ({"max_tokens": 10**9}, 400, "512 tokens at most"),
    ({"seed": 1.5}, 400, "seed: .*valid integer"),
    ({"stop": [""]}, 400, r"stop\[0\]: .*at least 1 character"),
    ({"tools": []}, 400, "tools: .*not permitted"),
    ({"logprobs": True}, 400, "logprobs: .*False"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty: "),
    ({"model": "gpt"}, 404, "no model 'gpt' here, but 'tiny'"),
    ({"messages": []}, 400, "messages: .*at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, r"messages\[0\]\.role: "),
    ({"messages": [{"role": "user"}]}, 400, r"messages\[0\]\.content: .*required"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, r"messages\[0\]\.content\[0\]: "),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the user's last"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "0 image.* the text says <image> 1 time"),
    ({"messages": [{"role": "system", "content": PICTURE}]}, 400, "belong to the user"),
    ({"messages": [{"role": "user", "content": PICTURE}]}, 400, "not an image"),
    ({"messages": [{"role": "user", "content": PICTURE * 9}]}, 400, "9 pictures; 8 may"),
    ({"messages": [{"role": "user", "content": "long " * 4000}]}, 400, "together they may be 4096"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, status, message", WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(
    server: Live, photos: list[bytes], wrong: dict, status: int, message: str
) -> None:
    body = json.dumps({**asked(photos[0]), **wrong})
    answer = httpx.post(
        server.url + CHAT, content=body, headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert re.search(message, error["message"]), error


def test_a_picture_without_words_is_asked_what_the_model_was_trained_on() -> None:
    turn = Turn.model_validate_json(json.dumps({"role": "user", "content": PICTURE}))
    assert turn.message("What is it?").content == "<image>\nWhat is it?"
    assert turn.message("What is it?\n<image>").content == "What is it?\n<image>"


@pytest.mark.parametrize(
    "url",
    ["data:image/png,abc", "data:image/png;base64,a$b=", "ftp://x/1.png", "", "http://x/1.png"],
)
def test_pictures_come_as_data_uris(server: Live, url: str) -> None:
    message: Any = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    with pytest.raises(openai.BadRequestError, match="base64|must be a data URI"):
        server.client().chat.completions.create(model="tiny", messages=[message])


def test_broken_bodies_and_other_paths(server: Live) -> None:
    def post(content: bytes, kind: str = "application/json") -> tuple[int, str]:
        answer = httpx.post(server.url + CHAT, content=content, headers={"content-type": kind})
        return answer.status_code, answer.json()["error"]["message"]

    for broken in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}'):
        status, message = post(broken)
        assert status == 400 and message.startswith("body: "), (broken[:10], message)
    assert post(b"{}", "text/plain")[0] == 415
    assert httpx.get(server.url + CHAT).status_code == 405
    assert httpx.get(server.url + "/v1/embeddings").json()["error"]["message"] == "Not Found"
    allowed = httpx.options(
        server.url + CHAT, headers={"origin": "http://x", "access-control-request-method": "POST"}
    )
    assert not any(name.startswith("access-control") for name in allowed.headers)


def test_limits_of_bodies_and_pixels(model: Llava, photos: list[bytes]) -> None:
    bomb = io.BytesIO()
    Image.new("1", (8000, 8000)).save(bomb, "PNG")
    with live(model, limits=Limits(max_body=100_000)) as here:
        answer = here.post(asked(bomb.getvalue()))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_large")
        assert "8000x8000 pixels" in answer.json()["error"]["message"]
        answer = here.post(asked(b"x" * 100_000))
        assert answer.status_code == 413 and "100000 bytes" in answer.json()["error"]["message"]
        with pytest.raises(openai.APIStatusError, match="413"):
            here.client().chat.completions.create(model="tiny", messages=shown(b"x" * 3_000_000))

        def parts() -> Iterator[bytes]:  # no length is announced
            yield from [b" " * 10_000] * 20

        headers = {"content-type": "application/json"}
        assert httpx.post(here.url + CHAT, content=parts(), headers=headers).status_code == 413
        assert here.post(asked(photos[0], max_tokens=2)).status_code == 200


def test_pictures_by_url_under_the_downloaders_rules(model: Llava, photos: list[bytes]) -> None:
    """Refused where they are not allowed; where they are, not from private addresses, and no redirect to these."""

    class Files(BaseHTTPRequestHandler):
        served: ClassVar[list[str]] = []

        def do_GET(self) -> None:
            self.served.append(self.path)
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            self.wfile.write(b"<html>" if self.path == "/page" else photos[1])

        def log_message(self, *_: object) -> None: ...

    def refused(here: Live, url: str) -> str:
        with pytest.raises(openai.BadRequestError) as error:
            here.client().chat.completions.create(model="tiny", messages=[ask(url)], max_tokens=9)
        return str(error.value)

    def ask(url: str) -> Any:
        return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        port = files.server_address[1]
        with live(model) as here:
            assert "--allow-image-urls" in refused(here, f"http://127.0.0.1:{port}/1.png")
        with live(model, limits=Limits(fetch=FetchOptions(retries=0))) as here:
            for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
                assert "can't be fetched: " in refused(here, f"http://{host}:{port}/1.png")
            assert "scheme" in refused(here, "file:///etc/passwd")
        assert not Files.served, "nobody was asked"
        with live(model, limits=Limits(fetch=FetchOptions(retries=0, allow_private=True))) as here:
            assert "scheme" in refused(here, f"http://127.0.0.1:{port}/away")
            assert "html" in refused(here, f"http://127.0.0.1:{port}/page")
            answer = here.client().chat.completions.create(
                model="tiny", messages=[ask(f"http://127.0.0.1:{port}/1.png")], max_tokens=9
            )
            assert answer.choices[0].message.content == model.caption(photos[1], max_new_tokens=9)
        files.shutdown()


def test_the_key(model: Llava, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with live(model, key="s3cret") as here:
        for key in ("none", "s3cre", "s3crets"):
            with pytest.raises(openai.AuthenticationError, match="give the key"):
                here.client(key).models.list()
        for header in ("Bearer ключ", "Basic s3cret", "s3cret", ""):
            assert (
                httpx.get(
                    f"{here.url}/v1/models", headers={"authorization": header.encode()}
                ).status_code
                == 401
            )
        assert here.post({}).status_code == 401
        assert httpx.get(f"{here.url}/metrics").status_code == 401
        assert httpx.get(f"{here.url}/health").status_code == 200
        text = [{"role": "user", "content": "a private matter"}]
        here.client("s3cret").chat.completions.create(model="tiny", messages=text, max_tokens=2)  # type: ignore[call-overload]
    ours = " ".join(
        record.getMessage()
        for record in caplog.records
        if not record.name.startswith(("openai", "http"))
    )
    assert "200 in" in ours and "s3cret" not in ours and "private" not in ours


# ---- many at once ----


def test_nobody_gets_anothers_answer_and_none_is_lost(model: Llava, photos: list[bytes]) -> None:
    """200 requests from 16 clients, one in ten of them bad."""
    right = [model.caption(photo, "What?", max_new_tokens=20) for photo in photos]
    assert len(set(right)) > 15
    with live(model, batch_size=8) as here:
        bad: list[Any] = [
            {"n": -1},
            {"messages": shown(b"no picture")},
            {"messages": shown(photos[0][:500])},
            {"x": 1},
        ]

        def client(number: int) -> list[str]:
            draw, openai_client, outcomes = random.Random(number), here.client(), []
            for request in range(number, 200, 16):
                if request % 10 == 0:
                    status = here.post({**asked(photos[0]), **draw.choice(bad)}).status_code
                    outcomes.append("bad" if status == 400 else f"wrong: {status}")
                    continue
                which, stream = draw.randrange(len(photos)), draw.random() < 0.5
                answer: Any = openai_client.chat.completions.create(
                    model="tiny", messages=shown(photos[which]), max_tokens=20, stream=stream
                )  # type: ignore[call-overload]
                if stream:
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
                else:
                    text = answer.choices[0].message.content
                outcomes.append(
                    "right" if text == right[which] else f"wrong: {text!r}, not {right[which]!r}"
                )
            return outcomes

        with ThreadPoolExecutor(16) as clients:
            outcomes = [outcome for done in clients.map(client, range(16)) for outcome in done]
        assert len(outcomes) == 200
        assert outcomes.count("bad") == 20 and outcomes.count("right") == 180, set(outcomes)
        assert here.metric('llava_requests_total{status="200"}') == 180
        assert here.metric('llava_requests_total{status="400"}') == 20
        assert here.metric("llava_places") == here.metric("llava_rows") == 0


def raw(here: Live, body: dict[str, Any], half: bool = False) -> socket.socket:
    """A connection on which a request, or half of one, has been sent."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(here.url.rpartition(":")[2])))
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + (content[: len(content) // 2] if half else content))
    return connection


def test_clients_that_go_away_free_their_places(model: Llava, photos: list[bytes]) -> None:
    """While they speak, while they wait for their turn, in the middle of their request."""
    with endless(model), live(model, batch_size=2, queue=10) as here:
        kinds = [{"stream": True}, {}, {"stream": True}, {}]
        connections = [raw(here, asked(photo, **kind)) for photo, kind in zip(photos, kinds)]
        connections.append(raw(here, asked(photos[4]), half=True))
        here.wait(lambda: len(here.worker.places) == 5 and len(here.worker.rows) == 2)
        for connection in connections:
            connection.close()
        here.wait(lambda: not here.worker.places and not here.worker.rows)
        here.wait(lambda: here.metric('llava_requests_total{status="499"}') == 5)
        assert here.post(asked(photos[0], max_tokens=2)).status_code == 200


def test_a_full_queue_says_when_to_come_again(model: Llava, photos: list[bytes]) -> None:
    with endless(model), live(model, batch_size=1, queue=1) as here:
        connections = [raw(here, asked(photo)) for photo in photos[:2]]
        here.wait(lambda: len(here.worker.places) == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            here.client().chat.completions.create(model="tiny", messages=shown(photos[2]))  # type: ignore[call-overload]
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for connection in connections:
            connection.close()
        here.wait(lambda: not here.worker.places)
        assert here.post(asked(photos[2], max_tokens=2)).status_code == 200


def test_time_is_up(model: Llava, photos: list[bytes]) -> None:
    """An answer that takes too long, streamed or not, and a client that takes too long to ask."""
    with endless(model), live(model, timeout=0.2) as here:
        slow = raw(here, asked(photos[0]), half=True)
        assert here.post(asked(photos[0])).json()["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="time is up"):
            list(
                here.client().chat.completions.create(
                    model="tiny", messages=shown(photos[0]), stream=True
                )
            )  # type: ignore[call-overload]
        assert slow.recv(20).startswith(b"HTTP/1.1 504")
        slow.close()


# ---- the command ----


@pytest.fixture
def command(checkpoint: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Start `llava serve`; returns the process and its URL, when it is up."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [
            sys.executable,
            "-m",
            "llava_simplified.cli",
            "serve",
            str(checkpoint),
            "--port",
            str(port),
            *options,
        ]
        process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env={**os.environ, "LLAVA_API_KEY": ""}
        )
        started.append(process)
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                return process, f"http://127.0.0.1:{port}"
            except httpx.HTTPError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.1)
        raise AssertionError("it did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert (
            llava(
                [
                    "serve",
                    "nothing-to-load",
                    "--port",
                    str(port := taken.getsockname()[1]),
                    "--no-page",
                ]
            )
            == 2
        )
    assert (
        f"Address already in use (while attempting to bind on address ('127.0.0.1', {port}))"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_signal_lets_what_was_begun_come_to_its_end(command: Any, photos: list[bytes]) -> None:
    process, url = command("--no-page", "--batch-size", "2")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(photo: bytes) -> int:
        answer = client.chat.completions.create(
            model="tiny",
            messages=shown(photo),
            max_tokens=200,
            extra_body={"repetition_penalty": 1.2},
        )  # type: ignore[call-overload]
        return answer.usage.completion_tokens

    def begun() -> float:
        """Requests that the server has taken: a fast machine may have answered some of them by now."""
        lines = [line.split() for line in httpx.get(f"{url}/metrics").text.splitlines()]
        return sum(
            float(line[-1])
            for line in lines
            if line[0].startswith(("llava_places", "llava_requests_total"))
        )

    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(ask, photo) for photo in photos[:6]]  # four of them wait
        while begun() < 6:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert all(answer.result() > 0 for answer in answers)
    assert process.wait(20) == 0
