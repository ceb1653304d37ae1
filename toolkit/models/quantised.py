"""Frozen linear layers whose weights are kept in 4 or 8 bits (QLoRA, Dettmers et al. 2023).

`nf4` cuts the flattened weight into blocks of `BLOCK` numbers. A block keeps its largest magnitude
(its scale), and of each number, divided by it, the nearest of 16 levels: quantiles of the normal
distribution, which give every level the same share of normal weights. Scales are kept in 8 bits
too, in groups of `GROUP`. (The paper takes the mean of all scales away and keeps floats of 8 bits;
here a group keeps its least scale and the step to the next code. No sum is part of it, so that
every device and number of threads gives the same codes.)

`int8` keeps a whole number from -127 to 127 for each weight, and a scale for each row.

A forward makes the weight in the compute type, rounded once from fp32, and backward makes it again.
"""

import itertools
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.models.init import canonical_name
from toolkit.models.parameters import BLOCK, GROUP, QuantisedLayers

_CHUNK = 1 << 14
"""Blocks that are coded at once, so that what is needed meanwhile stays small."""
_TINY = torch.finfo(torch.float32).tiny


def _levels() -> list[float]:
    """The 16 levels, ascending: 0, 8 quantiles above and 7 below, divided by the largest (appendix
    E of the paper). The outermost are half of the mean of 1/30 and 1/32 from the end."""
    normal, end = NormalDist(), 1 - (1 / 30 + 1 / 32) / 2
    above = [normal.inv_cdf(end - n * (end - 0.5) / 8) for n in range(8)]
    below = [-normal.inv_cdf(end - n * (end - 0.5) / 7) for n in range(7)]
    return [value / above[0] for value in (*below, 0.0, *reversed(above))]


LEVELS = _levels()
"""Of `nf4`, from -1 to 1."""


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, ...]:
    """What is kept of a weight (out, in): for `int8` codes (out, in) and scales (out), for `nf4`
    pairs of codes, codes of scales, least scales, steps, and the levels, all 1-D.

    The same for the same values, on every device. A number that is not finite makes others of its
    row or group NaN."""
    weight = weight.detach().float()
    if kind == "int8":
        scales = weight.abs().amax(1) / 127
        codes = (weight / scales.clamp(min=_TINY)[:, None]).round().to(torch.int8)
        return codes, scales
    flat = weight.flatten()
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    borders = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(LEVELS)])
    borders = borders.to(weight.device)
    pairs = []
    for some, own in zip(blocks.split(_CHUNK), scales.split(_CHUNK), strict=True):
        share = some / own.clamp(min=_TINY)[:, None]
        codes = torch.bucketize(share, borders, out_int32=True).to(torch.uint8).view(-1, 2)
        pairs.append(codes[:, 0] << 4 | codes[:, 1])
    more = scales[-1:].expand(-scales.numel() % GROUP)
    groups = torch.cat([scales, more]).view(-1, GROUP)
    least = groups.amin(1)
    steps = (groups.amax(1) - least) / 255
    of_scales = ((groups - least[:, None]) / steps.clamp(min=_TINY)[:, None]).round()
    kept = of_scales.to(torch.uint8).flatten()[: scales.numel()].clone()
    # With the levels, which would else be copied to the device in every forward.
    levels = torch.tensor(LEVELS).to(weight.device)
    return torch.cat(pairs), kept, least, steps, levels


def dequantise(
    parts: Sequence[Tensor], kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight (out, in) that `quantise` has kept `parts` of, computed in fp32."""
    if kind == "int8":
        codes, scales = parts
        return (codes * scales[:, None]).to(dtype)
    pairs, of_scales, least, steps, levels = parts
    number = of_scales.numel()
    scales = of_scales * steps.repeat_interleave(GROUP)[:number]
    scales = scales + least.repeat_interleave(GROUP)[:number]
    both = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    blocks = both.index_select(0, pairs.int()).view(-1, BLOCK) * scales[:, None]
    return blocks.flatten()[: shape[0] * shape[1]].view(shape).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T, which keeps for backward what is kept of W, not W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kind: str,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor,
        # One by one: torch.compile counts the names of arguments.
        least: Tensor | None = None,
        steps: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Tensor:
        parts = [p for p in (codes, scales, least, steps, levels) if p is not None]
        ctx.save_for_backward(*parts)
        ctx.kind, ctx.shape = kind, shape
        return x @ dequantise(parts, kind, shape, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        weight = dequantise(parts, ctx.kind, ctx.shape, grads[0].dtype)
        return grads[0] @ weight, None, None, *(None for _ in parts)


class QuantisedLinear(nn.Module):
    """A linear layer that keeps of its frozen weight what `quantise` gives, as buffers. The bias
    stays the parameter that it was."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind, self.shape = kind, (linear.out_features, linear.in_features)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        parts = quantise(linear.weight, kind)
        self._names = [f"part{number}" for number in range(len(parts))]
        for name, part in zip(self._names, parts, strict=True):
            self.register_buffer(name, part, persistent=False)

    @property
    def parts(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    @torch.no_grad()
    def fill_(self, weight: Tensor) -> None:
        """Keep another weight (out, in), of any floating type."""
        for own, part in zip(self.parts, quantise(weight, self.kind), strict=True):
            own.copy_(part)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) that it computes with."""
        return dequantise(self.parts, self.kind, self.shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out = _Product.apply(x, self.kind, self.shape, *self.parts)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def quantise_layers(model: nn.Module, quantised: QuantisedLayers) -> None:
    """Put a `QuantisedLinear` in the place of each of these linear layers, adapters around it or
    not, in place. On the meta device its parts wait for `fill_`."""
    for name in quantised.layers:
        parent, _, last = name.rpartition(".")
        owner: nn.Module = model.get_submodule(parent)
        linear = owner.get_submodule(last)
        if hasattr(linear, "base_layer"):  # an adapter's, around the layer
            owner, last, linear = linear, "base_layer", linear.get_submodule("base_layer")
        assert type(linear) is nn.Linear, f"{name} is a {type(linear).__name__}"
        assert not linear.weight.requires_grad, f"{name} is trained"
        setattr(owner, last, QuantisedLinear(linear, quantised.kind))


def quantised_linears(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Canonical name of the weight -> layer, of all whose weights are quantised."""
    return {
        canonical_name(f"{name}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, QuantisedLinear)
    }
