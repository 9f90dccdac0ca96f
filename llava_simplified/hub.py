"""Names of models: a folder on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_simplified.foreign_files import read_json_object, shorten

# Names of the entries of a config.json that contain the number of layers, experts and so on. A malicious value of a
# billion would keep the program building modules forever, even without weights.
_COUNT = re.compile(r"(?:^|_)(?:layers?|depths?|experts|blocks|stages)$")
_MAX_COUNT = 10_000


def check_model_name(name_or_path: str | Path) -> None:
    """Raise ValueError if a name is neither a folder nor a possible name of a repository on the Hub.

    Libraries assume that every name that is not a folder is a repository, and would report a mistyped path as an invalid
    repository name. The message here is about the path.
    """
    name = str(name_or_path)
    path = Path(name)
    try:
        if path.is_dir():
            return
        is_file = path.exists()
    except OSError as error:
        # For example, the name is too long for the file system.
        raise ValueError(
            f"{name:.200}: no such folder ({error.strerror}). Check the path of the model."
        ) from None
    if is_file:
        raise ValueError(f"{name}: expected the folder of a model, but this is a file.")
    # Import these here, because data/transforms.py imports this module and does not need the Hub for a local folder.
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
    """Check what Transformers does not check: the file size of a model's `config.json`, and the numbers of modules in it.

    A file that does not exist is left to Transformers, which explains what is missing.

    Raises:
        ValueError: The file is too large, is not a JSON object, or describes a model with too many modules.
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
    except OSError:
        # There is no such repository; Transformers reports it.
        return
    if path is not None:
        check_module_counts(read_json_object(Path(path)), path)


def check_module_counts(config: Any, path: str | Path) -> None:
    """Raise ValueError if a config, or a nested config, describes a model with more than 10,000 modules of a kind.

    Args:
        config: The content of a `config.json`, or any value inside it (the function calls itself).
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
            raise ValueError(f"{path}: {name} must be at most {_MAX_COUNT}, not {shorten(value)}")
        check_module_counts(value, path)
