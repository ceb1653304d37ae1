"""GLM 4.5 (`glm4_moe`): grouped-query attention with DeepSeek-V3's mixture of experts."""

from functools import partial
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.families.llama import EXPERTS, PRE_NORMS, PROJECTIONS, QK_NORMS, SHARED
from toolkit.hf.families.parts import UNUSUAL_HEAD_DIM, without_effect
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family, Part, Settings
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig


def _read_experts(settings: Settings) -> dict[str, Any]:
    width, shared = settings.take("moe_intermediate_size"), settings.take("n_shared_experts")
    layers, dense = settings.take("num_hidden_layers"), settings.take("first_k_dense_replace")
    if not shared:
        raise settings.not_covered(f"n_shared_experts {shared}")
    if dense >= layers:
        raise settings.not_covered(f"first_k_dense_replace {dense} with {layers} layers")
    try:
        moe = MoEConfig(
            num_experts=settings.take("n_routed_experts"),
            top_k=settings.take("num_experts_per_tok"),
            intermediate_size=width,
            normalize_top_k=settings.take("norm_topk_prob"),
            score_function="sigmoid",
            scaling_factor=settings.take("routed_scaling_factor"),
            num_groups=settings.take("n_group"),
            top_k_groups=settings.take("topk_group"),
            bias_update_rate=0.0,
            shared_expert_intermediate_size=width * shared,
            dense_layers=tuple(range(dense)),
            load_balancing_multiplier=0.0,
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: not a model that can be built: {error}") from None
    settings.notes.append(
        "biases of experts stay as they are; model.moe.bias_update_rate (DeepSeek-V3: 0.001) goes "
        "on balancing in training"
    )
    return {"moe": moe}


def _write_experts(config: TransformerConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    shared, rest = divmod(moe.shared_expert_intermediate_size or 0, moe.intermediate_size)
    has_family_parts = (
        moe.score_function == "sigmoid" and moe.bias_update_rate is not None and not rest
    )
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.intermediate_size,
        "n_shared_experts": shared if has_family_parts else 0,
        "norm_topk_prob": moe.normalize_top_k,
        "routed_scaling_factor": moe.scaling_factor,
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        "first_k_dense_replace": len(moe.dense_layers),
    }


def _read_mtp(settings: Settings) -> dict[str, Any]:
    if number := settings.take("num_mtp_layers", 0):
        settings.notes.append(
            f"multi-token prediction (num_mtp_layers {number}) is left out; logits are "
            "the same without"
        )
    return {}


def _write_rope(config: TransformerConfig) -> dict[str, Any]:
    """The class takes half of each head where nothing is said."""
    rope = write_rope(config)
    fraction = {"partial_rotary_factor": config.rotary_fraction}
    return {**rope, "rope_parameters": {**rope["rope_parameters"], **fraction}, **fraction}


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    can_score=False,
    parts=(
        *SHARED,
        Part(partial(read_rope, is_partial=True), _write_rope),
        UNUSUAL_HEAD_DIM,
        Part(
            lambda settings: {
                "qkv_bias": settings.take("attention_bias"),
                "qk_norm": "per_head" if settings.take("use_qk_norm") else "none",
            },
            lambda config: {
                "attention_bias": config.has_qkv_bias,
                "use_qk_norm": config.qk_norm == "per_head",
            },
        ),
        without_effect("output_router_logits"),
        Part(_read_experts, _write_experts),
        Part(_read_mtp, lambda config: {"num_nextn_predict_layers": 0}),
    ),
    block={
        **PROJECTIONS,
        **EXPERTS,
        "mlp.gate.e_score_correction_bias": "feed_forward.router.score_bias",
        "mlp.shared_experts.gate_proj": "feed_forward.shared.gate",
        "mlp.shared_experts.up_proj": "feed_forward.shared.up",
        "mlp.shared_experts.down_proj": "feed_forward.shared.down",
        **PRE_NORMS,
        **QK_NORMS,
    },
    passes_over_further_layers=True,
)
