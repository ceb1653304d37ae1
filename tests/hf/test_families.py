"""Which family can hold a model, and what is named where one cannot."""

import re

import pytest

from toolkit.hf.choose import misfits
from toolkit.hf.families import FAMILIES
from toolkit.hf.families.gpt import GPT2, GPT_NEOX
from toolkit.hf.families.llama import (
    GEMMA2,
    GEMMA3_TEXT,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMO3,
    PHI3,
    QWEN2,
    QWEN3,
)
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.rope_scaling import LinearRopeConfig, YarnRopeConfig

PLAIN = TransformerConfig(
    vocab_size=100,
    d_model=32,
    num_layers=4,
    num_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
)
MIXED = {"sliding_window": 8, "attention_pattern": ("sliding", "full")}
GEMMA = PLAIN.replace(
    norm_weight_offset=1.0,
    norm_placement="sandwich",
    feed_forward="geglu",
    embedding_scale=32**0.5,
    tie_embeddings=True,
    **MIXED,
)
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=8, scaling_factor=2.0)
YARN = YarnRopeConfig(factor=4, original_max_position_embeddings=16)


@pytest.mark.parametrize(
    ("config", "model_type"),
    [
        (PLAIN, "llama"),
        (PLAIN.replace(bias=True, rope_scaling=YARN), "llama"),
        (PLAIN.replace(sliding_window=8), "mistral"),
        (PLAIN.replace(d_model=40, num_heads=6, head_dim=8), "mistral"),
        (PLAIN.replace(qkv_bias=True), "qwen2"),
        (PLAIN.replace(qkv_bias=True, **MIXED), "qwen2"),
        (PLAIN.replace(**MIXED), "smollm3"),
        (PLAIN.replace(parallel_residual=True, **MIXED), None),
        (PLAIN.replace(qk_norm="per_head", **MIXED), "qwen3"),
        (PLAIN.replace(qk_norm="full", norm_placement="reordered"), "olmo2"),
        (PLAIN.replace(qk_norm="full", norm_placement="reordered", **MIXED), "olmo3"),
        (PLAIN.replace(rotary_fraction=0.5), "phi3"),
        (PLAIN.replace(rope_pattern=("rope", "rope", "rope", "none")), "smollm3"),
        (
            PLAIN.replace(rope_pattern=("none",), norm_placement="reordered", qk_norm="per_head"),
            "exaone4",
        ),
        (PLAIN.replace(residual_scale=0.2, logit_scale=0.1), "granite"),
        (PLAIN.replace(attention_scale=0.3, embedding_scale=4.0), "granite"),
        (PLAIN.replace(rotary_fraction=0.5, qkv_bias=True, head_dim=16), "glm"),
        (PLAIN.replace(rotary_fraction=0.5, norm_placement="sandwich", head_dim=16), "glm4"),
        (PLAIN.replace(norm="layer_norm", norm_weights=False, clip_qkv=8.0), "olmo"),
        (PLAIN.replace(norm="layer_norm", parallel_residual=True, shared_norm=True), "cohere"),
        (PLAIN.replace(attention_gate="headwise"), None),
        (PLAIN.replace(attention_sinks=True), None),
        (PLAIN.replace(norm_placement="normalized"), None),
        (GEMMA, "gemma2"),
        (GEMMA.replace(attention_soft_cap=5.0), "gemma2"),
        (GEMMA.replace(qk_norm="per_head", sliding_rope_theta=10.0), "gemma3_text"),
    ],
)
def test_the_plainest_family_is_preferred(config, model_type):
    found = [family.model_type for family in FAMILIES if not misfits(family, config)]
    assert next(iter(found), None) == model_type


@pytest.mark.parametrize(
    ("family", "config", "part"),
    [
        (LLAMA, PLAIN.replace(qk_norm="per_head"), "qk_norm 'per_head'"),
        (LLAMA, PLAIN.replace(norm_placement="reordered"), "norm_placement 'reordered'"),
        (LLAMA, PLAIN.replace(logit_soft_cap=3.0), "logit_soft_cap 3.0"),
        (LLAMA, PLAIN.replace(attention_scale=0.3), "attention_scale 0.3"),
        (LLAMA, PLAIN.replace(embedding_scale=2.0), "embedding_scale 2.0"),
        (LLAMA, PLAIN.replace(positions="learned"), "positions 'learned'"),
        (LLAMA, PLAIN.replace(norm="layer_norm"), "norm 'layer_norm'"),
        (LLAMA, PLAIN.replace(qkv_bias=True), "attention_output_bias False"),
        (LLAMA, PLAIN.replace(parallel_residual=True), "parallel_residual True"),
        (LLAMA, PLAIN.replace(sliding_window=8), "sliding_window or attention_pattern"),
        (LLAMA, PLAIN.replace(rotary_fraction=0.5), "partial_rotary_factor 0.5 is not covered"),
        (LLAMA, PLAIN.replace(feed_forward="gelu"), "hidden_act|feed_forward"),
        (
            LLAMA,
            PLAIN.replace(d_model=40, num_heads=6, head_dim=8),
            "hidden_size 40 is not a multiple of num_attention_heads 6, as llama asks for",
        ),
        (LLAMA, PLAIN.replace(moe=MOE.replace(dense_layers=(0,))), "moe"),
        (MIXTRAL, PLAIN.replace(moe=MOE), "moe.scaling_factor 2.0"),
        (MISTRAL, PLAIN.replace(**MIXED), "sliding_window or attention_pattern"),
        (MISTRAL, PLAIN.replace(bias=True), "qkv_bias True"),
        (QWEN2, PLAIN, "qkv_bias False"),
        (QWEN3, PLAIN.replace(qk_norm="full"), "qk_norm 'full'"),
        (
            QWEN3,
            PLAIN.replace(qk_norm="per_head", sliding_rope_theta=10.0, **MIXED),
            "sliding_rope_theta",
        ),
        (
            OLMO3,
            PLAIN.replace(
                qk_norm="full",
                norm_placement="reordered",
                rope_scaling=YARN.replace(truncate=False),
            ),
            "truncate False",
        ),
        (PHI3, PLAIN.replace(rope_scaling=LinearRopeConfig(factor=2)), "rope_type 'linear'"),
        (GEMMA2, GEMMA.replace(attention_scale=0.3), "attention_scale 0.3"),
        (GEMMA2, GEMMA.replace(embedding_scale=1.0), "embedding_scale 1.0"),
        (GEMMA2, GEMMA.replace(norm_weight_offset=0.0), "norm_weight_offset 0.0"),
        (
            GEMMA3_TEXT,
            GEMMA.replace(qk_norm="per_head", attention_soft_cap=3.0),
            "attn_logit_softcapping 3.0",
        ),
        (GPT2, PLAIN, "activation_function 'silu' is not covered"),
        (
            GPT2,
            PLAIN.replace(
                norm="layer_norm",
                positions="learned",
                num_key_value_heads=None,
                feed_forward="gelu",
            ),
            "bias False",
        ),
        (
            GPT_NEOX,
            PLAIN.replace(
                norm="layer_norm",
                bias=True,
                num_key_value_heads=None,
                feed_forward="gelu_exact",
                head_dim=16,
            ),
            "head_dim 16",
        ),
    ],
)
def test_the_part_that_a_family_lacks_is_named(family, config, part):
    reason = next(iter(misfits(family, config)), "")
    assert re.search(part, reason), reason
