"""`llava serve`: load a checkpoint, serve requests until a signal arrives, then finish those in flight."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """The command line of `llava serve`."""
    parser = argparse.ArgumentParser(
        "llava serve", description="Serve a model: a web page and an OpenAI-compatible API"
    )
    parser.add_argument("checkpoint", help="folder that training wrote")
    parser.add_argument(
        "--model-base", help="the language model, if it is not where it was at training"
    )
    parser.add_argument("--vision-tower", help="the vision tower, likewise")
    parser.add_argument("--name", help="what clients call the model (the folder's name)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("LLAVA_API_KEY", ""), help="or in LLAVA_API_KEY, which `ps` does not show")  # fmt: skip
    parser.add_argument(
        "--allowed-hosts",
        "--allowed_hosts",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="host names, such as a proxy's, that clients may use besides IP addresses, localhost and the name of this machine",
    )
    page = parser.add_mutually_exclusive_group()
    page.add_argument("--no-page", action="store_true", help="serve the API only")
    page.add_argument(
        "--examples", type=Path, metavar="FOLDER", help="folder of example images for the page"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--batch-size", type=int, default=16, help="answers decoded at the same time (%(default)s)"
    )
    limits.add_argument(
        "--queue", type=int, default=64, help="requests that may wait; more get 429 (%(default)s)"
    )
    limits.add_argument(
        "--timeout", type=float, default=120, help="seconds a request may take (%(default)s)"
    )
    limits.add_argument(
        "--context",
        type=int,
        default=4096,
        help="tokens, prompt, pictures and answer (%(default)s)",
    )
    limits.add_argument("--max-tokens", type=int, default=512, help="of an answer (%(default)s)")
    limits.add_argument("--max-images", type=int, default=8, help="of a request (%(default)s)")
    limits.add_argument(
        "--max-body", type=int, default=20, help="megabytes of a request (%(default)s)"
    )
    limits.add_argument(
        "--allow-image-urls",
        action="store_true",
        help="fetch http(s) pictures, from public addresses",
    )
    args = parser.parse_args(argv)
    needed = ["starlette", "uvicorn", "pydantic", "prometheus_client"]
    if missing := [name for name in needed if not find_spec(name)]:
        raise ValueError(
            f"{', '.join(missing)} not installed: pip install 'llava-simplified[serve]'"
        )
    return serve(args)


def serve(args: argparse.Namespace) -> int:
    """Run the server until SIGTERM or SIGINT; return 0 when all requests in flight have been answered."""
    import uvicorn

    from llava_simplified.model.llava import Llava
    from llava_simplified.prepare.fetch_options import FetchOptions
    from llava_simplified.serve.api import Limits, create_app
    from llava_simplified.serve.engine import Worker
    from llava_simplified.serve.page import find_examples, load_examples, page_routes
    from llava_simplified.serve.security import check_host_names

    check_host_names(args.allowed_hosts)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    socket.create_server(
        (args.host, args.port), family=family
    ).close()  # one that is taken shows before the loading
    examples = load_examples(find_examples(args.examples)) if args.examples else []
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(0)
    )  # before the server is up, and again when it has drained
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if not args.api_key and not _is_loopback(args.host):
        print(f"warning: {args.host} is open to others, and there is no --api-key", file=sys.stderr)
    model = Llava.from_pretrained(
        args.checkpoint, model_base=args.model_base, vision_tower=args.vision_tower
    )
    worker = Worker(model, args.batch_size, args.queue, args.timeout, args.context)
    fetch = (
        FetchOptions(retries=0, max_bytes=args.max_body * 10**6) if args.allow_image_urls else None
    )
    name = args.name or Path(args.checkpoint).resolve().name
    limits = Limits(args.max_body * 10**6, args.max_images, args.max_tokens, fetch)
    page = []
    if not args.no_page:
        page = page_routes(
            name, model.instruction, limits, args.batch_size, bool(args.api_key), examples
        )
    app = create_app(worker, name, args.api_key, limits, page, [*args.allowed_hosts, args.host])
    config = uvicorn.Config(
        app,
        args.host,
        args.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(args.timeout),
    )
    print(f"serving {name} on http://{args.host}:{args.port}", file=sys.stderr)
    uvicorn.Server(config).run()
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
