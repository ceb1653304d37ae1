"""Counts in the configs equal what is built; presets; bad values."""

import msgspec
import pytest

from toolkit.errors import ConfigError
from toolkit.models.config import GPTConfig, ModelConfig, TransformerConfig
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.presets import PRESETS, preset
from toolkit.models.rope_scaling import LinearRopeConfig

SMALL = {
    "vocab_size": 100,
    "vocab_multiple": 64,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_sequence_length": 16,
}

VARIANTS = [
    {},
    {"tie_embeddings": True},
    {"num_key_value_heads": 2, "head_dim": 6},
    {"bias": True},
    {"bias": True, "norm": "layer_norm", "feed_forward": "gelu", "positions": "learned"},
    {"norm": "layer_norm", "qk_norm": "full", "bias": True, "num_key_value_heads": 1},
    {"qk_norm": "per_head", "num_key_value_heads": 2},
    {"qk_norm": "full", "norm_placement": "reordered"},
    {
        "moe": MoEConfig(
            num_experts=5,
            top_k=2,
            intermediate_size=24,
            shared_expert_intermediate_size=16,
            dense_layers=(1,),
            load_balancing_multiplier=0.0,
        )
    },
    {  # as in Gemma 2
        "num_layers": 3,
        "num_key_value_heads": 2,
        "norm_weight_offset": 1.0,
        "norm_placement": "sandwich",
        "feed_forward": "geglu",
        "embedding_scale": 32**0.5,
        "sliding_window": 5,
        "attention_pattern": ("sliding", "full"),
        "attention_scale": 0.3,
        "attention_soft_cap": 2.0,
        "logit_soft_cap": 3.0,
        "tie_embeddings": True,
    },
    {  # as in Gemma 3
        "num_layers": 4,
        "norm_weight_offset": 1.0,
        "norm_placement": "sandwich",
        "qk_norm": "per_head",
        "rope_theta": 1e6,
        "rope_scaling": LinearRopeConfig(factor=8.0),
        "sliding_rope_theta": 1e4,
        "sliding_window": 4,
        "attention_pattern": ("sliding", "sliding", "full"),
    },
    {  # as in GPT-NeoX
        "norm": "layer_norm",
        "bias": True,
        "parallel_residual": True,
        "feed_forward": "gelu_exact",
        "rotary_fraction": 0.25,
    },
    {"attention_gate": "headwise", "attention_sinks": True, "qkv_bias": True},
    {"attention_gate": "elementwise", "num_key_value_heads": 2, "rope_pattern": ("none", "rope")},
    {"norm_placement": "normalized", "num_key_value_heads": 2, "attention_sinks": True},
    {"norm": "layer_norm", "norm_weights": False, "clip_qkv": 0.5, "bias": True},
    {"parallel_residual": True, "shared_norm": True, "rope_pattern": ("rope", "none")},
    {"residual_scale": 0.5, "logit_scale": 0.25, "tie_embeddings": True},
    {  # as in Qwen 2, and a width that is no power of two
        "d_model": 36,
        "num_heads": 9,
        "num_key_value_heads": 3,
        "qkv_bias": True,
        "sliding_window": 6,
    },
]

COUNTED = [
    *VARIANTS,
    {"bias": True, "qkv_bias": False, "feed_forward": "geglu"},
    {"attention_output_bias": True, "norm_placement": "sandwich", "norm": "layer_norm"},
    {"feed_forward_bias": True, "feed_forward": "gelu_exact", "head_dim": 10},
    {"bias": True, "feed_forward_bias": False, "attention_output_bias": False},
]

EXACT_COUNTS = {
    "quickstart": 2_557_632,
    "bench_7M": 7_604_480,
    "gpt2_124M": 124_439_808 + 47 * 768,  # 50,257 ids are padded to 50,304 rows
    "gpt2_1558M": 1_557_611_200 + 47 * 1_600,
    "smollm2_135M": 134_515_008,
    "smollm2_360M": 361_821_120,
    "llama_271M": 308_577_280,
    "olmo2_190M": 267_424_512,
    "olmo2_1B": 1_484_916_736,
    "olmoe_1B_7B": 6_919_161_856,
    "llama3_8B": 8_030_261_248,
    "olmo2_7B": 7_298_617_344,
    "olmo_hybrid_7B": 7_430_870_688,
    "olmo_hybrid_190M": 278_277_432,
    "olmo2_13B": 13_716_198_400,
    "olmo2_32B": 32_234_279_936,
    "llama3_70B": 70_553_706_496,
    "qwen3_0.6B": 596_049_920,
    "qwen3_1.7B": 1_720_574_976,
    "qwen3_4B": 4_022_468_096,
    "qwen3_8B": 8_190_735_360,
    "qwen3_14B": 14_768_307_200,
    "qwen3_32B": 32_762_123_264,
    "qwen3_30B_A3B": 30_532_122_624,
}


@pytest.mark.parametrize("changes", COUNTED, ids=str)
def test_parameter_count_equals_the_built_model(changes):
    config = TransformerConfig(**{**SMALL, **changes})
    model = config.build(init_device="meta")
    assert config.num_parameters == sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for p in model.embeddings.parameters())
    assert config.num_non_embedding_parameters == config.num_parameters - embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_exact_count(name):
    config = msgspec.convert(preset(name), ModelConfig)
    model = config.build(init_device="meta")
    assert config.num_parameters == EXACT_COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == EXACT_COUNTS[name]


def test_presets_are_complete_and_independent():
    assert set(EXACT_COUNTS) == set(PRESETS)
    preset("quickstart")["d_model"] = 1
    assert preset("quickstart")["d_model"] == 192


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'gpt2_124m': no such preset; did you mean 'gpt2_124M'"):
        preset("gpt2_124m")


def test_flops_count_matrices_head_and_causal_attention():
    config = TransformerConfig(**SMALL, num_key_value_heads=2)
    matrices = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48) + 100 * 32
    attention_forward = 2 * (2 + 2) * 32 * (16 + 1) / 2  # layers * (QK, PV) * width * mean keys
    assert config.flops_per_token(16) == 6 * matrices + 3 * attention_forward
    tied = config.replace(tie_embeddings=True)
    assert tied.flops_per_token(16) == config.flops_per_token(16)


@pytest.mark.parametrize("sequence_length", [1, 4, 5, 16])
def test_flops_count_the_keys_inside_windows(sequence_length):
    config = TransformerConfig(
        **{**SMALL, "num_layers": 3, "sliding_window": 5, "attention_pattern": ("sliding", "full")}
    )
    plain = config.replace(sliding_window=None)
    place = range(sequence_length)
    fewer = sum(max(0, query - 4) for query in place)  # keys of a layer before the window
    saved = 12 * 32 * 2 * fewer / sequence_length  # layers 0 and 2
    got = plain.flops_per_token(sequence_length) - config.flops_per_token(sequence_length)
    assert got == pytest.approx(saved, abs=1)


def test_gpt_config_is_the_same_model_in_other_words():
    gpt = GPTConfig(vocab_size=100, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    same = gpt.to_transformer()
    assert same.intermediate_size == 128
    assert (gpt.num_parameters, gpt.flops_per_token(8)) == (
        same.num_parameters,
        same.flops_per_token(8),
    )
    model = gpt.build(init_device="meta")
    assert model.config == same
    assert sum(p.numel() for p in model.parameters()) == gpt.num_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "d_model 32 is not divisible by num_heads 5"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 5}, "rope needs an even head_dim, not 5"),
        ({"rotary_fraction": 0.3, "head_dim": 10}, "even head_dim, not 3 of it rotated"),
        (
            {"norm": "layer_norm", "norm_weight_offset": 1.0},
            "norm_weight_offset goes with norm rms",
        ),
        ({"parallel_residual": True, "norm_placement": "sandwich"}, "norm_placement pre only"),
        ({"shared_norm": True}, "shared_norm goes with parallel_residual only"),
        ({"norm_weights": False}, "norm_weights false goes with norm layer_norm"),
        ({"rope_pattern": ()}, "rope_pattern: empty; name at least one kind"),
        ({"rope_pattern": ("none",), "positions": "learned"}, "goes with positions rope"),
        (
            {"norm_placement": "normalized", "qk_norm": "full"},
            "qk_norm does not go with norm_placement normalized; leave it out",
        ),
        ({"norm_placement": "normalized", "feed_forward": "gelu"}, "swiglu or geglu, not gelu"),
        ({"vocab_size": 0}, "vocab_size must be greater than 0, not 0"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_multiple", 2**53 + 1, "vocab_multiple 9,007,199,254,740,993 is larger than any"),
        ("n_inner", 2**30, "n_inner 1,073,741,824 is larger than any"),
        ("n_embd", 3 * 2**22, "intermediate_size 50,331,648 is larger than any"),
    ],
)
def test_sizes_in_the_names_of_gpt2_are_checked_at_once(
    field: str, value: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{field: value})
