"""Schemas of request bodies, with strict validation.

One rule applies to all fields. A value is accepted if it requests nothing, or what the server does anyway: null for any
field, an empty text or list for an unknown field, `"tool_choice": "auto"` without tools. A value that is unknown, out of
range or not supported raises an error that names the field. If it were ignored instead, the client would get a result
that differs from what it requested.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llava_simplified.data.records import insert_image_placeholders
from llava_simplified.model.generation_options import DEFAULT_TEMPERATURE, GenerationOptions
from llava_simplified.prompt import Message
from llava_simplified.serve.engine import RequestError

# Lower temperatures are replaced by greedy decoding, which sampling approaches as the temperature goes to 0. Dividing
# logits by a very low temperature would overflow float32.
_MIN_TEMPERATURE = 1e-3

# The URL-safe alphabet of base64 -> the standard one.
_STANDARD_BASE64 = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\f\v"
# Escape sequences in URLs of the characters that occur in base64. urllib's `unquote` is not used, because it creates an
# object for every escape sequence, of which a body can contain millions.
_URL_ESCAPES = {
    b"%2B": b"+",
    b"%2F": b"/",
    b"%3D": b"=",
    b"%20": b"",
    b"%0A": b"",
    b"%0D": b"",
    b"%2b": b"+",
    b"%2f": b"/",
    b"%3d": b"=",
    b"%0a": b"",
    b"%0d": b"",
}


class StrictModel(BaseModel):
    """A pydantic model that rejects values of another type (no coercion), unknown fields, NaN and infinity.

    Exceptions: a field with the value null is treated as missing, and so is an unknown field that requests nothing.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    # Some clients send all fields of a message or a request. Fields that are not set then have the value null, or an
    # empty list such as LiteLLM's `thinking_blocks`.
    @model_validator(mode="before")
    @classmethod
    def drop_empty_fields(cls, fields: object) -> object:
        """Remove the fields that are null, and the unknown fields that request nothing."""
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {
            name: value
            for name, value in fields.items()
            if not (value is None if name in known else requests_nothing(value))
        }


def requests_nothing(value: object) -> bool:
    """Return whether a value is null, false or empty.

    An empty object does request something: `"web_search_options": {}` turns web search on.
    """
    if isinstance(value, list):
        return all(map(requests_nothing, value))
    return value is None or value is False or value == ""


# For the fields with these types, an empty list or object requests nothing.
EmptyList = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]


# ---- messages ----


class TextPart(StrictModel):
    """Text within a message."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None  # accepted but ignored


class ImageURL(StrictModel):
    """An image: `url` is the decoded content of a data URL (bytes), or another URL unchanged (str)."""

    url: str | bytes
    detail: Literal["auto", "low", "high"] | None = None  # accepted but ignored

    @field_validator("url")
    @classmethod
    def decode_url(cls, url: str) -> str | bytes:
        """Return the content of a data URL or of plain base64; another URL is returned unchanged."""
        url = url.strip()
        scheme, colon, rest = url.partition(":")
        # Some servers accept base64 alone, without the rest of a data URL. It contains no colon, and every URL does.
        if not colon:
            return _decode_base64(url)
        if scheme.lower() != "data":
            return url
        head, _, data = rest.partition(",")
        # Ignore the media type: the decoder recognizes the format by the content.
        if not head.lower().rstrip().endswith(";base64"):
            raise ValueError("expected data:image/...;base64,...")
        return _decode_base64(data)


def _decode_base64(text: str) -> bytes:
    """Decode base64 as browsers do: white space and padding are optional. `-` and `_` are accepted, too.

    Raises:
        ValueError: The text is not base64.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        content = _decode_lenient_base64(text)
    if not content:
        raise ValueError("expected a data URL (data:image/...;base64,...), got an empty one")
    return content


def _decode_lenient_base64(text: str) -> bytes:
    """Decode base64 with the usual deviations: white space, URL-safe characters, missing padding."""
    try:
        data = text.encode("ascii")
        # In a data URL, `+`, `/` and `=` may be escaped.
        if b"%" in data:
            for escape, character in _URL_ESCAPES.items():
                data = data.replace(escape, character)
        data = data.translate(_STANDARD_BASE64, _WHITE_SPACE).rstrip(b"=")
        padding = b"=" * (-len(data) % 4)
        return base64.b64decode(data + padding, validate=True)
    except ValueError as error:
        raise ValueError(
            f"expected a data URL (data:image/...;base64,...), another URL or base64: {error}"
        ) from None


class ImagePart(StrictModel):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageURL
    cache_control: dict[str, Any] | None = None  # accepted but ignored

    @field_validator("image_url", mode="before")
    @classmethod
    def wrap_string(cls, image_url: object) -> object:
        """Accept a plain string instead of an object with the field `url`."""
        if isinstance(image_url, str):
            return {"url": image_url}
        return image_url


class ChatMessage(StrictModel):
    """One message of a conversation. A plain string as `content` becomes one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None
    # In the next request, OpenAI's client sends an answer back with all fields of its message. In the answers of this
    # server, these fields are empty.
    refusal: Literal[""] | None = None
    annotations: EmptyList | None = None
    tool_calls: EmptyList | None = None
    # LiteLLM moves fields that it does not know into this one: {"refusal": null}.
    provider_specific_fields: dict[str, Literal[""] | EmptyList | EmptyObject | None] | None = None

    # With tool calls and refusals, OpenAI's API sends `"content": null`, and its client sends this back with the next
    # question. Treat such a message as an empty text, as other servers do.
    @model_validator(mode="before")
    @classmethod
    def fill_missing_content(cls, fields: object) -> object:
        if not isinstance(fields, dict) or fields.get("role") != "assistant":
            return fields
        return fields if fields.get("content") is not None else {**fields, "content": ""}

    @field_validator("content", mode="before")
    @classmethod
    def wrap_string(cls, content: object) -> object:
        """Accept a plain string instead of a list of parts."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return content

    @property
    def images(self) -> list[str | bytes]:
        """The images of the message: decoded data URLs (bytes), or other URLs (str)."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def to_message(self, instruction: str) -> Message:
        """Convert the message for the prompt renderer.

        Images are placed before the text, as in training, unless the text contains `<image>`.

        Args:
            instruction: Text to use if the message consists of images only.

        Raises:
            ValueError: The images do not match the role or the `<image>` placeholders.
        """
        text = "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        # Replace "developer", OpenAI's newer name, with "system", which chat templates support.
        role = "system" if self.role == "developer" else self.role
        count = len(self.images)
        if count and role != "user":
            raise ValueError(
                f"only user messages can contain images, but a message with the role {role!r} contains {count}"
            )
        if count and not text.strip():
            text = instruction
        (message,) = insert_image_placeholders([Message(role, text)], count, where="the message")
        return message


# ---- requests ----


class Conversation(StrictModel):
    """The fields that chat completions and attention maps share."""

    # Optional and ignored by default, because the server has only one model; see `api.Limits.strict_model`.
    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=100)

    def to_messages(self, instruction: str) -> list[Message]:
        """Convert all messages for the prompt renderer; see `ChatMessage.to_message`.

        Raises:
            RequestError: A message is invalid.
        """
        converted: list[Message] = []
        for index, message in enumerate(self.messages):
            try:
                converted.append(message.to_message(instruction))
            except ValueError as error:
                param = f"messages[{index}].content"
                raise RequestError(f"{param}: {error}", param=param) from None
        return converted


class StreamOptions(StrictModel):
    """Options of streamed responses."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(StrictModel):
    """The only supported `response_format`."""

    type: Literal["text"]


StopText = Annotated[str, Field(min_length=1, max_length=100)]


class ChatRequest(Conversation):
    """The body of POST /v1/chat/completions."""

    # The older and the newer name of the same limit in OpenAI's API. The newer one takes precedence.
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    # Extensions of OpenAI's API, as in vLLM.
    top_k: int | None = Field(None, ge=-1, lt=2**31)  # -1 (vLLM) and 0 both mean all tokens
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    n: int | None = Field(None, ge=1)
    # Accept signed 64-bit seeds; larger ones would overflow in the generator.
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[StopText] | None = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted and ignored, because these fields do not affect the answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    parallel_tool_calls: bool | None = None  # there are no tools that could be called in parallel
    # Fields that clients often send. They are accepted only with the values that describe this server's behavior.
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=0)
    logit_bias: EmptyObject | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    reasoning_effort: Literal["none"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    tools: EmptyList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: EmptyList | None = None
    function_call: Literal["none", "auto"] | None = None
    # Options of other servers, whose clients send them with these default values.
    min_p: float | None = Field(None, ge=0, le=0)
    typical_p: float | None = Field(None, ge=1, le=1)
    length_penalty: float | None = Field(None, ge=1, le=1)
    min_tokens: int | None = Field(None, ge=0, le=0)
    best_of: int | None = Field(None, ge=1, le=1)
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    add_generation_prompt: Literal[True] | None = None
    chat_template_kwargs: EmptyObject | None = None
    mm_processor_kwargs: EmptyObject | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def wrap_string(cls, stop: object) -> object:
        """Accept a plain string instead of a list."""
        if isinstance(stop, str):
            return [stop] if stop else []
        return stop

    @property
    def requested_tokens(self) -> int | None:
        """The maximum number of new tokens in the request; None if it sets none."""
        return self.max_completion_tokens or self.max_tokens

    def to_generation_options(self, max_tokens_limit: int) -> GenerationOptions:
        """Return the generation options.

        Without a temperature, a single answer is greedy and several are sampled, as in `Llava.caption`.

        Args:
            max_tokens_limit: Maximum number of tokens of an answer, also used for requests that set none. If
                a request sets a higher number, it is lowered, and the response contains a warning.

        Raises:
            RequestError: The request asks for several greedy answers.
        """
        max_new_tokens = min(self.requested_tokens or max_tokens_limit, max_tokens_limit)
        # `or` is safe for replacing None here: for these fields, 0 is either not valid or the default itself.
        num_return_sequences = self.n or 1
        temperature = self._effective_temperature(num_return_sequences)
        if num_return_sequences > 1 and temperature == 0:
            raise RequestError(
                "n: greedy decoding would generate the same answer several times; set temperature > 0.",
                param="n",
            )
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k or 0, 0),
            repetition_penalty=self.repetition_penalty or 1.0,
            num_return_sequences=num_return_sequences,
            seed=self.seed,
        )

    def _effective_temperature(self, num_return_sequences: int) -> float:
        """Return the temperature, where 0 stands for greedy decoding."""
        if self.temperature is None:
            # Sample by default if there are several answers, since greedy ones would be identical.
            return DEFAULT_TEMPERATURE if num_return_sequences > 1 else 0.0
        if self.temperature < _MIN_TEMPERATURE:
            return 0.0
        return self.temperature


class AttentionRequest(Conversation):
    """The body of POST /v1/attention: a conversation about one image, and its answer."""

    answer: str = Field(min_length=1, max_length=100_000)


def image_urls(messages: Sequence[ChatMessage]) -> list[str | bytes]:
    """Return the images of a conversation, in the order of the messages."""
    urls: list[str | bytes] = []
    for message in messages:
        urls += message.images
    return urls
