"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): linear attention that forgets and corrects.

What a layer does with a row:
1. Queries, keys and values are projected, and each of their channels is mixed with those of the
   tokens right before it (`short_convolution`), then SiLU.
2. Each head's decay and write strength come from the token: exp(-exp(A_log) softplus(decay(x) +
   dt_bias)), and sigmoid(write(x)), twice that with negative eigenvalues.
3. The gated delta rule (`delta_rule.py`, or the kernels of flash-linear-attention).
4. Each head's output is normalised, multiplied by SiLU of a gate, and projected back.

Convolution and state begin anew with each document.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu, softplus

from toolkit.models.config import TransformerConfig
from toolkit.models.delta_rule import gated_delta_rule
from toolkit.models.kernels import delta_rule_kernel, fla_function
from toolkit.models.norms import RMSNorm, widened
from toolkit.models.projections import projected


class RowDocuments:
    """Where documents start, for all layers with linear attention in one forward. A plain object,
    as `RotaryTable` is.

    Attributes:
        starts: as `document_starts` tells them of whole rows, `(batch, seq)`.
        offsets: for kernels that want all rows as one: where each document begins and where the
            last one ends, int32; or None.
    """

    __slots__ = ("offsets", "starts")

    def __init__(self, starts: Tensor, *, dtype: torch.dtype) -> None:
        self.starts = starts
        self.offsets: Tensor | None = None
        if delta_rule_kernel(starts.device.type, dtype=dtype) == "fla":
            # The host waits for the number of documents here, once for all layers, as the kernel
            # itself does.
            place = torch.arange(starts.shape[1], device=starts.device)
            begins = (starts == place).flatten().nonzero()[:, 0]
            ends = begins.new_full((1,), starts.numel())
            self.offsets = torch.cat((begins, ends)).int()


class GatedDeltaNet(nn.Module):
    """One layer; takes the place of `Attention` in a block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        net = config.delta_net
        assert net is not None
        self.key_head_dim, self.value_head_dim = net.key_head_dim, net.value_head_dim
        self.strongest = 2.0 if net.allow_negative_eigenvalues else 1.0
        width, heads = config.d_model, net.num_value_heads
        self.query = nn.Linear(width, net.key_width, bias=False)
        self.key = nn.Linear(width, net.key_width, bias=False)
        self.value = nn.Linear(width, net.value_width, bias=False)
        self.gate = nn.Linear(width, net.value_width, bias=False)
        self.decay = nn.Linear(width, heads, bias=False)
        self.write = nn.Linear(width, heads, bias=False)
        self.query_conv = nn.Parameter(torch.empty(net.key_width, net.conv_kernel_size))
        self.key_conv = nn.Parameter(torch.empty(net.key_width, net.conv_kernel_size))
        self.value_conv = nn.Parameter(torch.empty(net.value_width, net.conv_kernel_size))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.output_norm = RMSNorm(net.value_head_dim, net.norm_eps)
        self.output = nn.Linear(net.value_width, width, bias=False)

    def forward(self, x: Tensor, rotary: object = None, mask: RowDocuments | None = None) -> Tensor:
        """`(batch, seq, d_model)` to the same shape. `rotary` is not used: the order of tokens is
        in the state."""
        layers = (self.query, self.key, self.value, self.gate, self.decay, self.write)
        query, key, value, gate, decay, write = projected(x, *layers)
        starts = None if mask is None else mask.starts
        query = self._mixed(query, self.query_conv, self.key_head_dim, starts)
        key = self._mixed(key, self.key_conv, self.key_head_dim, starts)
        value = self._mixed(value, self.value_conv, self.value_head_dim, starts)
        # Weights are rounded to the compute type first, as those of norms are.
        rate = widened(self.A_log.to(decay.dtype)).exp()
        steps = softplus(widened(decay) + widened(self.dt_bias.to(decay.dtype)))
        strength = widened(write).sigmoid() * self.strongest
        out = mixed_rows(query, key, value, -rate * steps, strength, mask)
        gated = self.output_norm(out) * silu(gate.unflatten(-1, (-1, self.value_head_dim)))
        return self.output(gated.flatten(2))

    @staticmethod
    def _mixed(x: Tensor, weight: Tensor, head_dim: int, starts: Tensor | None) -> Tensor:
        """`(batch, seq, channels)` as `(batch, seq, heads, head_dim)`."""
        return silu(short_convolution(x, weight, starts)).unflatten(-1, (-1, head_dim))


def breaks_graphs(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether a compiled block is cut in two at a kernel that torch.compile does not know."""
    kernel = delta_rule_kernel(device.type, dtype=dtype or torch.float32)
    return kernel == "fla" and any(isinstance(m, GatedDeltaNet) for m in model.modules())


def mixed_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write_strength: Tensor,
    documents: RowDocuments | None,
) -> Tensor:
    """`gated_delta_rule`, by the kernel that the device has."""
    if delta_rule_kernel(value.device.type, dtype=value.dtype) == "fla":
        return _by_fla(query, key, value, log_decay, write_strength, documents)
    starts = None if documents is None else documents.starts
    return gated_delta_rule(query, key, value, log_decay, write_strength, starts)


@torch.compiler.disable
def _by_fla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    write_strength: Tensor,
    documents: RowDocuments | None,
) -> Tensor:
    groups = value.shape[2] // key.shape[2]
    if groups > 1:  # not every release shares key heads by itself
        query, key = (x.repeat_interleave(groups, dim=2) for x in (query, key))
    inputs = [query, key, value, log_decay, write_strength]
    offsets = None
    if documents is not None:
        offsets, inputs = documents.offsets, [x.flatten(0, 1)[None] for x in inputs]
    query, key, value, log_decay, write_strength = (x.contiguous() for x in inputs)
    with torch.autocast(value.device.type, enabled=False):
        out, _ = fla_function()(
            query,
            key,
            value,
            g=log_decay,
            beta=write_strength.to(value.dtype),
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=offsets,
        )
    return out if documents is None else out[0].unflatten(0, documents.starts.shape)


def short_convolution(x: Tensor, weight: Tensor, starts: Tensor | None = None) -> Tensor:
    """Each channel's weighted sum over a token and those right before it in its document.

    Args:
        x: `(batch, seq, channels)`; so is the result, in the same type, added up in fp32.
        weight: `(channels, kernel_size)`, the token itself last, as torch's Conv1d has it.
        starts: see `gated_delta_rule`.
    """
    return _ShortConvolution.apply(x, weight.to(x.dtype), starts)


class _ShortConvolution(torch.autograd.Function):
    """A third less time than torch's depthwise convolution on a CPU, with documents too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, starts: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, starts)
        wide, taps = widened(x), widened(weight)
        out = wide * taps[:, -1]
        for back, seen in _earlier(x, taps, starts):
            product = wide[:, :-back] * taps[:, -1 - back]
            out[:, back:] += product if seen is None else product * seen
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, starts = ctx.saved_tensors
        wide, taps, grad = widened(x), widened(weight), widened(grad)
        grad_x, grad_taps = grad * taps[:, -1], torch.zeros_like(taps)
        grad_taps[:, -1] = (grad * wide).sum((0, 1))
        for back, seen in _earlier(x, taps, starts):
            part = grad[:, back:] if seen is None else grad[:, back:] * seen
            grad_x[:, :-back].addcmul_(part, taps[:, -1 - back])
            grad_taps[:, -1 - back] = (part * wide[:, :-back]).sum((0, 1))
        return grad_x.to(x.dtype), grad_taps.to(weight.dtype), None


def _earlier(x: Tensor, taps: Tensor, starts: Tensor | None) -> Iterator[tuple[int, Tensor | None]]:
    """Each distance back in time, and where a token has one so far before it in its document, from
    the first that has one in its row: 1 or 0, `(batch, seq - back, 1)`; None: all do."""
    place = torch.arange(x.shape[1], device=x.device)
    for back in range(1, min(taps.shape[1], x.shape[1])):
        if starts is None:
            yield back, None
        else:
            yield back, (place - back >= starts)[:, back:, None].to(taps.dtype)
