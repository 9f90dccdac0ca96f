"""Refuse rows with content that training would otherwise silently ignore.

If the key `video` of a row were ignored, a question about the video would become a valid text-only example, and the model
would learn to guess the answer. The same holds for an image under a key that is not read, for placeholders of other
programs in the text, for tools, and for parts of a prompt under other keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_simplified.data.questions import QUESTIONS_KEY
from llava_simplified.prompt import IMAGE_PLACEHOLDER, Message

_RECORD_KEYS = {
    "id",
    "image",
    "images",
    "width",
    "height",
    "instruction",
    "response",
    "responses",
    "conversations",
    "messages",
    "texts",
    "chosen",
    "rejected",
    QUESTIONS_KEY,
}
_TURN_KEYS = {"role", "content", "from", "value", "id", "name"}
# Keys under which other programs store media that are not images.
_OTHER_MEDIA_KEY = re.compile(
    r"(video|audio|speech|point_?cloud|pcd)s?(_?(path|file|filename|bytes)s?)?",
    re.IGNORECASE,
)
# Keys under which other programs store an image, and which are not read here.
_OTHER_IMAGE_KEY = re.compile(
    r"images?|(img|picture|photo)s?(_?(path|file|filename|name|url))?s?"
    r"|images?_?((path|file|filename|name|url)s?|bytes|b64|base64|data|list)|pixel_values",
    re.IGNORECASE,
)
_OTHER_MEDIA_FILE = re.compile(
    r"\.(mp4|m4v|mkv|mov|avi|webm|mpe?g|wmv|flv|mp3|wav|flac|ogg|opus|m4a|aac|ply|pcd|obj|glb|pdf)$",
    re.IGNORECASE,
)
_IMAGE_FILE = re.compile(
    r"\.(jpe?g|jpe|jfif|png|gif|webp|bmp|tiff?|avif|heic|heif|jxl|jp2)$", re.IGNORECASE
)
_TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
# Keys of Alpaca's format with more parts of the prompt, in addition to `instruction`.
_PROMPT_KEYS = ("input", "history", "system")
# Placeholders of other programs: <video>, <image_1>, <|image|>, <image/>, <|vision_start|>, [IMG]. HTML does not match: its
# tags have attributes, or an end tag, for which `check_placeholders` looks.
_OTHER_PLACEHOLDER = re.compile(
    r"<\|?(?P<tag>(?:video|audio|speech|sound|voice|music|point_?cloud)s?|image|document|pdf|region|depth)"
    r"(?:[ _]?\d+)?\s*/?\|?>"
    r"|<\|?img(?:[ _]?\d+)?\s*/?\|?>"  # HTML has no <img> without attributes, and Qwen-VL closes its own
    r"|<\|(?:vision|audio|video|image|img)_(?:start|pad|bos)\|>"
    r"|<(?:img|image|video|audio)_?(?:context|token|soft_token|placeholder|here|pad|patch|start)>"
    r"|<start_of_image>|<im_(?:start|patch)>|(?-i:\[IMG\])",
    re.IGNORECASE,
)


def check_row_keys(row: Mapping[str, Any], images: Sequence[str], where: str) -> None:
    """Refuse a row with a key whose value training would silently ignore.

    Args:
        row: The row.
        images: The images of the row, from the keys that are read.
        where: File name and row number, for error messages.

    Raises:
        ValueError: The row contains a video, a sound or the like, an image under a key that is not read, tools, or a part
            of the prompt in addition to its instruction.
    """
    for key, value in row.items():
        # Ignore empty values: a table with images and videos has a column for each, which is empty in the other rows.
        if not value or key in _RECORD_KEYS:
            continue
        _check_media(key, value, where, has_images=bool(images))
        if key in _TOOL_KEYS:
            raise ValueError(
                f"{where}: the key {key!r} is for tools, which are not supported; remove the record"
            )
        if key in _PROMPT_KEYS and "conversations" not in row:
            raise ValueError(
                f"{where}: the key {key!r} is not read together with 'instruction'; put the entire prompt into "
                "'instruction', or into 'conversations'"
            )


def is_other_media(key: str) -> bool:
    """Return whether a key names media that are not images: `video`, `audio_path`, or the suffix of such a file, `mp4`."""
    return bool(_OTHER_MEDIA_KEY.fullmatch(key) or _OTHER_MEDIA_FILE.fullmatch(f".{key}"))


def check_turn_keys(turn: Mapping[str, Any], where: str) -> None:
    """Refuse a turn of a conversation with a key whose value training would silently ignore.

    Raises:
        ValueError: The turn has images or other media of its own, or calls a tool.
    """
    for key in turn.keys() - _TURN_KEYS:
        value = turn[key]
        if not value:
            continue
        _check_media(key, value, f"{where}: in a turn", has_images=False)
        if key in _TOOL_KEYS:
            raise ValueError(
                f"{where}: in a turn: the key {key!r} is for tools, which are not supported; remove the record"
            )


def _check_media(key: str, value: object, where: str, *, has_images: bool) -> None:
    """Refuse a key whose value is a video, a sound or the like, or an image that would not be read.

    Args:
        key: The key.
        value: Its value, which is not empty.
        where: Beginning of the error message.
        has_images: Whether the row has images under the keys that are read.
    """
    if not isinstance(value, (str, list, dict)):
        return  # a score or a flag
    if _OTHER_MEDIA_KEY.fullmatch(key):
        raise ValueError(
            f"{where}: the key {key!r} contains {value!r:.80}, but only images are supported; "
            "remove the key or the record"
        )
    if has_images:
        return  # other keys then describe these images, such as the URLs that they came from
    names = value if isinstance(value, list) else [value]
    is_image_file = any(isinstance(name, str) and _IMAGE_FILE.search(name) for name in names)
    if is_image_file or _OTHER_IMAGE_KEY.fullmatch(key):
        raise ValueError(
            f"{where}: the key {key!r} is not read; rename it to 'image', or remove it"
        )
    if any(isinstance(name, str) and _OTHER_MEDIA_FILE.search(name) for name in names):
        raise ValueError(
            f"{where}: the key {key!r} contains {value!r:.80}, but only images are supported; "
            "remove the key or the record"
        )


def check_placeholders(turns: Sequence[Message], where: str) -> None:
    """Refuse placeholders of other programs in user turns. In other turns they are ordinary text.

    Raises:
        ValueError: A user turn contains such a placeholder.
    """
    for turn in turns:
        if turn.role != "user" or not ("<" in turn.content or "[" in turn.content):
            continue
        for match in _OTHER_PLACEHOLDER.finditer(turn.content):
            if match[0] == IMAGE_PLACEHOLDER:
                continue
            # A tag with an end tag is not a placeholder, but HTML or a text about HTML.
            tag = match["tag"]
            if tag and f"</{tag}>" in turn.content:
                continue
            raise ValueError(
                f"{where}: the placeholder {match[0]} is not supported; write {IMAGE_PLACEHOLDER} for an image, "
                "and remove other media"
            )
