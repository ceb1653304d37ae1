"""One matrix product per group of rows, each group with a matrix of its own.

Rows lie sorted by group; `ends[g]` is where group g stops.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from toolkit.models import kernels
from toolkit.models.kernels import Hardware, grouped_kernel, hardware_of


def grouped_backend(x: Tensor, weight: Tensor) -> Literal["grouped_mm", "loop"]:
    return grouped_kernel(_hardware(x), dtype=x.dtype, widths=tuple(weight.shape[1:]))


def ends_for(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`ends` where `grouped_linear` wants it, for several products over the same groups: a loop on
    a GPU waits for the sizes of groups once, and not in each product and each gradient."""
    return ends.cpu() if grouped_backend(x, weight) == "loop" else ends


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[start:end] @ weight[g].T` for every group g: `(rows, out)`.

    `x` is `(rows, in)`, sorted by group; `weight` is `(groups, out, in)`, cast to the type of `x`,
    with the gradient zero for a group without rows; `ends`, from `ends_for`, is `(groups,)` int32.
    """
    weight = weight.to(x.dtype)
    if grouped_backend(x, weight) == "grouped_mm":
        if kernels.leaves_empty_groups_undefined(_hardware(x)):
            weight = _ZeroWithoutRows.apply(weight, ends)
        return grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return _loop(x, weight, ends)


def _hardware(x: Tensor) -> Hardware:
    return hardware_of(x.device.type, x.device.index)


class _ZeroWithoutRows(torch.autograd.Function):
    """The weights themselves; their gradient is zero for groups without rows, whatever it was."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ends,) = ctx.saved_tensors
        is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return grad.masked_fill(is_empty[:, None, None], 0.0), None


# An operator of its own, so that torch.compile neither breaks the graph at the numbers of rows,
# which only the host knows, nor compiles the loop anew for each of them.
@torch.library.custom_op("toolkit::grouped_linear", mutates_args=())
def _loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for group, (start, end) in _occupied(ends):
        torch.mm(x[start:end], weight[group].t(), out=out[start:end])
    return out


@torch.library.custom_op("toolkit::grouped_linear_backward", mutates_args=())
def _loop_backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    occupied = _occupied(ends)
    for group in set(range(weight.shape[0])) - {group for group, _ in occupied}:
        grad_weight[group].zero_()
    for group, (start, end) in occupied:
        torch.mm(grad[start:end], weight[group], out=grad_x[start:end])
        torch.mm(grad[start:end].t(), x[start:end], out=grad_weight[group])
    return grad_x, grad_weight


@_loop.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_loop_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_loop_backward(grad.contiguous(), *ctx.saved_tensors), None


_loop.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _occupied(ends: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Groups that have rows, with the places where they start and end."""
    stops = ends.tolist()
    ranges = enumerate(zip([0, *stops], stops, strict=False))
    return [(group, (start, end)) for group, (start, end) in ranges if end > start]
