"""Models of `transformers`: fetched from the hub, and loaded from a local folder by
`transformers` itself, quietly and with none of the folder's own code run."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.prepare.tokenizers.auto import quiet_transformers as quiet_transformers
from toolkit.data.prepare.tokenizers.backend import check_small_files
from toolkit.errors import CheckpointError
from toolkit.storage.foreign import guard

if TYPE_CHECKING:
    import torch

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


def load_causal_lm(
    folder: Path,
    *,
    dtype: "torch.dtype",
    plain_attention: bool = False,
    all_used: bool = False,
    scores: bool = False,
) -> Any:
    """The model of a folder in evaluation mode, on the CPU, as one that gives `scores` or logits;
    raises CheckpointError where `transformers` cannot load it, or weights are missing, or with
    `all_used` are left over. `plain_attention` computes attention by its formula, without fused
    kernels."""
    with _loading(folder, "transformers cannot load it"):
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager" if plain_attention else None,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    model, info = loaded
    unexpected = info["unexpected_keys"] if all_used else ()
    for fault, names in (("misses", info["missing_keys"]), ("has no use for", unexpected)):
        if names:
            raise CheckpointError(
                f"{folder}: transformers {fault} {min(names)} ({len(names)} in all); "
                "get the folder again"
            )
    return model.eval()


def with_adapter(base: Any, folder: Path) -> Any:
    """`base` with the adapter in `folder`, by `peft`, in evaluation mode; raises CheckpointError
    where `peft` cannot load all of it."""
    with _loading(folder, "peft cannot load it"):
        from peft import PeftModel

        model: Any = PeftModel.from_pretrained(base, str(folder))
    return model.eval()


@contextlib.contextmanager
def _loading(folder: Path, problem: str) -> Iterator[None]:
    """Libraries read `folder` inside: quietly, and what goes wrong is a CheckpointError."""
    check_small_files(folder, CheckpointError)
    with quiet_transformers(), guard(folder, CheckpointError, problem=problem):
        yield
