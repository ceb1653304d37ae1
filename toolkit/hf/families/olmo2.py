"""Olmo2ForCausalLM: Llama with norms on the outputs of attention and feed-forward, and QK-norm."""

from typing import Any

from toolkit.hf.families.fields import read_attention_bias, write_head_dim
from toolkit.hf.families.llama import decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.architecture import LinearRopeConfig
from toolkit.models.config import TransformerConfig

NORMS = {
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
}


def write_olmo(config: TransformerConfig) -> dict[str, Any]:
    """Fields that OLMo 2 and 3 have in common, but for rope's."""
    return {
        **write_shared(config),
        "attention_bias": config.has_qkv_bias,
        **write_head_dim(config),
    }


def read_olmo(settings: Settings) -> dict[str, Any]:
    """Our fields for what `write_olmo` writes."""
    return {
        **read_shared(settings),
        **read_attention_bias(settings),
        "head_dim": settings.take("head_dim", None),
        "norm_placement": "reordered",
        "qk_norm": "full",
    }


def _write_rope(config: TransformerConfig) -> dict[str, Any]:
    """transformers 4.57 takes linear scaling only, in this spelling, and refuses any other."""
    rope = write_rope(config)
    if isinstance(config.rope_scaling, LinearRopeConfig):
        rope["rope_scaling"] = {"type": "linear", "factor": float(config.rope_scaling.factor)}
    return rope


def _only_newer(config: TransformerConfig) -> str | None:
    scaling = config.rope_scaling
    if scaling is None or (isinstance(scaling, LinearRopeConfig) and scaling.factor > 1):
        return None
    return "rope_scaling"


OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    write_config=lambda config: {**write_olmo(config), **_write_rope(config)},
    read_config=lambda settings: {**read_olmo(settings), **read_rope(settings)},
    rules=lambda config: decoder_rules(config, NORMS),
    only_newer=_only_newer,
)
