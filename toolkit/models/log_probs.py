"""Log-probabilities of single tokens from the output head, in chunks of rows.

The loss of a language model is one sum, whose gradient can wait for backward
(`toolkit.models.loss`). A preference loss weighs each document by itself, so its gradient is known
in backward alone: each chunk's logits are computed again there. The largest tensor is
`chunk_size * padded_vocab_size` in both directions, and the head costs four matrix products a
token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import (
    IGNORE_INDEX,
    LinearCrossEntropy,
    VocabularyShard,
    equal_chunks,
)
from toolkit.models.norms import widened
from toolkit.models.router import RouterSums, router_loss
from toolkit.models.shapes import loss_chunk_rows
from toolkit.models.weight_gradient import add_product


class TokenValues(NamedTuple):
    """One number for each position, in the place of the sums of a loss."""

    values: Tensor
    """`(batch, seq)`, fp32 (float64 for a float64 model), differentiable."""
    router_loss: Tensor | None = None
    """Of a mixture of experts: the losses of its routers, summed over targets; 0-d."""
    router: RouterSums | None = None
    """The same sums apart, detached."""

    def with_router(self, sums: RouterSums, moe: MoEConfig) -> "TokenValues":
        return self._replace(router_loss=router_loss(sums, moe), router=sums.detached())


class TokenLogProbs(nn.Module):
    """Takes the place of a head's loss: the log-probability of each label, 0 where there is none.

    To be put in before a model is cut or compiled: `head.loss = TokenLogProbs(head.loss)`.
    """

    def __init__(self, own: LinearCrossEntropy) -> None:
        super().__init__()
        self.vocab_size, self.soft_cap = own.vocab_size, own.soft_cap
        self.padded_vocab_size, self.chunk_size = own.padded_vocab_size, own.chunk_size
        self.kernel: Callable[..., Any] = log_prob_chunk
        self.shard: VocabularyShard | None = None

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss_multiplier: float = 0.0
    ) -> TokenValues:
        """`hidden` is `(batch, seq, d_model)`, `labels` `(batch, seq)`."""
        rows = loss_chunk_rows(self.chunk_size, self.padded_vocab_size, hidden.device.type)
        options = {"vocab_size": self.vocab_size, "soft_cap": self.soft_cap, "shard": self.shard}
        if self.shard is not None:
            rows *= self.shard.ranks
        function = _ChunkedLogProbs.apply
        return TokenValues(function(hidden, weight, labels, options, rows, self.kernel))


def log_prob_chunk(
    logits: Tensor,
    labels: Tensor,
    grad: Tensor | None,
    *,
    vocab_size: int,
    soft_cap: float | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Log-probabilities `(rows,)` of the labels under `logits`, `(rows, padded_vocab_size)` or the
    columns of a shard; with `grad`, their gradient `(rows,)`, that of `logits` in their type.

    d log p(y) / d logits = onehot(y) - softmax.
    """
    is_target = (labels != IGNORE_INDEX)[:, None]
    wide = widened(logits)
    first = 0 if shard is None else shard.first
    tangent = None
    if soft_cap is not None:
        tangent = (wide / soft_cap).tanh()
        wide = tangent * soft_cap
    if vocab_size < first + wide.shape[1]:
        column = torch.arange(wide.shape[1], device=wide.device, dtype=torch.int32)
        wide = wide.masked_fill(column >= vocab_size - first, float("-inf"))
    local = labels[:, None] - first
    is_here = is_target & (local >= 0) & (local < wide.shape[1])
    ids = local.where(is_here, 0)
    if shard is None:
        log_share = torch.log_softmax(wide, -1)
        own = log_share.gather(-1, ids)
    else:
        # A shard may have nothing but padding.
        peak = wide.amax(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).min)
        total = (wide - peak).exp().sum(-1, keepdim=True)
        target = wide.gather(-1, ids).where(is_here, 0.0)
        peaks, totals, targets = shard.gather(torch.cat((peak, total, target), -1)).split(1, -1)
        highest = peaks.amax(0)
        log_sum = (totals * (peaks - highest).exp()).sum(0).log() + highest
        log_share, own = wide - log_sum, targets.sum(0) - log_sum
    if grad is None:
        return own.where(is_target, 0.0).squeeze(-1)
    scale = grad.to(wide.dtype)[:, None].where(is_target, 0.0)
    result = log_share.exp() * -scale
    # The target's own column is replaced and not adjusted: 1 - p is rounded once.
    at_target = (-torch.expm1(own) * scale).where(is_here, result.gather(-1, ids))
    result = result.scatter(-1, ids, at_target)
    if tangent is not None:  # d cap tanh(x / cap) / dx = 1 - tanh(x / cap)^2
        result = result * (1.0 - tangent.square())
    return result.to(logits.dtype)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: dict[str, Any],
        chunk_size: int,
        kernel: Callable[..., Any],
    ) -> Tensor:
        shape = labels.shape
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        ctx.save_for_backward(hidden, weight, labels)
        ctx.settings = options, chunk_size, kernel
        compute_weight = weight.to(hidden.dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        values = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in equal_chunks(hidden.shape[0], chunk_size):
                logits = hidden[part] @ compute_weight.t()
                values[part] = kernel(logits, labels[part], None, **options)
        return values.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        options, chunk_size, kernel = ctx.settings
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        shape, grad = grad.shape, grad.flatten()
        compute_weight = weight.to(hidden.dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight: Tensor | None = None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in equal_chunks(hidden.shape[0], chunk_size):
                chunk = hidden[part]
                own = kernel(chunk @ compute_weight.t(), labels[part], grad[part], **options)
                if grad_hidden is not None:
                    torch.mm(own, compute_weight, out=grad_hidden[part])
                if needs_weight:
                    grad_weight = add_product(grad_weight, own.t(), chunk, wide)
        if needs_weight and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight, dtype=wide)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.view(*shape, -1)
        return grad_hidden, grad_weight, None, None, None, None
