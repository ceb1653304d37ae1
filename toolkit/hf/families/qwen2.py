"""Qwen2ForCausalLM: Llama with biases of query, key and value, and windows in some layers."""

from typing import Any

from toolkit.hf.families.fields import read_layer_types, write_head_dim, write_layer_types
from toolkit.hf.families.llama import PRE_NORMS, decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """Windows as Qwen 2 and 3 write them down."""
    fields = write_layer_types(config)
    kinds = [*fields["layer_types"], "sliding_attention"]
    return {
        **fields,
        "use_sliding_window": fields["sliding_window"] is not None,
        # Read where `layer_types` is unknown: windows begin after this many layers.
        "max_window_layers": kinds.index("sliding_attention"),
    }


def read_windows(settings: Settings) -> dict[str, Any]:
    """Our fields for what `write_windows` writes."""
    # The config class has merged these two into `sliding_window` and `layer_types`.
    settings.without_effect("use_sliding_window", "max_window_layers")
    return read_layer_types(settings)


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        **write_head_dim(config),
        **write_windows(config),
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    return {
        **read_shared(settings),
        **read_rope(settings),
        **read_windows(settings),
        "head_dim": settings.take("head_dim", None),
        "qkv_bias": True,
    }


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, PRE_NORMS),
    buffers=(r".*\.rotary_emb\.inv_freq",),
)
