"""LlamaForCausalLM (Llama 2 and 3, SmolLM), and what its descendants share with it."""

from collections.abc import Callable
from typing import Any

from toolkit.hf.families.fields import (
    check_whole_heads,
    read_attention_bias,
    read_gated_activation,
    read_init_std,
    write_activation,
)
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family, Rule, rules_of
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig

ATTENTION = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
}
ATTENTION_OUTPUT = {"self_attn.o_proj": "attention.output"}
FEED_FORWARD = {
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}


def write_shared(config: TransformerConfig, *, activation: str = "hidden_act") -> dict[str, Any]:
    """Fields of config.json that Llama and its descendants have in common, but for rope's.

    `activation`: the field that names it.
    """
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        activation: write_activation(config),
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_shared(settings: Settings, *, activation: str = "hidden_act") -> dict[str, Any]:
    """Our fields for what `write_shared` writes; RMS norms and rotary positions."""
    settings.without_effect("attention_dropout")
    return {
        "vocab_size": settings.take("vocab_size"),
        "d_model": settings.take("hidden_size"),
        "intermediate_size": settings.take("intermediate_size"),
        "num_layers": settings.take("num_hidden_layers"),
        "num_heads": settings.take("num_attention_heads"),
        "num_key_value_heads": settings.take("num_key_value_heads"),
        "max_sequence_length": settings.take("max_position_embeddings"),
        "norm": "rms_norm",
        "norm_eps": settings.take("rms_norm_eps"),
        "positions": "rope",
        "feed_forward": read_gated_activation(settings, activation),
        "init_std": read_init_std(settings),
        "tie_embeddings": settings.take("tie_word_embeddings"),
    }


def attention_rules(config: TransformerConfig, layer: int) -> list[Rule]:
    """Rules of the projections of one layer's attention."""
    return [
        *_modules(layer, ATTENTION, has_bias=config.has_qkv_bias),
        *_modules(layer, ATTENTION_OUTPUT, has_bias=config.has_attention_output_bias),
    ]


def projection_rules(config: TransformerConfig, layer: int) -> list[Rule]:
    """Rules of the projections of one layer's attention and feed-forward."""
    return [
        *attention_rules(config, layer),
        *_modules(layer, FEED_FORWARD, has_bias=config.has_feed_forward_bias),
    ]


def decoder_rules(
    config: TransformerConfig,
    block_norms: dict[str, str],
    projections: Callable[[TransformerConfig, int], list[Rule]] = projection_rules,
) -> list[Rule]:
    """Rules of a Llama-shaped state dict.

    Args:
        config: of the model.
        block_norms: norms of each block, theirs -> ours.
        projections: gives the rules of a layer's other tensors.
    """
    rules = [Rule(("embeddings.tokens.weight",), ("model.embed_tokens.weight",))]
    for layer in range(config.num_layers):
        rules += projections(config, layer)
        rules += _modules(layer, block_norms, has_bias=False)
    rules += rules_of("head.norm", "model.norm", ("weight",))
    if not config.tie_embeddings:
        rules.append(Rule(("head.weight",), ("lm_head.weight",)))
    return rules


def _modules(layer: int, names: dict[str, str], *, has_bias: bool) -> list[Rule]:
    kinds = ("weight", "bias") if has_bias else ("weight",)
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    return [
        rule
        for name, part in names.items()
        for rule in rules_of(f"{ours}.{part}", f"{theirs}.{name}", kinds)
    ]


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        "head_dim": config.attention_head_dim,
        "attention_bias": config.has_qkv_bias,
        "mlp_bias": config.has_feed_forward_bias,
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    settings.without_effect("pretraining_tp")
    check_whole_heads(settings)
    return {
        **read_shared(settings),
        **read_rope(settings),
        **read_attention_bias(settings),
        "head_dim": settings.take("head_dim"),
        "feed_forward_bias": settings.take("mlp_bias"),
    }


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, PRE_NORMS),
    buffers=(r".*\.rotary_emb\.inv_freq",),
)
