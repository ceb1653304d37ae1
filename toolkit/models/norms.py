"""RMSNorm and LayerNorm: statistics in fp32 (or wider), results in the input's type."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from toolkit.models.config import TransformerConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dimension (Zhang &
    Sennrich 2019; Gemma's has an offset of 1)."""

    def __init__(self, width: int, eps: float, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same shape and type."""
        # The weight is rounded to the compute type first, so that engines which keep a
        # low-precision copy of it (FSDP2) and those which cast on use (autocast) agree.
        weight = self.weight.to(x.dtype)
        if fuses_norms(x.device) and not self.weight_offset and not torch.compiler.is_compiling():
            with torch.autocast(x.device.type, enabled=False):
                return functional.rms_norm(x, weight.shape, weight, self.eps)
        if self.weight_offset:
            weight = widened(weight) + self.weight_offset
        if torch.compiler.is_compiling():  # fuses the plain formula
            wide = widened(x)
            return (wide * _rms_scale(wide, self.eps) * weight).to(x.dtype)
        return _RMSNormFunction.apply(x, weight, self.eps)


class _RMSNormFunction(torch.autograd.Function):
    """The same numbers forward; backward in two thirds of the time and half the memory of what
    autograd makes of the formula, as it keeps the input and one number per vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        scale = _rms_scale(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = widened(grad)
        normed = widened(x) * scale
        product = (grad * normed).flatten(0, -2)
        # y_i = n_i w_i with n = s x, and ds/dx_j = -s^3 x_j / width:
        # dL/dx = s (g w - n mean(g w n))
        mean = (product @ widened(weight)).view(scale.shape) / x.shape[-1]
        grad_x = (grad * weight).addcmul_(normed, mean, value=-1.0).mul_(scale)
        return grad_x.to(x.dtype), product.sum(0).to(weight.dtype), None


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, *, bias: bool, has_weight: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if has_weight else None
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same shape and type."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if fuses_norms(x.device) and not torch.compiler.is_compiling():
            with torch.autocast(x.device.type, enabled=False):
                return functional.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        wide = widened(x)
        weight = None if weight is None else weight.to(wide.dtype)
        bias = None if bias is None else bias.to(wide.dtype)
        return functional.layer_norm(wide, x.shape[-1:], weight, bias, self.eps).to(x.dtype)


def fuses_norms(device: torch.device) -> bool:
    """Whether torch has one kernel for a norm and one for its backward, with statistics in fp32 and
    the result rounded once, whatever the type of the input: on CUDA. On a CPU its RMSNorm is many,
    and its LayerNorm of bf16 rounds more."""
    return device.type == "cuda"


def build_norm(config: TransformerConfig, width: int) -> RMSNorm | LayerNorm:
    """The norm that `config` asks for, over `width` channels."""
    if config.norm == "rms_norm":
        return RMSNorm(width, config.norm_eps, weight_offset=config.norm_weight_offset)
    has_weight = config.norm_weights
    return LayerNorm(width, config.norm_eps, bias=config.bias and has_weight, has_weight=has_weight)


def _rms_scale(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def widened(x: Tensor) -> Tensor:
    """`x` in fp32, or wider if it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
