"""Configs of every family in `transformers`, chosen so that each part of a mapping decides
something: windows shorter than the sequence, soft caps, odd numbers of heads, tied and not."""

from typing import Any

WINDOW = {"sliding_window": 8}
MIXED = {
    **WINDOW,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def rope(theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


def rope_by_kind(theta: float, local_theta: float, **scaling: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta, **scaling},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        }
    }


DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 72, **rope(500.0)}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama3": ("llama", {"head_dim": 16, **rope(1000.0, **LLAMA3)}),
    "llama_biases_linear": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, **rope(1000.0, **LINEAR)},
    ),
    "llama_yarn_geglu": (
        "llama",
        {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh", **rope(1000.0, **YARN)},
    ),
    "mistral": ("mistral", {"hidden_size": 40, "head_dim": 8, **WINDOW}),
    "mistral_no_window": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, **rope(1000.0)}),
    "qwen2_windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "head_dim": 8,
            **WINDOW,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_biases_windows_yarn": (
        "qwen3",
        {
            "head_dim": 32,
            "attention_bias": True,
            "use_sliding_window": True,
            **MIXED,
            **rope(1000.0, truncate=False, beta_fast=4.0, attention_factor=1.3, **YARN),
        },
    ),
    "olmo2": ("olmo2", {"hidden_size": 72}),
    "olmo2_biases_tied": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "olmo3": ("olmo3", {"head_dim": 32, **MIXED, **rope_by_kind(1000.0, 1000.0, **YARN)}),
    "olmo3_defaults": ("olmo3", {"num_hidden_layers": 4, "attention_bias": True, **WINDOW}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            **WINDOW,
        },
    ),
    "gemma2_untied_biases_no_caps": (
        "gemma2",
        {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            **MIXED,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, **MIXED, **rope_by_kind(1000.0, 10.0, **LINEAR)}),
    "gemma3_old_spelling": (
        "gemma3_text",
        {
            "head_dim": 8,
            "num_hidden_layers": 3,
            "sliding_window_pattern": 3,
            "rope_theta": 700.0,
            "rope_local_base_freq": 70.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            **WINDOW,
        },
    ),
    "phi3": ("phi3", {"head_dim": 16, "partial_rotary_factor": 0.5, **WINDOW}),
    "phi3_tied": ("phi3", {"tie_word_embeddings": True, **rope(500.0)}),
    "olmo": ("olmo", {"clip_qkv": 0.7, "hidden_size": 72}),
    "cohere": (
        "cohere",
        {"hidden_size": 72, "logit_scale": 0.2, "attention_bias": True, **rope(1e3, **LINEAR)},
    ),
    "cohere2": (
        "cohere2",
        {"hidden_size": 72, "num_hidden_layers": 5, "layer_norm_eps": 1e-6, **WINDOW},
    ),
    "stablelm": ("stablelm", {"hidden_size": 144, "use_qkv_bias": True}),
    "stablelm_parallel": (
        "stablelm",
        {
            "hidden_size": 72,
            "use_parallel_residual": True,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            **rope(1000.0, partial_rotary_factor=0.5),
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, **rope(500.0)}),
    "smollm3_windows_biases_untied": (
        "smollm3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 0, 1],
            "use_sliding_window": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            **rope(1000.0, **YARN),
            **WINDOW,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 16, "mlp_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    "exaone4": (
        "exaone4",
        {"num_hidden_layers": 5, **WINDOW, **rope(1000.0, **LLAMA3)},
    ),
    "exaone4_no_window": (
        "exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
        },
    ),
    "glm": ("glm", {"head_dim": 16, **rope(1000.0, partial_rotary_factor=0.5)}),
    "glm4": ("glm4", {"head_dim": 32, "partial_rotary_factor": 0.25, "attention_bias": False}),
    "starcoder2": (
        "starcoder2",
        {"hidden_size": 72, "hidden_act": "gelu_new", "tie_word_embeddings": False, **WINDOW},
    ),
    "starcoder2_no_biases": ("starcoder2", {"use_bias": False, "hidden_act": "gelu"}),
    "gpt_neox": ("gpt_neox", {"hidden_size": 144, "hidden_act": "gelu"}),
    "gpt_neox_serial": (
        "gpt_neox",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_size": 72,
            "hidden_act": "gelu_fast",
            "tie_word_embeddings": True,
            **rope(1000.0, partial_rotary_factor=0.5, **LINEAR),
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2_untied": (
        "gpt2",
        {"n_inner": 40, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
}
"""Name of the case -> (model_type, fields)."""

MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 5, "router_aux_loss_coef": 0.02, **WINDOW}),
    "mixtral_one_expert_tied": (
        "mixtral",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 1,
            "head_dim": 8,
            "hidden_act": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            **rope(1000.0, **LINEAR),
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16},
    ),
    "qwen3_moe_some_dense_biases_windows": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "attention_bias": True,
            "use_sliding_window": True,
            "tie_word_embeddings": True,
            **WINDOW,
        },
    ),
    "olmoe": ("olmoe", {"hidden_size": 72, "num_experts": 7, "num_experts_per_tok": 3}),
    "olmoe_biases_all_experts": (
        "olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "clip_qkv": 0.8,
            "attention_bias": True,
            **rope(1000.0, **YARN),
        },
    ),
}
"""The same for mixtures of experts."""

HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo_hybrid": (
        "olmo_hybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 10,
            "rope_parameters": {"rope_type": "default", "rope_theta": None},
        },
    ),
    "olmo_hybrid_rope_biases_tied": (
        "olmo_hybrid",
        {
            "layer_types": ["full_attention", "linear_attention"],
            "linear_key_head_dim": 12,
            "linear_conv_kernel_dim": 3,
            "linear_allow_neg_eigval": False,
            "linear_a_log_max": 4.0,
            "linear_dt_min": 0.01,
            "attention_bias": True,
            "tie_word_embeddings": True,
            **rope(1000.0, **YARN),
        },
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 5,
            **rope(1000.0, partial_rotary_factor=0.5),
        },
    ),
    "qwen3_5_biases_tied": (
        "qwen3_5_text",
        {
            "layer_types": ["full_attention", "linear_attention"],
            "head_dim": 8,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
"""The same for models with linear attention."""
