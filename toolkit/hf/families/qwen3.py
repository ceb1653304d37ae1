"""Qwen3ForCausalLM: Llama with normalised query and key heads, and windows in some layers."""

from typing import Any

from toolkit.hf.families.fields import read_attention_bias
from toolkit.hf.families.llama import PRE_NORMS, decoder_rules, read_shared, write_shared
from toolkit.hf.families.qwen2 import read_windows, write_windows
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig

NORMS = {
    **PRE_NORMS,
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
}


def write_attention(config: TransformerConfig) -> dict[str, Any]:
    """What Qwen 3 has of its own."""
    return {
        "head_dim": config.attention_head_dim,
        "attention_bias": config.has_qkv_bias,
        **write_windows(config),
        **write_rope(config),
    }


def read_attention(settings: Settings) -> dict[str, Any]:
    """Our fields for what `write_attention` writes."""
    return {
        **read_rope(settings),
        **read_windows(settings),
        "head_dim": settings.take("head_dim"),
        **read_attention_bias(settings),
        "qk_norm": "per_head",
    }


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    write_config=lambda config: {**write_shared(config), **write_attention(config)},
    read_config=lambda settings: {**read_shared(settings), **read_attention(settings)},
    rules=lambda config: decoder_rules(config, NORMS),
)
