"""Exact numbers of parameters and FLOPs of a Transformer, from its config."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.models.config import ModelConfig, TransformerConfig


def num_parameters(config: "TransformerConfig") -> int:
    """Parameters of the built model, padding rows included."""
    head = 0 if config.tie_embeddings else config.padded_vocab_size * config.d_model
    sparse = config.moe_layers
    blocks = len(sparse) * _block_parameters(config, is_sparse=True)
    blocks += (config.num_layers - len(sparse)) * _block_parameters(config, is_sparse=False)
    return num_embedding_parameters(config) + blocks + _norm(config, config.d_model) + head


def num_embedding_parameters(config: "TransformerConfig") -> int:
    """Parameters of the lookup tables: token ids (padding rows included) and positions."""
    rows = config.padded_vocab_size
    if config.positions == "learned":
        rows += config.max_sequence_length
    return rows * config.d_model


def num_active_parameters(config: "TransformerConfig") -> int:
    """Parameters that one token uses: of a mixture's routed experts, `top_k`."""
    moe = config.moe
    if moe is None:
        return num_parameters(config)
    unused = (moe.num_experts - moe.top_k) * 3 * config.d_model * moe.intermediate_size
    return num_parameters(config) - unused * len(config.moe_layers)


def shown_parameters(config: "ModelConfig") -> str:
    """The number of parameters for a reader, with that of the active ones where it is another."""
    total, active = config.num_parameters, config.num_active_parameters
    return f"{total:,}" if active == total else f"{total:,} ({active:,} active)"


def flops_per_token(config: "TransformerConfig", sequence_length: int) -> int:
    """Model FLOPs to train one token (forward and backward) in a sequence of that length.

    6 * (weights of the matrices that a token uses + vocab_size * d_model of the output head, tied
    or not) + 12 * num_heads * head_dim * (keys that a token attends to, summed over layers).

    Causal attention: a token attends to (sequence_length + 1) / 2 keys on average, and inside a
    sliding window of w to fewer; QK^T and PV are 2 FLOPs each per key and channel, and backward
    costs twice forward. Lookup of embeddings, norms, biases and padding ids are not counted, nor is
    anything that activation checkpointing computes twice.
    """
    matrices = config.vocab_size * config.d_model
    keys = 0  # of all queries of a sequence, summed over layers
    sparse = set(config.moe_layers)
    for layer in range(config.num_layers):
        matrices += _attention_matrices(config)
        matrices += _feed_forward_matrices(config, active=True, is_sparse=layer in sparse)
        keys += attended_keys(config, layer, sequence_length)
    width = config.num_heads * config.attention_head_dim
    return 6 * matrices + 12 * width * keys // sequence_length


def attended_keys(config: "TransformerConfig", layer: int, sequence_length: int) -> int:
    """Keys that the queries of a sequence of that length attend to in one layer, all added up."""
    window = config.window_of(layer) or sequence_length
    window = min(window, sequence_length)
    # The first `window` queries see 1, 2, ..., window keys, all later ones see `window`.
    return window * (window + 1) // 2 + (sequence_length - window) * window


def _attention_matrices(config: "TransformerConfig") -> int:
    heads = 2 * config.num_heads + 2 * config.kv_heads
    return config.d_model * heads * config.attention_head_dim


def _feed_forward_matrices(config: "TransformerConfig", *, active: bool, is_sparse: bool) -> int:
    moe = config.moe
    if moe is None or not is_sparse:
        return config.num_feed_forward_matrices * config.d_model * config.intermediate_size
    experts = moe.top_k if active else moe.num_experts
    width = experts * moe.intermediate_size + (moe.shared_expert_intermediate_size or 0)
    return 3 * config.d_model * width + config.d_model * moe.num_experts


def _block_parameters(config: "TransformerConfig", *, is_sparse: bool) -> int:
    query = config.num_heads * config.attention_head_dim
    key_value = config.kv_heads * config.attention_head_dim
    total = _attention_matrices(config)
    total += _feed_forward_matrices(config, active=False, is_sparse=is_sparse)
    num_norms = {"pre": 2, "reordered": 2, "sandwich": 4}[config.norm_placement]
    total += num_norms * _norm(config, config.d_model)
    if config.qk_norm == "full":
        total += _norm(config, query) + _norm(config, key_value)
    elif config.qk_norm == "per_head":
        total += 2 * _norm(config, config.attention_head_dim)
    if config.has_qkv_bias:
        total += query + 2 * key_value
    if config.has_attention_output_bias:
        total += config.d_model
    if config.has_feed_forward_bias and not is_sparse:
        inputs = config.num_feed_forward_matrices - 1
        total += inputs * config.intermediate_size + config.d_model
    return total


def _norm(config: "TransformerConfig", width: int) -> int:
    return 2 * width if config.norm == "layer_norm" and config.bias else width
