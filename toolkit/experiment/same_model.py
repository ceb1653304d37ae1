"""Whether a checkpoint is of the model that is asked for."""

from pathlib import Path
from typing import Any

import msgspec

from toolkit.errors import CheckpointError
from toolkit.models.layer_configs import MoEConfig

# Fields that change how the model is computed, not what its weights mean.
_FREE_MODEL_FIELDS = frozenset(
    {
        "loss_chunk_size", "init_std", "init_scale_residual", "initializer_range",
        "mtp_loss_multiplier", "moe.load_balancing_multiplier", "moe.router_z_loss_multiplier",
    }
)  # fmt: skip
# Longer context from the same weights, and a head of scores: a new run may change these. Shapes are
# checked on loading.
_FREE_FOR_WEIGHTS = _FREE_MODEL_FIELDS | {
    "rope_theta", "rope_scaling", "sliding_rope_theta", "max_sequence_length", "num_mtp_layers",
    "moe.bias_update_rate", "num_scores",
}  # fmt: skip
_MOE_DEFAULTS = {
    field.name: msgspec.to_builtins(field.default)
    for field in msgspec.structs.fields(MoEConfig)
    if field.default is not msgspec.NODEFAULT
}


def check_model(
    checkpoint: Path | str, saved: dict[str, Any], asked: dict[str, Any], *, weights_only: bool
) -> None:
    """Raise CheckpointError where the model that is `asked` for is another than the one `saved` in
    `checkpoint`. `weights_only`: a new run begins from its weights, and may change more."""
    free = _FREE_FOR_WEIGHTS if weights_only else _FREE_MODEL_FIELDS
    saved, asked = _flat(saved), _flat(asked)
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


def _flat(model: dict[str, Any]) -> dict[str, Any]:
    """`model` with the fields of its `moe` as `moe.NAME`. Fields that the release which stored it
    did not have are at their defaults; of `bias_update_rate` only counts whether there is one."""
    moe = model.get("moe")
    if not isinstance(moe, dict):
        return model
    fields = {**_MOE_DEFAULTS, **moe}
    if fields["bias_update_rate"] is not None:
        fields["bias_update_rate"] = "a rate"
    return {**model, "moe": "experts", **{f"moe.{name}": value for name, value in fields.items()}}
