"""Whether another model talks about the same tokens; told from its checkpoint, without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.train.adapter_base import MERGE


def check_same_vocabulary(
    checkpoint: Path | str, extra: Mapping[str, Any], vocab_size: int, *, key: str
) -> None:
    """Raise CheckpointError where the model in `checkpoint`, as its `extra` tells, has other tokens
    than one of `vocab_size`, is an adapter without its base, or a reward model."""
    if extra.get("adapter") is not None:
        raise CheckpointError(f"{key}: {checkpoint} holds an adapter, not a whole model; {MERGE}")
    model = extra.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("num_scores") is not None:
        raise CheckpointError(
            f"{key}: {checkpoint} is a reward model, which has no probabilities of tokens; take a "
            "language model"
        )
    found = model.get("vocab_size")
    if found != vocab_size:
        raise CheckpointError(
            f"{key}: {checkpoint} has a vocabulary of {found} tokens, model.vocab_size is "
            f"{vocab_size}; take a model with the same tokenizer"
        )
