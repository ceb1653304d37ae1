"""Descendants of Llama with parts of their own: layers without rope (SmolLM 3, EXAONE 4), scales
(Granite), biases of queries, keys and values (Seed-OSS), neighbouring channels rotated (GLM)."""

from typing import Any

from toolkit.hf.families.llama import PRE_NORMS, PROJECTIONS, QK_NORMS, SHARED
from toolkit.hf.families.parts import (
    ATTENTION_BIAS,
    HEAD_DIM,
    LAYER_TYPES,
    UNUSUAL_HEAD_DIM,
    always,
    no_dropout,
    renamed,
    shortest_pattern,
    without_effect,
)
from toolkit.hf.families.rope import ROPE, read_rope, write_rope
from toolkit.hf.family import Family, Modules, Part, Settings
from toolkit.models.config import TransformerConfig


def _read_smollm3(settings: Settings) -> dict[str, Any]:
    windows = LAYER_TYPES.read(settings)
    kinds = ["rope" if has_rope else "none" for has_rope in settings.take("no_rope_layers")]
    return {
        **(windows if settings.take("use_sliding_window") else {"sliding_window": None}),
        "rope_pattern": shortest_pattern(kinds),
    }


def _write_smollm3(config: TransformerConfig) -> dict[str, Any]:
    fields = LAYER_TYPES.write(config)
    return {
        **fields,
        "use_sliding_window": fields["sliding_window"] is not None,
        "no_rope_layers": [int(config.has_rope(layer)) for layer in range(config.num_layers)],
    }


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    parts=(
        *SHARED,
        ROPE,
        UNUSUAL_HEAD_DIM,
        ATTENTION_BIAS,
        renamed(feed_forward_bias="mlp_bias"),
        # The config class has merged it into `no_rope_layers`.
        without_effect("no_rope_layer_interval"),
        Part(_read_smollm3, _write_smollm3),
    ),
    block=PROJECTIONS | PRE_NORMS,
)

GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    can_score=False,
    parts=(
        *SHARED,
        ROPE,
        UNUSUAL_HEAD_DIM,
        ATTENTION_BIAS,
        renamed(
            feed_forward_bias="mlp_bias",
            embedding_scale="embedding_multiplier",
            residual_scale="residual_multiplier",
        ),
        Part(
            lambda settings: {
                "attention_scale": settings.take("attention_multiplier"),
                "logit_scale": 1.0 / settings.take("logits_scaling"),
            },
            lambda config: {
                "attention_multiplier": config.attention_scale or config.attention_head_dim**-0.5,
                "logits_scaling": 1.0 / config.logit_scale,
            },
        ),
    ),
    block=PROJECTIONS | PRE_NORMS,
)

SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    parts=(
        *SHARED,
        ROPE,
        HEAD_DIM,
        renamed(
            qkv_bias="attention_bias",
            attention_output_bias="attention_out_bias",
            feed_forward_bias="mlp_bias",
        ),
        no_dropout("attention_dropout", "residual_dropout"),
        without_effect("pretraining_tp"),
    ),
    block=PROJECTIONS | PRE_NORMS,
)


def no_rope_in_full_layers(settings: Settings) -> dict[str, Any]:
    """`rope_pattern` of a class that rotates in sliding layers alone."""
    kinds = ["rope" if "sliding" in kind else "none" for kind in settings.take("layer_types")]
    return {"rope_pattern": shortest_pattern(kinds)}


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """As `LAYER_TYPES`; but where no layer has a window and none rotates, one that no layer uses:
    such classes look for one."""
    fields = LAYER_TYPES.write(config)
    if fields["sliding_window"] is None and not config.has_rope(0):
        fields["sliding_window"] = config.max_sequence_length
    return fields


def _read_exaone4(settings: Settings) -> dict[str, Any]:
    windows = LAYER_TYPES.read(settings)
    has_windows = settings.take("sliding_window") is not None
    return {**windows, **(no_rope_in_full_layers(settings) if has_windows else {})}


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    parts=(
        *SHARED,
        ROPE,
        UNUSUAL_HEAD_DIM,
        # The config class has merged it into `layer_types`.
        without_effect("sliding_window_pattern"),
        Part(_read_exaone4, write_windows),
        always(norm_placement="reordered", qk_norm="per_head"),
    ),
    block={
        **PROJECTIONS,
        **QK_NORMS,
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "feed_forward_norm",
    },
)


def write_partial_rope(config: TransformerConfig) -> dict[str, Any]:
    """For classes that would else rotate a part of their own choice."""
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return {**rope, "partial_rotary_factor": config.rotary_fraction}


_GLM = (
    *SHARED,
    Part(lambda settings: read_rope(settings, is_partial=True), write_partial_rope),
    HEAD_DIM,
    renamed(qkv_bias="attention_bias"),
)
_GLM_PROJECTIONS: Modules = {
    **{name: ours for name, ours in PROJECTIONS.items() if name.startswith("self_attn.")},
    "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.up"),
    "mlp.down_proj": "feed_forward.down",
}

GLM = Family(
    "glm",
    "GlmForCausalLM",
    parts=_GLM,
    block={**_GLM_PROJECTIONS, **PRE_NORMS},
    rotates_neighbours=True,
)

GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    parts=(*_GLM, always(norm_placement="sandwich")),
    block={
        **_GLM_PROJECTIONS,
        "input_layernorm": "attention_norm",
        "post_self_attn_layernorm": "attention_output_norm",
        "post_attention_layernorm": "feed_forward_norm",
        "post_mlp_layernorm": "feed_forward_output_norm",
    },
    rotates_neighbours=True,
)
