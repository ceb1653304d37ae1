"""Collectives over a process group that gradients pass through.

Backward of each is the one that its mathematics asks for: a gather's is a reduce-scatter and the
other way round, a sum's is a sum, and rows that were sent away come back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Their names before torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Exchange = Callable[[Tensor], Tensor]


def gathered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """The `x` of all ranks one after another along `dim`; without a gradient."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    dim %= x.dim()
    return out.unflatten(0, (group.size(), -1)).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scattered(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This rank's range along `dim` of the sum of `x` over all ranks; without a gradient."""
    dim %= x.dim()
    parts = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    out = x.new_empty(parts.shape[1:])
    _reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """The `x` of all ranks one after another along `dim`. Every rank may use all of it: its
    gradients add up over ranks."""
    return _Linear.apply(
        x, partial(gathered, group=group, dim=dim), partial(reduce_scattered, group=group, dim=dim)
    )


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's range along `dim` of the sum of `x` over all ranks."""
    return _Linear.apply(
        x, partial(reduce_scattered, group=group, dim=dim), partial(gathered, group=group, dim=dim)
    )


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over all ranks. Every rank uses it: its gradients add up over ranks too."""
    total = partial(_summed, group=group)
    return _Linear.apply(x, total, total)


def all_to_all_rows(
    x: Tensor, group: dist.ProcessGroup, *, sent: list[int], received: list[int]
) -> Tensor:
    """Rows of `x` to other ranks: `sent[r]` of them to rank r, in order; back come `received[r]`
    from rank r, in the order of ranks."""
    there = partial(_exchanged, group=group, sent=sent, received=received)
    back = partial(_exchanged, group=group, sent=received, received=sent)
    return _Linear.apply(x, there, back)


def share_of_gradient(x: Tensor, share: float) -> Tensor:
    """`x` itself, with `share` times its gradient: where several ranks compute the same of it and
    gradients add up over them."""
    return _Linear.apply(x, lambda x: x.view_as(x), lambda grad: grad * share)


class _Linear(torch.autograd.Function):
    """`compute`, a linear function over several ranks, with `adjoint` as its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Exchange, adjoint: Exchange) -> Tensor:
        ctx.adjoint = adjoint
        return compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.adjoint(grad), None, None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _exchanged(x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
