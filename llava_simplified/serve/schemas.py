"""Schemas of request bodies, with strict validation.

A parameter that is unknown, out of range or not supported raises an error that names it. If it was ignored
instead, the client would get a result that differs from what it requested.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llava_simplified.data.records import insert_image_placeholders
from llava_simplified.model.generation_options import DEFAULT_TEMPERATURE, GenerationOptions
from llava_simplified.prompt import Message
from llava_simplified.serve.engine import RequestError

# Lower temperatures are replaced by greedy decoding, which is the limit of sampling: logits divided by them
# would overflow float32.
_MIN_TEMPERATURE = 1e-3


class StrictModel(BaseModel):
    """A model without type coercion, unknown fields, NaN and infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# ---- messages ----


class TextPart(StrictModel):
    """Text within a message."""

    type: Literal["text"]
    text: str


class ImageURL(StrictModel):
    """An image: `url` is the decoded content of a data URL (bytes), or another URL unchanged (str)."""

    url: str | bytes
    detail: Literal["auto", "low", "high"] | None = None  # accepted but ignored

    @field_validator("url")
    @classmethod
    def decode_data_url(cls, url: str) -> str | bytes:
        if not url.startswith("data:"):
            return url
        head, _, data = url.partition(",")
        # Ignore the media type: the decoder recognizes the format by the content.
        if not head.endswith(";base64"):
            raise ValueError("expected data:image/...;base64,...")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ValueError(f"the data URL is not valid base64: {error}") from None


class ImagePart(StrictModel):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class ChatMessage(StrictModel):
    """One message of a conversation. A plain string as `content` becomes one text part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def wrap_string(cls, content: object) -> object:
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        return content

    @property
    def images(self) -> list[str | bytes]:
        """The images of the message: content of data URLs, or other URLs."""
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
        # Replace "developer", OpenAI's newer name, by "system", which chat templates support.
        role = "system" if self.role == "developer" else self.role
        count = len(self.images)
        if count and role != "user":
            raise ValueError(f"only user messages can contain images, got a {role} message")
        if count and not text.strip():
            text = instruction
        (message,) = insert_image_placeholders([Message(role, text)], count, "the message")
        return message


# ---- requests ----


class Conversation(StrictModel):
    """The fields that chat completions and attention maps share."""

    model: str
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
                raise RequestError(f"{param}: {error}", param) from None
        return converted


class StreamOptions(StrictModel):
    """Options of streamed responses."""

    include_usage: bool = False


class TextFormat(StrictModel):
    """The only supported `response_format`."""

    type: Literal["text"]


StopText = Annotated[str, Field(min_length=1, max_length=100)]


class ChatRequest(Conversation):
    """The body of POST /v1/chat/completions."""

    # The older and the newer name of the same limit in OpenAI's API. The newer one takes precedence.
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    # Treat None as a missing field, here and below, since some clients send null for every default.
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    # Extensions of OpenAI's API, as in vLLM.
    top_k: int | None = Field(None, ge=0, lt=2**31)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    n: int | None = Field(None, ge=1)
    # Accept signed 64-bit seeds; larger ones would overflow in the generator.
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[StopText] | None = Field(None, max_length=4)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted and ignored: they do not affect the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Accepted only with the values that correspond to the server's behavior; clients often send these.
    store: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    response_format: TextFormat | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def wrap_string(cls, stop: object) -> object:
        if isinstance(stop, str):
            return [stop]
        return stop

    def to_generation_options(self, max_tokens_limit: int) -> GenerationOptions:
        """Return the generation options.

        Without a temperature, a single answer is greedy and several are sampled, as in `Llava.caption`.

        Args:
            max_tokens_limit: Maximum and default number of tokens of an answer.

        Raises:
            RequestError: The request exceeds the limit, or requests several greedy answers.
        """
        max_new_tokens = self.max_completion_tokens or self.max_tokens or max_tokens_limit
        if max_new_tokens > max_tokens_limit:
            param = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
            raise RequestError(
                f"{param}: {max_new_tokens} tokens were requested, but the server generates at most "
                f"{max_tokens_limit}.",
                param,
            )
        # `or` is safe for replacing None, since 0 is either not valid or the default itself.
        num_return_sequences = self.n or 1
        temperature = self._effective_temperature(num_return_sequences)
        if num_return_sequences > 1 and temperature == 0:
            raise RequestError(
                "n: several answers of greedy decoding are identical; set temperature > 0.", "n"
            )
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            num_return_sequences=num_return_sequences,
            seed=self.seed,
        )

    def _effective_temperature(self, num_return_sequences: int) -> float:
        # Sample by default if there are several answers, since greedy ones would be identical.
        if self.temperature is None:
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
