"""Gemma2ForCausalLM: norms around both halves of a block, soft caps, windows in some layers."""

import math
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.fields import (
    check_whole_heads,
    read_gated_activation,
    read_init_std,
    read_layer_types,
    write_activation,
    write_layer_types,
)
from toolkit.hf.families.llama import decoder_rules, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig

NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_output_norm",
}


def write_gemma(config: TransformerConfig) -> dict[str, Any]:
    """Fields that Gemma 2 and 3 have in common, but for rope's."""
    fields = write_shared(config)
    del fields["hidden_act"]
    scale = config.attention_scale or config.attention_head_dim**-0.5
    return {
        **fields,
        "head_dim": config.attention_head_dim,
        "hidden_activation": write_activation(config),
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
    settings.without_effect("attention_dropout")
    divisor = settings.take("query_pre_attn_scalar")
    if divisor <= 0:
        raise CheckpointError(
            f"config.json: query_pre_attn_scalar {divisor} must be greater than 0"
        )
    width, bias = settings.take("hidden_size"), settings.take("attention_bias")
    return {
        "vocab_size": settings.take("vocab_size"),
        "d_model": width,
        "intermediate_size": settings.take("intermediate_size"),
        "num_layers": settings.take("num_hidden_layers"),
        "num_heads": settings.take("num_attention_heads"),
        "num_key_value_heads": settings.take("num_key_value_heads"),
        "head_dim": settings.take("head_dim"),
        "max_sequence_length": settings.take("max_position_embeddings"),
        "norm": "rms_norm",
        "norm_eps": settings.take("rms_norm_eps"),
        "norm_weight_offset": 1.0,
        "norm_placement": "sandwich",
        "positions": "rope",
        "attention_scale": divisor**-0.5,
        "attention_soft_cap": settings.take("attn_logit_softcapping"),
        "logit_soft_cap": settings.take("final_logit_softcapping"),
        "embedding_scale": math.sqrt(width),
        "feed_forward": read_gated_activation(settings, "hidden_activation"),
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "init_std": read_init_std(settings),
        "tie_embeddings": settings.take("tie_word_embeddings"),
        **read_layer_types(settings),
    }


GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    write_config=lambda config: {**write_gemma(config), **write_rope(config)},
    read_config=lambda settings: {**read_gemma(settings), **read_rope(settings)},
    rules=lambda config: decoder_rules(config, NORMS),
)
