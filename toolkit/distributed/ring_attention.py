"""Attention whose keys and values travel around a ring of ranks (Liu et al. 2023).

1. A rank begins with its own keys and values. While its queries attend to those that are here, they
   travel on to the next rank, and those of the rank before come in.
2. Each time queries see a part of their keys, the kernel gives the result over that part and the
   logsumexp of its scores. Both are merged: out = sum of exp(lse_part - lse) * out_part, where
   exp(lse) = sum of exp(lse_part).
3. Backward goes around once more. With the logsumexp of all keys, a kernel's backward over a part
   is that part's share of the gradients. The share of the keys travels along with them, one step
   behind, and after the last step goes home.

No rank holds the keys of more than two others. What no query sees is skipped: pairs of stretches,
and the steps after the last that anybody needs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from toolkit.distributed.shared_rows import SharedRows
from toolkit.models.attention import compiled_flex_attention
from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import MaskedBackend, attention_backend
from toolkit.models.layer_inputs import MaskMaker
from toolkit.models.masks import block_mask, first_keys, score_bias, take
from toolkit.models.norms import widened


class Part(NamedTuple):
    """Queries and keys of one call of a kernel, by their indices on the ranks that have them."""

    queries: slice
    keys: slice
    is_causal: bool = False
    """Both are the same stretch, and each query sees all that is before it."""
    bias: Tensor | None = None
    """0 where a query sees a key, -inf elsewhere; None: it sees all of them, or see `is_causal`."""
    is_blind: Tensor | None = None
    """Queries, `(batch, 1, queries)`, that see no key at all."""
    blocks: BlockMask | None = None
    """All of it for flex attention."""


class RingMask:
    """Which keys each query sees, step by step, for all layers of a kind in one forward."""

    __slots__ = ("steps",)

    def __init__(self, steps: list[list[Part]]) -> None:
        self.steps = steps
        """What of the keys that came `n` steps is seen, n = 0 and on. As many on each rank."""


def ring(rows: SharedRows) -> tuple[Callable[..., Tensor], MaskMaker]:
    """What puts ring attention into a model: `attend` of attention, `masks` of the model."""

    @torch.compiler.disable(reason="messages from rank to rank have no graph")
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: RingMask,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        assert soft_cap is sinks is None, "gradients of parts know neither"
        return _Ring.apply(query, key, value, mask, rows, scale)

    def masks(
        config: TransformerConfig,
        x: Tensor,
        starts: Tensor | None,
        length: int,
        backend: MaskedBackend | None = None,
    ) -> Callable[[int | None], RingMask]:
        length *= rows.ranks
        backend = backend or attention_backend(x.device, x.dtype, config.attention_head_dim)
        make = _blocks if backend == "flex" else _stretches

        @cache
        def mask(window: int | None) -> RingMask:
            return RingMask(
                [
                    make(rows, step, starts, length, window, x)
                    for step in range(_last_step(rows, length, window) + 1)
                ]
            )

        return lambda window: mask(None if window is None or window >= length else window)

    return attend, masks


def _sees(queries: range, keys: range, window: int | None) -> bool:
    """Whether any query of a row of one document sees any of the keys."""
    first = 0 if window is None else queries.start - window + 1
    return keys.start < queries.stop and keys.stop > first


def _last_step(rows: SharedRows, length: int, window: int | None) -> int:
    """After which no rank sees anything of the keys that come."""
    places, ranks = rows.places(length), range(rows.ranks)
    return max(
        step
        for step in ranks
        for rank in ranks
        for keys in places[rank - step]
        if any(_sees(queries, keys, window) for queries in places[rank])
    )


def _blocks(
    rows: SharedRows, step: int, starts: Tensor | None, length: int, window: int | None, x: Tensor
) -> list[Part]:
    places = rows.places(length)
    queries, keys = places[rows.rank], places[rows.rank - step]
    if not any(_sees(some, others, window) for some in queries for others in keys):
        return []
    every = torch.arange(length, device=x.device)
    starts = torch.zeros_like(every)[None] if starts is None else starts
    first = rows.own(first_keys(starts, window))
    blocks = block_mask(first, take(every, queries, 0), take(every, keys, 0))
    return [Part(slice(None), slice(None), blocks=blocks)]


def _stretches(
    rows: SharedRows, step: int, starts: Tensor | None, length: int, window: int | None, x: Tensor
) -> list[Part]:
    """Pairs of stretches, the same ones first: there every query sees itself in step 0, so that
    none has a logsumexp of -inf from then on."""
    places = rows.places(length)
    parts: list[Part] = []
    for queries, own in _with_indices(places[rows.rank]):
        for keys, others in _with_indices(places[rows.rank - step]):
            if not _sees(queries, keys, window):
                continue
            is_inside = window is None or keys.start >= queries.stop - window
            if starts is None and is_inside and (queries == keys or keys.stop <= queries.start):
                parts.append(Part(own, others, is_causal=queries == keys))
                continue
            every = torch.arange(length, device=x.device)
            begins = torch.zeros_like(every)[None] if starts is None else starts
            first = first_keys(begins, window)[:, queries.start : queries.stop]
            place = every[queries.start : queries.stop], every[keys.start : keys.stop]
            bias = score_bias(first, x.dtype, *place)
            parts.append(Part(own, others, bias=bias, is_blind=bias.isneginf().all(-1)))
    return sorted(parts, key=lambda part: part.queries != part.keys)


def _with_indices(places: tuple[range, ...]) -> list[tuple[range, slice]]:
    ends = [0]
    for stretch in places:
        ends.append(ends[-1] + len(stretch))
    return [(s, slice(*ends[n : n + 2])) for n, s in enumerate(places)]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: RingMask,
        rows: SharedRows,
        scale: float | None,
    ) -> Tensor:
        out = torch.zeros_like(widened(query))
        lse = out.new_full(query.shape[:3], float("-inf"))
        here = torch.stack((key, value))
        for step, parts in enumerate(mask.steps):
            coming = _Sent(here, rows, 1) if step + 1 < len(mask.steps) else None
            for part in parts:
                at, (keys, values) = part.queries, here[:, :, :, part.keys]
                part_out, part_lse = _attended(query[:, :, at], keys, values, part, scale)
                old, so_far = lse[:, :, at], out[:, :, at]
                new = torch.logaddexp(old, part_lse)
                so_far.mul_((old - new).exp()[..., None])
                so_far.addcmul_(widened(part_out), (part_lse - new).exp()[..., None])
                old.copy_(new)
            if coming is not None:
                here = coming.received()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mask, ctx.rows, ctx.scale = mask, rows, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        mask, rows, scale = ctx.mask, ctx.rows, ctx.scale
        grad_query = torch.zeros_like(out, dtype=lse.dtype)
        here, gone = torch.stack((key, value)), None
        grads = torch.zeros_like(here, dtype=lse.dtype)
        for step, parts in enumerate(mask.steps):
            coming = _Sent(here, rows, 1) if step + 1 < len(mask.steps) else None
            own = torch.zeros_like(here, dtype=lse.dtype)
            for part in parts:
                at, (keys, values) = part.queries, here[:, :, :, part.keys]
                inputs = query[:, :, at], keys, values
                results = grad[:, :, at], out[:, :, at], lse[:, :, at]
                part_query, part_key, part_value = _gradients(inputs, results, part, scale)
                grad_query[:, :, at] += part_query
                own[0, :, :, part.keys] += part_key
                own[1, :, :, part.keys] += part_value
            grads = own if gone is None else gone.received().add_(own)
            if coming is not None:
                gone = _Sent(grads, rows, 1)
                here = coming.received()
        if len(mask.steps) > 1:
            grads = _Sent(grads, rows, 1 - len(mask.steps)).received()
        grad_key, grad_value = grads.to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None


class _Sent:
    """A tensor on its way to the rank `distance` places on; from as far behind comes another."""

    def __init__(self, tensor: Tensor, rows: SharedRows, distance: int) -> None:
        self._sent = tensor.contiguous()
        self._received = torch.empty_like(self._sent)
        to, source = ((rows.rank + d) % rows.ranks for d in (distance, -distance))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, group=rows.group, group_peer=to),
                dist.P2POp(dist.irecv, self._received, group=rows.group, group_peer=source),
            ]
        )

    def received(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def _takes_flash(x: Tensor, part: Part) -> bool:
    return x.device.type == "cpu" and part.blocks is None


def _attended(
    query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of `part`, and the logsumexp of its scores, -inf where a query sees
    none. On a CPU by torch's flash attention, on CUDA by flex attention, or written out where that
    does not run (`attention_kernel`)."""
    if not _takes_flash(query, part):
        return _differentiable(query, key, value, part, scale)
    key, value = _repeated(query, key, value)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, part.is_causal, attn_mask=part.bias, scale=scale
    )
    return out, lse if part.is_blind is None else lse.masked_fill(part.is_blind, float("-inf"))


def _gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    part: Part,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Of `inputs` (queries, keys, values) the share of `part`. `results` are of all keys together:
    the gradient of what came out, that itself, and the logsumexp."""
    grad, out, lse = results
    if _takes_flash(grad, part):
        query, key, value = inputs
        heads = key.shape[1]
        key, value = _repeated(query, key, value)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, part.is_causal, attn_mask=part.bias, scale=scale
        )
        grad_query, *others = grads
        grad_key, grad_value = (x.unflatten(1, (heads, -1)).sum(2) for x in others)
        return grad_query, grad_key, grad_value
    # The kernels' own backward takes the logsumexp of their own keys. So the part is computed again
    # and given the gradients that it has in the merged result:
    # d out = w d out_part + w (out_part - out) d lse_part, where w = exp(lse_part - lse).
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        part_out, part_lse = _differentiable(query, key, value, part, scale)
    weight = (part_lse.detach() - lse).exp()[..., None]
    grad_out = widened(grad) * weight
    grad_lse = (grad_out * (widened(part_out.detach()) - widened(out))).sum(-1)
    given = [grad_out.to(part_out.dtype), grad_lse.to(part_lse.dtype)]
    return torch.autograd.grad([part_out, part_lse], [query, key, value], given)


def _differentiable(
    query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float | None
) -> tuple[Tensor, Tensor]:
    if part.blocks is not None:
        flex = flex_attention if query.device.type == "cpu" else compiled_flex_attention()
        out, aux = flex(
            query,
            key,
            value,
            block_mask=part.blocks,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        return out, aux.lse
    key, value = _repeated(query, key, value)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = widened(query @ key.mT) * scale
    if part.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    elif part.bias is not None:
        scores = scores + part.bias
    if part.is_blind is None:
        return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)
    # Of nothing there is no gradient but NaN; what comes of such queries has a weight of zero.
    scores = scores.masked_fill(part.is_blind[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(part.is_blind, float("-inf"))
    return scores.softmax(-1).to(value.dtype) @ value, lse


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Keys and values, as many as there are queries."""
    groups = query.shape[1] // key.shape[1]
    return [x if groups == 1 else x.repeat_interleave(groups, dim=1) for x in (key, value)]
