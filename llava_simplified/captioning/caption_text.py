"""From what a model generated to the text that is written: loops, length, template, prefix and suffix.

    "a cat. a cat. a cat. a cat."     what the model generated
    "a cat."                          --loop-guard: a sequence of words that repeats itself ends it
    "a cat."                          --max-words
    "a cat., indoors, sleeping"       --template "{caption}, {tags}"
    "sks, a cat., indoors, sleeping"  --prefix "sks, "

Nothing here depends on the model that generated the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from llava_simplified.data.image_folder import split_shard_name
from llava_simplified.model.loop_guard import WORD, find_loop

# What `image_fields` returns. Templates have {caption} as well.
IMAGE_FIELDS = ("name", "folder", "tags")
TEMPLATE_FIELDS = ("caption", *IMAGE_FIELDS)

_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*(?=\s|$)|[。！？]")
_DANGLING = " \t\r\n,;:-–—、，；："  # what no caption should end with
_FIELD = re.compile(r"\{(\w+)\}")
_EMPTY = "\0"  # stands for a field without a value while a template is filled


@dataclass(frozen=True)
class TextOptions:
    """How captions are finished.

    Attributes:
        prefix, suffix: Texts to put before and after, as they are.
        template: Text with {caption} and other `TEMPLATE_FIELDS`; empty for the caption alone.
        max_words: Maximum number of generated words; None for no limit.
        loop_guard: End a caption when at least this many words repeat the words directly before them;
            0 for never.
    """

    prefix: str = ""
    suffix: str = ""
    template: str = ""
    max_words: int | None = None
    loop_guard: int = 0

    def __post_init__(self) -> None:
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(f"--max-words {self.max_words}: must be at least 1")
        if self.loop_guard < 0:
            raise ValueError(f"--loop-guard {self.loop_guard}: must be at least 0 (0 turns it off)")
        if not self.template:
            return
        check_fields(self.template, TEMPLATE_FIELDS, "--template")
        if "caption" not in field_names(self.template):
            raise ValueError(
                f"--template {self.template!r}: {{caption}} is missing, so that no caption would be "
                "written"
            )


class FinishedCaption(NamedTuple):
    """A caption as it is written.

    Attributes:
        text: The text; empty if the model generated none.
        ended_by: Why the generated text was shortened: "loop", "max_words" or "".
    """

    text: str
    ended_by: Literal["", "loop", "max_words"]


def finish_caption(
    caption: str, options: TextOptions, fields: Mapping[str, str]
) -> FinishedCaption:
    """Shorten a generated text, and put it into its template, between prefix and suffix.

    Args:
        caption: The generated text.
        options: How to finish it.
        fields: `IMAGE_FIELDS` of the image; only those that the template names are needed.
    """
    text = caption.strip()
    ended_by: Literal["", "loop", "max_words"] = ""
    if options.loop_guard:
        before_loop = end_at_loop(text, options.loop_guard)
        if before_loop != text:
            text, ended_by = before_loop, "loop"
    if options.max_words is not None:
        shorter = limit_words(text, options.max_words)
        if shorter != text:
            text, ended_by = shorter, ended_by or "max_words"
    # A prefix alone is no caption.
    if not text:
        return FinishedCaption("", ended_by)
    if options.template:
        text = fill_fields(options.template, {**fields, "caption": text})
    return FinishedCaption(options.prefix + text + options.suffix, ended_by)


# ---- shortening ----


def end_at_loop(text: str, num_repeated: int) -> str:
    """Return a text up to the point where it begins to repeat itself.

    Args:
        text: The text.
        num_repeated: Number of repeated words that make a loop, see `find_loop`.
    """
    end = find_loop(text, num_repeated)
    return text if end is None else text[:end].rstrip(_DANGLING)


def limit_words(text: str, max_words: int) -> str:
    """Return the beginning of a text with at most `max_words` words.

    It ends with a sentence if that keeps at least half of the words, otherwise with any word.
    """
    matches = list(WORD.finditer(text))
    if len(matches) <= max_words:
        return text
    cut = text[: matches[max_words - 1].end()]
    enough = matches[(max_words - 1) // 2].end()
    # Search in the whole text: whether a sentence ends at the end of `cut` depends on what follows.
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match.end() <= len(cut)]
    if ends and ends[-1] >= enough:
        return cut[: ends[-1]]
    return cut.rstrip(_DANGLING)


# ---- fields ----


def image_fields(image: str, folder: str, tags: str = "") -> dict[str, str]:
    """Return the `IMAGE_FIELDS` of an image.

    Args:
        image: Name of the image, relative to `folder`; `shard.tar#key` for an image in a shard.
        folder: The image folder, whose own name is the {folder} of the images directly in it.
        tags: What stands in the image's sidecar file.
    """
    file_name, key = split_shard_name(image)
    path = PurePosixPath(folder.replace("\\", "/")) / file_name
    if key is not None:
        path = path.with_suffix("") / key
        return {"name": path.name, "folder": path.parent.name, "tags": tags}
    return {"name": path.stem, "folder": path.parent.name, "tags": tags}


def field_names(template: str) -> set[str]:
    """Return the names of the fields in a template: {"caption", "tags"} of "{caption}, {tags}"."""
    return set(_FIELD.findall(template))


def check_fields(template: str, known: tuple[str, ...], where: str) -> None:
    """Check that a template names known fields only.

    Raises:
        ValueError: It names another one. The message begins with `where`.
    """
    unknown = sorted(field_names(template) - set(known))
    if unknown:
        choices = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(f"{where}: {{{unknown[0]}}} is not a field; the fields are {choices}")


def fill_fields(template: str, fields: Mapping[str, str]) -> str:
    """Replace the fields of a template by their values. A field without a value leaves no comma behind.

    "{caption}, {tags}" without tags is the caption alone. Other braces are ordinary text.
    """

    def value_of(match: re.Match[str]) -> str:
        # Values may contain braces, and even the mark: they are inserted in one pass.
        value = fields[match[1]].replace(_EMPTY, "")
        return value or _EMPTY

    filled = _FIELD.sub(value_of, template.replace(_EMPTY, ""))
    filled = re.sub(rf",[ \t]*{_EMPTY}", "", filled)
    filled = re.sub(rf"{_EMPTY}[ \t]*,[ \t]*", "", filled)
    return filled.replace(_EMPTY, "").strip()
