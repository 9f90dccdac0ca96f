"""Prompt files: several prompts with weights, one of which is chosen for each image.

    # Lines that begin with # are comments. A weight and a bar may precede a prompt; else its weight is 1.
    3 | Describe this image in one sentence.
    1 | Describe this image. Its tags are: {tags}
    0.5 | Which {folder} does {name} show?

Several prompts make the captions of a data set more varied. The choice depends only on the seed and on the name
of the image. It stays the same when a job continues, is split, or runs again with more images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llava_simplified.captioning.caption_text import (
    IMAGE_FIELDS,
    check_fields,
    field_names,
    fill_fields,
    image_fields,
)
from llava_simplified.captioning.sidecars import read_tags
from llava_simplified.foreign_files import read_small_file
from llava_simplified.prompt import IMAGE_PLACEHOLDER

_WEIGHTED = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*\|(.*)")
# The beginning of a line whose weight is wrong, such as `1,5 |`, `-1 |`, `1e3 |` or `50% |`.
_WRONG_WEIGHT = re.compile(r"\s*([-+]?[.,]?\d[\d.,]*(?:[eE][-+]?\d+)?\s*%?)\s*\|")


class WeightedPrompt(NamedTuple):
    """A prompt of a prompt file. It is chosen with a probability proportional to its weight."""

    weight: float
    text: str


def read_prompt_file(path: str | Path) -> tuple[WeightedPrompt, ...]:
    """Read a prompt file; see the module's docstring.

    Raises:
        ValueError: The file is not UTF-8 or contains no prompt; or a line has a wrong weight, a weight without a prompt, or
            an unknown field.
    """
    prompts: list[WeightedPrompt] = []
    for number, line in enumerate(read_text_lines(path, "--prompt-file"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--prompt-file {path}, line {number}"
        weight, text = 1.0, line.strip()
        weighted = _WEIGHTED.fullmatch(line)
        wrong = _WRONG_WEIGHT.match(line)
        if weighted:
            weight, text = float(weighted[1]), weighted[2].strip()
        # Otherwise, the weight would be a part of the prompt.
        elif wrong:
            raise ValueError(
                f"{where}: the weight {wrong[1].strip()!r} must be a number such as 3 or 0.5"
            )
        if not text:
            raise ValueError(f"{where}: expected a prompt after the weight, as `WEIGHT | PROMPT`")
        check_fields(text, IMAGE_FIELDS, where)
        prompts.append(WeightedPrompt(weight, text))
    if not any(prompt.weight for prompt in prompts):
        raise ValueError(
            f"--prompt-file {path}: the file contains no prompt with a weight above 0. Add one; without `WEIGHT |`, it has the weight 1."
        )
    return tuple(prompts)


def read_text_lines(path: str | Path, option: str) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        option: The command-line option that names the file, for error messages.

    Raises:
        ValueError: The file cannot be read, is too large, or is not UTF-8.
    """
    try:
        # Do not use `splitlines`. It also splits at other Unicode separators, which may occur within a text.
        text = read_small_file(Path(path)).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {path}: not UTF-8 ({error}); save it as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None
    except OSError as error:
        raise ValueError(f"{option} {path}: {error.strerror}") from None
    return [line.rstrip("\r") for line in text.split("\n")]


def choose_prompt(prompts: Sequence[WeightedPrompt], image: str, seed: int) -> WeightedPrompt:
    """Return the prompt of an image.

    Args:
        prompts: All prompts, with at least one weight above 0.
        image: Name of the image, relative to the image folder.
        seed: Random seed.
    """
    # Use a hash as the random number. With a random generator, the choice would depend on the previous images.
    name = image.encode(errors="surrogateescape")
    digest = hashlib.sha256(f"{seed}|".encode() + name).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    # Imagine the weights as segments of a line, one after the other. The random number is a point on the line: return
    # the prompt in whose segment it lies. Because of rounding, it may lie just beyond the last segment.
    candidates = [prompt for prompt in prompts if prompt.weight > 0]
    point = fraction * sum(prompt.weight for prompt in prompts)
    for prompt in candidates:
        point -= prompt.weight
        if point < 0:
            return prompt
    return candidates[-1]


def fill_prompt(prompt: WeightedPrompt, image: str, folder: str, tags: str = "") -> str:
    """Return the text of a prompt for an image. See `image_fields` for the arguments."""
    fields = image_fields(image, folder, tags)
    # A file may be called "<image>.jpg". Remove the brackets, because a placeholder in the prompt stands for an image.
    without_brackets = IMAGE_PLACEHOLDER.strip("<>")
    for name, value in fields.items():
        fields[name] = value.replace(IMAGE_PLACEHOLDER, without_brackets)
    return fill_fields(prompt.text, fields)


def prompt_chooser(
    prompts: Sequence[WeightedPrompt], folder: str, seed: int
) -> Callable[[str], str]:
    """Return a function from the name of an image to its prompt.

    Args:
        prompts: All prompts.
        folder: The image folder.
        seed: Random seed of the choice.
    """

    def prompt_of(image: str) -> str:
        """Return the prompt of an image."""
        prompt = choose_prompt(prompts, image, seed)
        tags = ""
        if "tags" in field_names(prompt.text):
            # Do not be strict: a prompt without tags, or with some wrong characters, is better than no caption.
            tags = read_tags(image, folder, strict=False)
        return fill_prompt(prompt, image, folder, tags)

    return prompt_of


def prompts_use_tags(prompts: Sequence[WeightedPrompt]) -> bool:
    """Return whether a prompt contains {tags}, for which sidecar files must be read."""
    return any("tags" in field_names(prompt.text) for prompt in prompts)
