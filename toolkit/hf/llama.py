"""LlamaForCausalLM, and the names that its descendants keep."""

from typing import Any

from toolkit.hf.family import Family, Rule, same
from toolkit.models.config import TransformerConfig

PROJECTIONS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}

_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}


def _fits(config: TransformerConfig) -> bool:
    return (
        config.norm == "rms_norm"
        and config.norm_placement == "pre"
        and config.qk_norm == "none"
        and config.positions == "rope"
        and config.feed_forward == "swiglu"
        and config.d_model % config.num_heads == 0
    )


def shared_config(config: TransformerConfig) -> dict[str, Any]:
    """Fields of config.json that Llama and its descendants have in common."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        # `rope_parameters` is read by transformers >= 5, `rope_theta` by older ones.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "attention_bias": config.bias,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        **shared_config(config),
        "head_dim": config.attention_head_dim,
        "mlp_bias": config.bias,
    }


def decoder_rules(config: TransformerConfig, block_norms: dict[str, str]) -> list[Rule]:
    """Rules of a Llama-shaped state dict whose blocks hold the norms `theirs -> ours`."""
    rules = [Rule("model.embed_tokens.weight", ("embeddings.tokens.weight",), same)]
    kinds = ("weight", "bias") if config.bias else ("weight",)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        for name, part in PROJECTIONS.items():
            for kind in kinds:
                rules.append(Rule(f"{theirs}.{name}.{kind}", (f"{ours}.{part}.{kind}",), same))
        for name, norm in block_norms.items():
            rules.append(Rule(f"{theirs}.{name}.weight", (f"{ours}.{norm}.weight",), same))
    rules.append(Rule("model.norm.weight", ("head.norm.weight",), same))
    if not config.tie_embeddings:
        rules.append(Rule("lm_head.weight", ("head.weight",), same))
    return rules


def _rules(config: TransformerConfig) -> list[Rule]:
    return decoder_rules(config, _NORMS)


LLAMA = Family("LlamaForCausalLM", _fits, _config, _rules)
