"""Whether two model configs describe the same computation on the same weights."""

import math
from typing import Any

from toolkit.models.config import TransformerConfig

_NO_MATTER = ("vocab_multiple", "init_std", "init_scale_residual", "loss_chunk_size")
"""Fields that decide neither weights nor logits; all others count."""


def defining_values(config: TransformerConfig) -> dict[str, Any]:
    """What decides shapes and logits, with defaults filled in and layers spelled out."""
    fields = {n: getattr(config, n) for n in config.__struct_fields__ if n not in _NO_MATTER}
    bases = fields.pop("rope_theta"), fields.pop("sliding_rope_theta")
    scaling = fields.pop("rope_scaling")
    del fields["sliding_window"], fields["attention_pattern"]
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    frequencies = tuple(
        (bases[0], scaling) if window is None or bases[1] is None else (bases[1], None)
        for window in windows
    )
    has_rope = config.positions == "rope"
    has_dense = len(config.moe_layers) < config.num_layers
    return {
        **fields,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.intermediate_size if has_dense else None,
        "rotary_fraction": config.rotary_dim if has_rope else None,
        "rope_theta, rope_scaling or sliding_rope_theta": frequencies if has_rope else (),
        "sliding_window or attention_pattern": windows,
        "attention_scale": config.attention_scale or config.attention_head_dim**-0.5,
        "bias": config.bias if config.norm == "layer_norm" else None,
        "qkv_bias": config.has_qkv_bias,
        "attention_output_bias": config.has_attention_output_bias,
        "feed_forward_bias": config.has_feed_forward_bias if has_dense else None,
        "moe": _experts(config),
    }


def differences(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """All parts of `one` in which `other` differs, as "name value"."""
    second = defining_values(other)
    return [
        f"{name} {value!r}"
        for name, value in defining_values(one).items()
        if not _equal(value, second[name])
    ]


def _experts(config: TransformerConfig) -> Any:
    """Without the terms of the training loss."""
    if config.moe is None:
        return None
    alike = {"dense_layers": (), "load_balancing_multiplier": 0.0, "router_z_loss_multiplier": 0.0}
    return config.moe_layers, config.moe.replace(**alike)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other
