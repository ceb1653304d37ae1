"""Exported folders as repositories of the Hugging Face hub, or of what HF_ENDPOINT names."""

import os
import shlex
from pathlib import Path

from toolkit.errors import CheckpointError
from toolkit.storage.foreign import reason_of

_NO_REASON = "For more information check"


def check_push(repo: str) -> None:
    """Before anything is written: `repo` can be a name, there is a token, and nobody asked
    to stay offline. Raises CheckpointError."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"--push-to-hub {repo}: {_reason(error)}") from None
    if get_token() is None:
        raise CheckpointError(
            f"--push-to-hub {repo}: no token is known; log in with `hf auth login`, or set HF_TOKEN"
        )
    if constants.is_offline_mode():
        raise CheckpointError(f"--push-to-hub {repo}: the hub is offline; unset HF_HUB_OFFLINE")


def push_folder(folder: Path, repo: str, *, private: bool = False, message: str) -> str:
    """Upload all files of `folder` to the model repository `repo`, which is made where it is
    missing, as a commit that is called `message`; returns its address. `private` decides for a new
    repository only. Raises CheckpointError: the hub refuses, or cannot be reached."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        created = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # of httpx, huggingface_hub, hf_xet and the system
        raise CheckpointError(
            f"--push-to-hub {repo}: {_reason(error)}; the export is in {folder}, and "
            f"`{shlex.join(['hf', 'upload', repo, str(folder)])}` tries again"
        ) from None
    return str(created)


def _reason(error: Exception) -> str:
    """What the hub says stands after an address of a page about HTTP."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith(_NO_REASON)]
    if not lines or isinstance(error, KeyError):
        return reason_of(error)
    return " ".join(" ".join(lines[:3]).split()).rstrip(".: ")
