"""Attacks on the server and its page: each route allows only what the table says."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from live_server import (
    ATTENTION,
    CHAT,
    Limits,
    LiveServer,
    chat_body,
    image_part,
    live_server,
    user_message,
)
from starlette.routing import Route

from llava_simplified.cli import main as llava
from llava_simplified.model.llava import Llava
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.serve import page
from llava_simplified.serve.api import create_app
from llava_simplified.serve.engine import Engine
from llava_simplified.serve.page import page_routes
from llava_simplified.serve.security import PUBLIC_PATHS, HostCheck, check_host_names

KEY = "s3cret"

# Every route with its methods, whether it needs the API key, and what it allows.
ROUTES: dict[str, tuple[str, str, str]] = {
    "/": ("GET HEAD", "public", "the HTML of the page, the same for everybody"),
    "/page.css": ("GET HEAD", "public", "the style sheet"),
    "/page.js": ("GET HEAD", "public", "the script, which imports the next three"),
    "/page_attention.js": ("GET HEAD", "public", "a module of the script"),
    "/page_client.js": ("GET HEAD", "public", "a module of the script"),
    "/page_image.js": ("GET HEAD", "public", "a module of the script"),
    "/page.json": (
        "GET HEAD",
        "public",
        "the model's name and instruction, the limits, whether a key is needed",
    ),
    "/health": ("GET HEAD", "public", "whether the engine's loop runs"),
    "/examples/0": (
        "GET HEAD",
        "key",
        "a JPEG made at the start from the operator's folder",
    ),
    "/metrics": ("GET HEAD", "key", "counters and gauges, no content of requests"),
    "/v1/models": ("GET HEAD", "key", "the name of the model"),
    "/v1/models/{name:path}": ("GET HEAD", "key", "the name of the model; others are 404"),
    "/v1/chat/completions": (
        "POST",
        "key",
        "an answer of the model, within the limits of the options",
    ),
    "/v1/attention": (
        "POST",
        "key",
        "attention maps of one image and one answer, within the same limits",
    ),
}
# The same table, with a path that exists in the place of the pattern.
TABLE = {path.replace("{name:path}", "tiny"): entry for path, entry in ROUTES.items()}
PATHS = list(TABLE)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"]


@pytest.fixture(scope="module", params=["", KEY], ids=["without key", "with key"])
def key(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(model: Llava, photos: Sequence[bytes], key: str) -> Iterator[LiveServer]:
    with live_server(
        model, key=key, examples=photos[:2], allowed_hosts=["llava.example.org"], max_queue=100
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LiveServer, key: str) -> Iterator[httpx.Client]:
    """Return a client that sends the key, if there is one, and follows no redirects."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client_without_key(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def send_raw(server: LiveServer, *lines: str, body: bytes = b"") -> tuple[int, str]:
    """Send exactly these lines; return the status and the rest of the response."""
    port = int(server.url.rpartition(":")[2])
    head = "\r\n".join([*lines, "Connection: close", "", ""])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode("latin-1") + body)
        data = b""
        while chunk := connection.recv(65536):
            data += chunk
    status_line, _, rest = data.decode("latin-1").partition("\r\n")
    return int(status_line.split()[1]), rest


# ---- the routes ----


def test_routes_are_those_of_table(model: Llava, photos: Sequence[bytes], key: str) -> None:
    routes = page_routes("tiny", model.instruction, Limits(), 16, bool(key), photos[:1])
    app = create_app(Engine(model), "tiny", key, page=routes)
    found: dict[str, str] = {}
    for route in app.routes:
        assert type(route) is Route, f"{route}: mounted applications and websockets are not allowed"
        found[route.path] = " ".join(sorted(route.methods or ()))
    assert found == {path: methods for path, (methods, _, _) in ROUTES.items()}


@pytest.mark.parametrize("path", PATHS)
def test_routes_answer_only_methods_of_table(client: httpx.Client, path: str) -> None:
    allowed = TABLE[path][0].split()
    for method in METHODS:
        status = client.request(method, path).status_code
        if method in allowed:
            assert status in (200, 415), method  # 415: the POST has no JSON
        else:
            assert status == 405, method


@pytest.mark.parametrize("path", PATHS)
def test_routes_need_key_as_in_table(client_without_key: httpx.Client, key: str, path: str) -> None:
    _, access, _ = TABLE[path]
    is_open = access == "public" or not key
    for method in METHODS:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": f"key={KEY}"}):
            url = f"{path}?key={KEY}"
            status = client_without_key.request(method, url, headers=headers).status_code
            expected = (200, 405, 415) if is_open else (401,)
            assert status in expected


@pytest.mark.medium
def test_other_paths_do_not_exist(
    client: httpx.Client, client_without_key: httpx.Client, key: str
) -> None:
    paths = [
        "/docs",
        "/openapi.json",
        "/page.html",
        "/page.py",
        "/page.js/",
        "/v1",
        "/v1/",
        "/static/page.js",
        "/favicon.ico",
        "/login",
        "/config",
        "/theme.css",
        "/monitoring",
        "/examples",
        "/examples/",
    ]
    gradio = [
        "",
        "/",
        "/info",
        "/config",
        "/upload",
        "/queue/join",
        "/queue/data",
        "/heartbeat/x",
        "/call/ask",
        "/run/predict",
        "/api/predict",
        "/component_server",
        "/deep_link",
        "/reset",
        "/startup-events",
        "/file=/etc/passwd",
        "/file=http://127.0.0.1/",
        "/file/etc/passwd",
        "/proxy=http://127.0.0.1/",
        "/stream/x",
        "/process_recording",
        "/cancel",
        "/assets/x",
        "/static/x",
        "/upload_progress",
    ]
    for path in paths + ["/gradio_api" + rest for rest in gradio]:
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert client.request(method, path).status_code == 404, path
            if key:
                assert client_without_key.request(method, path).status_code in (401, 404)
    for path in ("/?deep_link=x", "/?__theme=dark", "/?view=api"):
        assert client.get(path).content == client.get("/").content, "the query must be ignored"


# ---- files and URLs ----


TRAVERSALS = [
    "/examples/../page.py",
    "/examples/..%2fpage.py",
    "/examples/%2e%2e/%2e%2e/etc/passwd",
    "/examples/..%5c..%5cetc%5cpasswd",
    "/examples//etc/passwd",
    "/examples/%2fetc%2fpasswd",
    "/examples/0/../../etc/passwd",
    "/examples/0%00.png",
    "/examples/0.png",
    "/examples/-1",
    "/examples/+1",
    "/examples/1e0",
    "/examples/0x0",
    "/examples/٠",
    "/examples/2",
    "/examples/99999999999999999999",
    "/examples/" + "9" * 5000,
    "/page.js/../page.py",
    "/page.css%00.py",
    "/page.js%2f..%2fpage.py",
    "/../../../../etc/passwd",
    "/..%2f..%2f..%2fetc%2fpasswd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/./page.py",
    "/etc/passwd",
    "//etc/passwd",
    "/file:///etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1/etc/passwd",
]


@pytest.mark.parametrize("target", TRAVERSALS, ids=lambda target: target[:40])
def test_traversal_reaches_no_file(server: LiveServer, key: str, target: str) -> None:
    """The target is sent exactly as written, because HTTP clients would normalize it."""
    lines = ["Host: 127.0.0.1"]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    encoded = target.encode().decode("latin-1")
    status, response = send_raw(server, f"GET {encoded} HTTP/1.1", *lines)
    assert status in (400, 404)
    assert "root:" not in response and "import " not in response


def test_examples_are_those_given_at_start(client: httpx.Client, photos: Sequence[bytes]) -> None:
    for number in (0, 1):
        response = client.get(f"/examples/{number}")
        assert (
            response.content == photos[number] and response.headers["content-type"] == "image/jpeg"
        )


class Bait(BaseHTTPRequestHandler):
    """A server that must not receive any request."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_image_urls_are_neither_fetched_nor_read(
    client: httpx.Client, photos: Sequence[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(photos[0])
    with ThreadingHTTPServer(("127.0.0.1", 0), Bait) as bait:
        threading.Thread(target=bait.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{bait.server_address[1]}"
        urls = [
            f"file://{secret}",
            str(secret),
            "secret.png",
            "../secret.png",
            f"http://{address}/a.png",
            f"HTTP://{address}/a.png",
            f"https://{address}/a.png",
            f"ftp://{address}/a.png",
            f"//{address}/a.png",
            f"blob:http://{address}/x",
            "gopher://x/",
            "data:text/plain,hello",
            "",
            "\x00",
        ]
        monkeypatch.chdir(tmp_path)
        read_bytes = Path.read_bytes
        reads: list[Path] = []
        monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
        for url in urls:
            messages = [{"role": "user", "content": [image_part(url)]}]
            body = {"model": "tiny", "messages": messages}
            chat = client.post(CHAT, json=body)
            attention = client.post(ATTENTION, json={**body, "answer": "a cat"})
            assert (chat.status_code, attention.status_code) == (400, 400), url
            error = chat.json()["error"]
            is_malformed = error["param"] == "messages[0].content[0].image_url.url"
            assert is_malformed or error["code"] == "image_url_not_allowed"
        bait.shutdown()
    assert not Bait.requests and not reads


def test_attention_fetches_under_same_rules_as_chat(model: Llava) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Bait) as bait:
        threading.Thread(target=bait.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{bait.server_address[1]}/a.png"
        messages = [{"role": "user", "content": [image_part(url)]}]
        body = {"model": "tiny", "messages": messages, "answer": "a cat"}
        with live_server(model, limits=Limits(fetch=FetchOptions(retries=0))) as server:
            response = server.post(body, ATTENTION)
        bait.shutdown()
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["code"] != "image_url_not_allowed", (
        "the URL is allowed, so its address must be refused"
    )
    assert not Bait.requests


def test_file_data_of_gradio_is_refused(client: httpx.Client) -> None:
    """Gradio, which many demo pages of models use, reads the files that such an object names."""

    def body_with(content: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": [{"role": "user", "content": content}]}

    file_data: dict[str, Any] = {
        "path": "/etc/passwd",
        "url": "http://127.0.0.1:1/",
        "meta": {"_type": "gradio.FileData"},
    }
    bodies: list[Any] = [
        file_data,
        {"data": [file_data], "fn_index": 0, "session_hash": "x"},
        body_with([file_data]),
        body_with(file_data),
        body_with([{"type": "file", "file": file_data}]),
        body_with([{"type": "image_url", "image_url": file_data}]),
    ]
    gradio_paths = ["queue/join", "run/predict", "component_server"]
    for path in [*PATHS, *(f"/gradio_api/{name}" for name in gradio_paths)]:
        for body in bodies:
            response = client.post(path, json=body)
            assert 400 <= response.status_code < 500, (path, body)
            assert "root:" not in response.text


# ---- host and origin ----


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_foreign_host_is_refused(client: httpx.Client, path: str) -> None:
    for host in (
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example.",
        "llava.example.org.evil.example",
        "a.llava.example.org",
        "2130706433",
        "0x7f.1",
        "evillocalhost",
    ):
        for method in ("GET", "POST"):
            response = client.request(method, path, headers={"host": host})
            assert response.status_code == 421, host
            error = response.json()["error"]
            assert error["code"] == "host_not_allowed" and "--allowed-hosts" in error["message"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:1234",
        "[::1]",
        "[::1]:8000",
        "192.168.1.7",
        "localhost",
        "LOCALHOST:99",
        "llava.localhost",
        "localhost.",
        socket.gethostname(),
        "llava.example.org",
        "LLaVA.example.org:443",
    ],
)
def test_own_hosts_are_answered(client: httpx.Client, host: str) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert client.get(path, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        " ",
        "a b",
        "user@localhost",
        "localhost/x",
        "localhost:port",
        "localhost:99999",
        "[::1",
        "[x]",
        "localhost:",
        "localhost,evil.example",
        "évil",
        ".",
        "http://localhost",
    ],
)
def test_malformed_host_is_refused(server: LiveServer, host: str) -> None:
    for path in ("/", "/health"):
        status, _ = send_raw(server, f"GET {path} HTTP/1.1", f"Host: {host}")
        assert status == 400


@pytest.mark.parametrize("hosts", [[], ["localhost", "localhost"], ["localhost", "evil.example"]])
def test_missing_and_repeated_host_is_refused(server: LiveServer, hosts: list[str]) -> None:
    lines = [f"Host: {host}" for host in hosts]
    for version in ("1.1", "1.0"):
        status, _ = send_raw(server, f"GET /health HTTP/{version}", *lines)
        assert status == 400


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"localhost"], [b"\xff"]])
def test_host_check_does_not_rely_on_http_parser(hosts: list[bytes]) -> None:
    """h11 refuses such requests itself, but httptools, which uvicorn uses if it is installed, does not."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def application(*_: Any) -> None:
        raise AssertionError("the request reached the application")

    headers = [(b"host", host) for host in hosts]
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": headers}
    asyncio.run(HostCheck(application)(scope, receive, send))
    assert sent[0]["status"] == 400
    assert set(json.loads(sent[1]["body"])["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", PATHS)
def test_foreign_origin_is_refused(client: httpx.Client, server: LiveServer, path: str) -> None:
    own = server.url
    host = own.removeprefix("http://")
    foreign = [
        "null",
        "https://evil.example",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        own.replace("127.0.0.1", "localhost"),
        f"{own}.evil.example",
        f"http://x@{host}",
        f"{own}/",
        f"file://{host}",
        f"chrome-extension://{host}",
        "",
        host,
    ]
    for origin in foreign:
        for method in ("GET", "POST"):
            response = client.request(method, path, headers={"origin": origin})
            if path == "/health":
                assert response.status_code == (200 if method == "GET" else 405)
            else:
                assert response.status_code == 403, origin
                assert response.json()["error"]["code"] == "origin_not_allowed"
            assert not any(name.startswith("access-control") for name in response.headers)
    twice = client.get(path, headers=[("origin", own), ("origin", "https://evil.example")])
    assert twice.status_code == (200 if path == "/health" else 403)


def test_own_origin_is_answered(
    client: httpx.Client, server: LiveServer, photos: Sequence[bytes]
) -> None:
    body = chat_body(photos[0], max_tokens=2)
    assert client.post(CHAT, json=body, headers={"origin": server.url}).status_code == 200
    for host, origin in (
        ("llava.example.org", "https://llava.example.org"),  # behind a proxy that terminates TLS
        ("llava.example.org:8443", "https://llava.example.org:8443"),
        ("llava.example.org:443", "https://llava.example.org"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("LOCALHOST:8000", "http://localhost:8000"),
    ):
        response = client.post(CHAT, json=body, headers={"host": host, "origin": origin})
        assert response.status_code == 200, (host, response.text)
    other_port = {"host": "llava.example.org", "origin": "https://llava.example.org:8443"}
    assert client.post(CHAT, json=body, headers=other_port).status_code == 403


def test_forwarded_headers_do_not_change_host(client: httpx.Client) -> None:
    headers = {
        "host": "evil.example",
        "x-forwarded-host": "localhost",
        "forwarded": "host=localhost",
    }
    assert client.get("/", headers=headers).status_code == 421


@pytest.mark.parametrize("name", ["*", "http://x.org", "x.org:80", "x.org/", "", "a b"])
def test_allowed_hosts_must_be_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--allowed-hosts"):
        check_host_names([name])
    options = ["--allowed-hosts", "good.example", "--allowed_hosts", name]
    assert llava(["serve", "no-checkpoint", *options]) == 2
    assert "--allowed-hosts" in capsys.readouterr().err


@pytest.mark.slow
def test_command_passes_hosts_and_examples(
    command: Any, photos: Sequence[bytes], tmp_path: Path
) -> None:
    (tmp_path / "cat.png").write_bytes(photos[0])
    examples = ["--examples", str(tmp_path)]
    hosts = ["--allowed-hosts", "a.example", "b.example", "--allowed_hosts", "c.example"]
    _, url = command(*examples, *hosts)
    statuses = {"a.example": 200, "b.example": 200, "c.example:80": 200, "d.example": 421}
    for host, status in statuses.items():
        assert httpx.get(f"{url}/examples/0", headers={"host": host}).status_code == status
    (tmp_path / "cat.png").unlink()
    assert httpx.get(f"{url}/examples/0").headers["content-type"] == "image/jpeg", (
        "the example must be kept in memory"
    )


# ---- headers ----


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_responses_have_security_headers(
    client: httpx.Client, server: LiveServer, path: str
) -> None:
    responses = [
        client.get(path),
        client.post(path, json={}),
        httpx.get(server.url + path),
        client.get(path, headers={"host": "evil.example"}),
        client.get(path, headers={"origin": "null"}),
    ]
    for response in responses:
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] in ("no-store", "no-cache")
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        policy = response.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy)
        assert "unsafe" not in response.headers["content-security-policy"]
    if path in PUBLIC_PATHS - {"/health"}:
        policy = client.get(path).headers["content-security-policy"].split("; ")
        directives = [directive.split()[0] for directive in policy]
        assert directives == [
            "default-src",
            "script-src",
            "style-src",
            "img-src",
            "connect-src",
            "form-action",
            "base-uri",
            "frame-ancestors",
        ]


def test_page_files_contain_no_inline_code_and_no_markup_from_strings() -> None:
    folder = Path(page.__file__).parent
    html = (folder / "page.html").read_text(encoding="utf-8")
    assert html.count("<script") == 1 and "<style" not in html and "style=" not in html
    assert not [word for word in html.split() if word.startswith("on") and "=" in word]
    scripts = sorted(folder.glob("*.js"))
    assert len(scripts) == 4
    for forbidden in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
    ):
        for script in scripts:
            assert forbidden not in script.read_text(encoding="utf-8"), (script.name, forbidden)


# ---- generation options ----


EXTREME: list[tuple[dict[str, Any], int]] = [
    ({"temperature": 1e-38}, 200),
    ({"temperature": 5e-324}, 200),
    ({"temperature": 1e-4, "top_p": 5e-324, "top_k": 1}, 200),
    ({"temperature": 0.001}, 200),
    ({"temperature": 0.001, "repetition_penalty": 0.1}, 200),
    ({"temperature": 0.001, "repetition_penalty": 10}, 200),
    ({"temperature": 2, "top_p": 5e-324}, 200),
    (
        {
            "temperature": 2,
            "top_p": 1e-45,
            "repetition_penalty": 10,
            "top_k": 2**31 - 1,
            "seed": 2**63 - 1,
        },
        200,
    ),
    ({"temperature": 1, "seed": -(2**63)}, 200),
    ({"n": 3, "temperature": 5e-324}, 400),
    ({"temperature": -5e-324}, 400),
    ({"temperature": 2.0000001}, 400),
    ({"temperature": 1e38}, 400),
    ({"temperature": 10**400}, 400),
    ({"temperature": "1"}, 400),
    ({"temperature": [1]}, 400),
    ({"temperature": True}, 400),
    ({"temperature": float("nan")}, 400),
    ({"temperature": float("inf")}, 400),
    ({"top_p": 0}, 400),
    ({"top_p": 1.0000001}, 400),
    ({"top_k": 2**31}, 400),
    ({"top_k": -2}, 400),
    ({"repetition_penalty": 5e-324}, 400),
    ({"repetition_penalty": 1e38}, 400),
    ({"repetition_penalty": -1}, 400),
    ({"n": 10**30}, 400),
    ({"seed": 2**63}, 400),
    ({"seed": 1e300}, 400),
    ({"min_new_tokens": 10**9}, 400),
    ({"num_beams": 1000}, 400),
]


@pytest.mark.medium
def test_extreme_options_fail_only_their_own_request(
    model: Llava, client: httpx.Client, server: LiveServer, photos: Sequence[bytes]
) -> None:
    expected = [model.caption(photo, "What?", max_new_tokens=40) for photo in photos[:4]]

    def ask(body: dict[str, Any]) -> httpx.Response:
        content = json.dumps(body)  # httpx refuses NaN
        return client.post(CHAT, content=content, headers={"content-type": "application/json"})

    def ask_greedily(number: int) -> list[str]:
        answers = []
        for _ in range(6):
            response = ask(chat_body(photos[number], max_tokens=40))
            assert response.status_code == 200, response.text
            answers.append(response.json()["choices"][0]["message"]["content"])
        return answers

    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(ask_greedily, number) for number in range(4)]
        bodies = [chat_body(photos[5], max_tokens=20, **options) for options, _ in EXTREME]
        extreme = list(threads.map(ask, bodies))
    for (options, status), response in zip(EXTREME, extreme):
        assert response.status_code == status, (options, response.text)
    for number, answers in enumerate(others):
        assert answers.result() == [expected[number]] * 6
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "1", True])
def test_invalid_lengths_are_refused(
    client: httpx.Client, photos: Sequence[bytes], tokens: Any
) -> None:
    assert client.post(CHAT, json=chat_body(photos[0], max_tokens=tokens)).status_code == 400


def test_tiny_temperature_is_greedy(
    model: Llava, client: httpx.Client, photos: Sequence[bytes]
) -> None:
    expected = model.caption(photos[3], "What?", max_new_tokens=20)
    for temperature in (1e-38, 5e-324, 9e-4):
        response = client.post(
            CHAT, json=chat_body(photos[3], max_tokens=20, temperature=temperature)
        )
        assert response.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.medium
def test_attention_maps_do_not_change_answers_in_progress(
    model: Llava, client: httpx.Client, photos: Sequence[bytes]
) -> None:
    """Attention maps are computed between two steps of the batch, and do not change its answers."""
    expected = [model.caption(photo, "What?", max_new_tokens=40) for photo in photos[:4]]
    bodies = [
        {"model": "tiny", "messages": user_message(photos[6]), "answer": answer}
        for answer in ("a cat", "\ufffd", "x" * 1000, "", 7, None)
    ]
    with ThreadPoolExecutor(8) as threads:
        answers = [
            threads.submit(client.post, CHAT, json=chat_body(photo, max_tokens=40))
            for photo in photos[:4] * 5
        ]
        maps = [threads.submit(client.post, ATTENTION, json=body) for body in bodies * 3]
    texts = [answer.result().json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == expected * 5
    statuses = [attention.result().status_code for attention in maps]
    assert statuses == [200, 400, 400, 400, 400, 400] * 3
