"""Request chat completions from a server with OpenAI's API, and retry or stop as each answer requires.

    answer                                           meaning                    reaction
    200 with choices                                 success                    return the captions
    429, 503, 529, connection refused, no route      busy, or starting          pause all requests, then repeat
    5xx, 408, 425, timeout, cut off, not JSON        error of the server        repeat, at most `retries` times
    other 4xx                                        error of the record        the record fails
    401, 402, 404, 405, redirect, wrong certificate  error of the command line  the job stops
    200 with a refusal                               the model refuses          the record fails

A pause applies to all requests. It is as long as `Retry-After` says; without this header, it is twice as long as the
previous pause. The job waits up to `max_wait` seconds for a server that is unavailable, so you can restart the server
during a job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

from llava_simplified.captioning.endpoint_options import EndpointOptions, request_fields
from llava_simplified.foreign_files import shorten
from llava_simplified.model.generation_options import GenerationOptions
from llava_simplified.prepare.fetch import TIMEOUT_ERRORS, parse_retry_after
from llava_simplified.prepare.request_url import UrlError, parse_url

logger = logging.getLogger(__name__)

# Kinds of failures that the next run tries again. Other kinds, caused by the record or the model, would occur again.
SERVER_FAILURES = ("http_error", "timeout", "connection", "bad_answer")

MIN_PAUSE = 0.1  # seconds; `Retry-After: 0` must not become a busy loop
FIRST_PAUSE = 0.5  # seconds before the first retry; doubled with every retry
MAX_PAUSE = 30.0
CONNECT_TIMEOUT = 20.0
# Far longer than any caption. It protects the memory from a server that never stops sending.
MAX_ANSWER_BYTES = 16_000_000
# The loop guard creates an object for each word and compares words with each other, which is slow for longer texts.
MAX_CAPTION_CHARACTERS = 200_000
MAX_MESSAGE_LENGTH = 300

# llama-server answers 503 while it loads its model; some hosted services answer 529 when they are overloaded.
_BUSY_STATUSES = (429, 503, 529)
_TRANSIENT_STATUSES = (408, 425)
# The address, the key or the name of the model is wrong, or there is no credit left. All records would fail.
_FATAL_STATUSES = (401, 402, 404, 405)


class EndpointError(ValueError):
    """The job cannot continue: a setting is wrong, the server is gone, or it failed too often."""


class RecordError(ValueError):
    """One record has no caption.

    Attributes:
        kind: One of `SERVER_FAILURES`, "rejected" (by the server, status 4xx) or "refused" (by the model).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _TransientError(Exception):
    """A request has failed, and may succeed if it is repeated."""

    def __init__(self, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class _UnavailableError(Exception):
    """The server does not accept requests at the moment."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Choice(NamedTuple):
    """One generated text. `finish_reason` is "length" if it was cut at the maximum number of tokens."""

    text: str
    finish_reason: str | None


class EndpointClient:
    """Sends requests to one server. Use it as an async context manager.

    Args:
        endpoint: The server.
        options: Generation options of all requests.

    Raises:
        ValueError: An option cannot be expressed in a request, or the URL or the API key is invalid.

    Attributes:
        failures: Number of failed records by kind.
    """

    def __init__(self, endpoint: EndpointOptions, options: GenerationOptions) -> None:
        self.endpoint = endpoint
        # The name of the host cannot be checked earlier: encoding it requires an extra.
        try:
            self._url = parse_url(endpoint.completions_url)
        except UrlError as error:
            raise EndpointError(f"--endpoint {endpoint.url}: {error}") from None
        self.failures: Counter[str] = Counter()
        self._num_choices = options.num_return_sequences
        self._fields = request_fields(options, endpoint)
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        # Local servers require no key, and some reject an empty one.
        key = endpoint.api_key()
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._max_n = self._num_choices  # becomes 1 if the server refuses `n`
        # Number of successful requests. If it is above 0, the server has accepted the key; see `_check_status` for 403.
        self._num_answered = 0
        # The pause of all requests; see the top of this module.
        self._resume_at = 0.0
        self._pause_rounds = 0
        self._unavailable_since: float | None = None

    async def __aenter__(self) -> EndpointClient:
        self._session = aiohttp.ClientSession(
            # limit=0 turns aiohttp's limit off, because `_slots` already limits the connections. Use the resolver of the
            # operating system, as other programs do. With force_close, a connection is never reused: if a broken
            # server or proxy sent more data than one answer, the rest would be read as the answer to the next
            # request, and images would get the captions of others.
            connector=aiohttp.TCPConnector(
                limit=0, force_close=True, resolver=aiohttp.ThreadedResolver()
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=self.endpoint.timeout, sock_connect=CONNECT_TIMEOUT
            ),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    # ---- records ----

    async def complete(self, messages: Sequence[Mapping[str, Any]]) -> list[Choice]:
        """Return `num_return_sequences` answers to a conversation.

        If the server ignores or rejects the field `n`, several requests with one answer each are sent.

        Raises:
            RecordError: The record fails. It is counted in `failures`.
            EndpointError: The job cannot continue.
        """
        # Count failures here, and not where they are raised, because `_complete` repeats some requests without `n`.
        try:
            return await self._complete(messages)
        except RecordError as error:
            self.count_failure(error)
            raise

    async def _complete(self, messages: Sequence[Mapping[str, Any]]) -> list[Choice]:
        """Collect the answers; see `complete`."""
        choices: list[Choice] = []
        max_n = self._max_n
        while len(choices) < self._num_choices:
            n = min(max_n, self._num_choices - len(choices))
            body = {**self._fields, "messages": messages}
            if n > 1:
                body["n"] = n
            # Use another seed for each request, because equal seeds would generate equal texts.
            if "seed" in body and choices:
                body["seed"] += len(choices)
            try:
                answer = await self._request(body)
            except RecordError as error:
                if n == 1 or error.kind != "rejected":
                    raise
                max_n = 1  # the field `n` may be the reason, so try without it
                continue
            # Ignore additional answers: each record has `num_return_sequences` rows.
            choices += answer[:n]
            # The request has succeeded without the field `n`, so this field was the reason for the rejection, and not
            # the image. Do not send it again.
            if max_n < self._max_n:
                logger.info("The server accepts one answer per request only (n=1).")
                self._max_n = max_n
        return choices

    def count_failure(self, error: RecordError) -> None:
        """Count a failed record.

        Raises:
            EndpointError: More than `max_failures` records have failed at the server or were rejected by it.
        """
        self.failures[error.kind] += 1
        # Refusals of the model are not failures of the server.
        failed = self.failures.total() - self.failures["refused"]
        if failed > self.endpoint.max_failures:
            kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.failures.items())
            raise EndpointError(
                f"--max-failures {self.endpoint.max_failures}: {failed} records have failed at the server or were "
                f"rejected by it ({kinds}); the last error: {error}. Run the same command again to continue the job."
            ) from error

    # ---- requests ----

    async def _request(self, body: Mapping[str, Any]) -> list[Choice]:
        """Send one request, and retry it when the server fails."""
        # Encode once: a request with images is several hundred kilobytes.
        data = json.dumps(body).encode()
        attempt = 0
        while True:
            try:
                async with self._slots:
                    return await self._send_when_available(data)
            except _TransientError as error:
                if attempt == self.endpoint.retries:
                    raise RecordError(error.kind, f"{error} ({attempt + 1} attempts)") from None
                pause = error.retry_after
            if pause is None:
                pause = min(MAX_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1)
            attempt += 1
            # Sleep outside the semaphore, so that another record can use the slot.
            await asyncio.sleep(min(pause, self.endpoint.max_wait))

    async def _send_when_available(self, data: bytes) -> list[Choice]:
        """Send a request, and repeat it while the server is busy or unreachable.

        Raises:
            RecordError: The server refuses this request for too long, but has answered others in the meantime. Some
                services answer 429 to a request that is too large for their limits, however often it is sent.
            EndpointError: The server is unavailable for too long.
        """
        answered_before: int | None = None  # number of answers at the first refusal of this request
        while True:
            while (pause := self._resume_at - time.monotonic()) > 0:
                # Do not send all requests at the same moment: a server with a short queue would reject most of them.
                await asyncio.sleep(pause + random.uniform(0, MIN_PAUSE))
            # Remember when the request was sent: a pause may begin while it is in flight; see `_pause`.
            sent_at = time.monotonic()
            try:
                choices = await self._post(data)
            except _UnavailableError as error:
                if answered_before is None:
                    answered_before = self._num_answered
                try:
                    self._pause(error, sent_at)
                except EndpointError:
                    if self._num_answered == answered_before:
                        raise
                    raise RecordError(
                        "http_error",
                        f"{error}; the server has answered other requests since it first refused this one",
                    ) from None
            else:
                self._pause_rounds = 0
                self._num_answered += 1
                return choices

    def _pause(self, error: _UnavailableError, sent_at: float) -> None:
        """Pause all requests.

        Raises:
            EndpointError: The server has been unavailable for too long, or requests too long a pause.
        """
        now = time.monotonic()
        if self._unavailable_since is None:
            self._unavailable_since = now
            logger.warning("%s: %s; waiting for the server", self.endpoint.url, error)
        waited = now - self._unavailable_since
        max_wait = self.endpoint.max_wait
        requested = error.retry_after or 0.0
        if waited > max_wait or requested > max_wait:
            reason = f"the server was unavailable for {waited:.0f} s"
            if requested > max_wait:
                reason = f"the server requests a pause of {requested:g} s"
            raise EndpointError(
                f"--endpoint {self.endpoint.url}: {error}; {reason}. The limit is --max-wait {max_wait:g}, in seconds. "
                "Run the same command again to continue the job."
            )
        if error.retry_after is not None:
            self._resume_at = max(self._resume_at, now + max(error.retry_after, MIN_PAUSE))
        # Many requests in flight can fail at once. Only those that were sent after the last pause prolong it.
        elif sent_at >= self._resume_at:
            self._resume_at = now + min(MAX_PAUSE, FIRST_PAUSE * 2**self._pause_rounds)
            self._pause_rounds += 1

    async def _post(self, data: bytes) -> list[Choice]:
        """Send a request once.

        Raises:
            _UnavailableError, _TransientError, RecordError, EndpointError: See the top of this module.
        """
        # Do not follow redirects: a POST could become a GET, or the key could be sent to another host.
        try:
            async with self._session.post(self._url, data=data, allow_redirects=False) as response:
                answer = await _read_answer(response)
        except TIMEOUT_ERRORS as error:
            # No connection: the host name was not resolved in time, or no host answers at the address.
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise _UnavailableError(f"no connection within {CONNECT_TIMEOUT:g} s") from None
            raise _TransientError(
                "timeout", f"no answer within --timeout {self.endpoint.timeout:g} s"
            ) from None
        except (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch, ssl.SSLError) as error:
            raise EndpointError(f"--endpoint {self.endpoint.url}: {error}") from None
        # TLS errors are subclasses of this error, so this clause must follow theirs.
        except aiohttp.ClientConnectorError as error:
            raise _UnavailableError(f"no connection ({error.strerror or error})") from None
        except (aiohttp.ClientError, OSError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE_LENGTH]
            raise _TransientError("connection", f"the answer was cut off: {reason}") from None
        self._check_status(response, answer)
        # The server is available, even if its answer cannot be parsed.
        self._unavailable_since = None
        return parse_choices(answer)

    def _check_status(self, response: aiohttp.ClientResponse, answer: bytes) -> None:
        """Raise the error for a status other than 200; see the top of this module."""
        status = response.status
        if status == 200:
            return
        # The body describes an error better than the status does. `error_message` shortens it, since the body of a
        # proxy's error is a web page.
        message = f"status {status}: {error_message(answer) or response.reason}".rstrip(".")
        retry_after = parse_retry_after(response.headers.get("Retry-After"))
        if status in _BUSY_STATUSES:
            raise _UnavailableError(message, retry_after)
        self._unavailable_since = None
        if 300 <= status < 400:
            target = response.headers.get("Location", "another address")
            raise EndpointError(
                f"--endpoint {self.endpoint.url}: the server redirects to {target!r:.200}, which is not followed; "
                "pass the final URL."
            )
        # If the server has accepted the key before, 403 forbids the content of this request. Otherwise, the key is wrong.
        if status in _FATAL_STATUSES or (status == 403 and not self._num_answered):
            raise EndpointError(self._describe_fatal(status, message))
        if 400 <= status < 500 and status not in _TRANSIENT_STATUSES:
            raise RecordError("rejected", message)
        raise _TransientError("http_error", message, retry_after)

    def _describe_fatal(self, status: int, message: str) -> str:
        """Return the message of an error that stops the job, with the options to check."""
        url = self.endpoint.url
        if status in (401, 403):
            variable = self.endpoint.api_key_env
            advice = f"No API key was sent, because ${variable} is not set."
            if "Authorization" in self._headers:
                advice = f"Check the API key in ${variable}, which was sent."
            return f"--endpoint {url}: {message}. {advice}"
        if status in (404, 405):
            return (
                f"--endpoint {url}: {message}. Check --model {self.endpoint.model} and the URL, which "
                "usually ends in /v1."
            )
        return f"--endpoint {url}: {message}"


# ---- answers ----


async def _read_answer(response: aiohttp.ClientResponse) -> bytes:
    """Return the body of a response. Unlike `response.read()`, refuse more than `MAX_ANSWER_BYTES`."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise _TransientError(
                "bad_answer", f"the answer has more than {MAX_ANSWER_BYTES} bytes"
            )
    return b"".join(chunks)


def parse_choices(data: bytes) -> list[Choice]:
    """Return the choices of a chat completion, at least one.

    Raises:
        RecordError: The model, or a content filter, refuses to answer (kind "refused").
        _TransientError: The data is not a chat completion (kind "bad_answer").
    """
    try:
        answer = json.loads(data)
    # Deeply nested arrays exceed Python's recursion limit.
    except (ValueError, RecursionError) as error:
        raise _TransientError(
            "bad_answer", f"the answer is not JSON ({type(error).__name__}): {data[:100]!r}"
        ) from None
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices:
        raise _TransientError("bad_answer", f"the answer has no choices: {shorten(answer)}")
    return [_parse_choice(choice) for choice in choices]


def _parse_choice(choice: object) -> Choice:
    """Return one choice of an answer; see `parse_choices` for the errors."""
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise _TransientError("bad_answer", f"a choice has no message: {shorten(choice)}")
    # The reason is optional. It is ignored below if it is not a string.
    finish_reason = choice.get("finish_reason")
    # OpenAI's models give the reason of a refusal in `refusal`, filters only in `finish_reason`.
    refusal = message.get("refusal")
    if refusal or finish_reason == "content_filter":
        raise RecordError(
            "refused",
            f"refused by the model or a content filter: {shorten(refusal or finish_reason)}",
        )
    content = message.get("content")
    # Some servers send null for an empty text.
    if not isinstance(content, str | None):
        raise _TransientError("bad_answer", f"the content is not a string: {shorten(content)}")
    if content and len(content) > MAX_CAPTION_CHARACTERS:
        raise _TransientError(
            "bad_answer",
            f"the text has {len(content)} characters; a caption has at most {MAX_CAPTION_CHARACTERS}",
        )
    if not isinstance(finish_reason, str):
        finish_reason = None
    return Choice((content or "").strip(), finish_reason)


def error_message(data: bytes) -> str:
    """Return the message of an error response, in any of the usual forms, shortened."""
    try:
        error = json.loads(data)
    except (ValueError, RecursionError):
        error = data.decode(errors="replace")
    # {"error": {"message": "..."}}, {"error": "..."}, {"message": "..."}, {"detail": "..."}
    for name in ("error", "message", "detail"):
        if isinstance(error, dict):
            error = error.get(name, error)
    text = error if isinstance(error, str) else json.dumps(error)
    return " ".join(text.split())[:MAX_MESSAGE_LENGTH]
