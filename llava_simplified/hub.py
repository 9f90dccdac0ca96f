"""Names of models: a folder on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path


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
