"""Models by their names on the hub."""

import re
from pathlib import Path

from toolkit.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md"]
_NOT_OF_TRANSFORMERS = ["original/*", "onnx/*", "*/*"]


def is_hub_name(text: str) -> bool:
    """Whether `text` can be `model` or `owner/model`, and no local path is called so."""
    return _NAME.fullmatch(text) is not None and not Path(text).exists()


def name_in_cache(folder: Path) -> str | None:
    """The name on the hub of a model in the cache of `huggingface_hub`, by the folder's place
    (`models--owner--name/snapshots/commit`); None: it lies elsewhere."""
    for path in (folder.absolute(), folder.resolve()):
        repository = path.parent.parent.name
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/", 1)
    return None


def fetch_model(name: str, *, revision: str | None = None) -> Path:
    """The local folder of the model `name`, downloaded now where the cache of `huggingface_hub`
    does not hold it: configs, tokenizer, and the weights as safetensors, or else as .bin. Raises
    CheckpointError: the hub gives none, or cannot be reached.

    `revision`: branch, tag or commit; default: the main branch.
    """
    from huggingface_hub import snapshot_download

    try:
        for weights in ("*.safetensors", "*.bin"):
            wanted = [*_SMALL_FILES, weights]
            folder = snapshot_download(
                name, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_OF_TRANSFORMERS
            )
            if any(Path(folder).glob(weights)):
                break
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
        raise CheckpointError(
            f"{name}: no such local folder, and the hub gave no model of this name: {reason}; "
            "if it is meant to be a run, `toolkit runs` lists the runs there are"
        ) from None
    return Path(folder)
