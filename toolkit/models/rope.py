"""Rotary positions (Su et al. 2021) in the rotate-half layout of `transformers`' Llama."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.models.rope_scaling import (
    LinearRopeConfig,
    Llama3RopeConfig,
    RopeScalingConfig,
    YarnRopeConfig,
)


class RotaryTable:
    """cos and sin of every angle in fp32, each `(seq, rotary_dim / 2)` or `(batch, seq, ...)`.

    A plain object and not a tuple of tensors: FSDP2 would round those to the compute type, as it
    does all arguments of a module.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def at(self, positions: Tensor) -> "RotaryTable":
        """The angles of `positions`, `(batch, seq)` int64."""
        return RotaryTable(self.cos[positions], self.sin[positions])


@lru_cache(maxsize=8)
def rotary_table(
    sequence_length: int,
    rotary_dim: int,
    theta: float,
    device: torch.device,
    scaling: RopeScalingConfig | None = None,
) -> RotaryTable:
    """Angles position * theta^(-2i / rotary_dim) for i < rotary_dim / 2, kept for reuse. `scaling`
    changes the frequencies and, for YaRN, multiplies cosines and sines."""
    # Outside inference mode, or a table first made in evaluation could not be used in training.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        channel = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
        frequency, factor = _scaled(1.0 / theta ** (channel / rotary_dim), theta, scaling)
        position = torch.arange(sequence_length, device=device, dtype=torch.float32)
        angle = torch.outer(position, frequency)
        return RotaryTable(angle.cos() * factor, angle.sin() * factor)


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate the first channels of `(batch, seq, heads, head_dim)`, as many as the table is for: of
    these rotary_dim channels, i is paired with i + rotary_dim / 2."""
    rotary_dim = 2 * table.cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        rotated = rotate(x[..., :rotary_dim], table)
        return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
    cos, sin = table.cos[..., None, :], table.sin[..., None, :]
    if rounds_in_kernels(x.device) and not torch.compiler.is_compiling():
        return _Rotate.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rounds_in_kernels(device: torch.device) -> bool:
    """Whether a kernel that is given fp32 and bf16 computes in fp32 and writes bf16 at full speed:
    on CUDA. A CPU converts what it reads and writes in passes of their own."""
    return device.type == "cuda"


class _Rotate(torch.autograd.Function):
    """The same, rounded once, in four kernels and four backward: that turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = out.chunk(2, dim=-1)
    torch.addcmul(first * cos, second, sin, value=-direction, out=left)
    torch.addcmul(second * cos, first, sin, value=direction, out=right)
    return out


def _scaled(
    frequency: Tensor, theta: float, scaling: RopeScalingConfig | None
) -> tuple[Tensor, float]:
    """Frequencies `(rotary_dim / 2,)` in radians per token, and the factor of cosines and sines."""
    match scaling:
        case LinearRopeConfig():
            return frequency / scaling.factor, 1.0
        case Llama3RopeConfig():
            # Interpolated by how often a frequency turns in the original length.
            turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - kept) * frequency / scaling.factor + kept * frequency, 1.0
        case YarnRopeConfig():
            return _yarn(frequency, theta, scaling), _yarn_attention_factor(scaling)
    return frequency, 1.0


def _yarn(frequency: Tensor, theta: float, scaling: YarnRopeConfig) -> Tensor:
    """Interpolated by channel, between those that turn beta_fast and beta_slow times."""
    rotary_dim = 2 * frequency.numel()

    def channel_turning(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_turning(scaling.beta_fast), channel_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    channel = torch.arange(frequency.numel(), device=frequency.device, dtype=torch.float32)
    # The least width keeps a transition inside one channel from dividing by zero.
    divided = ((channel - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequency / scaling.factor * divided + frequency * (1 - divided)


def _yarn_attention_factor(scaling: YarnRopeConfig) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def magnitude(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(max(scaling.factor, 1.0)) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude(1.0)
