"""OlmoeForCausalLM: Llama with QK-norm over all heads at once and experts in all layers."""

from typing import Any

from toolkit.hf.families.experts import expert_rules, read_experts, write_experts
from toolkit.hf.families.fields import check_whole_heads, read_attention_bias
from toolkit.hf.families.llama import decoder_rules, read_shared, write_shared
from toolkit.hf.families.qwen3 import NORMS
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    return {
        **write_shared(config),
        **write_experts(config),
        **({} if moe is None else {"norm_topk_prob": moe.normalize_top_k}),
        "attention_bias": config.has_qkv_bias,
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    settings.require("clip_qkv", None)
    check_whole_heads(settings)
    return {
        **read_shared(settings),
        **read_rope(settings),
        **read_attention_bias(settings),
        "qk_norm": "full",
        "moe": read_experts(settings, normalize_top_k=settings.take("norm_topk_prob")),
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, NORMS, expert_rules),
)
