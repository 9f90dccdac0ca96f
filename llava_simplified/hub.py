"""Names of models: a folder on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_simplified.foreign_files import read_json_object, shorten

# Entries of a config.json that say how many modules a model has. Building a billion of them would take forever, even
# without weights.
_COUNT = re.compile(r"(?:^|_)(?:layers?|depths?|experts|blocks|stages)$")
_MAX_COUNT = 10_000


def check_model_name(name_or_path: str | Path) -> None:
    """Raise ValueError if a name is neither a folder nor can be a repository on the Hub.

    Libraries assume that every name that is not a folder is a repository, and then report that its form is invalid. A
    mistyped path deserves a message about the path.
    """
    name = str(name_or_path)
    path = Path(name)
    try:
        if path.is_dir():
            return
        is_file = path.exists()
    except OSError as error:  # a name that is too long for the file system
        raise ValueError(
            f"{name:.200}: no such folder ({error.strerror}). Check the path of the model."
        ) from None
    if is_file:
        raise ValueError(f"{name}: expected the folder of a model, but this is a file.")
    # Imported here because commands are checked before anything heavy is imported.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{name}: no such folder. Check the path, or pass the name of a model on the Hugging Face Hub, such as "
            "openai/clip-vit-base-patch16."
        ) from None


def check_model_config(name_or_path: str | Path) -> None:
    """Check what Transformers does not check in the `config.json` of a model: its size, and the number of modules.

    A file that does not exist is left to Transformers, which explains what is missing.

    Raises:
        ValueError: The file is too large, is no JSON object, or describes a model of millions of modules.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(
            str(name_or_path),
            "config.json",
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # there is no such repository
        return
    if path is not None:
        check_module_counts(read_json_object(Path(path)), path)


def check_module_counts(config: Any, path: str | Path) -> None:
    """Raise ValueError if a config, or one within it, describes a model of millions of modules.

    Args:
        config: The content of a `config.json`, nested as JSON is.
        path: The file, for the message.
    """
    if isinstance(config, list):
        for value in config:
            check_module_counts(value, path)
    if not isinstance(config, dict):
        return
    for name, value in config.items():
        counts = value if isinstance(value, list) else [value]
        is_count = _COUNT.search(name) is not None
        if is_count and any(isinstance(count, int) and count > _MAX_COUNT for count in counts):
            raise ValueError(f"{path}: {name}={shorten(value)}; the maximum is {_MAX_COUNT}")
        check_module_counts(value, path)
