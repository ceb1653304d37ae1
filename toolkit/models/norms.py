"""RMSNorm and LayerNorm: statistics in fp32 (or wider), results in the input's type."""

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dimension.

    Zhang & Sennrich 2019; Gemma's has an offset of 1.
    """

    def __init__(self, width: int, eps: float, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same shape and type."""
        wide = _widened(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # The weight is rounded to the compute type first, so that engines which keep a
        # low-precision copy of it (FSDP2) and those which cast on use (autocast) agree.
        weight = self.weight.to(x.dtype)
        if self.weight_offset:
            weight = weight.to(wide.dtype) + self.weight_offset
        return (wide * scale * weight).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float, *, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same shape and type."""
        wide = _widened(x)
        weight = self.weight.to(x.dtype).to(wide.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype).to(wide.dtype)
        return nn.functional.layer_norm(wide, weight.shape, weight, bias, self.eps).to(x.dtype)


def build_norm(config: TransformerConfig, width: int) -> RMSNorm | LayerNorm:
    """The norm that `config` asks for, over `width` channels."""
    if config.norm == "rms_norm":
        return RMSNorm(width, config.norm_eps, weight_offset=config.norm_weight_offset)
    return LayerNorm(width, config.norm_eps, bias=config.bias)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
