"""Llama (2 and 3, SmolLM) and its descendants: RMS norms, rotary positions, gated feed-forwards.

What one of them has of its own stands in its table.
"""

import math
from functools import partial
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.parts import (
    ATTENTION_BIAS,
    HEAD_DIM,
    INIT_STD,
    LAYER_TYPES,
    ONE_WINDOW,
    SIZES,
    UNUSUAL_HEAD_DIM,
    WHOLE_HEADS,
    activation,
    always,
    experts,
    no_dropout,
    renamed,
    required,
    without_effect,
    write_only_window,
)
from toolkit.hf.families.rope import ROPE, only_newer, read_rope, rope_by_kind, write_rope
from toolkit.hf.family import Family, Part, Settings
from toolkit.models.config import TransformerConfig
from toolkit.models.rope_scaling import LinearRopeConfig

_INV_FREQ = (r".*\.rotary_emb\.inv_freq",)

_BASE = (
    SIZES,
    renamed(num_key_value_heads="num_key_value_heads", norm_eps="rms_norm_eps"),
    INIT_STD,
    without_effect("attention_dropout"),
    always(norm="rms_norm", positions="rope"),
)
SHARED = (*_BASE, activation("hidden_act", "swiglu", "geglu"))
"""What Llama and most of its descendants have in common, but for rope."""

PROJECTIONS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
QK_NORMS = {
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
}
EXPERTS = {
    "mlp.gate": "feed_forward.router",
    "mlp.experts.{}.gate_proj": "feed_forward.experts.gate",
    "mlp.experts.{}.up_proj": "feed_forward.experts.up",
    "mlp.experts.{}.down_proj": "feed_forward.experts.down",
}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    parts=(
        WHOLE_HEADS,
        *SHARED,
        ROPE,
        ATTENTION_BIAS,
        renamed(head_dim="head_dim", feed_forward_bias="mlp_bias"),
        without_effect("pretraining_tp"),
    ),
    block=PROJECTIONS | PRE_NORMS,
    buffers=_INV_FREQ,
)

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    parts=(*SHARED, ROPE, HEAD_DIM, ONE_WINDOW),
    block=PROJECTIONS | PRE_NORMS,
    buffers=_INV_FREQ,
)


def _write_qwen_windows(config: TransformerConfig) -> dict[str, Any]:
    fields = LAYER_TYPES.write(config)
    kinds = [*fields["layer_types"], "sliding_attention"]
    return {
        **fields,
        "use_sliding_window": fields["sliding_window"] is not None,
        # Read where `layer_types` is unknown: windows begin after this many layers.
        "max_window_layers": kinds.index("sliding_attention"),
    }


_QWEN_WINDOWS = (
    # The config class has merged these two into `sliding_window` and `layer_types`.
    without_effect("use_sliding_window", "max_window_layers"),
    Part(LAYER_TYPES.read, _write_qwen_windows),
)

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    parts=(*SHARED, ROPE, *_QWEN_WINDOWS, UNUSUAL_HEAD_DIM, always(qkv_bias=True)),
    block=PROJECTIONS | PRE_NORMS,
    buffers=_INV_FREQ,
)

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    parts=(*SHARED, ROPE, *_QWEN_WINDOWS, HEAD_DIM, ATTENTION_BIAS, always(qk_norm="per_head")),
    block=PROJECTIONS | PRE_NORMS | QK_NORMS,
)


def _read_dense_layers(settings: Settings) -> list[int]:
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


def _read_switched_window(settings: Settings) -> dict[str, Any]:
    window = settings.take("sliding_window")
    return {"sliding_window": window if settings.take("use_sliding_window") else None}


def _write_switched_window(config: TransformerConfig) -> dict[str, Any]:
    window = write_only_window(config)
    return {"use_sliding_window": window is not None, "sliding_window": window}


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    parts=(
        *SHARED,
        ROPE,
        experts(intermediate_size="moe_intermediate_size", dense_layers=_read_dense_layers),
        Part(
            write=lambda config: (
                {"decoder_sparse_step": 1, "mlp_only_layers": list(config.moe.dense_layers)}
                if config.moe
                else {}
            )
        ),
        UNUSUAL_HEAD_DIM,
        ATTENTION_BIAS,
        Part(_read_switched_window, _write_switched_window),
        always(qk_norm="per_head"),
    ),
    block=PROJECTIONS | EXPERTS | PRE_NORMS | QK_NORMS,
)

MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    parts=(
        *SHARED,
        ROPE,
        experts(num_experts="num_local_experts", normalize_top_k=None),
        UNUSUAL_HEAD_DIM,
        # The class computes scaled frequencies from this number alone.
        Part(write=lambda config: HEAD_DIM.write(config) if config.rope_scaling else {}),
        ONE_WINDOW,
        without_effect("router_jitter_noise"),
    ),
    block={
        **PROJECTIONS,
        "block_sparse_moe.gate": "feed_forward.router",
        "block_sparse_moe.experts.{}.w1": "feed_forward.experts.gate",
        "block_sparse_moe.experts.{}.w3": "feed_forward.experts.up",
        "block_sparse_moe.experts.{}.w2": "feed_forward.experts.down",
        **PRE_NORMS,
    },
    buffers=_INV_FREQ,
)

OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    can_score=False,
    parts=(
        renamed(clip_qkv="clip_qkv"),
        WHOLE_HEADS,
        *SHARED,
        ROPE,
        ATTENTION_BIAS,
        experts(),
        always(qk_norm="full"),
    ),
    block=PROJECTIONS | EXPERTS | PRE_NORMS | QK_NORMS,
)


def _write_olmo2_rope(config: TransformerConfig) -> dict[str, Any]:
    """transformers 4.57 takes linear scaling only, in this spelling, and refuses any other."""
    rope = write_rope(config)
    if isinstance(config.rope_scaling, LinearRopeConfig):
        rope["rope_scaling"] = {"type": "linear", "factor": float(config.rope_scaling.factor)}
    return rope


def _olmo2_only_newer(config: TransformerConfig) -> str | None:
    scaling = config.rope_scaling
    if scaling is None or (isinstance(scaling, LinearRopeConfig) and scaling.factor > 1):
        return None
    return "rope_scaling"


_OLMO = (
    *SHARED,
    ATTENTION_BIAS,
    UNUSUAL_HEAD_DIM,
    always(norm_placement="reordered", qk_norm="full"),
)
_OLMO_NORMS = {
    **QK_NORMS,
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
}

OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    parts=(*_OLMO, Part(read_rope, _write_olmo2_rope)),
    block=PROJECTIONS | _OLMO_NORMS,
    only_newer=_olmo2_only_newer,
)

OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    parts=(*_OLMO, LAYER_TYPES, rope_by_kind()),
    block=PROJECTIONS | _OLMO_NORMS,
    only_newer=only_newer,
)


def _read_gemma(settings: Settings) -> dict[str, Any]:
    divisor = settings.take("query_pre_attn_scalar")
    if divisor <= 0:
        raise CheckpointError(
            f"config.json: query_pre_attn_scalar {divisor} must be greater than 0"
        )
    scale = math.sqrt(settings.take("hidden_size"))
    return {"attention_scale": divisor**-0.5, "embedding_scale": scale}


def _write_gemma(config: TransformerConfig) -> dict[str, Any]:
    scale = config.attention_scale or config.attention_head_dim**-0.5
    # The class takes whole numbers only; another scale is then not what is read back.
    return {"query_pre_attn_scalar": round(scale**-2)}


_GEMMA = (
    WHOLE_HEADS,
    required("use_bidirectional_attention", False, None),
    *_BASE,
    activation("hidden_activation", "swiglu", "geglu"),
    Part(_read_gemma, _write_gemma),
    HEAD_DIM,
    ATTENTION_BIAS,
    renamed(attention_soft_cap="attn_logit_softcapping", logit_soft_cap="final_logit_softcapping"),
    LAYER_TYPES,
    always(norm_weight_offset=1.0, norm_placement="sandwich"),
)
_GEMMA_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_output_norm",
}

GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    parts=(*_GEMMA, ROPE),
    block=PROJECTIONS | _GEMMA_NORMS,
)

_GEMMA3_BASE = "rope_local_base_freq"

GEMMA3_TEXT = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    parts=(
        # The class has this field and does not use it.
        required("attn_logit_softcapping", None),
        *_GEMMA,
        rope_by_kind(_GEMMA3_BASE),
        always(qk_norm="per_head"),
    ),
    block=PROJECTIONS | _GEMMA_NORMS | QK_NORMS,
    only_newer=partial(only_newer, sliding_base=_GEMMA3_BASE),
)

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    parts=(
        *SHARED,
        no_dropout("resid_pdrop", "embd_pdrop"),
        UNUSUAL_HEAD_DIM,
        ONE_WINDOW,
        Part(partial(read_rope, is_partial=True, is_scaled=False), write_rope),
        # Of a kind of scaled rope (longrope) that is not read.
        without_effect("original_max_position_embeddings"),
        Part(
            write=lambda config: {
                "original_max_position_embeddings": config.max_sequence_length,
                # Older code looks for it here.
                "partial_rotary_factor": config.rotary_fraction,
            }
        ),
    ),
    block={
        "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
        "self_attn.o_proj": "attention.output",
        "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.up"),
        "mlp.down_proj": "feed_forward.down",
        **PRE_NORMS,
    },
)
