"""nGPT: a Transformer on the unit sphere (Loshchilov et al. 2024).

1. Each vector of width d_model in a weight matrix has length one: `unit_dimensions` says which way
   it lies. Who steps the weights makes them so again after each step.
2. A block goes a learned share of the way to what attention, or the feed-forward, points at, and
   back to the sphere: x = unit(x + |alpha| * (unit(f(x)) - x)), with a rate for each channel.
3. Queries and keys are unit vectors of each head times learned scales, after their rotation, and
   scores are multiplied by sqrt(head_dim). The hidden layer of a feed-forward and the logits have
   learned scales of their own. There are no other norms.

All scales but those of the hidden layer, and the rates, are kept divided by sqrt(d_model), so that
they learn as fast as weights do (section 2.5 there). Queries and keys have a scale each, as in
OLMo-core: the paper's one for both does not go with grouped queries.
"""

import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig
from toolkit.models.feed_forward import FeedForward
from toolkit.models.kernels import widest_float
from toolkit.models.norms import widened
from toolkit.models.projections import projected

FIRST_SHARE = 0.05
"""Of the way, at first."""
_EPS = 1e-12
"""Keeps a vector of zeros from dividing by zero."""
_ROUNDING = 2.0**-20
"""Of a squared length, what fp32 may leave between a vector and the sphere."""
_AT_ONCE = 1 << 24
"""Most elements that are there in float64."""


def unit(x: Tensor) -> Tensor:
    """`x` with length one in its last dimension, computed in fp32."""
    wide = widened(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _EPS)).to(x.dtype)


def scaled_units(heads: Tensor, scale: Tensor, factor: float) -> Tensor:
    """`(batch, seq, heads, head_dim)`, each head with length one, times `factor * scale`, which is
    `(heads * head_dim,)`."""
    return unit(heads) * (scale.to(heads.dtype) * factor).view(heads.shape[2:])


class SphereStep(nn.Module):
    """Step 2 of the module's head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.factor = FIRST_SHARE * config.d_model**0.5
        self.alpha = nn.Parameter(torch.empty(config.d_model))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """From `x`, `(..., d_model)`, towards `target` of the same shape."""
        share = (self.alpha.to(x.dtype) * self.factor).abs()
        return unit(torch.lerp(x, unit(target), share))


class NormalizedFeedForward(FeedForward):
    """down(activation(gate_scale * sqrt(d_model) * gate(x)) * (up_scale * up(x)))."""

    def __init__(self, config: TransformerConfig, intermediate_size: int) -> None:
        super().__init__(config, intermediate_size, bias=False)
        self.factor = config.d_model**0.5
        self.gate_scale = nn.Parameter(torch.empty(intermediate_size))
        self.up_scale = nn.Parameter(torch.empty(intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        assert self.gate is not None
        gate, up = projected(x, self.gate, self.up)
        gate = gate * (self.gate_scale.to(gate.dtype) * self.factor)
        return self.down(self.activation(gate) * (up * self.up_scale.to(up.dtype)))


def unit_dimension(name: str) -> int | None:
    """The dimension of a parameter along which its vectors of width d_model lie, which have length
    one; None: it has none."""
    if not name.endswith(".weight"):
        return None
    return 0 if name.endswith(("attention.output.weight", "feed_forward.down.weight")) else 1


def squared_lengths(matrix: Tensor, dim: int) -> Tensor:
    """Of the vectors along `dim`, in float64: rounded to fp32 they show no order of adding."""
    wide = widest_float(matrix.device)
    parts = matrix.split(max(1, _AT_ONCE // max(1, matrix.shape[1])))
    sums = [part.to(wide).square().sum(dim) for part in parts]
    return torch.cat(sums) if dim == 1 else torch.stack(sums).sum(0)


def lengthen_(matrix: Tensor, squares: Tensor, dim: int) -> None:
    """Make vectors of these squared lengths unit vectors. One that is already, to rounding, stays
    as it is to the last bit: a skipped step or a load changes nothing."""
    factor = squares.clamp(min=_EPS**2).rsqrt()
    factor = torch.where((squares - 1.0).abs() <= _ROUNDING, 1.0, factor)
    matrix.mul_(factor.to(matrix.dtype).unsqueeze(dim))
