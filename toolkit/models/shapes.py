"""The parameters of a Transformer by name, and what they cost, told from its architecture.

No torch. The names and shapes here are the one source of counts, FLOPs and patterns; a test holds
them against the built model.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from toolkit.models.architecture import Architecture
from toolkit.models.layer_configs import DeltaNetConfig

Shape = tuple[int, ...]
Named = tuple[str, Shape]

HEAD = "head.weight"
SCORE = "head.score.weight"
"""The parameter of a head that gives scores."""

CHUNK_BYTES = 1 << 30
CPU_CHUNK_BYTES = 32 << 20
LEAST_CHUNK_ROWS = 256
"""See `loss_chunk_rows`."""
MTP_PREFIX = "mtp."
"""Of the names of all parameters of multi-token prediction."""
_ROUTER, SCORE_BIAS = ".router.weight", ".router.score_bias"
"""How the names of a router's tensors end."""


def whole_model(model: Architecture) -> Iterator[Named]:
    """What `Transformer` holds, in the order in which torch names it."""
    yield from _embeddings(model)
    kinds: dict[_Kind, list[Named]] = {}
    for layer, kind in enumerate(_kinds(model)):
        if kind not in kinds:
            kinds[kind] = list(_block(model, kind))
        for name, shape in kinds[kind]:
            yield f"blocks.{layer}.{name}", shape
    yield from _head(model)
    for number in range(model.num_mtp_layers):
        for name, shape in _mtp_layer(model, number):
            yield f"{MTP_PREFIX}{number}.{name}", shape


def state_shapes(model: Architecture) -> dict[str, Shape]:
    """Name -> shape of all that a checkpoint holds of a model: its parameters, and the biases of
    its routers, which no optimizer trains."""
    named = dict(whole_model(model))
    if model.moe is not None and model.moe.bias_update_rate is not None:
        routers = [name for name in named if name.endswith(_ROUTER)]
        named |= {n.removesuffix(_ROUTER) + SCORE_BIAS: named[n][:1] for n in routers}
    return named


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
    kinds = Counter(_kinds(model))
    blocks = sum(number * _count(_block(model, kind)) for kind, number in kinds.items())
    blocks += sum(_count(_mtp_layer(model, number)) for number in range(model.num_mtp_layers))
    return _count(_embeddings(model)) + blocks + _count(_head(model))


def num_non_embedding_parameters(model: Architecture) -> int:
    """All but the lookup tables: token ids (padding rows included) and positions."""
    return num_parameters(model) - _count(_embeddings(model))


def num_active_parameters(model: Architecture) -> int:
    """Parameters that one token uses: of a mixture's routed experts, `top_k`."""
    unused = sum(math.prod(shape) - used_weights(model, shape) for _, shape in _experts(model))
    return num_parameters(model) - unused * model.num_routers


def used_weights(model: Architecture, shape: Shape) -> int:
    """Weights of a parameter that one token uses: of stacked experts, the share of `top_k`."""
    total = math.prod(shape)
    if len(shape) == 3 and model.moe is not None:
        return total * model.moe.top_k // model.moe.num_experts
    return total


def flops_per_token(model: Architecture, sequence_length: int) -> int:
    """Model FLOPs to train one token (forward and backward) in a sequence of that length.

    6 * (weights of the matrices that a token uses + vocab_size * d_model of the output head, tied
    or not) + 12 * num_heads * head_dim * (keys that a token attends to, summed over layers)
    + 18 * value_heads * key_head_dim * value_head_dim * (layers with linear attention).

    Causal attention: a token attends to (sequence_length + 1) / 2 keys on average, and inside a
    sliding window of w to fewer; QK^T and PV are 2 FLOPs each per key and channel, and backward
    costs twice forward. Linear attention: reading the state by the key and by the query, and
    writing to it, are 2 FLOPs each per number of the state, as a step of the recurrence needs them;
    what its computation in chunks does besides is not counted. Lookup of embeddings, norms, biases
    and padding ids are not counted, nor is anything that activation checkpointing computes twice.
    Each module for multi-token prediction counts as a block with its projection and another output
    head.
    """
    matrices = (_head_columns(model) + model.vocab_size * model.num_mtp_layers) * model.d_model
    for kind, number in Counter(_kinds(model)).items():
        matrices += number * _multiplied(model, _block(model, kind))
    for number in range(model.num_mtp_layers):
        matrices += _multiplied(model, _mtp_layer(model, number))
    layers = range(model.num_layers + model.num_mtp_layers)
    mixing = sum(mixing_flops(model, layer, sequence_length) for layer in layers)
    return 6 * matrices + mixing // sequence_length


def _multiplied(model: Architecture, named: Iterator[Named]) -> int:
    """Weights of the matrices that a token uses."""
    return sum(used_weights(model, shape) for _, shape in named if len(shape) > 1)


def block_flops_per_token(model: Architecture, layer: int, sequence_length: int) -> int:
    """What one block adds to `flops_per_token`."""
    matrices = _multiplied(model, _block(model, _kind(model, layer)))
    return 6 * matrices + mixing_flops(model, layer, sequence_length) // sequence_length


def head_flops_per_token(model: Architecture) -> int:
    """What the output head adds to `flops_per_token`."""
    return 6 * _head_columns(model) * model.d_model


def mixing_flops(model: Architecture, layer: int, sequence_length: int) -> int:
    """FLOPs, forward and backward, of attention between the tokens of a sequence of that length in
    one layer, without its linear layers; a third of them forward."""
    if model.kind_of(layer) == "linear" and (net := model.delta_net) is not None:
        state = net.num_value_heads * net.key_head_dim * net.value_head_dim
        return 18 * state * sequence_length
    keys = attended_keys(model, layer, sequence_length)
    return 12 * model.num_heads * model.attention_head_dim * keys


def attended_keys(model: Architecture, layer: int, sequence_length: int) -> int:
    """Keys that the queries of a sequence of that length attend to in one layer, all added up; none
    in a layer with linear attention."""
    if model.kind_of(layer) == "linear":
        return 0
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
        yield HEAD, (model.padded_vocab_size, model.d_model)
    if model.is_normalized:
        yield "head.scale", (model.padded_vocab_size,)
    yield from _norm(model, "head.norm", model.d_model)


class _Kind(NamedTuple):
    """What blocks may differ in."""

    is_sparse: bool
    is_linear: bool
    placement: str


def _kind(model: Architecture, layer: int) -> _Kind:
    """Of one block; those for multi-token prediction come after the last layer."""
    is_linear = model.kind_of(layer) == "linear"
    return _Kind(model.has_experts(layer), is_linear, model.norm_placement_of(layer))


def _kinds(model: Architecture) -> list[_Kind]:
    """Of each block."""
    return [_kind(model, layer) for layer in range(model.num_layers)]


def _block(model: Architecture, kind: _Kind) -> Iterator[Named]:
    width = model.d_model
    yield from _delta_net(model) if kind.is_linear else _attention(model)
    yield from _norm(model, "attention_norm", width)
    if kind.is_sparse:
        yield from _experts(model)
    else:
        bias = model.has_feed_forward_bias
        yield from _feed_forward(model, "feed_forward", model.intermediate_size, bias=bias)
    if not model.shared_norm:
        yield from _norm(model, "feed_forward_norm", width)
    if model.is_normalized:
        yield "attention_step.alpha", (width,)
        yield "feed_forward_step.alpha", (width,)
    if kind.placement == "sandwich":
        yield from _norm(model, "attention_output_norm", width)
        yield from _norm(model, "feed_forward_output_norm", width)


def _delta_net(model: Architecture) -> Iterator[Named]:
    net, width = model.delta_net, model.d_model
    if net is None:
        return
    heads = net.num_value_heads
    for name, channels in _mixed_widths(net):
        yield f"attention.{name}_conv", (channels, net.conv_kernel_size)
    yield from (("attention.A_log", (heads,)), ("attention.dt_bias", (heads,)))
    gates = (("gate", net.value_width), ("decay", heads), ("write", heads))
    for name, rows in (*_mixed_widths(net), *gates):
        yield f"attention.{name}.weight", (rows, width)
    yield "attention.output_norm.weight", (net.value_head_dim,)
    yield "attention.output.weight", (width, net.value_width)


def _mixed_widths(net: DeltaNetConfig) -> tuple[tuple[str, int], ...]:
    return (("query", net.key_width), ("key", net.key_width), ("value", net.value_width))


def _attention(model: Architecture) -> Iterator[Named]:
    width, head = model.d_model, model.attention_head_dim
    query, key = model.num_heads * head, model.kv_heads * head
    if model.attention_sinks:
        yield "attention.sinks", (model.num_heads,)
    if model.is_normalized:
        yield "attention.query_scale", (query,)
        yield "attention.key_scale", (key,)
    for name, rows in (("query", query), ("key", key), ("value", key)):
        yield from _linear(f"attention.{name}", rows, width, bias=model.has_qkv_bias)
    yield from _linear("attention.output", width, query, bias=model.has_attention_output_bias)
    if model.gate_width:
        yield from _linear("attention.gate", model.gate_width, width, bias=model.has_qkv_bias)
    if model.qk_norm != "none":
        per_head = model.qk_norm == "per_head"
        yield from _norm(model, "attention.query_norm", head if per_head else query)
        yield from _norm(model, "attention.key_norm", head if per_head else key)


def _mtp_layer(model: Architecture, number: int) -> Iterator[Named]:
    width = model.d_model
    yield from _norm(model, "embedding_norm", width)
    yield from _norm(model, "hidden_norm", width)
    yield from _linear("projection", width, 2 * width, bias=False)
    for name, shape in _block(model, _kind(model, model.num_layers + number)):
        yield f"block.{name}", shape
    yield from _norm(model, "norm", width)


def _feed_forward(model: Architecture, name: str, inner: int, *, bias: bool) -> Iterator[Named]:
    if model.is_normalized:
        yield f"{name}.gate_scale", (inner,)
        yield f"{name}.up_scale", (inner,)
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
    if model.is_normalized or not model.norm_weights:
        return
    yield f"{name}.weight", (width,)
    if model.norm == "layer_norm" and model.bias:
        yield f"{name}.bias", (width,)


def _count(parameters: Iterable[Named]) -> int:
    return sum(math.prod(shape) for _, shape in parameters)
