"""Attention in blocks of queries: ordinary matrix products, and scores that are never kept.

    for each block of queries and the keys that these see:
        weights = exp(scale * query @ key^T + bias - max),  out = weights @ value / sum(weights)

Backward makes the weights again from one number a query, the logarithm of the sum (Dao et al. 2022,
"FlashAttention"). A block's products are as fast as the machine's batched products are, and its
elementwise part is one loop where it is compiled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.models.norms import widened

LARGEST_BLOCK = 1 << 26
"""Most scores of a block, over all rows and heads."""


@torch.compiler.assume_constant_result
def prefers_blocks(device_type: str, dtype: torch.dtype) -> bool:
    """Whether compiled attention is faster so than by SDPA: on CPUs with AVX-512 (2 to 3 times on a
    Zen 5). SDPA's kernel uses AMX where there is some; these products are not measured there."""
    if device_type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX512" and not torch.cpu._is_amx_tile_supported()


class QueryBlock(NamedTuple):
    """Queries, by their row in the tensor, and the keys from the first to the last that they see.
    Plain numbers: they become constants of a compiled graph."""

    start: int
    end: int
    first_key: int
    end_key: int


def computes_in_blocks(query: Tensor, blocks: Sequence[QueryBlock]) -> bool:
    """Whether attention of `query` is computed so here and now: not compiled it is no faster than
    SDPA, and the scores of a block must stay small."""
    if not torch.compiler.is_compiling() or not prefers_blocks(query.device.type, query.dtype):
        return False
    most = max((end - start) * (last - first) for start, end, first, last in blocks)
    return query.shape[0] * query.shape[1] * most <= LARGEST_BLOCK


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    blocks: Sequence[QueryBlock],
    scale: float | None,
) -> Tensor:
    """Attention of whole heads, `(batch, heads, queries, head_dim)` and the same of keys and values
    with as many heads or, for grouped queries, fewer.

    `bias`, `(batch or 1, 1, queries, keys)`, is added to the scores; None: causal, for queries and
    keys of the same row. `blocks` cover the queries in order. `scale` as in SDPA.
    """
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return _Blockwise.apply(query, key, value, bias, tuple(map(tuple, blocks)), scale)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        blocks: tuple[tuple[int, int, int, int], ...],
        scale: float,
    ) -> Tensor:
        with torch.autocast(query.device.type, enabled=False):
            outs, sums = [], []
            for start, end, first, last in blocks:
                own = _grouped(query[:, :, start:end], key.shape[1])
                scores = own @ key[:, :, first:last].transpose(2, 3)
                scores = _biased(scores, bias, (start, end, first, last), scale)
                peak = scores.amax(-1, keepdim=True)
                weights = (scores - peak).exp()
                total = weights.sum(-1, keepdim=True)
                out = widened(weights.to(value.dtype) @ value[:, :, first:last]) / total
                outs.append(_ungrouped(out.to(query.dtype), query.shape[1]))
                sums.append(peak + total.log())
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
        ctx.save_for_backward(query, key, value, bias, out, *sums)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, *sums = ctx.saved_tensors
        (grad,) = grads
        kind, heads = query.dtype, query.shape[1]
        grad_key = grad_value = None
        grad_queries = []
        with torch.autocast(query.device.type, enabled=False):
            for block, log_sum in zip(ctx.blocks, sums, strict=True):
                start, end, first, last = block
                own = _grouped(query[:, :, start:end], key.shape[1])
                own_grad = _grouped(grad[:, :, start:end], key.shape[1])
                own_out = _grouped(out[:, :, start:end], key.shape[1])
                keys, values = key[:, :, first:last], value[:, :, first:last]
                # As sums over keys and as a product of the result they are equal.
                mean = (widened(own_grad) * widened(own_out)).sum(-1, keepdim=True)
                scores = _biased(own @ keys.transpose(2, 3), bias, block, ctx.scale)
                weights = (scores - log_sum).exp()
                change = widened(own_grad @ values.transpose(2, 3))
                grad_scores = (weights * (change - mean) * ctx.scale).to(kind)
                grad_queries.append(_ungrouped(grad_scores @ keys, heads))
                of_key = widened(grad_scores.transpose(2, 3) @ own)
                of_value = widened(weights.to(kind).transpose(2, 3) @ own_grad)
                grad_key = _added(grad_key, of_key, first, key.shape[2])
                grad_value = _added(grad_value, of_value, first, key.shape[2])
            grad_query = grad_queries[0] if len(grad_queries) == 1 else torch.cat(grad_queries, 2)
        assert grad_key is not None
        assert grad_value is not None
        return grad_query, grad_key.to(kind), grad_value.to(kind), None, None, None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Heads that share keys and values as rows of one matrix."""
    if x.shape[1] == groups:
        return x
    return x.unflatten(1, (groups, -1)).flatten(2, 3)


def _ungrouped(x: Tensor, heads: int) -> Tensor:
    if x.shape[1] == heads:
        return x
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _biased(
    products: Tensor, bias: Tensor | None, block: tuple[int, int, int, int], scale: float
) -> Tensor:
    """Scores of a block in fp32, with -inf where a query does not see a key."""
    start, end, first, last = block
    rows, keys = end - start, last - first
    scores = widened(products) * scale
    apart = scores.unflatten(2, (-1, rows)) if scores.shape[2] != rows else scores
    if bias is None:
        query = torch.arange(start, end, device=scores.device)[:, None]
        seen = torch.arange(first, last, device=scores.device) <= query
        return apart.masked_fill(~seen, float("-inf")).view_as(scores)
    own = bias[:, :, start:end, first:last]
    if apart.dim() == 5:
        own = own[:, :, None]
    assert own.shape[-1] == keys
    return (apart + own).view_as(scores)


def _added(total: Tensor | None, part: Tensor, first: int, length: int) -> Tensor:
    """`total` and `part`, whose rows begin at `first`."""
    if part.shape[2] != length:
        part = torch.nn.functional.pad(part, (0, 0, first, length - first - part.shape[2]))
    return part if total is None else total + part
