"""The parameters of a Transformer by name, and what they cost, told from its architecture.

No torch. The names and shapes here are the one source of counts, FLOPs and patterns; a test holds
them against the built model.
"""

import math
from collections.abc import Iterable, Iterator

from toolkit.models.architecture import Architecture

Shape = tuple[int, ...]
Named = tuple[str, Shape]

SCORE = "head.score.weight"
"""The parameter of a head that gives scores."""

CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES = 32 << 20
LEAST_CHUNK_ROWS = 256
"""See `loss_chunk_rows`."""


def whole_model(model: Architecture) -> Iterator[Named]:
    """What `Transformer` holds, in the order in which torch names it."""
    yield from _embeddings(model)
    dense, sparse = list(_block(model, sparse=False)), list(_block(model, sparse=True))
    with_experts = set(model.moe_layers)
    for layer in range(model.num_layers):
        for name, shape in sparse if layer in with_experts else dense:
            yield f"blocks.{layer}.{name}", shape
    yield from _head(model)


def loss_chunk_rows(asked: int | None, padded_vocab_size: int, device_type: str) -> int:
    """Most rows of which logits exist at once: what was `asked` for, or rows with so many bytes of
    logits in fp32.

    Each chunk adds a gradient of the whole head to those before, which costs as much as the
    products of some dozen rows: hence the least number. On a CPU larger chunks gain 1% (1,024
    against 256 rows of 8,192 ids) and then nothing.
    """
    if asked is not None:
        return asked
    most = CPU_CHUNK_BYTES if device_type == "cpu" else CHUNK_BYTES
    return max(LEAST_CHUNK_ROWS, most // (4 * padded_vocab_size))


def num_parameters(model: Architecture) -> int:
    """Parameters of the built model, padding rows included."""
    sparse = len(model.moe_layers)
    blocks = sparse * _count(_block(model, sparse=True))
    blocks += (model.num_layers - sparse) * _count(_block(model, sparse=False))
    return _count(_embeddings(model)) + blocks + _count(_head(model))


def num_non_embedding_parameters(model: Architecture) -> int:
    """All but the lookup tables: token ids (padding rows included) and positions."""
    return num_parameters(model) - _count(_embeddings(model))


def num_active_parameters(model: Architecture) -> int:
    """Parameters that one token uses: of a mixture's routed experts, `top_k`."""
    unused = sum(
        math.prod(shape) - used_weights(model, shape) for _, shape in _block(model, sparse=True)
    )
    return num_parameters(model) - unused * len(model.moe_layers)


def used_weights(model: Architecture, shape: Shape) -> int:
    """Weights of a parameter that one token uses: of stacked experts, the share of `top_k`."""
    total = math.prod(shape)
    if len(shape) == 3 and model.moe is not None:
        return total * model.moe.top_k // model.moe.num_experts
    return total


def flops_per_token(model: Architecture, sequence_length: int) -> int:
    """Model FLOPs to train one token (forward and backward) in a sequence of that length.

    6 * (weights of the matrices that a token uses + vocab_size * d_model of the output head, tied
    or not) + 12 * num_heads * head_dim * (keys that a token attends to, summed over layers).

    Causal attention: a token attends to (sequence_length + 1) / 2 keys on average, and inside a
    sliding window of w to fewer; QK^T and PV are 2 FLOPs each per key and channel, and backward
    costs twice forward. Lookup of embeddings, norms, biases and padding ids are not counted, nor is
    anything that activation checkpointing computes twice.
    """
    sparse, matrices = len(model.moe_layers), _head_columns(model) * model.d_model
    for is_sparse, layers in ((True, sparse), (False, model.num_layers - sparse)):
        block = (shape for _, shape in _block(model, sparse=is_sparse) if len(shape) > 1)
        matrices += layers * sum(used_weights(model, shape) for shape in block)
    keys = sum(attended_keys(model, layer, sequence_length) for layer in range(model.num_layers))
    width = model.num_heads * model.attention_head_dim
    return 6 * matrices + 12 * width * keys // sequence_length


def block_flops_per_token(model: Architecture, layer: int, sequence_length: int) -> int:
    """What one block adds to `flops_per_token`."""
    block = _block(model, sparse=layer in model.moe_layers)
    matrices = sum(used_weights(model, shape) for _, shape in block if len(shape) > 1)
    keys = attended_keys(model, layer, sequence_length)
    return 6 * matrices + 12 * model.num_heads * model.attention_head_dim * keys // sequence_length


def head_flops_per_token(model: Architecture) -> int:
    """What the output head adds to `flops_per_token`."""
    return 6 * _head_columns(model) * model.d_model


def attended_keys(model: Architecture, layer: int, sequence_length: int) -> int:
    """Keys that the queries of a sequence of that length attend to in one layer, all added up."""
    window = min(model.window_of(layer) or sequence_length, sequence_length)
    # The first `window` queries see 1, 2, ..., window keys, all later ones see `window`.
    return window * (window + 1) // 2 + (sequence_length - window) * window


def _head_columns(model: Architecture) -> int:
    return model.num_scores or model.vocab_size


def _embeddings(model: Architecture) -> Iterator[Named]:
    yield "embeddings.tokens.weight", (model.padded_vocab_size, model.d_model)
    if model.positions == "learned":
        yield "embeddings.positions.weight", (model.max_sequence_length, model.d_model)


def _head(model: Architecture) -> Iterator[Named]:
    if model.num_scores is not None:
        yield SCORE, (model.num_scores, model.d_model)
    elif not model.tie_embeddings:
        yield "head.weight", (model.padded_vocab_size, model.d_model)
    yield from _norm(model, "head.norm", model.d_model)


def _block(model: Architecture, *, sparse: bool) -> Iterator[Named]:
    width, head = model.d_model, model.attention_head_dim
    query, key = model.num_heads * head, model.kv_heads * head
    for name, rows in (("query", query), ("key", key), ("value", key)):
        yield from _linear(f"attention.{name}", rows, width, bias=model.has_qkv_bias)
    yield from _linear("attention.output", width, query, bias=model.has_attention_output_bias)
    if model.qk_norm != "none":
        per_head = model.qk_norm == "per_head"
        yield from _norm(model, "attention.query_norm", head if per_head else query)
        yield from _norm(model, "attention.key_norm", head if per_head else key)
    yield from _norm(model, "attention_norm", width)
    if sparse:
        yield from _experts(model)
    else:
        bias = model.has_feed_forward_bias
        yield from _feed_forward(model, "feed_forward", model.intermediate_size, bias=bias)
    yield from _norm(model, "feed_forward_norm", width)
    if model.norm_placement == "sandwich":
        yield from _norm(model, "attention_output_norm", width)
        yield from _norm(model, "feed_forward_output_norm", width)


def _feed_forward(model: Architecture, name: str, inner: int, *, bias: bool) -> Iterator[Named]:
    if model.is_gated:
        yield from _linear(f"{name}.gate", inner, model.d_model, bias=bias)
    yield from _linear(f"{name}.up", inner, model.d_model, bias=bias)
    yield from _linear(f"{name}.down", model.d_model, inner, bias=bias)


def _experts(model: Architecture) -> Iterator[Named]:
    moe, width = model.moe, model.d_model
    if moe is None:
        return
    yield "feed_forward.router.weight", (moe.num_experts, width)
    yield "feed_forward.experts.gate", (moe.num_experts, moe.intermediate_size, width)
    yield "feed_forward.experts.up", (moe.num_experts, moe.intermediate_size, width)
    yield "feed_forward.experts.down", (moe.num_experts, width, moe.intermediate_size)
    if (shared := moe.shared_expert_intermediate_size) is not None:
        yield from _feed_forward(model, "feed_forward.shared", shared, bias=False)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[Named]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(model: Architecture, name: str, width: int) -> Iterator[Named]:
    yield f"{name}.weight", (width,)
    if model.norm == "layer_norm" and model.bias:
        yield f"{name}.bias", (width,)


def _count(parameters: Iterable[Named]) -> int:
    return sum(math.prod(shape) for _, shape in parameters)
