"""Layer norms with gated feed-forwards and rotary positions: OLMo 1, StableLM, Command R."""

from typing import Any

from toolkit.hf.families.llama import PRE_NORMS, PROJECTIONS
from toolkit.hf.families.llama_kin import (
    no_rope_in_full_layers,
    write_partial_rope,
    write_windows,
)
from toolkit.hf.families.parts import (
    ATTENTION_BIAS,
    INIT_STD,
    LAYER_TYPES,
    SIZES,
    UNUSUAL_HEAD_DIM,
    WHOLE_HEADS,
    activation,
    always,
    no_dropout,
    renamed,
    required,
    without_effect,
)
from toolkit.hf.families.rope import ROPE, read_rope
from toolkit.hf.family import Family, Part, Settings

_SHARED = (
    SIZES,
    renamed(num_key_value_heads="num_key_value_heads"),
    activation("hidden_act", "swiglu", "geglu"),
    INIT_STD,
    without_effect("attention_dropout"),
    always(norm="layer_norm", positions="rope"),
)

OLMO = Family(
    "olmo",
    "OlmoForCausalLM",
    parts=(
        *_SHARED,
        WHOLE_HEADS,
        ROPE,
        ATTENTION_BIAS,
        renamed(clip_qkv="clip_qkv"),
        # The class has no field for it.
        always(norm_weights=False, norm_eps=1e-5),
    ),
    block=PROJECTIONS,
)


def _read_stablelm(settings: Settings) -> dict[str, Any]:
    is_parallel = settings.take("use_parallel_residual")
    linear = {"attention_output_bias": False, "feed_forward_bias": False}
    return {"parallel_residual": is_parallel, "shared_norm": is_parallel, "bias": True, **linear}


STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    parts=(
        *_SHARED,
        WHOLE_HEADS,
        renamed(norm_eps="layer_norm_eps", qkv_bias="use_qkv_bias"),
        Part(lambda settings: read_rope(settings, is_partial=True), write_partial_rope),
        Part(
            _read_stablelm,
            lambda config: {"use_parallel_residual": config.parallel_residual},
        ),
        required("qk_layernorm", False),
        no_dropout("hidden_dropout"),
    ),
    block=PROJECTIONS | PRE_NORMS,
)

_COHERE = (
    *_SHARED,
    renamed(norm_eps="layer_norm_eps", logit_scale="logit_scale"),
    UNUSUAL_HEAD_DIM,
    ROPE,
    ATTENTION_BIAS,
    always(parallel_residual=True, shared_norm=True),
)
_COHERE_BLOCK = {**PROJECTIONS, "input_layernorm": "attention_norm"}

COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    can_score=False,
    parts=(*_COHERE, required("use_qk_norm", False, None)),
    block=_COHERE_BLOCK,
    rotates_neighbours=True,
)


def _read_cohere2(settings: Settings) -> dict[str, Any]:
    return {**LAYER_TYPES.read(settings), **no_rope_in_full_layers(settings)}


COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    can_score=False,
    parts=(*_COHERE, Part(_read_cohere2, write_windows)),
    block=_COHERE_BLOCK,
    rotates_neighbours=True,
)
