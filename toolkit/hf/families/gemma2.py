"""Gemma2ForCausalLM: norms around both halves of a block, soft caps, windows in some layers."""

import math
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.fields import (
    check_whole_heads,
    read_attention_bias,
    read_layer_types,
    write_layer_types,
)
from toolkit.hf.families.llama import decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig

ACTIVATION = "hidden_activation"
NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_output_norm",
}


def write_gemma(config: TransformerConfig) -> dict[str, Any]:
    """Fields that Gemma 2 and 3 have in common, but for rope's."""
    scale = config.attention_scale or config.attention_head_dim**-0.5
    return {
        **write_shared(config, activation=ACTIVATION),
        "head_dim": config.attention_head_dim,
        "attention_bias": config.has_qkv_bias,
        # The class takes whole numbers only; another scale is then not what is read back.
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": config.logit_soft_cap,
        "attn_logit_softcapping": config.attention_soft_cap,
        **write_layer_types(config),
    }


def read_gemma(settings: Settings) -> dict[str, Any]:
    """Our fields for what `write_gemma` writes."""
    check_whole_heads(settings)
    settings.require("use_bidirectional_attention", False, None)
    divisor = settings.take("query_pre_attn_scalar")
    if divisor <= 0:
        raise CheckpointError(
            f"config.json: query_pre_attn_scalar {divisor} must be greater than 0"
        )
    return {
        **read_shared(settings, activation=ACTIVATION),
        **read_attention_bias(settings),
        "head_dim": settings.take("head_dim"),
        "norm_weight_offset": 1.0,
        "norm_placement": "sandwich",
        "attention_scale": divisor**-0.5,
        "attention_soft_cap": settings.take("attn_logit_softcapping"),
        "logit_soft_cap": settings.take("final_logit_softcapping"),
        "embedding_scale": math.sqrt(settings.take("hidden_size")),
        **read_layer_types(settings),
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    write_config=lambda config: {**write_gemma(config), **write_rope(config)},
    read_config=lambda settings: {**read_gemma(settings), **read_rope(settings)},
    rules=lambda config: decoder_rules(config, NORMS),
)
