"""One matrix product per group of rows, each group with a matrix of its own.

Rows lie sorted by group; `ends[g]` is where group g stops. Which implementation computes the
product is decided in `grouped_backend` alone.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

_ALIGNMENT = 16
"""Bytes that the rows of CUDA's grouped operands must be a multiple of."""


def grouped_backend(x: Tensor, weight: Tensor) -> Literal["grouped_mm", "loop"]:
    """How `grouped_linear` multiplies.

    "grouped_mm": torch's grouped kernel, which the host does not wait for; CUDA, bf16, widths that
    are a multiple of 8. "loop": one product for each group that has rows, any device and type. On
    a CPU torch's own grouped product is such a loop too, and as fast.
    """
    aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in weight.shape[1:])
    fits = x.is_cuda and x.dtype == torch.bfloat16 and aligned
    return "grouped_mm" if fits else "loop"


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[start:end] @ weight[g].T` for every group g.

    Args:
        x: `(rows, in)`, sorted by group.
        weight: `(groups, out, in)`; cast to the type of `x`.
        ends: `(groups,)` int32, ascending; the last one is `rows`.

    Returns:
        `(rows, out)`. The gradient of a group without rows is zero.
    """
    weight = weight.to(x.dtype)
    if grouped_backend(x, weight) == "grouped_mm":
        return grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return _loop(x, weight, ends)


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


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_loop_backward(grad.contiguous(), *ctx.saved_tensors), None


_loop.register_autograd(_backward, setup_context=_keep)


def _occupied(ends: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Groups that have rows, with the places where they start and end."""
    stops = ends.tolist()
    ranges = enumerate(zip([0, *stops], stops, strict=False))
    return [(group, (start, end)) for group, (start, end) in ranges if end > start]
