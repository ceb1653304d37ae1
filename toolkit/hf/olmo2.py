"""Olmo2ForCausalLM: Llama with norms on the outputs of attention and feed-forward, and QK-norm."""

from typing import Any

from toolkit.hf.family import Family, Rule
from toolkit.hf.llama import decoder_rules, shared_config
from toolkit.models.config import TransformerConfig

_NORMS = {
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
}


def _fits(config: TransformerConfig) -> bool:
    return (
        config.norm == "rms_norm"
        and config.norm_placement == "reordered"
        and config.qk_norm == "full"
        and config.positions == "rope"
        and config.feed_forward == "swiglu"
        and not config.bias
        and config.num_heads * config.attention_head_dim == config.d_model
    )


def _config(config: TransformerConfig) -> dict[str, Any]:
    return {"model_type": "olmo2", **shared_config(config)}


def _rules(config: TransformerConfig) -> list[Rule]:
    return decoder_rules(config, _NORMS)


OLMO2 = Family("Olmo2ForCausalLM", _fits, _config, _rules)
