"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464), in chunks.

Each head keeps a matrix S (key_head_dim x value_head_dim), zero where a document starts. With the
decay a = exp(log_decay) and the write strength b, a token with query q, key k and value v does

    S = a S + k (b (v - a S^T k))^T        forget, then correct what S answers to k
    o = S^T q

A chunk of C tokens does so in a few matrix products. Let D be the decay between two of its tokens
(zero for a later one, and between documents), g that from the chunk's beginning to a token (zero in
documents that begin inside of the chunk), and let the corrections b (v - a S^T k) be rows of V:

    V = U - W S    with  (I + tril(b K K^T * D, -1)) [U, W] = b [V_in, g K]     (the WY form)
    O = g Q S + (Q K^T * D) V
    S = g_last S + (D_last K)^T V

All that is not linear in S is computed for all chunks at once; `_scan` goes from chunk to chunk.
Decays are sums of the logarithms of a document's own tokens alone, and what lies between documents
is multiplied by exact zeros: no document changes a bit of another one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.models.kernels import widest_float
from toolkit.models.norms import widened

CHUNK_SIZE = 64
"""Tokens of a chunk."""

_EPS = 1e-6
"""Added to the squared length of queries and keys, as the layers in use do."""


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write_strength: Tensor,
    starts: Tensor | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The outputs o, `(batch, seq, value_heads, value_head_dim)`, in the type of `value`.

    Queries and keys are scaled to length one, queries also by 1 / sqrt(key_head_dim). Computed in
    fp32, or in float64 for float64 inputs, autocast or not.

    Args:
        query, key: `(batch, seq, key_heads, key_head_dim)`; each key head serves as many
            consecutive value heads.
        value: `(batch, seq, value_heads, value_head_dim)`.
        log_decay: `(batch, seq, value_heads)`, at most 0.
        write_strength: the same shape, 0 to 1, or to 2 for negative eigenvalues.
        starts: as `masks.document_starts` tells them; None: each row is one document.
    """
    with torch.autocast(value.device.type, enabled=False):
        groups = value.shape[2] // key.shape[2]
        query = _unit(widened(query)) * query.shape[-1] ** -0.5
        key = _unit(widened(key))
        chunk_size = min(chunk_size, value.shape[1])
        # `(chunks, batch, key_heads, 1 or value heads of each, chunk_size, ...)`.
        q, k, v, strengths = (
            _in_chunks(x, chunk_size, n)
            for x, n in (
                (query, 1),
                (key, 1),
                (widened(value), groups),
                (widened(write_strength)[..., None], groups),
            )
        )
        chunks = _Chunks(widened(log_decay), starts, chunk_size, key.shape[2])
        pairs = chunks.pairs
        system = k @ k.mT * (strengths * pairs)
        sides = torch.cat((v * strengths, k * (strengths * chunks.carried)), dim=-1)
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        added, erased = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
        states, corrections = _scan(
            *(x.flatten(1, 3) for x in (added, erased, k * chunks.remaining, chunks.kept))
        )
        shape = chunks.kept.shape[:4]
        states, corrections = states.unflatten(1, shape[1:]), corrections.unflatten(1, shape[1:])
        out = (q * chunks.carried) @ states + (q @ k.mT * pairs) @ corrections
        # `(batch, chunks, chunk_size, key_heads, groups, ...)`
        rows = out.permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        return rows[:, : value.shape[1]].to(value.dtype)


class _Chunks:
    """Decays inside of chunks, each `(chunks, batch, key_heads, groups, chunk_size, ...)`.

    Attributes:
        pairs: from the token of a column to that of a row; 0 to a token before, or of another
            document.
        carried: from before the chunk to a token.
        remaining: from a token to the last one.
        kept: from before the chunk to its end.
    """

    def __init__(self, log_decay: Tensor, starts: Tensor | None, size: int, key_heads: int) -> None:
        """`log_decay`: `(batch, seq, value_heads)`."""
        missing = -log_decay.shape[1] % size
        logs = pad(log_decay, (0, 0, 0, missing)).unflatten(1, (-1, size)).transpose(0, 1)
        place = torch.arange(size, device=logs.device)
        sees = place <= place[:, None]
        own = None
        if starts is not None:
            # Where a token's document starts in the chunk. Padding is a document of its own.
            own = pad(starts, (0, missing), value=log_decay.shape[1]).unflatten(1, (-1, size))
            own = own.transpose(0, 1) - size * torch.arange(len(logs), device=logs.device).view(
                -1, 1, 1
            )
            sees = sees & (own[..., None] == own[..., None, :])
        # A document's own numbers, added up; as a product, for which inductor finds a kernel.
        wide = widest_float(logs.device)
        total = (sees.to(wide) @ logs.to(wide)).to(logs.dtype)
        total = total.unflatten(3, (key_heads, -1)).permute(0, 1, 3, 4, 2)[..., None]
        self.pairs = _exp(total - total.mT, sees if own is None else sees[:, :, None, None])
        self.carried = total.exp()
        if own is not None:
            self.carried = torch.where(own[:, :, None, None, :, None] < 0, self.carried, 0.0)
        self.remaining = self.pairs[..., -1:, :].mT
        self.kept = self.carried[..., -1:, :]


def _exp(x: Tensor, where: Tensor) -> Tensor:
    """exp(x), and 0 elsewhere, whatever `x` is there."""
    return x.masked_fill(~where, float("-inf")).exp()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)


def _in_chunks(x: Tensor, size: int, groups: int) -> Tensor:
    """`(batch, seq, heads, width)` as `(chunks, batch, heads / groups, groups, size, width)`."""
    x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    x = x.unflatten(2, (-1, groups)).unflatten(1, (-1, size))
    return x.permute(1, 0, 3, 4, 2, 5).contiguous()


# An operator of its own, so that torch.compile does not unroll the loop over chunks.
@torch.library.custom_op("toolkit::delta_scan", mutates_args=())
def _scan(added: Tensor, erased: Tensor, keys: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of each chunk the state before it, `(chunks, heads, key_head_dim, value_head_dim)`, and its
    corrections, like `added`.

    With S = 0 before the first: corrections = added - erased S, S = kept S + keys^T corrections.

    Args:
        added: `(chunks, heads, chunk_size, value_head_dim)`.
        erased, keys: `(chunks, heads, chunk_size, key_head_dim)`.
        kept: `(chunks, heads, 1, 1)`.
    """
    states = added.new_zeros(added.shape[0], added.shape[1], keys.shape[-1], added.shape[-1])
    corrections = torch.empty_like(added, memory_format=torch.contiguous_format)
    for n in range(added.shape[0]):
        torch.baddbmm(added[n], erased[n], states[n], alpha=-1.0, out=corrections[n])
        if n + 1 < added.shape[0]:
            torch.mul(states[n], kept[n], out=states[n + 1])
            states[n + 1].baddbmm_(keys[n].mT, corrections[n])
    return states, corrections


@torch.library.custom_op("toolkit::delta_scan_backward", mutates_args=())
def _scan_backward(
    grad_states: Tensor,
    grad_corrections: Tensor,
    states: Tensor,
    corrections: Tensor,
    erased: Tensor,
    keys: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_added = grad_corrections.clone(memory_format=torch.contiguous_format)
    after = torch.zeros_like(states)  # gradients of the states behind chunks
    for n in reversed(range(states.shape[0])):
        if n + 1 < states.shape[0]:
            torch.mul(after[n + 1], kept[n + 1], out=after[n])
            after[n].baddbmm_(erased[n + 1].mT, grad_added[n + 1], alpha=-1.0)
            after[n] += grad_states[n + 1]
            grad_added[n].baddbmm_(keys[n], after[n])
    grad_erased = -(grad_added @ states.mT)
    grad_keys = corrections @ after.mT
    grad_kept = (states * after).sum((2, 3), keepdim=True)
    return grad_added, grad_erased, grad_keys, grad_kept


@_scan.register_fake
def _(added: Tensor, erased: Tensor, keys: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    states = added.new_empty(added.shape[0], added.shape[1], keys.shape[-1], added.shape[-1])
    return states, torch.empty_like(added, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(
    grad_states: Tensor,
    grad_corrections: Tensor,
    states: Tensor,
    corrections: Tensor,
    erased: Tensor,
    keys: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (corrections, keys, keys, kept)
    added, erased, keys, kept = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in like
    )
    return added, erased, keys, kept


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output, *inputs[1:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _scan_backward(*(grad.contiguous() for grad in grads), *ctx.saved_tensors)


_scan.register_autograd(_backward, setup_context=_keep)
