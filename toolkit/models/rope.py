"""Rotary positions (Su et al. 2021) in the rotate-half layout of `transformers`' Llama."""

from functools import lru_cache

import torch
from torch import Tensor


class RotaryTable:
    """cos and sin of every angle in fp32, each `(seq, head_dim / 2)` or `(batch, seq, ...)`.

    A plain object and not a tuple of tensors: engines that cast floating-point arguments of a
    module to the compute type (FSDP2) would round the angles' cosines to bf16. Nothing here is a
    buffer, so there is nothing to lose when a model is built on the meta device.
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
    sequence_length: int, head_dim: int, theta: float, device: torch.device
) -> RotaryTable:
    """Angles position * theta^(-2i / head_dim) for i < head_dim / 2, kept for reuse."""
    # Outside inference mode, or a table first made in evaluation could not be used in training.
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        channel = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
        frequency = 1.0 / theta ** (channel / head_dim)
        position = torch.arange(sequence_length, device=device, dtype=torch.float32)
        angle = torch.outer(position, frequency)
        return RotaryTable(angle.cos(), angle.sin())


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate `(batch, seq, heads, head_dim)`: channel i is paired with i + head_dim / 2."""
    cos, sin = table.cos[..., None, :], table.sin[..., None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
