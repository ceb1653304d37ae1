"""An RMSNorm or LayerNorm over channels that lie on several ranks, whose statistics are of all of
them.

As the norms of a whole model it keeps its input and one number per vector for backward: autograd
would keep two more copies of the input, in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.distributed.collectives import all_reduce
from toolkit.models.norms import LayerNorm, widened


def shared_norm(norm: Any, group: dist.ProcessGroup, width: int) -> Callable[[Tensor], Tensor]:
    """The forward of `norm`, which has some channels of those that the ranks of `group` have
    together: `width` of them, where shared ones count as often as there are copies."""
    offset, is_centred = getattr(norm, "weight_offset", 0.0), isinstance(norm, LayerNorm)

    def mean(sums: Tensor) -> Tensor:
        return all_reduce(sums, group) / width

    def forward(x: Tensor) -> Tensor:
        wide, centre = widened(x), None
        if is_centred:
            centre = mean(wide.sum(-1, keepdim=True))
            wide = wide - centre
            centre = centre.detach()
        kept = x.detach()
        scale = torch.rsqrt(mean(_SquareSum.apply(wide, kept, centre)) + norm.eps)
        weight = widened(norm.weight.to(x.dtype)) + offset
        out = _Scaled.apply(wide, kept, centre, scale, weight)
        if is_centred and norm.bias is not None:
            out = out + widened(norm.bias.to(x.dtype))
        return out.to(x.dtype)

    return forward


def _again(x: Tensor, centre: Tensor | None) -> Tensor:
    return widened(x) if centre is None else widened(x) - centre


class _SquareSum(torch.autograd.Function):
    """Sum of squares of each vector of `wide`, which `x` and `centre` give again in backward."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, x: Tensor, centre: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, centre)
        return wide.square().sum(-1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _again(*ctx.saved_tensors) * (2 * grad), None, None


class _Scaled(torch.autograd.Function):
    """`wide * scale * weight`, with a number of `scale` for each vector and one of `weight` for
    each channel; `wide` as in `_SquareSum`."""

    @staticmethod
    def forward(
        ctx: Any, wide: Tensor, x: Tensor, centre: Tensor | None, scale: Tensor, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, centre, scale, weight)
        return wide * scale * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
        x, centre, scale, weight = ctx.saved_tensors
        wide = _again(x, centre)
        product = grad * wide
        grad_weight = (product * scale).flatten(0, -2).sum(0)
        grad_scale = (product @ weight)[..., None]
        return (grad * weight).mul_(scale), None, None, grad_scale, grad_weight
