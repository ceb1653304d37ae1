"""Qwen3MoeForCausalLM: Qwen 3 with experts in some layers or in all, and one window for all."""

from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.experts import expert_rules, read_experts, write_experts
from toolkit.hf.families.fields import read_attention_bias, write_head_dim, write_only_window
from toolkit.hf.families.llama import decoder_rules, read_shared, write_shared
from toolkit.hf.families.qwen3 import NORMS
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    moe, window = config.moe, write_only_window(config)
    experts: dict[str, Any] = {}
    if moe is not None:
        experts = {
            **write_experts(config, intermediate_size="moe_intermediate_size"),
            "norm_topk_prob": moe.normalize_top_k,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(moe.dense_layers),
        }
    return {
        **write_shared(config),
        **experts,
        **write_head_dim(config),
        "attention_bias": config.has_qkv_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    window = settings.take("sliding_window")
    experts = read_experts(
        settings,
        intermediate_size="moe_intermediate_size",
        normalize_top_k=settings.take("norm_topk_prob"),
        dense_layers=_dense_layers(settings),
    )
    return {
        **read_shared(settings),
        **read_rope(settings),
        "head_dim": settings.take("head_dim", None),
        **read_attention_bias(settings),
        "qk_norm": "per_head",
        "sliding_window": window if settings.take("use_sliding_window") else None,
        "moe": experts,
    }


def _dense_layers(settings: Settings) -> list[int]:
    """Layers that are named, and all but every so-manieth one."""
    step, named = settings.take("decoder_sparse_step"), settings.take("mlp_only_layers", None) or []
    layers = range(settings.take("num_hidden_layers"))
    dense = [layer for layer in layers if layer in named or (layer + 1) % step]
    if len(dense) == len(layers):
        raise CheckpointError(
            f"config.json: decoder_sparse_step {step} and mlp_only_layers {named} leave no layer "
            "with experts; such a model is a qwen3"
        )
    return dense


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, NORMS, expert_rules),
)
