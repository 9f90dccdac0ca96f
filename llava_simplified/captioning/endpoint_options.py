"""Options of `llava caption --endpoint`, and the conversion of generation options to fields of a request.

Command-line parsers import this module, so it imports no large libraries.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.options import CHECKPOINT_OPTIONS

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_MAX_SIDE = 65_500  # pixels; the limit of the JPEG format
# Fields of a request that `--extra-body` must not change, because reading the answers depends on them.
_OWN_FIELDS = ("model", "messages", "n", "stream")
# Generation options for which OpenAI's API has no field -> the value that turns the option off.
_UNSUPPORTED: dict[str, Any] = {
    "min_new_tokens": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "start_with": "",
    "forbid": (),
}


@dataclass(frozen=True)
class EndpointOptions:
    """A server with OpenAI's API, and how to send requests to it.

    Attributes:
        url: The base URL: http://host:8000/v1.
        model: The name of the model on the server.
        concurrency: Maximum number of requests in flight.
        max_side: Maximum length of an image's longer side in pixels.
        stop: Texts that end a caption.
        extra_body: Additional fields of each request, as a JSON object. Null removes a field.
        timeout: Maximum duration of one request in seconds.
        retries: Maximum number of retries of a request after an error of the server.
        max_wait: Seconds to wait for a server that is not reachable, or refuses requests because it is busy.
        max_failures: Stop the job when more records than this have failed at the server or were rejected by it.
        api_key_env: Environment variable that contains the API key. The key itself is never stored.
    """

    url: str
    model: str
    concurrency: int = 32
    max_side: int = 1024
    stop: tuple[str, ...] = ()
    extra_body: str = "{}"
    timeout: float = 120.0
    retries: int = 4
    max_wait: float = 300.0
    max_failures: int = 100
    api_key_env: str = DEFAULT_KEY_VARIABLE

    def __post_init__(self) -> None:
        _check_url(self.url)
        # Options that are integers -> (minimum, maximum).
        ranges = {
            "concurrency": (1, math.inf),
            "max_side": (1, _MAX_SIDE),
            "retries": (0, math.inf),
            "max_failures": (0, math.inf),
        }
        for name, (minimum, maximum) in ranges.items():
            value = getattr(self, name)
            if not minimum <= value <= maximum:
                upper = f" and at most {maximum}" if maximum < math.inf else ""
                raise ValueError(f"{_option(name)} {value}: must be at least {minimum}{upper}")
        # `not 0 < value` refuses NaN too, unlike `value <= 0`.
        for name in ("timeout", "max_wait"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{_option(name)} {getattr(self, name)}: must be a number above 0 (seconds)"
                )
        if "" in self.stop:
            raise ValueError("--stop: the text is empty; pass the text that ends a caption")
        # Parse the fields now, so that a wrong format is reported before the job starts.
        self.extra_fields()

    @property
    def completions_url(self) -> str:
        """The URL that requests are sent to."""
        return f"{self.url.rstrip('/')}/chat/completions"

    def extra_fields(self) -> dict[str, Any]:
        """Return the fields of `extra_body`.

        Raises:
            ValueError: It is not a JSON object, has a field that this program sets, or a seed that is no integer.
        """
        try:
            extra = json.loads(self.extra_body)
        except ValueError as error:
            raise ValueError(f"--extra-body {self.extra_body}: not JSON ({error})") from None
        if not isinstance(extra, dict):
            raise ValueError(
                f'--extra-body {self.extra_body}: expected a JSON object such as {{"top_k": 20}}'
            )
        own = [name for name in _OWN_FIELDS if name in extra]
        if own:
            raise ValueError(f"--extra-body: the field {own[0]!r} is set by the command itself")
        # With several requests per image, each gets another seed, which is computed from this one.
        seed = extra.get("seed")
        if seed is not None and type(seed) is not int:
            raise ValueError(f"--extra-body: the field 'seed' is {seed!r}; expected an integer")
        return extra

    def job_settings(self) -> dict[str, Any]:
        """Return the options that affect captions. An unfinished job cannot continue if they change.

        They do not include the address, so a job can continue with another server that runs the same model.
        """
        return {
            "model": self.model,
            "max_side": self.max_side,
            "stop": list(self.stop),
            "extra_body": self.extra_fields(),
        }

    def api_key(self) -> str:
        """Return the API key; empty if there is none, because local servers require none.

        Raises:
            ValueError: The user has named a variable that is not set, or the key contains invalid characters.
        """
        # Remove the line break that keys from a file often end with.
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.api_key_env != DEFAULT_KEY_VARIABLE:
            raise ValueError(
                f"--api-key-env {self.api_key_env}: this environment variable is not set; export it"
            )
        # The key becomes part of an HTTP header. A line break in it would begin another header.
        if not key.isascii() or not key.isprintable():
            raise ValueError(f"--api-key-env {self.api_key_env}: the key must be printable ASCII")
        return key


def _option(name: str) -> str:
    """Return the command-line option of a field: `--max-side` for `max_side`."""
    return "--" + name.replace("_", "-")


def _check_url(url: str) -> None:
    """Check the base URL of a server.

    Raises:
        ValueError: The URL is malformed, its scheme is neither http nor https, or it contains a query, a fragment or a
            password.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises ValueError if it is not a port
    except ValueError as error:
        raise ValueError(f"--endpoint {url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--endpoint {url}: expected a URL such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise ValueError(
            "--endpoint: the URL contains a password; put the key into the environment variable "
            f"{DEFAULT_KEY_VARIABLE}, or into the one that --api-key-env names"
        )
    if parts.query or parts.fragment:
        raise ValueError(f"--endpoint {url}: expected a base URL, without '?' and '#'")


# ---- command line ----


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add `--endpoint` and the options that require it."""
    # `url` and `model` have no default, so pass any text. The help texts below show the defaults of the other fields.
    defaults = EndpointOptions(url="http://127.0.0.1", model="")
    group = parser.add_argument_group(
        "server",
        "Caption with a model on a server with OpenAI's API: vLLM, SGLang, `llava serve`, or a hosted service.",
    )
    group.add_argument(
        "--endpoint",
        metavar="URL",
        help="Base URL of the server, such as http://127.0.0.1:8000/v1; replaces --model-path",
    )
    group.add_argument("--model", help="Name of the model on the server")
    group.add_argument(
        "--concurrency",
        type=int,
        default=defaults.concurrency,
        help="Maximum number of requests in flight (default: %(default)s)",
    )
    group.add_argument(
        "--max-side",
        type=int,
        default=defaults.max_side,
        metavar="PIXELS",
        help="Maximum length of the longer side of the images that are sent; larger ones are shrunk "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="Text that ends a caption; repeat the option for several texts",
    )
    group.add_argument(
        "--extra-body",
        default=defaults.extra_body,
        metavar="JSON",
        help="Additional fields of each request, as a JSON object; null removes a field",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=defaults.timeout,
        metavar="SECONDS",
        help="Maximum duration of a request in seconds (default: %(default)s)",
    )
    group.add_argument(
        "--retries",
        type=int,
        default=defaults.retries,
        help="Maximum number of retries of a request after a server error, a timeout, or a response that is cut off or not "
        "JSON (default: %(default)s)",
    )
    group.add_argument(
        "--max-wait",
        type=float,
        default=defaults.max_wait,
        metavar="SECONDS",
        help="Seconds to wait for a server that is starting, busy or not reachable (default: %(default)s)",
    )
    group.add_argument(
        "--max-failures",
        type=int,
        default=defaults.max_failures,
        help="Stop when more records than this have failed; run the same command again to continue "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--api-key-env",
        default=defaults.api_key_env,
        metavar="NAME",
        help="Environment variable with the API key (default: %(default)s, if it is set)",
    )


def parse_endpoint_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> EndpointOptions | None:
    """Return the options of the server; None without `--endpoint`.

    Args:
        parser: The parser of the command, from which the defaults are read.
        args: The parsed arguments.

    Raises:
        ValueError: An option is invalid or missing, or would be ignored: an option of the server without `--endpoint`, or
            an option of a local model with it.
    """
    # The options have the names of the fields.
    names = [field.name for field in fields(EndpointOptions) if field.name != "url"]

    def refuse_changed(options: Sequence[str], reason: str) -> None:
        """Raise ValueError if one of the options differs from its default, because it would be ignored."""
        for name in options:
            if getattr(args, name) != parser.get_default(name):
                raise ValueError(f"{_option(name)} {reason}.")

    # Refuse options that would be ignored, because the captions would not be what the user expects.
    if not args.endpoint:
        if not args.model_path:
            raise ValueError("--model-path is required, or --endpoint for a model on a server.")
        refuse_changed(names, "requires --endpoint")
        return None
    if not args.model:
        raise ValueError(
            f"--model: the name of the model on the server is required with --endpoint; {args.endpoint}/models "
            "lists the names."
        )
    refuse_changed(
        CHECKPOINT_OPTIONS, "has no effect with --endpoint, because the model runs on the server"
    )
    refuse_changed(["batch_size"], "has no effect with --endpoint; pass --concurrency")
    options = {name: getattr(args, name) for name in names}
    options["stop"] = tuple(args.stop)
    return EndpointOptions(args.endpoint, **options)


# ---- requests ----


def request_fields(options: GenerationOptions, endpoint: EndpointOptions) -> dict[str, Any]:
    """Return the fields of a request that all records share: model, limits and sampling.

    Args:
        options: Generation options.
        endpoint: The server.

    Raises:
        ValueError: An option is used for which OpenAI's API has no field.
    """
    for name, default in _UNSUPPORTED.items():
        if getattr(options, name) != default:
            raise ValueError(
                f"{_option(name)}: OpenAI's API has no field for this option. If the server has one, pass it with "
                "--extra-body, for example '{\"min_tokens\": 5}' for vLLM."
            )
    body: dict[str, Any] = {
        "model": endpoint.model,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
    }
    # Send only what differs from the default, because not every server knows all of these fields.
    if options.top_p != 1:
        body["top_p"] = options.top_p
    if options.top_k:
        body["top_k"] = options.top_k
    if options.repetition_penalty != 1:
        body["repetition_penalty"] = options.repetition_penalty
    if options.temperature > 0 and options.seed is not None:
        body["seed"] = options.seed
    if endpoint.stop:
        body["stop"] = list(endpoint.stop)
    # Add the user's fields last, so that they take precedence. A null removes a field.
    body.update(endpoint.extra_fields())
    return {name: value for name, value in body.items() if value is not None}
