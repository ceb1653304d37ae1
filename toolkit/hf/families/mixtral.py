"""MixtralForCausalLM: Mistral with experts in all layers."""

from functools import partial
from typing import Any

from toolkit.hf.families.experts import expert_rules, read_experts, write_experts
from toolkit.hf.families.fields import write_head_dim, write_only_window
from toolkit.hf.families.llama import PRE_NORMS, decoder_rules, read_shared, write_shared
from toolkit.hf.families.rope import read_rope, write_rope
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig

_RULES = partial(
    expert_rules, module="block_sparse_moe", names={"gate": "w1", "up": "w3", "down": "w2"}
)


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_shared(config),
        **write_experts(config, num_experts="num_local_experts"),
        **write_head_dim(config),
        # The class computes scaled frequencies from this number alone.
        **({"head_dim": config.attention_head_dim} if config.rope_scaling else {}),
        "sliding_window": write_only_window(config),
        **write_rope(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    if noise := settings.take("router_jitter_noise", 0.0):
        settings.notes.append(
            f"router_jitter_noise {noise} of the original is not used in training"
        )
    return {
        **read_shared(settings),
        **read_rope(settings),
        "head_dim": settings.take("head_dim", None),
        "sliding_window": settings.take("sliding_window"),
        "moe": read_experts(settings, num_experts="num_local_experts", normalize_top_k=True),
    }


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, PRE_NORMS, _RULES),
    buffers=(r".*\.rotary_emb\.inv_freq",),
)
