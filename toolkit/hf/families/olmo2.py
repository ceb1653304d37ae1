"""Olmo2ForCausalLM: Llama with norms on the outputs of attention and feed-forward, and QK-norm."""

from typing import Any

from toolkit.hf.families.fields import write_head_dim
from toolkit.hf.families.llama import decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig

NORMS = {
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
}


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        "attention_bias": config.has_qkv_bias,
        **write_head_dim(config),
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    bias = settings.take("attention_bias")
    return {
        **read_shared(settings),
        **read_rope(settings),
        "head_dim": settings.take("head_dim", None),
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "norm_placement": "reordered",
        "qk_norm": "full",
    }


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, NORMS),
)
