"""Models and tokenizers as `transformers` itself loads them: from a local folder, quietly, and with
none of the folder's own code run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.prepare.tokenizers.auto import quiet_transformers as quiet_transformers
from toolkit.data.prepare.tokenizers.backend import check_small_files, check_tokenizer_file
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from toolkit.errors import CheckpointError, DataError
from toolkit.storage.foreign import guard

if TYPE_CHECKING:
    import torch

_TOKENIZER_FILES = (
    TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "vocab.json", "vocab.txt", "tokenizer.model",
    "spiece.model",
)  # fmt: skip


def load_causal_lm(
    folder: Path, *, dtype: "torch.dtype", plain_attention: bool = False, all_used: bool = False
) -> Any:
    """The model of a folder in evaluation mode, on the CPU.

    Args:
        plain_attention: compute attention by its formula, without fused kernels.
        all_used: weights that the model has no place for are an error.

    Raises:
        CheckpointError: `transformers` cannot load it, or weights are missing.
    """
    check_small_files(folder, CheckpointError)
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        with guard(folder, CheckpointError, problem="transformers cannot load it"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="eager" if plain_attention else None,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    model, info = loaded
    for key, fault, counts in (
        ("missing_keys", "misses", True),
        ("unexpected_keys", "has no use for", all_used),
    ):
        names = sorted(info[key])
        if names and counts:
            raise CheckpointError(
                f"{folder}: transformers {fault} {names[0]} ({len(names)} in all); get the folder "
                "again"
            )
    return model.eval()


def with_adapter(base: Any, folder: Path) -> Any:
    """`base` with the adapter in `folder`, by `peft`, in evaluation mode.

    Raises:
        CheckpointError: `peft` cannot load it, or not all of it.
    """
    check_small_files(folder, CheckpointError)
    with quiet_transformers():
        from peft import PeftModel

        with guard(folder, CheckpointError, problem="peft cannot load it"):
            model: Any = PeftModel.from_pretrained(base, str(folder))
    return model.eval()


def load_auto_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, with its chat template. A tokenizer.json alone decides the ids, as
    it does for data.

    Raises:
        DataError: there is none, or `transformers` cannot load it.
    """
    if not has_tokenizer(folder):
        raise DataError(f"{folder}: no tokenizer here; give one with --tokenizer FOLDER")
    check_small_files(folder, DataError)
    if (folder / TOKENIZER_FILE).is_file():
        check_tokenizer_file(folder / TOKENIZER_FILE)
    with quiet_transformers():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        kind: Any = AutoTokenizer
        if (folder / TOKENIZER_FILE).is_file():
            kind = PreTrainedTokenizerFast
        with guard(folder, DataError, problem="its tokenizer cannot be loaded"):
            return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a file of a tokenizer, in a format of any age."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)
