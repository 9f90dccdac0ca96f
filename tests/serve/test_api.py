"""The HTTP API, tested with OpenAI's own client and with faulty clients."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, get_type_hints
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
from live_server import (
    ATTENTION,
    CHAT,
    Limits,
    LiveServer,
    attention_body,
    chat_body,
    image_part,
    live_server,
    open_connection,
    paused_after,
    user_message,
    wide_photo,
    without_end_tokens,
)
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from PIL import Image
from starlette.requests import ClientDisconnect
from test_engine import nan_features_for

from llava_simplified.model.llava import Llava
from llava_simplified.prepare.fetch_options import FetchOptions
from llava_simplified.prompt import Message
from llava_simplified.serve.api import _run_while_connected
from llava_simplified.serve.attention_map import WORD, attention_map
from llava_simplified.serve.schemas import ChatMessage


@pytest.fixture(scope="module")
def server(model: Llava) -> Iterator[LiveServer]:
    with live_server(model, max_queue=100) as server:
        yield server


def create_completion(server: LiveServer, messages: list[Any], **options: Any) -> Any:
    return server.client().chat.completions.create(model="tiny", messages=messages, **options)


# ---- chat completions ----


def test_chat_equals_library(server: LiveServer, model: Llava, photos: list[bytes]) -> None:
    def answer(messages: list[Any]) -> str:
        return create_completion(server, messages, max_tokens=7).choices[0].message.content

    two_images = user_message(photos[0], photos[1], text="Which of <image> and <image> is it?")
    conversation: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Look at this."},
        {"role": "assistant", "content": "I do."},
        *two_images,
    ]
    messages = [
        Message("system", "Be brief."),
        Message("user", "Look at this."),
        Message("assistant", "I do."),
        Message("user", "Which of <image> and <image> is it?"),
    ]
    assert answer(conversation) == model.chat(messages, photos[:2], max_new_tokens=7)
    placed_before_text = model.chat("<image>\n<image>\nWhat?", photos[:2], max_new_tokens=7)
    assert answer(user_message(*photos[:2])) == placed_before_text
    trained_instruction = model.caption(photos[2], max_new_tokens=7)
    assert answer(user_message(photos[2], text="")) == trained_instruction
    text_only = [{"role": "user", "content": "Say it."}]
    assert answer(text_only) == model.chat("Say it.", max_new_tokens=7)


def test_chat_reports_usage_and_finish_reason(
    server: LiveServer, model: Llava, photos: list[bytes]
) -> None:
    prompt = model.prompt.render([Message("user", "<image>\nWhat?")], None).input_ids
    messages = user_message(photos[1])
    ended = create_completion(server, messages, max_completion_tokens=60)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.usage.prompt_tokens == len(prompt) - 1 + model.vision_tower.num_tokens
    assert ended.usage.total_tokens == ended.usage.prompt_tokens + ended.usage.completion_tokens

    without_end_token = ended.usage.completion_tokens - 1
    cut = create_completion(server, messages, max_tokens=without_end_token)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == without_end_token
    assert cut.choices[0].message.content == ended.choices[0].message.content


def test_chat_samples_like_the_library(
    server: LiveServer, model: Llava, photos: list[bytes]
) -> None:
    def answers(n: int, **options: Any) -> list[str]:
        messages = user_message(photos[0])
        completion = create_completion(server, messages, max_tokens=8, n=n, **options)
        assert [choice.index for choice in completion.choices] == list(range(n))
        return [choice.message.content for choice in completion.choices]

    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    sampled = model.caption(photos[0], "What?", num_return_sequences=3, max_new_tokens=8, **options)
    assert answers(3, **options) == sampled
    assert answers(3, **{**options, "seed": 4}) != sampled
    assert len(set(answers(16))) > 1, "several answers must be sampled even without a temperature"
    # Logits divided by this temperature would be infinite.
    greedy = model.caption(photos[0], "What?", max_new_tokens=8)
    assert answers(1, temperature=1e-40) == [greedy]


def test_stream_equals_complete_answer(server: LiveServer, photos: list[bytes]) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "n": 2, "temperature": 1.0, "seed": 5}
    messages = user_message(photos[1])
    texts = ["", ""]
    finish_reasons: list[str | None] = [None, None]
    usage = None
    stream_options = {"include_usage": True}
    stream = create_completion(
        server, messages, stream=True, stream_options=stream_options, **options
    )
    for chunk in stream:
        assert usage is None, "the usage must come last"
        usage = chunk.usage
        for choice in chunk.choices:
            assert finish_reasons[choice.index] is None
            texts[choice.index] += choice.delta.content or ""
            finish_reasons[choice.index] = choice.finish_reason
    complete = create_completion(server, messages, **options)
    assert texts == [choice.message.content for choice in complete.choices]
    assert finish_reasons == [choice.finish_reason for choice in complete.choices]
    assert usage == complete.usage


def test_stream_sends_text_while_it_is_generated(
    server: LiveServer, model: Llava, photos: list[bytes]
) -> None:
    with without_end_tokens(model), paused_after(model, steps=5):
        stream = create_completion(
            server, user_message(photos[1]), stream=True, max_tokens=512, stop="\n\n"
        )
        first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert first.choices[0].delta.content
        assert server.engine.sequences_running
        stream.close()
    server.wait_until(lambda: not server.engine.sequences_running)


def test_models_are_listed(server: LiveServer) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt")
    assert missing.value.code == "model_not_found"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


# ---- invalid requests ----

NOT_AN_IMAGE = image_part("data:image/png;base64,aGVsbG8=")


def message(role: str, content: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


# A change to a valid body, and the status, `param` and `code` of the error.
INVALID: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"temperature": -1}, 400, "temperature", None),
    ({"temperature": "0.5"}, 400, "temperature", None),
    ({"temperature": float("nan")}, 400, "temperature", None),
    ({"top_p": 0}, 400, "top_p", None),
    ({"n": 0}, 400, "n", None),
    ({"n": 17}, 400, "n", None),
    ({"n": 2, "temperature": 0}, 400, "n", None),
    ({"max_tokens": 0}, 400, "max_tokens", None),
    ({"max_completion_tokens": -1}, 400, "max_completion_tokens", None),
    ({"seed": 1.5}, 400, "seed", None),
    ({"stop": [""]}, 400, "stop[0]", None),
    ({"logprobs": True}, 400, "logprobs", None),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", None),
    ({"model": 3}, 400, "model", None),
    ({"unknown": 1}, 400, "unknown", None),
    ({"x" * 10**6: 1}, 400, "x" * 1000 + " ...", None),
    ({"unknown": [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]}, 400, None, None),
    ({"unknown": [0] * 30_000}, 400, None, None),
    ({"messages": []}, 400, "messages", None),
    (message("tool", "x"), 400, "messages[0].role", None),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
    (message("user", [{"type": "audio"}]), 400, "messages[0].content[0]", None),
    (message("user", [{"type": "text", "text": 3}]), 400, "messages[0].content[0].text", None),
    (message("user", [image_part(3)]), 400, "messages[0].content[0].image_url.url", None),  # type: ignore[arg-type]
    (message("assistant", "x"), 400, "messages", None),
    (message("user", "<image>"), 400, "messages[0].content", None),
    (message("system", [NOT_AN_IMAGE]), 400, "messages[0].content", None),
    (message("user", [NOT_AN_IMAGE]), 400, "messages", "not_image"),
    (message("user", [NOT_AN_IMAGE] * 9), 400, "messages", "too_many_images"),
    (message("user", "long " * 4000), 400, "messages", "context_length_exceeded"),
    (message("user", "long" * 1_000_000), 400, "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(
    ("change", "status", "param", "code"), INVALID, ids=lambda value: str(value)[:40]
)
def test_error_of_an_invalid_request_names_the_field(
    server: LiveServer,
    photos: list[bytes],
    change: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
) -> None:
    response = server.post({**chat_body(photos[0]), **change})
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["message"]


def test_image_without_text_gets_trained_instruction() -> None:
    body = json.dumps({"role": "user", "content": [NOT_AN_IMAGE]})
    chat_message = ChatMessage.model_validate_json(body)
    assert chat_message.to_message("What is it?").content == "<image>\nWhat is it?"
    assert chat_message.to_message("What is it?\n<image>").content == "What is it?\n<image>"


@pytest.mark.parametrize(
    ("url", "param", "code"),
    [
        ("data:image/png,abc", "messages[0].content[0].image_url.url", None),
        ("data:image/png;base64,a$b=", "messages[0].content[0].image_url.url", None),
        ("data:image/png;base64,", "messages[0].content[0].image_url.url", None),
        ("/etc/passwd", "messages", "not_image"),  # happens to be base64; files are not opened
        ("cat.png", "messages[0].content[0].image_url.url", None),
        ("", "messages[0].content[0].image_url.url", None),
        ("ftp://x/1.png", "messages", "image_url_not_allowed"),
        ("file:///etc/passwd", "messages", "image_url_not_allowed"),
        ("http://x/1.png", "messages", "image_url_not_allowed"),
    ],
)
def test_images_must_be_data_urls(
    server: LiveServer, url: str, param: str, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create_completion(server, [{"role": "user", "content": [image_part(url)]}])
    assert (refused.value.param, refused.value.code) == (param, code)


@pytest.mark.medium
@pytest.mark.parametrize(
    "spelling",
    [
        "data:image/png;base64,{}",
        "DATA:image/png;base64,{}",
        "Data:IMAGE/PNG;BASE64,{}",
        "data:;base64,{}",
        "data:image/png;charset=utf-8;base64,{}",
        " data:image/png;base64,{}\n",
        "{}",
    ],
)
def test_data_urls_are_read_in_all_spellings(
    server: LiveServer, model: Llava, photos: list[bytes], spelling: str
) -> None:
    expected = model.caption(photos[1], "What?", max_new_tokens=5)
    standard = base64.b64encode(photos[1]).decode()
    lines = base64.encodebytes(photos[1]).decode()
    url_safe = standard.translate(str.maketrans("+/", "-_"))
    for encoded in (standard, lines, url_safe, standard.rstrip("="), quote(standard, safe="")):
        url = spelling.format(encoded)
        for part in (image_part(url), {"type": "image_url", "image_url": url}):
            messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]
            completion = create_completion(server, messages, max_tokens=5)
            assert completion.choices[0].message.content == expected


# ---- fields with values that change nothing ----

REQUEST_FIELDS = sorted(get_type_hints(CompletionCreateParamsStreaming))
MESSAGE_FIELDS = sorted(openai.types.chat.ChatCompletionMessage.model_fields)

# For each field of OpenAI's requests: values that are accepted because they change nothing, and values that request
# something that the server does not support. Null is accepted for all fields except `messages`.
NEUTRAL: dict[str, list[Any]] = {
    "frequency_penalty": [0, 0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "logprobs": [False],
    "max_completion_tokens": [5],
    "max_tokens": [5],
    "metadata": [{}, {"key": "value"}],
    "modalities": [["text"], []],
    "model": ["tiny", "gpt-4o", ""],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0, 0.0],
    "prompt_cache_key": ["key", ""],
    "prompt_cache_retention": ["in_memory", "24h"],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["me", ""],
    "seed": [3],
    "service_tier": ["auto", "default"],
    "stop": [[], ""],
    "store": [False],
    "stream": [False],
    "stream_options": [{}, {"include_usage": None}, {"include_obfuscation": False}],
    "temperature": [0, 0.0],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "top_p": [1, 1.0],
    "user": ["me", ""],
    "verbosity": ["medium"],
    # Fields of other servers' APIs.
    "add_generation_prompt": [True],
    "best_of": [1],
    "chat_template_kwargs": [{}],
    "length_penalty": [1, 1.0],
    "min_p": [0],
    "min_tokens": [0],
    "mm_processor_kwargs": [{}],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "typical_p": [1],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
UNSUPPORTED: dict[str, list[Any]] = {
    "audio": [{"voice": "alloy", "format": "wav"}],
    "best_of": [2],
    "chat_template_kwargs": [{"enable_thinking": True}],
    "frequency_penalty": [0.1, -1],
    "min_p": [0.1],
    "min_tokens": [3],
    "function_call": [{"name": "f"}],
    "functions": [[{"name": "f"}]],
    "logit_bias": [{"50256": -100}],
    "logprobs": [True],
    "modalities": [["text", "audio"], ["audio"]],
    "prediction": [{"type": "content", "content": "a cat"}],
    "presence_penalty": [0.1, -1],
    "reasoning_effort": ["low", "high"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "service_tier": ["flex", "priority"],
    "store": [True],
    "stream_options": [{"include_obfuscation": True}],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[TOOL]],
    "top_logprobs": [1],
    "verbosity": ["low", "high"],
    "web_search_options": [{}],  # an empty object turns the search on
}


@pytest.mark.parametrize("field", REQUEST_FIELDS)
def test_fields_with_neutral_values_are_accepted(
    server: LiveServer, model: Llava, field: str
) -> None:
    expected = model.chat("Say it.", max_new_tokens=5)
    body = {"messages": [{"role": "user", "content": "Say it."}], "max_tokens": 5}
    values = NEUTRAL.get(field, [])
    if field != "messages":
        values = [None, *values]
    for value in values:
        response = server.post({**body, field: value, "max_completion_tokens": 5})
        assert response.status_code == 200, (field, value, response.text)
        assert response.json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_fields_with_unsupported_values_are_refused_by_name(server: LiveServer, field: str) -> None:
    for value in UNSUPPORTED[field]:
        body = {"messages": [{"role": "user", "content": "Say it."}], field: value}
        response = server.post(body)
        assert response.status_code == 400, (field, value)
        assert response.json()["error"]["param"].startswith(field)


def test_own_answer_can_be_sent_back(server: LiveServer, model: Llava) -> None:
    """OpenAI's example of a second turn appends the message of the response, in one form or another."""
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    answer = create_completion(server, messages, max_tokens=4).choices[0].message
    first = Message("assistant", answer.content)
    conversation = [Message("user", "Hi"), first, Message("user", "And now?")]
    expected = model.chat(conversation, max_new_tokens=4)
    raw = server.post({"messages": messages, "max_tokens": 4}).json()["choices"][0]["message"]
    all_fields = {**dict.fromkeys(MESSAGE_FIELDS), **raw, "annotations": [], "tool_calls": []}
    reasoning = {**raw, "reasoning_content": None}  # another server's field
    for sent in (answer, answer.model_dump(), raw, all_fields, reasoning):
        again = [*messages, sent, {"role": "user", "content": "And now?"}]
        completion = create_completion(server, again, max_tokens=4)
        assert completion.choices[0].message.content == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"provider_specific_fields": {"refusal": None, "citations": []}, "function_call": None},
        {"provider_specific_fields": {}, "thinking_blocks": [], "images": [], "audio": None},
        {"reasoning_content": "", "reasoning": None, "prefix": False, "name": None},
    ],
)
def test_message_of_other_clients_can_be_sent_back(fields: dict[str, Any]) -> None:
    message = ChatMessage.model_validate({"role": "assistant", "content": "Hi", **fields})
    assert message.to_message("") == Message("assistant", "Hi")


@pytest.mark.parametrize(
    "fields",
    [
        {"provider_specific_fields": {"refusal": "No."}},
        {"reasoning_content": "Because."},
        {"prefix": True},
        {"thinking_blocks": [{"type": "thinking"}]},
        {"images": [{}]},
    ],
)
def test_message_with_unknown_contents_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ChatMessage.model_validate({"role": "assistant", "content": "Hi", **fields})


EMPTY_ANSWERS: list[dict[str, Any]] = [
    {"content": None},
    {},
    {"content": ""},
    {"content": []},
    {"content": None, "refusal": None, "tool_calls": None, "function_call": None, "audio": None},
    {"content": None, "refusal": "", "tool_calls": []},
]


@pytest.mark.parametrize("fields", EMPTY_ANSWERS)
def test_empty_answer_can_be_sent_back(
    server: LiveServer, model: Llava, fields: dict[str, Any]
) -> None:
    """The answer of the model does not depend on how the empty answer is written."""
    question, again = Message("user", "Hi"), Message("user", "And now?")
    expected = model.chat([question, Message("assistant", ""), again], max_new_tokens=4)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", **fields},
        {"role": "user", "content": "And now?"},
    ]
    response = server.post({"messages": messages, "max_tokens": 4}).json()
    assert response["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("role", ["system", "developer", "user"])
@pytest.mark.parametrize("fields", [{"content": None}, {}])
def test_message_without_content_is_refused(
    server: LiveServer, role: str, fields: dict[str, Any]
) -> None:
    response = server.post({"messages": [{"role": role, **fields}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[0].content")


def test_null_content_with_an_unsupported_field_is_refused(server: LiveServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for field, value in [("tool_calls", [call]), ("function_call", call), ("refusal", "No.")]:
        sent = {"role": "assistant", "content": None, field: value}
        response = server.post({"messages": [{"role": "user", "content": "Hi"}, sent]})
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(f"messages[1].{field}")


def test_part_with_a_hint_for_caching_is_accepted() -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    message = ChatMessage.model_validate({"role": "user", "content": [part]})
    assert message.to_message("") == Message("user", "Hi")


def test_message_with_unsupported_fields_is_refused(server: LiveServer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for field, value in [("tool_calls", [call]), ("refusal", "No."), ("audio", {"id": "1"})]:
        sent = {"role": "assistant", "content": "Hi", field: value}
        response = server.post({"messages": [sent]})
        assert response.json()["error"]["param"].startswith(f"messages[0].{field}")


def test_strict_model_refuses_other_names(model: Llava) -> None:
    with live_server(model, limits=Limits(strict_model=True)) as server:
        for name, status in [
            ("tiny", 200),
            ("gpt", 404),
            ("", 404),
            (None, 404),
            ("x" * 10**6, 404),
        ]:
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "model": name}
            response = server.post(body)
            assert response.status_code == status
            if status == 404:
                assert response.json()["error"]["code"] == "model_not_found"
                assert len(response.content) < 2000


# Bodies of evaluation programs, without the image: VLMEvalKit, lmms-eval's `openai` and its reasoning models,
# lm-evaluation-harness, and clients of vLLM.
EVALUATION_BODIES: list[dict[str, Any]] = [
    {"model": "tiny", "max_tokens": 2048, "n": 1, "temperature": 0},
    {"model": "tiny", "max_tokens": 1024, "temperature": 0},
    {"model": "o1", "max_completion_tokens": 4096, "response_format": {"type": "text"}},
    {"model": "tiny", "max_tokens": 256, "temperature": 0.0, "stop": ["\n\n"], "seed": 1234},
    {"model": "tiny", "max_tokens": 2048, "temperature": 0, "top_p": 1.0, "top_k": -1},
]


@pytest.mark.medium
def test_requests_of_evaluation_programs_are_accepted(model: Llava, photos: list[bytes]) -> None:
    encoded = base64.b64encode(photos[0]).decode()
    url = {"url": f"data:image/png;base64,{encoded}", "detail": "low"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is this?"}]
    with live_server(model, limits=Limits(max_tokens=8)) as server:
        for body in EVALUATION_BODIES:
            response = server.post({"messages": [{"role": "user", "content": parts}], **body})
            assert response.status_code == 200, response.text
            answer = response.json()["choices"][0]["message"]["content"]
            assert answer == model.caption(photos[0], "What is this?", max_new_tokens=8)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_is_clamped_to_limit_and_context(
    model: Llava, photos: list[bytes], name: str
) -> None:
    limits = Limits(max_tokens=30)
    with without_end_tokens(model), live_server(model, limits=limits) as server:
        longest = server.post(chat_body(photos[0])).json()
        assert "warnings" not in longest, "without a requested length, there must be no warning"
        assert longest["usage"]["completion_tokens"] == 30
        for tokens in (31, 10**9, 10**400):
            response = server.post(chat_body(photos[0], **{name: tokens})).json()
            assert response["usage"]["completion_tokens"] == 30
            assert response["choices"][0]["finish_reason"] == "length"
            assert name in response["warnings"][0] and "30" in response["warnings"][0]
            text = longest["choices"][0]["message"]["content"]
            assert response["choices"][0]["message"]["content"] == text
        stream = server.client().chat.completions.create(
            model="tiny", messages=user_message(photos[0]), stream=True, **{name: 99}
        )
        chunks = list(stream)
        assert name in chunks[0].warnings[0]  # type: ignore[attr-defined]
        assert not any(hasattr(chunk, "warnings") for chunk in chunks[1:])


def test_answer_is_limited_to_the_rest_of_the_context(model: Llava, photos: list[bytes]) -> None:
    body = chat_body(photos[0], max_tokens=40)
    with without_end_tokens(model), live_server(model, max_context=100) as server:
        whole = server.post(body).json()
        prompt_tokens = whole["usage"]["prompt_tokens"]
        assert whole["usage"]["completion_tokens"] == 40
    with without_end_tokens(model), live_server(model, max_context=prompt_tokens + 7) as server:
        cut = server.post(body).json()
        assert cut["usage"]["completion_tokens"] == 7 and "7" in cut["warnings"][0]
        text = cut["choices"][0]["message"]["content"]
        assert whole["choices"][0]["message"]["content"].startswith(text)
    with live_server(model, max_context=prompt_tokens) as server:
        assert server.post(body).json()["error"]["code"] == "context_length_exceeded"


def test_malformed_bodies_are_refused(server: LiveServer) -> None:
    def post(content: bytes, content_type: str = "application/json") -> httpx.Response:
        headers = {"content-type": content_type}
        return httpx.post(server.url + CHAT, content=content, headers=headers)

    malformed = [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800"}']
    for content in malformed:
        response = post(content)
        error = response.json()["error"]
        assert response.status_code == 400, content[:10]
        assert error["param"] is None and error["type"] == "invalid_request_error"
    assert post(b"{}", "text/plain").status_code == 415


def test_other_methods_and_paths_are_refused(server: LiveServer) -> None:
    assert httpx.get(server.url + CHAT).status_code == 405
    missing = httpx.get(server.url + "/v1/embeddings")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    headers = {"origin": "http://x", "access-control-request-method": "POST"}
    preflight = httpx.options(server.url + CHAT, headers=headers)
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_size_of_bodies_and_images_is_limited(model: Llava, photos: list[bytes]) -> None:
    bomb = io.BytesIO()
    Image.new("1", (8000, 8000)).save(bomb, "PNG")
    with live_server(model, limits=Limits(max_body=100_000)) as server:
        response = server.post(chat_body(bomb.getvalue()))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "too_large")
        assert "8000x8000" in error["message"]
        response = server.post(chat_body(b"x" * 100_000))
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        with pytest.raises(openai.APIStatusError) as refused:
            create_completion(server, user_message(b"x" * 3_000_000))
        assert refused.value.status_code == 413

        def send_chunks() -> Iterator[bytes]:  # httpx announces no length for an iterator
            yield from [b" " * 10_000] * 20

        headers = {"content-type": "application/json"}
        response = httpx.post(server.url + CHAT, content=send_chunks(), headers=headers)
        assert response.status_code == 413
        assert server.post(chat_body(photos[0], max_tokens=2)).status_code == 200


# ---- image URLs ----


class ImageHost(BaseHTTPRequestHandler):
    """A server with images, which requests to the tested server refer to."""

    requests: ClassVar[list[str]] = []
    image: ClassVar[bytes] = b""
    resume: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/hang":
            self.resume.wait()
        self.send_response(302 if self.path == "/redirect" else 200)
        self.send_header("Location", "file:///etc/passwd")
        self.end_headers()
        self.wfile.write(b"<html>" if self.path == "/page" else self.image)

    def log_message(self, *_: object) -> None: ...


def test_image_urls_follow_rules_of_downloader(model: Llava, photos: list[bytes]) -> None:
    """Image URLs are refused by default. If they are allowed, private addresses and other schemes are still refused."""
    ImageHost.image = photos[1]

    def ask_about(url: str) -> list[Any]:
        return [{"role": "user", "content": [image_part(url)]}]

    def refusal(server: LiveServer, url: str) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as refused:
            create_completion(server, ask_about(url), max_tokens=9)
        return refused.value

    with ThreadingHTTPServer(("127.0.0.1", 0), ImageHost) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        port = host.server_address[1]
        url = f"http://127.0.0.1:{port}"
        with live_server(model) as server:
            error = refusal(server, f"{url}/1.png")
            assert error.code == "image_url_not_allowed"
            assert "--allow-image-urls" in error.message
        with live_server(model, limits=Limits(fetch=FetchOptions(retries=0))) as server:
            for name in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
                assert refusal(server, f"http://{name}:{port}/1.png").code
            for name in ("xn--a", "xn--.example", "a..example", "b\u00fccher.invalid", "a" * 64):
                assert refusal(server, f"http://{name}/1.png").code in ("bad_url", "dns")
            assert "scheme" in refusal(server, "file:///etc/passwd").message
        assert not ImageHost.requests, "a request has reached the host"
        allow_private = FetchOptions(retries=0, allow_private=True)
        with live_server(model, limits=Limits(fetch=allow_private)) as server:
            assert "scheme" in refusal(server, f"{url}/redirect").message
            assert refusal(server, f"{url}/page").code == "html"
            completion = create_completion(server, ask_about(f"{url}/1.png"), max_tokens=9)
            caption = model.caption(photos[1], max_new_tokens=9)
            assert completion.choices[0].message.content == caption
        host.shutdown()


@contextmanager
def image_host(image: bytes) -> Iterator[str]:
    """Run an `ImageHost`, and return its URL. Its path `/hang` is not answered while the block runs."""
    ImageHost.image = image
    ImageHost.requests.clear()
    ImageHost.resume.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), ImageHost) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{host.server_address[1]}"
        finally:
            ImageHost.resume.set()
            host.shutdown()


def url_body(*urls: str, **options: Any) -> dict[str, Any]:
    """Return the body of a request about the images of URLs."""
    content = [image_part(url) for url in urls]
    return {"messages": [{"role": "user", "content": content}], **options}


def test_image_host_that_was_down_is_tried_again(
    model: Llava, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llava_simplified.serve.api._HOST_BAN_SECONDS", 1.0)
    limits = Limits(fetch=FetchOptions(retries=0, allow_private=True, timeout=0.5))
    with image_host(photos[0]) as url, live_server(model, limits=limits) as server:
        hang = url_body(f"{url}/hang")
        with ThreadPoolExecutor(4) as clients:
            responses = list(clients.map(server.post, [hang] * 12))
        assert {response.json()["error"]["code"] for response in responses} == {"timeout"}
        image = url_body(f"{url}/1.png", max_tokens=2)
        assert "not requested" in server.post(image).json()["error"]["message"]
        time.sleep(1.0)
        assert server.post(image).status_code == 200


def test_slow_image_url_times_out_with_the_request(model: Llava, photos: list[bytes]) -> None:
    """The time limit of a request includes the time in which its images are fetched."""
    limits = Limits(fetch=FetchOptions(retries=0, allow_private=True, timeout=30))
    with image_host(photos[0]) as url, live_server(model, limits=limits, timeout=0.5) as server:
        body = url_body(f"{url}/hang")
        requests = [(CHAT, body), (CHAT, {**body, "stream": True})]
        requests.append((ATTENTION, {**body, "answer": "a cat"}))
        for path, request in requests:
            start = time.monotonic()
            response = server.post(request, path)
            assert time.monotonic() - start < 4
            assert response.status_code == 504
            assert response.json()["error"]["code"] == "timeout"
        assert server.metric('llava_requests_total{status="504"}') == 2
        assert server.metric('llava_attention_requests_total{status="504"}') == 1


def test_slow_parsing_times_out(
    model: Llava, photos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = threading.Event()
    monkeypatch.setattr("llava_simplified.serve.api.check_body", lambda _: resume.wait(10))
    with live_server(model, timeout=0.5) as server:
        responses = [
            server.post(chat_body(photos[0])),
            server.post(attention_body(photos[0], "a cat"), ATTENTION),
        ]
        resume.set()
    assert [response.status_code for response in responses] == [504, 504]


@pytest.mark.parametrize(
    ("has_started", "expected"), [(False, asyncio.TimeoutError), (True, ClientDisconnect)]
)
def test_time_limit_is_a_disconnection_only_after_the_response_has_started(
    has_started: bool, expected: type[Exception]
) -> None:
    async def receive() -> Any:
        await asyncio.sleep(60)

    async def run() -> None:
        await _run_while_connected(receive, asyncio.sleep(60), 0.01, lambda: has_started)

    with pytest.raises(expected):
        asyncio.run(run())


def test_fetched_images_share_the_limit_of_the_body(model: Llava, photos: list[bytes]) -> None:
    photo = photos[0]
    limits = Limits(
        max_body=2 * len(photo) + 1,
        fetch=FetchOptions(retries=0, allow_private=True),
    )
    with image_host(photo) as url, live_server(model, limits=limits) as server:
        urls = [f"{url}/{number}.png" for number in range(5)]
        assert server.post(url_body(*urls[:2], max_tokens=2)).status_code == 200
        ImageHost.requests.clear()
        response = server.post(url_body(*urls, max_tokens=2))
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("messages", "too_large")
        assert len(ImageHost.requests) == 3, "no image is fetched after the limit is exceeded"
        assert server.post(url_body(*urls, answer="a cat"), ATTENTION).status_code == 400


@pytest.mark.parametrize("path", [CHAT, ATTENTION])
def test_body_and_image_files_are_freed_before_the_model_runs(
    model: Llava, photos: list[bytes], path: str
) -> None:
    """Otherwise, each request that waits or runs would keep its image files, and their base64 in its body."""
    image = photos[0] + bytes(6_000_000)  # decoders ignore bytes after the end of the image
    body = chat_body(image) if path == CHAT else attention_body(image, "a cat")
    running = threading.Event()

    def begin() -> bool:
        running.set()
        return True

    with live_server(model) as server:
        server.post(chat_body(photos[0], max_tokens=2))  # allocates what all requests share
        with paused_after(model, steps=0, begin=begin):
            tracemalloc.start()
            connection = open_connection(server, body, path=path)
            assert running.wait(30)
            allocated, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            connection.close()
    assert allocated < 3_000_000


# ---- the API key and the log ----


@pytest.fixture
def messages_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture the messages of all loggers. The package's logger needs a handler, because it does not propagate them."""
    caplog.set_level("DEBUG")
    logger = logging.getLogger("llava_simplified")
    level = logger.level
    logger.setLevel("DEBUG")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def test_key_is_required_and_log_contains_no_content(
    model: Llava, messages_logged: pytest.LogCaptureFixture
) -> None:
    with live_server(model, key="s3cret") as server:
        for key in ("none", "s3cre", "s3crets"):
            with pytest.raises(openai.AuthenticationError) as refused:
                server.client(key).models.list()
            assert refused.value.code == "invalid_api_key"
        for header in ("Bearer ключ", "Basic s3cret", "s3cret", ""):
            headers = {"authorization": header.encode()}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401
        assert server.post({}).status_code == 401
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
        text: list[Any] = [{"role": "user", "content": "a private matter"}]
        create = server.client("s3cret").chat.completions.create
        create(model="tiny", messages=text, max_tokens=2)
    log = " ".join(
        record.getMessage()
        for record in messages_logged.records
        if not record.name.startswith(("openai", "http"))  # they log what the tests send
    )
    assert "200 in" in log
    assert "s3cret" not in log and "private" not in log


def test_key_may_end_with_any_character(model: Llava) -> None:
    """The last byte of `à` in UTF-8 is a space in Latin-1, in which headers are read."""
    with live_server(model, key="voilà") as server:
        headers = {"authorization": "Bearer voilà".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


# ---- many requests ----


@pytest.mark.medium
def test_concurrent_clients_get_their_own_answers(model: Llava, photos: list[bytes]) -> None:
    """16 clients send 100 requests, one in ten of which is invalid."""
    expected = [model.caption(photo, "What?", max_new_tokens=20) for photo in photos]
    assert len(set(expected)) > 15
    invalid: list[Any] = [
        {"n": -1},
        {"messages": user_message(b"no image")},
        {"messages": user_message(photos[0][:500])},
        {"x": 1},
    ]

    def run_client(server: LiveServer, number: int) -> list[str]:
        choose = random.Random(number)
        outcomes: list[str] = []
        for request in range(number, 100, 16):
            if request % 10 == 0:
                body = {**chat_body(photos[0]), **choose.choice(invalid)}
                status = server.post(body).status_code
                outcomes.append("refused" if status == 400 else f"wrong status {status}")
                continue
            photo = choose.randrange(len(photos))
            is_streamed = choose.random() < 0.5
            answer = create_completion(
                server, user_message(photos[photo]), max_tokens=20, stream=is_streamed
            )
            if is_streamed:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            else:
                text = answer.choices[0].message.content
            is_right = text == expected[photo]
            outcomes.append("right" if is_right else f"{text!r}, not {expected[photo]!r}")
        return outcomes

    with live_server(model, batch_size=8) as server:
        with ThreadPoolExecutor(16) as clients:
            results = clients.map(lambda number: run_client(server, number), range(16))
            outcomes = [outcome for result in results for outcome in result]
        assert outcomes.count("refused") == 10 and outcomes.count("right") == 90, set(outcomes)
        assert len(outcomes) == 100
        assert server.metric('llava_requests_total{status="200"}') == 90
        assert server.metric('llava_requests_total{status="400"}') == 10


def test_metrics_count_requests_and_sequences(model: Llava, photos: list[bytes]) -> None:
    with live_server(model, batch_size=2) as server, without_end_tokens(model):

        def all_arrived() -> bool:
            return len(server.engine.requests_in_flight) >= 3

        # Without `begin`, the steps could be over before the second request arrives.
        with paused_after(model, steps=3, begin=all_arrived):
            connections = [open_connection(server, chat_body(photo)) for photo in photos[:3]]
            server.wait_until(lambda: server.metric("llava_sequences_running") == 2)
            server.wait_until(lambda: server.metric("llava_requests_in_flight") == 3)
            for connection in connections:
                connection.close()
        server.wait_until(lambda: server.metric("llava_requests_in_flight") == 0)
        server.wait_until(lambda: server.metric("llava_sequences_running") == 0)
        assert server.post(chat_body(photos[0], max_tokens=3)).status_code == 200
        assert server.metric('llava_tokens_total{kind="answer"}') == 3
        assert server.metric("llava_first_token_seconds_count") >= 1


def test_disconnected_clients_free_their_sequences(model: Llava, photos: list[bytes]) -> None:
    """Clients disconnect while their answer is generated, while they wait, and while they send their request."""
    with without_end_tokens(model), live_server(model, batch_size=2, max_queue=10) as server:
        engine = server.engine
        options = [{"stream": True}, {}, {"stream": True}, {}]
        connections = [
            open_connection(server, chat_body(photo, **option))
            for photo, option in zip(photos, options)
        ]
        connections.append(open_connection(server, chat_body(photos[4]), send_half=True))
        server.wait_until(
            lambda: len(engine.requests_in_flight) == 5 and len(engine.sequences_running) == 2
        )
        for connection in connections:
            connection.close()
        server.wait_until(lambda: not engine.requests_in_flight and not engine.sequences_running)
        server.wait_until(lambda: server.metric('llava_requests_total{status="499"}') == 5)
        assert server.post(chat_body(photos[0], max_tokens=2)).status_code == 200


def test_full_queue_says_when_to_retry(model: Llava, photos: list[bytes]) -> None:
    with without_end_tokens(model), live_server(model, batch_size=1, max_queue=1) as server:
        with paused_after(model, steps=2):
            connections = [open_connection(server, chat_body(photo)) for photo in photos[:2]]
            server.wait_until(lambda: len(server.engine.requests_in_flight) == 2)
            with pytest.raises(openai.RateLimitError) as refused:
                create_completion(server, user_message(photos[2]))
            assert refused.value.code == "queue_full"
            assert int(refused.value.response.headers["retry-after"]) >= 1
            response = server.post(attention_body(photos[0], "a cat"), ATTENTION)
            assert response.status_code == 429 and response.headers["retry-after"]
            for connection in connections:
                connection.close()
        server.wait_until(lambda: not server.engine.requests_in_flight)
        assert server.post(chat_body(photos[2], max_tokens=2)).status_code == 200


def test_requests_time_out(model: Llava, photos: list[bytes]) -> None:
    """A request times out if its answer takes too long, streamed or not, or if the client sends it too slowly."""
    with live_server(model, timeout=0.5) as server, paused_after(model, steps=0):
        slow = open_connection(server, chat_body(photos[0]), send_half=True)
        response = server.post(chat_body(photos[0]))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError) as timed_out:
            list(create_completion(server, user_message(photos[0]), stream=True))
        assert timed_out.value.code == "timeout"
        assert slow.recv(20).startswith(b"HTTP/1.1 504")
        slow.close()


@pytest.mark.medium
def test_failing_request_gets_500_and_neighbours_their_answers(
    model: Llava, photos: list[bytes]
) -> None:
    """The model returns NaN for one image. A request with this image fails, streamed or not."""
    expected = [model.caption(photo, "What?", max_new_tokens=20) for photo in photos[1:7]]
    with live_server(model) as server, nan_features_for(model, photos[0]):

        def post(photo: bytes) -> httpx.Response:
            return server.post(chat_body(photo, max_tokens=20))

        with ThreadPoolExecutor(7) as clients:
            failed, *others = clients.map(post, photos[:7])
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        texts = [other.json()["choices"][0]["message"]["content"] for other in others]
        assert texts == expected
        with pytest.raises(openai.APIError) as streamed:
            list(create_completion(server, user_message(photos[0]), stream=True))
        assert streamed.value.code == "server_error"
        assert server.metric('llava_requests_total{status="500"}') == 2


# ---- attention maps ----


def test_attention_equals_library(model: Llava) -> None:
    photo = wide_photo()
    answer = model.caption(photo, "What?", max_new_tokens=20)
    with live_server(model) as server:
        response = server.post(attention_body(photo, answer), ATTENTION)
        assert response.status_code == 200
        assert server.metric('llava_attention_requests_total{status="200"}') == 1
    content = response.json()
    assert content["object"] == "attention"
    assert content["region"] == [0.25, 0.0, 0.75, 1.0]
    assert [word["word"] for word in content["words"]] == WORD.findall(answer)
    expected = attention_map(model, "What?", [photo], answer)[:, 0]
    grids = np.array([word["grid"] for word in content["words"]])
    np.testing.assert_allclose(grids, expected.numpy(), rtol=1e-3)


def test_attention_refuses_invalid_requests(model: Llava, photos: list[bytes]) -> None:
    text_only = [{"role": "user", "content": "What?"}]
    cases: list[tuple[dict[str, Any], int, str, set[str | None]]] = [
        ({"messages": text_only}, 400, "messages", {None}),
        ({"messages": user_message(*photos[:2])}, 400, "messages", {None}),
        ({"messages": user_message(photos[0][:-40])}, 400, "messages", {"corrupt", "truncated"}),
        ({"answer": ""}, 400, "answer", {None}),
        ({"answer": "   "}, 400, "answer", {None}),
        ({"answer": "\ufffd"}, 400, "answer", {None}),
        ({"answer": "word " * 200}, 400, "answer", {None}),
        ({"answer": 3}, 400, "answer", {None}),
        ({"temperature": 1}, 400, "temperature", {None}),
    ]
    with live_server(model, limits=Limits(max_tokens=20)) as server:
        for change, status, param, codes in cases:
            response = server.post({**attention_body(photos[0], "a cat"), **change}, ATTENTION)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (status, param), (change, error)
            assert error["code"] in codes, (change, error)


def test_attention_body_is_limited(model: Llava, photos: list[bytes]) -> None:
    with live_server(model, limits=Limits(max_body=1000)) as server:
        response = server.post(attention_body(photos[0], "a cat"), ATTENTION)
        assert response.status_code == 413
