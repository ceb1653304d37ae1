"""GPT-2, GPT-NeoX (Pythia) and StarCoder 2: layer norms, biases, feed-forwards of two layers."""

from typing import Any

from toolkit.hf.families.parts import (
    ATTENTION_BIAS,
    INIT_STD,
    ONE_WINDOW,
    SIZES,
    UNUSUAL_HEAD_DIM,
    WHOLE_HEADS,
    activation,
    always,
    ignored,
    no_dropout,
    renamed,
    required,
    without_effect,
)
from toolkit.hf.families.rope import ROPE, read_rope, write_rope
from toolkit.hf.family import Family, Part, interleaved
from toolkit.models.config import TransformerConfig

_QKV = ("attention.query", "attention.key", "attention.value")


_INNER_SIZE = Part(
    lambda settings: {
        "intermediate_size": settings.take("n_inner", None) or 4 * settings.take("n_embd")
    },
    lambda config: {
        "n_inner": config.intermediate_size
        if config.intermediate_size != 4 * config.d_model
        else None
    },
)

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    parts=(
        required("scale_attn_weights", True),
        required("scale_attn_by_inverse_layer_idx", False),
        required("add_cross_attention", False),
        renamed(
            vocab_size="vocab_size",
            max_sequence_length="n_positions",
            d_model="n_embd",
            num_layers="n_layer",
            num_heads="n_head",
            norm_eps="layer_norm_epsilon",
            tie_embeddings="tie_word_embeddings",
        ),
        _INNER_SIZE,
        activation("activation_function", "gelu", "gelu_exact"),
        INIT_STD,
        no_dropout("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        without_effect("reorder_and_upcast_attn"),
        ignored("summary_type", "summary_use_proj", "summary_activation"),
        ignored("summary_proj_to_labels", "summary_first_dropout"),
        always(norm="layer_norm", positions="learned", bias=True, init_scale_residual=True),
    ),
    block={
        "ln_1": "attention_norm",
        "ln_2": "feed_forward_norm",
        "attn.c_attn": _QKV,
        "attn.c_proj": "attention.output",
        "mlp.c_fc": "feed_forward.up",
        "mlp.c_proj": "feed_forward.down",
    },
    first={"transformer.wte": "embeddings.tokens", "transformer.wpe": "embeddings.positions"},
    last={"transformer.ln_f": "head.norm", "lm_head": "head", "score": "head.score"},
    layers="transformer.h",
    transposed=True,
    base_prefix="transformer.",
    buffers=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),
)


def _write_neox_rope(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config)
    # Without it the class would rotate a quarter.
    rope["rope_parameters"]["partial_rotary_factor"] = config.rotary_fraction
    # Read by transformers < 5.
    old = {"rotary_emb_base": config.rope_theta, "rotary_pct": config.rotary_fraction}
    return {**rope, **old}


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    parts=(
        WHOLE_HEADS,
        SIZES,
        renamed(norm_eps="layer_norm_eps", parallel_residual="use_parallel_residual"),
        activation("hidden_act", "gelu", "gelu_exact"),
        ATTENTION_BIAS,
        INIT_STD,
        Part(lambda settings: read_rope(settings, is_partial=True), _write_neox_rope),
        no_dropout("attention_dropout", "hidden_dropout"),
        without_effect("is_decoder"),
        ignored("classifier_dropout"),
        always(norm="layer_norm", positions="rope", bias=True),
    ),
    block={
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
        "mlp.dense_h_to_4h": "feed_forward.up",
        "mlp.dense_4h_to_h": "feed_forward.down",
        "attention.query_key_value": _QKV,
        "attention.dense": "attention.output",
    },
    first={"gpt_neox.embed_in": "embeddings.tokens"},
    # In files; since transformers 5 the module is called lm_head.
    last={
        "gpt_neox.final_layer_norm": "head.norm",
        "embed_out": "head",
        "score": "head.score",
    },
    layers="gpt_neox.layers",
    fuse=lambda config, rows: interleaved(config.num_heads),
    base_prefix="gpt_neox.",
    buffers=(
        r".*\.attention\.bias",
        r".*\.attention\.masked_bias",
        r".*\.rotary_emb\.inv_freq",
    ),
)

_LINEAR_BIASES = ("qkv_bias", "attention_output_bias", "feed_forward_bias")

STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    parts=(
        SIZES,
        renamed(num_key_value_heads="num_key_value_heads", norm_eps="norm_epsilon"),
        UNUSUAL_HEAD_DIM,
        activation("hidden_act", "gelu", "gelu_exact"),
        INIT_STD,
        ROPE,
        ONE_WINDOW,
        Part(
            lambda settings: dict.fromkeys(_LINEAR_BIASES, settings.take("use_bias")),
            lambda config: {"use_bias": config.has_qkv_bias},
        ),
        no_dropout("attention_dropout", "residual_dropout", "embedding_dropout"),
        always(norm="layer_norm", positions="rope", bias=True),
    ),
    block={
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.c_fc": "feed_forward.up",
        "mlp.c_proj": "feed_forward.down",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
    },
)
