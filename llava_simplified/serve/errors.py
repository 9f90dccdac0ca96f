"""Convert exceptions to errors in OpenAI's format."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from llava_simplified.data.images import ImageError
from llava_simplified.serve.engine import QueueFullError, RequestError

# An error message repeats the name of an unknown field or model, which can be as long as the body of the request.
_MAX_MESSAGE = 1000

# Values of the field `code` for errors that are identified by their HTTP status.
_CODES = {
    401: "invalid_api_key",
    403: "origin_not_allowed",
    404: "not_found",
    408: "body_too_slow",
    413: "body_too_large",
    415: "unsupported_media_type",
    421: "host_not_allowed",
}


def to_openai_error(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Convert an exception into an HTTP status, a body and headers.

    The message of a client error explains the problem. The message of a server error is generic; the
    details are written only to the server's log.

    Returns:
        The status code, `{"error": {"message", "type", "param", "code"}}`, and additional headers.
    """
    status = 400
    message = str(error)
    kind = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = {}

    if isinstance(error, HTTPException):
        status = error.status_code
        message = error.detail
        headers = dict(error.headers or {})
        code = _CODES.get(status)
    elif isinstance(error, QueueFullError):
        status, kind, code = 429, "rate_limit_error", "queue_full"
        # OpenAI's clients wait this long, and then try again.
        headers = {"retry-after": str(error.retry_after)}
    elif isinstance(error, asyncio.TimeoutError):
        status, kind, code = 504, "timeout_error", "timeout"
        message = "The request timed out."
    elif isinstance(error, ValidationError):
        param, message = _first_validation_error(error)
    elif isinstance(error, RequestError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, ImageError):
        param, code = "messages", error.kind  # for example "truncated"
    else:  # a server error, whose message may contain paths or prompts
        status, kind, code = 500, "server_error", "server_error"
        message = "The server failed to process the request. The server's log has the details."
    param = param and _shorten(param)
    body = {"error": {"message": _shorten(message), "type": kind, "param": param, "code": code}}
    return status, body, headers


def _shorten(text: str) -> str:
    if len(text) <= _MAX_MESSAGE:
        return text
    return text[:_MAX_MESSAGE] + " ..."


def _first_validation_error(error: ValidationError) -> tuple[str | None, str]:
    """Return the path of the first invalid field, such as `messages[0].role`, and the message."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = ""
    previous: str | int = ""
    for part in first["loc"]:
        # Skip parts that are not fields. For a union, pydantic also lists the member that it tried: after the index of
        # a content part, its tag ("text" or "image_url"); after `url`, one of the types of `ImageURL.url`.
        is_tag = isinstance(previous, int) and part in ("text", "image_url")
        is_type = previous == "url"
        if isinstance(part, int):
            path += f"[{part}]"
        elif not is_tag and not is_type:
            path += f".{part}"
        previous = part
    param = path.lstrip(".") or None
    return param, f"{param or 'body'}: {first['msg'].removeprefix('Value error, ')}"


def error_response(error: Exception) -> JSONResponse:
    """Return the response for an exception."""
    status, body, headers = to_openai_error(error)
    return JSONResponse(body, status, headers)


def handle_exception(_: Request, error: Exception) -> JSONResponse:
    """Return the response for an exception, as a Starlette exception handler."""
    return error_response(error)
