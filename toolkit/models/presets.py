"""Named model sizes, with every field that makes the architecture spelled out: a stored preset
does not change where a default does."""

import difflib
from typing import Any

from toolkit.errors import ConfigError
from toolkit.wording import shortened

_LLAMA_LIKE: dict[str, Any] = {
    "type": "transformer",
    "num_key_value_heads": None,
    "head_dim": None,
    "norm": "rms_norm",
    "norm_eps": 1e-5,
    "norm_weights": True,
    "norm_weight_offset": 0.0,
    "norm_placement": "pre",
    "residual_scale": 1.0,
    "parallel_residual": False,
    "shared_norm": False,
    "qk_norm": "none",
    "positions": "rope",
    "rope_pattern": ["rope"],
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rotary_fraction": 1.0,
    "sliding_rope_theta": None,
    "sliding_window": None,
    "attention_pattern": ["sliding"],
    "delta_net": None,
    "attention_gate": "none",
    "attention_sinks": False,
    "clip_qkv": None,
    "attention_scale": None,
    "attention_soft_cap": None,
    "logit_soft_cap": None,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "feed_forward": "swiglu",
    "moe": None,
    "bias": False,
    "qkv_bias": None,
    "attention_output_bias": None,
    "feed_forward_bias": None,
    "tie_embeddings": False,
    "init_std": 0.02,
    "init_scale_residual": False,
    "num_mtp_layers": 0,
    "mtp_loss_multiplier": 0.3,
}

_OLMO2_LIKE: dict[str, Any] = _LLAMA_LIKE | {
    "norm_eps": 1e-6,
    "norm_placement": "reordered",
    "qk_norm": "full",
    "rope_theta": 500_000.0,
}

_OLMO_HYBRID_LIKE: dict[str, Any] = _OLMO2_LIKE | {
    "rope_theta": 10_000.0,
    "rope_pattern": ["none"],
    "attention_pattern": ["linear", "linear", "linear", "full"],
}

_QWEN3_LIKE: dict[str, Any] = _LLAMA_LIKE | {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "norm_eps": 1e-6,
    "qk_norm": "per_head",
    "rope_theta": 1_000_000.0,
}

_TIED: dict[str, Any] = {"tie_embeddings": True}


def _sizes(
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_sequence_length: int,
    *,
    vocab_multiple: int = 64,
) -> dict[str, Any]:
    return locals()


def _delta_net(heads: int, key_head_dim: int) -> dict[str, Any]:
    """OLMo-hybrid's: values twice as wide as keys."""
    return {
        "num_key_heads": heads,
        "num_value_heads": heads,
        "key_head_dim": key_head_dim,
        "value_head_dim": 2 * key_head_dim,
        "conv_kernel_size": 4,
        "allow_negative_eigenvalues": True,
        "norm_eps": 1e-5,
        "norm_placement": "pre",
        "min_decay_rate": 0.0,
        "max_decay_rate": 16.0,
        "min_time_step": 0.001,
        "max_time_step": 0.1,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Small enough for two CPU cores: tied, because a vocabulary of 4,096 is a third of it.
    "quickstart": _LLAMA_LIKE | _sizes(4_096, 192, 4, 3, 512, 1_024) | {"tie_embeddings": True},
    # 7.6M parameters: the subject of benchmarks/.
    "bench_7M": _LLAMA_LIKE | _sizes(8_192, 256, 4, 4, 768, 2_048),
    # Radford et al. 2019; the name counts the shared embedding once.
    "gpt2_124M": {
        "type": "gpt",
        "vocab_size": 50_257,
        "vocab_multiple": 64,
        "n_positions": 1_024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": 3_072,
        "layer_norm_epsilon": 1e-5,
        "bias": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    # Radford et al. 2019, their largest; published with 1,557,611,200 (no padded rows).
    "gpt2_1558M": {
        "type": "gpt",
        "vocab_size": 50_257,
        "vocab_multiple": 64,
        "n_positions": 1_024,
        "n_embd": 1_600,
        "n_layer": 48,
        "n_head": 25,
        "n_inner": 6_400,
        "layer_norm_epsilon": 1e-5,
        "bias": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    # HuggingFaceTB/SmolLM2-135M and -360M as they were pretrained; those on the hub have been
    # extended to 8,192 tokens, with a rope_theta of 100,000.
    "smollm2_135M": _LLAMA_LIKE
    | _sizes(49_152, 576, 30, 9, 1_536, 2_048)
    | _TIED
    | {
        "num_key_value_heads": 3,
        "init_std": 0.041_666_666_666_666_664,
        "init_scale_residual": True,
    },
    "smollm2_360M": _LLAMA_LIKE
    | _sizes(49_152, 960, 32, 15, 2_560, 2_048)
    | _TIED
    | {"num_key_value_heads": 5, "init_std": 0.032_27, "init_scale_residual": True},
    # OLMo-core's llama2_271M shape, with GPT-2's vocabulary.
    "llama_271M": _LLAMA_LIKE | _sizes(50_257, 1_024, 16, 8, 2_816, 2_048, vocab_multiple=128),
    # OLMo-core's olmo2_190M shape, with the dolma2 vocabulary (190M without embedding).
    "olmo2_190M": _OLMO2_LIKE | _sizes(100_278, 768, 12, 12, 3_072, 4_096, vocab_multiple=128),
    # allenai/OLMo-2-0425-1B.
    "olmo2_1B": _OLMO2_LIKE | _sizes(100_278, 2_048, 16, 16, 8_192, 4_096, vocab_multiple=128),
    # allenai/OLMo-2-1124-7B, -13B and OLMo-2-0325-32B.
    "olmo2_7B": _OLMO2_LIKE | _sizes(100_278, 4_096, 32, 32, 11_008, 4_096, vocab_multiple=128),
    "olmo2_13B": _OLMO2_LIKE | _sizes(100_278, 5_120, 40, 40, 13_824, 4_096, vocab_multiple=128),
    "olmo2_32B": _OLMO2_LIKE
    | _sizes(100_278, 5_120, 64, 40, 27_648, 4_096, vocab_multiple=128)
    | {"num_key_value_heads": 8},
    # allenai/Olmo-Hybrid-7B, and its proportions at the size of olmo2_190M.
    "olmo_hybrid_7B": _OLMO_HYBRID_LIKE
    | _sizes(100_278, 3_840, 32, 30, 11_008, 65_536, vocab_multiple=128)
    | {"delta_net": _delta_net(30, 96)},
    "olmo_hybrid_190M": _OLMO_HYBRID_LIKE
    | _sizes(100_278, 768, 12, 12, 3_072, 4_096, vocab_multiple=128)
    | {"delta_net": _delta_net(12, 48)},
    # allenai/OLMoE-1B-7B-0924, with its losses of the router (Muennighoff et al. 2024).
    "olmoe_1B_7B": _LLAMA_LIKE
    | _sizes(50_304, 2_048, 16, 16, 1_024, 4_096)
    | {
        "qk_norm": "full",
        "moe": {
            "num_experts": 64,
            "top_k": 8,
            "intermediate_size": 1_024,
            "normalize_top_k": False,
            "load_balancing_multiplier": 0.01,
            "router_z_loss_multiplier": 0.001,
        },
    },
    # meta-llama/Meta-Llama-3-8B.
    "llama3_8B": _LLAMA_LIKE
    | _sizes(128_256, 4_096, 32, 32, 14_336, 8_192)
    | {"num_key_value_heads": 8, "rope_theta": 500_000.0},
    # meta-llama/Meta-Llama-3-70B.
    "llama3_70B": _LLAMA_LIKE
    | _sizes(128_256, 8_192, 80, 64, 28_672, 8_192)
    | {"num_key_value_heads": 8, "rope_theta": 500_000.0},
    # Qwen/Qwen3-0.6B-Base and so on; the smaller three share the embedding with the head.
    "qwen3_0.6B": _QWEN3_LIKE | _sizes(151_936, 1_024, 28, 16, 3_072, 32_768) | _TIED,
    "qwen3_1.7B": _QWEN3_LIKE | _sizes(151_936, 2_048, 28, 16, 6_144, 32_768) | _TIED,
    "qwen3_4B": _QWEN3_LIKE | _sizes(151_936, 2_560, 36, 32, 9_728, 32_768) | _TIED,
    "qwen3_8B": _QWEN3_LIKE | _sizes(151_936, 4_096, 36, 32, 12_288, 32_768),
    "qwen3_14B": _QWEN3_LIKE | _sizes(151_936, 5_120, 40, 40, 17_408, 32_768),
    "qwen3_32B": _QWEN3_LIKE | _sizes(151_936, 5_120, 64, 64, 25_600, 32_768),
    # Qwen/Qwen3-30B-A3B-Base; the loss of the router has the weight of its config.
    "qwen3_30B_A3B": _QWEN3_LIKE
    | _sizes(151_936, 2_048, 48, 32, 6_144, 32_768)
    | {
        "num_key_value_heads": 4,
        "moe": {
            "num_experts": 128,
            "top_k": 8,
            "intermediate_size": 768,
            "normalize_top_k": True,
            "load_balancing_multiplier": 0.001,
            "router_z_loss_multiplier": 0.0,
        },
    },
}


SOURCES: dict[str, str] = {
    "quickstart": "ours, for two CPU cores",
    "bench_7M": "ours, for benchmarks",
    "gpt2_124M": "openai-community/gpt2 (Radford et al. 2019)",
    "gpt2_1558M": "openai-community/gpt2-xl (Radford et al. 2019)",
    "smollm2_135M": "HuggingFaceTB/SmolLM2-135M, as it was pretrained",
    "smollm2_360M": "HuggingFaceTB/SmolLM2-360M, as it was pretrained",
    "llama_271M": "OLMo-core's llama2_271M, with GPT-2's vocabulary",
    "olmo2_190M": "OLMo-core's olmo2_190M",
    "olmo2_1B": "allenai/OLMo-2-0425-1B",
    "olmo2_7B": "allenai/OLMo-2-1124-7B",
    "olmo2_13B": "allenai/OLMo-2-1124-13B",
    "olmo2_32B": "allenai/OLMo-2-0325-32B",
    "olmo_hybrid_7B": "allenai/Olmo-Hybrid-7B",
    "olmo_hybrid_190M": "ours, in the proportions of allenai/Olmo-Hybrid-7B",
    "olmoe_1B_7B": "allenai/OLMoE-1B-7B-0924",
    "llama3_8B": "meta-llama/Meta-Llama-3-8B",
    "llama3_70B": "meta-llama/Meta-Llama-3-70B",
    "qwen3_0.6B": "Qwen/Qwen3-0.6B-Base",
    "qwen3_1.7B": "Qwen/Qwen3-1.7B-Base",
    "qwen3_4B": "Qwen/Qwen3-4B-Base",
    "qwen3_8B": "Qwen/Qwen3-8B-Base",
    "qwen3_14B": "Qwen/Qwen3-14B-Base",
    "qwen3_32B": "Qwen/Qwen3-32B",
    "qwen3_30B_A3B": "Qwen/Qwen3-30B-A3B-Base",
}
"""Preset -> the model whose shape it has."""


def preset(name: str) -> dict[str, Any]:
    """The fields of a model config, `type` included, as plain data for a recipe. Raises
    ConfigError for an unknown name, with the nearest known one."""
    if name not in PRESETS:
        name = shortened(name)
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "known presets: " + ", ".join(PRESETS)
        raise ConfigError(f"{name!r}: no such preset; {hint}", key="model.preset", about="model")
    return dict(PRESETS[name])
