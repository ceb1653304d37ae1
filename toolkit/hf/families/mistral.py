"""MistralForCausalLM: Llama with a sliding window in all layers or in none, and no biases."""

from typing import Any

from toolkit.hf.families.fields import write_only_window
from toolkit.hf.families.llama import PRE_NORMS, decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        "head_dim": config.attention_head_dim,
        "sliding_window": write_only_window(config),
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    return {
        **read_shared(settings),
        **read_rope(settings),
        "head_dim": settings.take("head_dim"),
        "sliding_window": settings.take("sliding_window"),
    }


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, PRE_NORMS),
    buffers=(r".*\.rotary_emb\.inv_freq",),
)
