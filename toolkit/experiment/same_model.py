"""Whether a checkpoint is of the model that is asked for."""

from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError

# Fields that change how the model is computed, not what its weights mean.
_FREE_MODEL_FIELDS = frozenset(
    {"loss_chunk_size", "init_std", "init_scale_residual", "initializer_range"}
)
# Longer context from the same weights, and a head of scores: a new run may change these. Shapes are
# checked on loading.
_FREE_FOR_WEIGHTS = _FREE_MODEL_FIELDS | {
    "rope_theta", "rope_scaling", "sliding_rope_theta", "max_sequence_length", "num_scores"
}  # fmt: skip


def check_model(
    checkpoint: Path | str, saved: dict[str, Any], asked: dict[str, Any], *, weights_only: bool
) -> None:
    """Raise CheckpointError where the model that is `asked` for is another than the one `saved` in
    `checkpoint`. `weights_only`: a new run begins from its weights, and may change more."""
    free = _FREE_FOR_WEIGHTS if weights_only else _FREE_MODEL_FIELDS
    changed = [
        f"model.{key} (was {saved[key]}, is {value})"
        for key, value in asked.items()
        if key in saved and saved[key] != value and key not in free
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint}: was saved from another model: {', '.join(changed)}; set it back, or "
            "start a new run"
        )
