"""Phi3ForCausalLM: Llama with fused projections; a part of each head may be rotated."""

from typing import Any

from toolkit.hf.families.fields import write_head_dim, write_only_window
from toolkit.hf.families.llama import PRE_NORMS, decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family, Rule, rules_of
from toolkit.hf.settings import Settings
from toolkit.hf.transforms import joined
from toolkit.models.config import TransformerConfig

_DROPOUT = ("resid_pdrop", "embd_pdrop")


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        **write_head_dim(config),
        "sliding_window": write_only_window(config),
        "original_max_position_embeddings": config.max_sequence_length,
        # Older code looks for it here.
        "partial_rotary_factor": config.rotary_fraction,
        **write_rope(config),
        **dict.fromkeys(_DROPOUT, 0.0),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    # The second is of a kind of scaled rope (longrope) that `read_rope` refuses.
    settings.without_effect(*_DROPOUT, "original_max_position_embeddings")
    return {
        **read_shared(settings),
        **read_rope(settings, is_partial=True, is_scaled=False),
        "head_dim": settings.take("head_dim", None),
        "sliding_window": settings.take("sliding_window"),
    }


def _projections(config: TransformerConfig, layer: int) -> list[Rule]:
    ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
    query = config.num_heads * config.attention_head_dim
    key_value = config.kv_heads * config.attention_head_dim
    heads = tuple(f"{ours}.attention.{part}.weight" for part in ("query", "key", "value"))
    inputs = tuple(f"{ours}.feed_forward.{part}.weight" for part in ("gate", "up"))
    return [
        Rule(
            heads,
            (f"{theirs}.self_attn.qkv_proj.weight",),
            joined([query, key_value, key_value]),
        ),
        *rules_of(f"{ours}.attention.output", f"{theirs}.self_attn.o_proj", ("weight",)),
        Rule(
            inputs,
            (f"{theirs}.mlp.gate_up_proj.weight",),
            joined([config.intermediate_size] * 2),
        ),
        *rules_of(f"{ours}.feed_forward.down", f"{theirs}.mlp.down_proj", ("weight",)),
    ]


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, PRE_NORMS, _projections),
)
