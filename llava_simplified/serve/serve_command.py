"""`llava serve`: load a checkpoint, and serve requests until a signal arrives."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llava_simplified.extras import require_extra
from llava_simplified.options import CommandParser, MessageFormatter, add_checkpoint_options
from llava_simplified.workers import event_loop

if TYPE_CHECKING:
    from llava_simplified.serve.api import Limits

logger = logging.getLogger(__name__)


def build_parser() -> CommandParser:
    """Return the parser of `llava serve`."""
    parser = CommandParser(
        "llava serve", "Serve a model with an OpenAI-compatible API and a web page."
    )
    add_checkpoint_options(parser, positional=True)
    parser.add_argument(
        "--name", help="Name of the model for clients (default: the checkpoint's folder)"
    )
    parser.add_argument(
        "--strict-model",
        action="store_true",
        help="Reject requests that name another model, or none (default: the name in a request is ignored)",
    )
    _add_network_options(parser)
    _add_page_options(parser)
    _add_limit_options(parser)
    return parser


def _add_network_options(parser: CommandParser) -> None:
    """Add the options for the address, the API key, the allowed hosts and image URLs."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 is reachable from other machines (default: %(default)s)",
    )
    group.add_argument(
        "--port", type=int, default=8000, help="Port to listen on (default: %(default)s)"
    )
    group.add_argument(
        "--api-key",
        # The default is a secret, so the help text must not contain %(default)s.
        default=os.environ.get("LLAVA_API_KEY", ""),
        help="API key required from clients (default: $LLAVA_API_KEY, which is safer: `ps` shows "
        "command-line options)",
    )
    group.add_argument(
        "--allowed-hosts",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="Additional host names of the server, for example the name of a proxy; IP addresses, localhost and "
        "the name of this machine are always allowed",
    )
    group.add_argument(
        "--allow-image-urls",
        action="store_true",
        help="Allow http(s) URLs of images in requests; only public addresses are fetched",
    )


def _add_page_options(parser: CommandParser) -> None:
    """Add the options of the web page."""
    group = parser.add_argument_group("web page").add_mutually_exclusive_group()
    group.add_argument("--no-page", action="store_true", help="Serve the API only")
    group.add_argument(
        "--examples", type=Path, metavar="FOLDER", help="Folder of example images for the page"
    )


def _add_limit_options(parser: CommandParser) -> None:
    """Add the options that limit requests."""
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="Maximum number of sequences generated at the same time (default: %(default)s)",
    )
    group.add_argument(
        "--queue",
        type=int,
        default=64,
        help="Maximum number of waiting requests; more are rejected with status 429 (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="Maximum duration of a request in seconds, including the time in the queue (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        type=int,
        default=4096,
        metavar="TOKENS",
        help="Maximum number of tokens of prompt, images and answer together (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="Maximum number of new tokens per answer; a higher number in a request is lowered (default: %(default)s)",
    )
    group.add_argument(
        "--max-images",
        type=int,
        default=8,
        help="Maximum number of images per request (default: %(default)s)",
    )
    group.add_argument(
        "--max-body",
        type=int,
        default=20,
        metavar="MEGABYTES",
        help="Maximum size of a request body in megabytes, and of all images that a request fetches "
        "(default: %(default)s)",
    )


# Minimum and maximum of each integer option.
_RANGES = {
    "port": (1, 65535),
    "batch_size": (1, math.inf),
    "queue": (0, math.inf),
    "context": (1, math.inf),
    "max_tokens": (1, math.inf),
    "max_images": (0, math.inf),
    "max_body": (1, math.inf),
}


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for an option whose number is out of range."""
    for name, (least, greatest) in _RANGES.items():
        value = getattr(args, name)
        if not least <= value <= greatest:
            limits = f"of at least {least}"
            if greatest < math.inf:
                limits = f"from {least} to {greatest}"
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: expected a number {limits}")
    # This also rejects NaN, with which a request would never time out.
    if not 0 < args.timeout < math.inf:
        raise ValueError(f"--timeout {args.timeout}: expected a positive number of seconds")


def _clean_key(key: str) -> str:
    """Return the API key without the white space around it, such as the line break of the file that it was read from.

    Clients could not send such a key: the white space at the ends of a header is not part of its value.

    Raises:
        ValueError: The key consists of white space, or contains control characters.
    """
    stripped = key.strip(" \t\r\n")
    if (key and not stripped) or not stripped.isprintable():
        raise ValueError(
            "--api-key (or LLAVA_API_KEY): the key must have visible characters, and no line breaks between them"
        )
    return stripped


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llava serve`. On SIGTERM, it finishes the requests in flight and exits with status 0."""
    args = build_parser().parse_args(argv)
    require_extra(
        "serve", "starlette", "uvicorn", "pydantic", "prometheus_client", purpose="llava serve"
    )
    if args.allow_image_urls:
        require_extra("download", "aiohttp", "aiodns", purpose="--allow-image-urls")

    from llava_simplified.serve.page import find_examples, load_examples
    from llava_simplified.serve.security import check_host_names

    # Check all options before loading the model, which can take minutes.
    _check_numbers(args)
    args.api_key = _clean_key(args.api_key)
    check_host_names(args.allowed_hosts)
    _check_address(args.host, args.port)
    examples = load_examples(find_examples(args.examples)) if args.examples else []
    return _serve(args, examples)


def _serve(args: argparse.Namespace, examples: Sequence[bytes]) -> int:
    """Load the model, and serve requests until a signal arrives."""
    import uvicorn

    from llava_simplified.captioning.runner import load_model
    from llava_simplified.model.openmp import run_in_own_thread
    from llava_simplified.serve.api import create_app
    from llava_simplified.serve.connections import TimedH11Protocol
    from llava_simplified.serve.engine import Engine
    from llava_simplified.serve.page import page_routes

    # While uvicorn runs, it handles SIGTERM itself: it finishes the requests, and then raises the signal again for this
    # handler. Before that, while the model is loaded, this handler exits at once.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _log_with_time()
    if not args.api_key and not _is_loopback(args.host):
        logger.warning(
            "%s is reachable from other machines, and every client may use the model. Pass --api-key to prevent this.",
            args.host,
        )
    # The engine computes in a thread of its own, and the main thread must not keep OpenMP threads.
    model = run_in_own_thread(lambda: load_model(args))
    engine = Engine(
        model,
        batch_size=args.batch_size,
        max_queue=args.queue,
        timeout=args.timeout,
        max_context=args.context,
    )
    name = args.name or Path(args.model_path).resolve().name
    limits = _limits(args)
    page = []
    if not args.no_page:
        page = page_routes(
            name,
            model.instruction,
            limits,
            batch_size=args.batch_size,
            key_required=bool(args.api_key),
            examples=examples,
        )
    app = create_app(
        engine,
        name,
        key=args.api_key,
        limits=limits,
        page=page,
        # Clients may use the value of --host too, which can be a name such as llava.example.org.
        allowed_hosts=[*args.allowed_hosts, args.host],
    )
    config = uvicorn.Config(
        app,
        args.host,
        args.port,
        http=TimedH11Protocol,
        log_level="warning",
        access_log=False,  # the endpoints log their requests, without addresses
        server_header=False,
        # After a signal, wait for requests in flight, but no longer than their timeout.
        timeout_graceful_shutdown=int(args.timeout),
    )
    # An IPv6 address in a URL is in brackets.
    authority = f"[{args.host}]" if ":" in args.host else args.host
    logger.info("Serving %s on http://%s:%d", name, authority, args.port)
    server = uvicorn.Server(config)
    if sys.platform == "win32" and args.allow_image_urls:
        # aiodns, which resolves the hosts of images, does not support the event loop that uvicorn uses on Windows.
        with event_loop() as loop:
            loop.run_until_complete(server.serve())
    else:
        server.run()
    return 0


def _check_address(host: str, port: int) -> None:
    """Check that the server can listen on an address.

    Raises:
        ValueError: The address is unknown or in use.
    """
    try:
        (family, *_), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            f"--host {host}: {error.strerror}; expected an address of this machine, "
            "such as 127.0.0.1 or 0.0.0.0"
        ) from None
    try:
        # Bind the port only to check it. uvicorn binds it again later, and reports an error if it is then in use.
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ValueError(
            f"--host {host} --port {port}: {reason}; pass another port or an address of this machine"
        ) from None


def _limits(args: argparse.Namespace) -> Limits:
    """Return the limits of requests; with `--allow-image-urls`, also the options for fetching images."""
    from llava_simplified.serve.api import Limits

    max_body = args.max_body * 10**6
    limits = Limits(
        max_body=max_body,
        max_images=args.max_images,
        max_tokens=args.max_tokens,
        strict_model=args.strict_model,
    )
    if not args.allow_image_urls:
        return limits

    from llava_simplified.prepare.fetch_options import FetchOptions

    # Do not retry a failed fetch: the client is waiting, and can repeat its request.
    return replace(limits, fetch=FetchOptions(retries=0, max_bytes=max_body))


def _log_with_time() -> None:
    """Add the time to each log message, because a server's log is usually read later."""
    formatter = MessageFormatter("%(asctime)s %(name)s %(message)s")
    for handler in logging.getLogger("llava_simplified").handlers:
        handler.setFormatter(formatter)


def _is_loopback(host: str) -> bool:
    """Return whether a host can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
