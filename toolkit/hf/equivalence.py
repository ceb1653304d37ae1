"""Whether two model configs describe the same computation on the same weights."""

import math
from typing import Any

from toolkit.models.config import TransformerConfig


def defining_values(config: TransformerConfig) -> dict[str, Any]:
    """What decides shapes and logits, with defaults filled in and layers spelled out."""
    rope = config.positions == "rope"
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    frequencies: tuple[Any, ...] = ()
    if rope:
        frequencies = tuple(_rope(config, window is not None) for window in windows)
    moe = config.moe
    has_dense = len(config.moe_layers) < config.num_layers
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.intermediate_size if has_dense else None,
        "max_sequence_length": config.max_sequence_length,
        "norm": config.norm,
        "norm_eps": config.norm_eps,
        "norm_weight_offset": config.norm_weight_offset,
        "norm_placement": config.norm_placement,
        "parallel_residual": config.parallel_residual,
        "qk_norm": config.qk_norm,
        "positions": config.positions,
        "rotary_fraction": config.rotary_dim if rope else None,
        "rope_theta, rope_scaling or sliding_rope_theta": frequencies,
        "sliding_window or attention_pattern": windows,
        "attention_scale": config.attention_scale or config.attention_head_dim**-0.5,
        "attention_soft_cap": config.attention_soft_cap,
        "logit_soft_cap": config.logit_soft_cap,
        "embedding_scale": config.embedding_scale,
        "feed_forward": config.feed_forward,
        "bias": config.bias if config.norm == "layer_norm" else None,
        "qkv_bias": config.has_qkv_bias,
        "attention_output_bias": config.has_attention_output_bias,
        "feed_forward_bias": config.has_feed_forward_bias if has_dense else None,
        "tie_embeddings": config.tie_embeddings,
        "moe": moe
        and (
            config.moe_layers,
            moe.num_experts,
            moe.top_k,
            moe.intermediate_size,
            moe.normalize_top_k,
            moe.shared_expert_intermediate_size,
        ),
    }


def differences(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """All parts of `one` in which `other` differs, as "name value"."""
    second = defining_values(other)
    return [
        f"{name} {value!r}"
        for name, value in defining_values(one).items()
        if not _equal(value, second[name])
    ]


def _rope(config: TransformerConfig, is_sliding: bool) -> tuple[Any, ...]:
    if is_sliding and config.sliding_rope_theta is not None:
        return (config.sliding_rope_theta, None)
    return (config.rope_theta, config.rope_scaling)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other
