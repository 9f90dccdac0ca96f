"""Convert chat rows of other programs to LLaVA's form, with `images` and `conversations`.

    {"images": ["0.jpg"],                                         TRL, ms-swift, LLaMA-Factory, mlx-vlm
     "messages": [{"role": "user", "content": "<image>What is this?"},
                  {"role": "assistant", "content": "a cat"}]}

    {"images": ["0.jpg"],                                         the same, the content as a list of parts
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}, ...]}

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.jpg"}, ...]}, ...]}

    {"images": ["0.jpg"],                                         FineVision, The Cauldron
     "texts": [{"user": "What is this?", "assistant": "a cat"}, ...]}

    {"conversations": [...], "system": "You answer briefly."}     LLaMA-Factory: the system turn has its own key

An image part becomes `<image>` on a separate line. Turns whose content is a text are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from llava_simplified.data.unsupported import check_turn_keys
from llava_simplified.foreign_files import shorten
from llava_simplified.prompt import IMAGE_PLACEHOLDER

_TURN_KEYS = ("messages", "texts", "system")  # replaced by `conversations`
_IMAGE_PARTS = ("image", "image_url")
_FILE_SCHEME = "file://"


def is_chat(row: Mapping[str, Any]) -> bool:
    """Return whether a row has one of the forms in the module's docstring."""
    if row.get("messages") is not None or is_question_answer_list(row.get("texts")):
        return True
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return False
    return "role" in turns[0] or bool(row.get("system"))


def is_question_answer_list(texts: object) -> bool:
    """Return whether a value of the key `texts` is a list of questions with answers, as in FineVision."""
    if not isinstance(texts, list) or not texts:
        return False
    return all(isinstance(pair, dict) and "user" in pair for pair in texts)


def convert_chat(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert a chat row to LLaVA's form. Its other keys are kept.

    Args:
        row: A row for which `is_chat` is true.
        where: File name and row number, for error messages.

    Raises:
        ValueError: A turn or a part is malformed, or is neither text nor image.
    """
    images: list[Any] = []
    turns = _list_turns(row, where)
    conversations = []
    for number, (role, content) in enumerate(turns):
        text = join_parts(content, images, f"{where}: turn {number}")
        conversations.append({"from": role, "value": text})
    plain = {key: value for key, value in row.items() if key not in _TURN_KEYS}
    plain["conversations"] = conversations
    if images:
        plain["images"] = _collect_images(row, images, where)
        plain.pop("image", None)
    elif isinstance(plain.get("images"), list):
        plain["images"] = [path_of_image(image) for image in plain["images"]]
    return plain


def path_of_image(image: object) -> object:
    """Return the path of an image in the form of `datasets`, {"bytes": null, "path": "0.jpg"}, or of a file:// URL.

    Other values are returned unchanged.
    """
    if isinstance(image, dict) and not image.get("bytes"):
        image = image.get("path")
    if isinstance(image, str) and image.startswith(_FILE_SCHEME):
        # An empty host is this machine, too: file:///a.jpg. Characters such as spaces are escaped in URLs: %20.
        path = image.removeprefix(_FILE_SCHEME)
        if path.startswith("localhost/"):
            path = path.removeprefix("localhost")
        return unquote(path)
    return image


def _list_turns(row: Mapping[str, Any], where: str) -> list[tuple[Any, Any]]:
    """Return role and content of each turn, the system turn first."""
    if row.get("messages") is not None and row.get("conversations") is not None:
        raise ValueError(f"{where}: has both 'messages' and 'conversations'; keep one of them")
    turns: list[tuple[Any, Any]] = []
    if row.get("system"):
        turns.append(("system", row["system"]))
    # FineVision and The Cauldron: a list of questions with answers instead of turns.
    if is_question_answer_list(row.get("texts")) and row.get("messages") is None:
        for pair in row["texts"]:
            turns.append(("user", pair["user"]))
            turns.append(("assistant", pair.get("assistant")))
        return turns
    key = "conversations"
    if row.get("messages") is not None:
        key = "messages"
    if not isinstance(row[key], list) or not row[key]:
        raise ValueError(
            f"{where}: {key!r} must be a non-empty list of turns, got {shorten(row[key])}"
        )
    for number, turn in enumerate(row[key]):
        if not isinstance(turn, dict):
            raise ValueError(
                f"{where}: turn {number} of {key!r} must be an object, got {shorten(turn)}"
            )
        check_turn_keys(turn, where)
        turns.append(turn_of(turn))
    return turns


def turn_of(turn: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return role and content of a turn. Chats call these keys `role` and `content`, LLaVA `from` and `value`.

    If an assistant's content is null, it is an empty text, as in OpenAI's API. If the key is missing, None is returned,
    which is an error later: the text may be stored under another key, and would be lost.
    """
    if "role" not in turn:
        return turn.get("from"), turn.get("value")
    content = turn.get("content")
    if content is None and "content" in turn and turn["role"] == "assistant":
        content = ""
    return turn["role"], content


def join_parts(content: object, images: list[Any], where: str) -> object:
    """Return the text of a turn, with `<image>` for each image part.

    Args:
        content: A text, or a list of parts.
        images: A list to which one entry is appended for each image part; see `_image_reference`.
        where: File name, row and turn, for error messages.

    Raises:
        ValueError: A part is malformed, or is neither text nor image.
    """
    if not isinstance(content, list):
        return content  # the parser of LLaVA's form checks the type
    text = ""
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise ValueError(f"{where}: a part must be an object, got {shorten(part)}")
        # Some programs leave out the type of a part, which follows from its keys.
        kind = part.get("type") or _kind_of(part)
        if kind == "text":
            part_text = _text_of(part, where)
            # Put images on separate lines, as in LLaVA's data.
            if text.endswith(IMAGE_PLACEHOLDER):
                text += "\n"
            text += part_text
        elif kind in _IMAGE_PARTS:
            images.append(_image_reference(part, where))
            if text and not text.endswith("\n"):
                text += "\n"
            text += IMAGE_PLACEHOLDER
        else:
            raise ValueError(
                f"{where}: a part of the type {kind!r} is not supported; the types are 'text' and 'image'"
            )
    # Put a line break after the last image too, as `insert_image_placeholders` does: a turn that consists only of
    # images must get the same tokens in both forms.
    if text.endswith(IMAGE_PLACEHOLDER):
        text += "\n"
    return text


def _kind_of(part: Mapping[str, Any]) -> str:
    """Return the type of a part without a key "type", such as {"text": "What?"}: its first known key, or ""."""
    for key in ("text", *_IMAGE_PARTS):
        if part.get(key) is not None:
            return key
    return ""


def _text_of(part: Mapping[str, Any], where: str) -> str:
    """Return the text of a part, under the key `text` or `content`."""
    text = part.get("text")
    if text is None:
        text = part.get("content")
    if not isinstance(text, str):
        raise ValueError(f"{where}: a text part needs the key 'text', got {shorten(dict(part))}")
    return text


def _image_reference(part: Mapping[str, Any], where: str) -> Any:
    """Return what an image part refers to.

    Returns:
        The image that the part names itself; or, if the image is in the list `images` of the row, its index in that
        list, or None for the next image of the list.
    """
    value = None
    # Programs use different keys for the same thing.
    for key in ("image", "image_url", "path", "url"):
        value = part.get(key)
        if value is not None:
            break
    if isinstance(value, dict):
        # OpenAI's form: {"type": "image_url", "image_url": {"url": "file:///a.jpg"}}.
        value = value.get("url", value)
    if value is None:
        return part.get("index")
    if isinstance(value, str):
        value = path_of_image(value)
    if isinstance(value, str) and "://" in value:
        raise ValueError(
            f"{where}: the image {shorten(value)} is a URL; only local files are supported. "
            "Download it first, for example with `llava download`."
        )
    if isinstance(value, str) and value.startswith("data:"):
        raise ValueError(
            f"{where}: an image in a data: URL (base64) is not supported; save it to a file, and pass the path of the "
            "file"
        )
    return value


def _collect_images(row: Mapping[str, Any], parts: list[Any], where: str) -> list[Any]:
    """Return the images of the row in the order of its image parts.

    Raises:
        ValueError: The parts refer to the images in several ways, to an image that is not there, or not to all images.
    """
    listed = row.get("images") or row.get("image") or []
    if not isinstance(listed, list):
        listed = [listed]
    listed = [path_of_image(image) for image in listed]
    # See `_image_reference` for the values of parts: an index and None refer to `listed`, others are images.
    own = [part for part in parts if not isinstance(part, int | None)]
    if own and (listed or len(own) < len(parts)):
        raise ValueError(
            f"{where}: name every image in the turns, or every image in 'images'; this row mixes both forms"
        )
    if own:
        return own
    # The images of parts without an index are those of the list, in order.
    if all(part is None for part in parts):
        return listed
    if None in parts:
        raise ValueError(
            f"{where}: give an index to every image part of the turns, or to none; this row mixes both forms"
        )
    # Several parts may have the same index, and the indices may be in any order.
    for part in parts:
        if not 0 <= part < len(listed):
            raise ValueError(
                f"{where}: an image part has the index {part}, but 'images' has {len(listed)} image(s); the first "
                "index is 0"
            )
    unused = sorted(set(range(len(listed))) - set(parts))
    if unused:
        raise ValueError(
            f"{where}: no image part refers to {shorten(listed[unused[0]])} in 'images'; remove it, or add a part with the "
            f"index {unused[0]}"
        )
    return [listed[part] for part in parts]
