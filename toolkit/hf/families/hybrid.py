"""Models with layers of linear attention: OLMo-hybrid, and the text model of Qwen 3.5."""

from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.llama import PRE_NORMS, PROJECTIONS, QK_NORMS, SHARED
from toolkit.hf.families.parts import (
    ATTENTION_BIAS,
    HEAD_DIM,
    UNUSUAL_HEAD_DIM,
    WHOLE_HEADS,
    activation,
    always,
    shortest_pattern,
    without_effect,
)
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family, Part, Settings, interleaved, joined
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig

_KINDS = {"linear_attention": "linear", "full_attention": "full"}
_SIZES = {
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_head_dim": "linear_key_head_dim",
    "value_head_dim": "linear_value_head_dim",
    "conv_kernel_size": "linear_conv_kernel_dim",
}
_INITIAL_STATES = {
    "min_decay_rate": "linear_a_log_min",
    "max_decay_rate": "linear_a_log_max",
    "min_time_step": "linear_dt_min",
    "max_time_step": "linear_dt_max",
}
"""Which are rates and steps, for all that they are called."""


def _pattern(settings: Settings) -> tuple[str, ...]:
    kinds = []
    for name in settings.take("layer_types"):
        if name not in _KINDS:
            what = settings.not_covered(f"{name!r} in layer_types")
            raise CheckpointError(f"{what}, which knows {' and '.join(_KINDS)}")
        kinds.append(_KINDS[name])
    missing = [name for name, kind in _KINDS.items() if kind not in kinds]
    if missing:
        raise settings.not_covered(f"layer_types without {missing[0]}")
    return shortest_pattern(kinds)


def _layers(names: dict[str, str], **fixed: Any) -> Part:
    """`attention_pattern` and `delta_net`; `names`: of fields of the latter, theirs; `fixed`: what
    else the class has of it."""

    def read(settings: Settings) -> dict[str, Any]:
        found = {ours: settings.take(theirs) for ours, theirs in names.items()}
        try:
            net = DeltaNetConfig(**found, **fixed)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"config.json: not a model that can be built: {error}") from None
        return {"attention_pattern": _pattern(settings), "delta_net": net}

    def write(config: TransformerConfig) -> dict[str, Any]:
        kinds = (config.kind_of(layer) == "linear" for layer in range(config.num_layers))
        types = ["linear_attention" if is_linear else "full_attention" for is_linear in kinds]
        net = config.delta_net
        own = {} if net is None else {theirs: getattr(net, ours) for ours, theirs in names.items()}
        return {"layer_types": types, **own}

    return Part(read, write)


_SILU = activation("hidden_act", "swiglu")
"""The classes put it behind the short convolutions too, where ours is always SiLU."""

_CONVOLUTIONS = ("attention.query_conv", "attention.key_conv", "attention.value_conv")
_FEED_FORWARD = {name: ours for name, ours in PROJECTIONS.items() if name.startswith("mlp.")}


def _read_olmo_rope(settings: Settings) -> dict[str, Any]:
    """The class rotates where there is a base; it takes a missing one for 10,000, null for none."""
    parameters = settings.take("rope_parameters")
    if isinstance(parameters, dict) and parameters.get("rope_theta") is None:
        return {"rope_pattern": ("none",)}
    return read_rope(settings)


def _write_olmo_rope(config: TransformerConfig) -> dict[str, Any]:
    if not any(config.has_rope(layer) for layer in range(config.num_layers)):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    return write_rope(config)


OLMO_HYBRID = Family(
    "olmo_hybrid",
    "OlmoHybridForCausalLM",
    can_score=False,
    parts=(
        WHOLE_HEADS,
        *SHARED,
        _SILU,
        ATTENTION_BIAS,
        UNUSUAL_HEAD_DIM,
        Part(_read_olmo_rope, _write_olmo_rope),
        _layers(
            _SIZES | _INITIAL_STATES | {"allow_negative_eigenvalues": "linear_allow_neg_eigval"},
            norm_eps=1e-5,
            norm_placement="pre",
        ),
        # A floor under initial time steps, which `linear_dt_min` is too.
        without_effect("linear_dt_init_floor"),
        always(norm_placement="reordered", qk_norm="full"),
    ),
    block={
        **PROJECTIONS,
        **QK_NORMS,
        "post_attention_layernorm": "attention_norm",
        "post_feedforward_layernorm": "feed_forward_norm",
    },
    # As in files; modules are called otherwise, and have one convolution.
    linear_block={
        "linear_attn.A_log": "attention.A_log",
        "linear_attn.dt_bias": "attention.dt_bias",
        " ".join(f"linear_attn.{x}_conv1d.weight" for x in "qkv"): _CONVOLUTIONS,
        "linear_attn.q_proj": "attention.query",
        "linear_attn.k_proj": "attention.key",
        "linear_attn.v_proj": "attention.value",
        "linear_attn.a_proj": "attention.decay",
        "linear_attn.b_proj": "attention.write",
        "linear_attn.g_proj": "attention.gate",
        "linear_attn.o_norm": "attention.output_norm",
        "linear_attn.o_proj": "attention.output",
        "attention_layer_norm": "attention_norm",
        "feedforward_layer_norm": "feed_forward_norm",
        **_FEED_FORWARD,
    },
    # In what transformers writes (5.23).
    other_names={".post_attention_layernorm.": ".feedforward_layer_norm."},
    only_newer=lambda config: "linear attention",
)

_OF_IMAGES = {"mrope_section", "mrope_interleaved"}
"""Which angles turn with the places in an image. In text all places are one."""


def _read_qwen_rope(settings: Settings) -> dict[str, Any]:
    parameters = settings.take("rope_parameters")
    if isinstance(parameters, dict):
        parameters = {name: v for name, v in parameters.items() if name not in _OF_IMAGES}
    of_text = Settings({"model_type": settings.model_type, "rope_parameters": parameters})
    return read_rope(of_text, is_partial=True)


def _write_qwen_rope(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config)
    # Without it the class would rotate a quarter.
    rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    return rope


QWEN3_5_TEXT = Family(
    "qwen3_5_text",
    "Qwen3_5ForCausalLM",
    parts=(
        *SHARED,
        _SILU,
        ATTENTION_BIAS,
        HEAD_DIM,
        Part(_read_qwen_rope, _write_qwen_rope),
        _layers(_SIZES | {"norm_eps": "rms_norm_eps"}),
        always(norm_weight_offset=1.0, qk_norm="per_head", attention_gate="elementwise"),
    ),
    block={
        # Head by head: the query, then its gate.
        "self_attn.q_proj": ("attention.query", "attention.gate"),
        **{name: ours for name, ours in PROJECTIONS.items() if name != "self_attn.q_proj"},
        **QK_NORMS,
        **PRE_NORMS,
    },
    linear_block={
        "linear_attn.conv1d.weight": _CONVOLUTIONS,
        "linear_attn.A_log": "attention.A_log",
        "linear_attn.dt_bias": "attention.dt_bias",
        "linear_attn.in_proj_qkv": ("attention.query", "attention.key", "attention.value"),
        "linear_attn.in_proj_z": "attention.gate",
        "linear_attn.in_proj_b": "attention.write",
        "linear_attn.in_proj_a": "attention.decay",
        "linear_attn.norm": "attention.output_norm",
        "linear_attn.out_proj": "attention.output",
        **PRE_NORMS,
        **_FEED_FORWARD,
    },
    fuse=lambda config, rows: (
        interleaved(config.num_heads, number=2) if len(rows) == 2 else joined(rows)
    ),
    # Heads that predict further tokens, which the class does not have.
    buffers=(r"mtp\..*",),
    only_newer=lambda config: "linear attention",
)
