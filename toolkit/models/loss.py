"""Output head and cross entropy in pieces: full logits never exist.

What happens to the `rows` token vectors of one forward:
1. They are cut into pieces of `chunk_size` rows.
2. `loss_chunk` makes the logits of one piece, their cross entropy and logsumexp^2, and at once the
   gradients of both with respect to the piece's vectors and the head's weight.
3. The gradients wait until backward, which only multiplies them by the incoming one.

So the largest tensor is `chunk_size * padded_vocab_size` fp32 whatever the sequence length, and the
head costs three matrix products a token (recomputing logits in backward would cost four).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
"""Label of a position that is not a target."""

ChunkKernel = Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


class LossSums(NamedTuple):
    """Sums over the target tokens of one forward, 0-d in fp32 (float64 for a float64 model)."""

    loss: Tensor
    """Cross entropy + z_loss_multiplier * logsumexp^2; differentiable."""
    ce: Tensor
    """Cross entropy alone, detached."""
    z: Tensor
    """logsumexp(logits)^2 without the multiplier, detached; 0 where the multiplier is 0."""


def loss_chunk(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    z_loss_multiplier: float,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Sums and gradients of one piece.

    Args:
        hidden: `(rows, d_model)` in the compute type.
        weight: `(padded_vocab_size, d_model)` in the compute type.
        labels: `(rows,)` ids, `IGNORE_INDEX` where there is no target.

    Returns:
        Sum of cross entropy, sum of logsumexp^2 (both fp32 0-d), gradient of
        ce + z_loss_multiplier * z with respect to `hidden` and to `weight` (compute type).
    """
    logits = hidden @ weight.t()
    if logits.dtype != torch.float64:
        logits = logits.float()
    if vocab_size < weight.shape[0]:
        padding = torch.arange(weight.shape[0], device=logits.device) >= vocab_size
        logits = logits.masked_fill(padding, float("-inf"))
    is_target = labels != IGNORE_INDEX
    ids = labels.where(is_target, 0)[:, None]
    log_sum = logits.logsumexp(-1)
    ce = (log_sum - logits.gather(-1, ids)[:, 0]).where(is_target, 0.0)
    z = log_sum.square().where(is_target, 0.0)
    grad_hidden = grad_weight = None
    if hidden_grad or weight_grad:
        # d ce / d logits = softmax - onehot;  d logsumexp^2 / d logits = 2 logsumexp softmax.
        scale = (1.0 + 2.0 * z_loss_multiplier * log_sum).where(is_target, 0.0)
        grad = (logits - log_sum[:, None]).exp() * scale[:, None]
        column = torch.arange(weight.shape[0], device=logits.device)
        hit = (column == ids) & is_target[:, None]
        grad = (grad - hit.to(grad.dtype)).to(hidden.dtype)
        grad_hidden = grad @ weight if hidden_grad else None
        grad_weight = grad.t() @ hidden if weight_grad else None
    return ce.sum(), z.sum(), grad_hidden, grad_weight


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        z_loss_multiplier: float,
        chunk_size: int,
        kernel: ChunkKernel,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden_grad, weight_grad = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ce, z = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if hidden_grad else None
        grad_weight: Tensor | None = None
        compute_weight = weight.to(hidden.dtype)
        # Equal pieces, so that a compiled kernel sees one shape (two when rows do not divide).
        num_chunks = -(-hidden.shape[0] // chunk_size)
        rows = -(-hidden.shape[0] // max(1, num_chunks))
        with torch.autocast(hidden.device.type, enabled=False):
            for index in range(num_chunks):
                piece = slice(index * rows, (index + 1) * rows)
                chunk_ce, chunk_z, chunk_grad_hidden, chunk_grad_weight = kernel(
                    hidden[piece],
                    compute_weight,
                    labels[piece],
                    vocab_size=vocab_size,
                    z_loss_multiplier=z_loss_multiplier,
                    hidden_grad=hidden_grad,
                    weight_grad=weight_grad,
                )
                ce += chunk_ce
                z += chunk_z
                if grad_hidden is not None and chunk_grad_hidden is not None:
                    grad_hidden[piece] = chunk_grad_hidden
                if chunk_grad_weight is not None:
                    if grad_weight is None:
                        grad_weight = chunk_grad_weight.to(wide)
                    else:
                        grad_weight += chunk_grad_weight
        ctx.save_for_backward(grad_hidden, grad_weight)
        if z_loss_multiplier == 0.0:
            z = torch.zeros_like(z)
        ctx.mark_non_differentiable(ce, z)
        return ce + z_loss_multiplier * z, ce, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss
        return grad_hidden, grad_weight, None, None, None, None, None, None


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    z_loss_multiplier: float = 0.0,
    chunk_size: int = 1024,
    kernel: ChunkKernel = loss_chunk,
) -> LossSums:
    """Loss sums of `hidden @ weight.T` against `labels`.

    Args:
        hidden: `(rows, d_model)` in the compute type.
        weight: `(padded_vocab_size, d_model)`; rows from `vocab_size` on are padding ids, left
            out of the softmax.
        labels: `(rows,)` ids, `IGNORE_INDEX` where there is no target.
        chunk_size: rows per piece.
        kernel: `loss_chunk` or its compiled form.
    """
    # Inside a Function's forward grad mode is always off, and needs_input_grad ignores no_grad.
    grad_enabled = torch.is_grad_enabled()
    return LossSums(
        *_ChunkedLinearCrossEntropy.apply(
            hidden, weight, labels, vocab_size, z_loss_multiplier, chunk_size, kernel, grad_enabled
        )
    )
