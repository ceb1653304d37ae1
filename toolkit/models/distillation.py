"""Kullback-Leibler divergence from a teacher's probabilities, over output heads in chunks of rows.

As in `toolkit.models.loss`, the logits of a chunk exist once: of both models, with the gradient of
the model's own. The gradients of hidden states and weight wait until backward, which multiplies
them by the incoming one.
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
    equal_chunks,
    scaled_gradients,
)
from toolkit.models.norms import widened
from toolkit.models.router import RouterSums, router_loss
from toolkit.models.shapes import loss_chunk_rows
from toolkit.models.weight_gradient import add_product


class TeacherRows(NamedTuple):
    """What a teacher's logits are made of."""

    hidden: Tensor
    """`(batch, seq, d_model)`, after the last norm."""
    weight: Tensor
    """Of its head, `(padded_vocab_size, d_model)`."""

    def with_router(self, sums: RouterSums, moe: MoEConfig) -> "TeacherRows":
        return self


class GiveRows(nn.Module):
    """Takes the place of a teacher's loss."""

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss_multiplier: float = 0.0
    ) -> TeacherRows:
        return TeacherRows(hidden, weight)


class DistillationSums(NamedTuple):
    """Sums over target tokens, 0-d in fp32 (float64 for a float64 model)."""

    loss: Tensor
    """What is trained; differentiable."""
    ce: Tensor
    """Cross entropy, detached."""
    divergence: Tensor
    """Times temperature^2, detached."""
    router: RouterSums | None = None
    """Of a mixture of experts, detached. Its losses are part of `loss`."""

    def with_router(self, sums: RouterSums, moe: MoEConfig) -> "DistillationSums":
        return self._replace(loss=self.loss + router_loss(sums, moe), router=sums.detached())


class DistillationLoss(nn.Module):
    """Takes the place of a head's loss: while there is a `teacher`, `DistillationSums`; without
    one, the sums of cross entropy."""

    def __init__(
        self,
        own: LinearCrossEntropy,
        *,
        is_reverse: bool,
        temperature: float,
        cross_entropy_weight: float,
    ) -> None:
        super().__init__()
        self.own = own
        self.settings = {
            "is_reverse": is_reverse,
            "temperature": temperature,
            "cross_entropy_weight": cross_entropy_weight,
        }
        self.kernel: Callable[..., Any] = divergence_chunk
        self.shard = None
        self.teacher: TeacherRows | None = None
        self.teacher_soft_cap: float | None = None

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss_multiplier: float = 0.0
    ) -> Any:
        if self.teacher is None:
            return self.own(hidden, weight, labels, z_loss_multiplier=z_loss_multiplier)
        own = self.own
        options = {
            **self.settings,
            "vocab_size": own.vocab_size,
            "soft_caps": (own.soft_cap, self.teacher_soft_cap),
        }
        rows = loss_chunk_rows(own.chunk_size, own.padded_vocab_size, hidden.device.type)
        grads = torch.is_grad_enabled()
        function = _ChunkedDivergence.apply
        return DistillationSums(
            *function(
                hidden.flatten(0, -2), weight, labels.flatten(),
                self.teacher.hidden.flatten(0, -2), self.teacher.weight,
                options, rows, self.kernel, grads,
            )
        )  # fmt: skip


def divergence_chunk(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    soft_caps: tuple[float | None, float | None],
    is_reverse: bool,
    temperature: float,
    cross_entropy_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums over one chunk of cross entropy and of temperature^2 * KL (Hinton et al. 2015, section
    2.1), 0-d in fp32 or wider, and the gradient of w ce + (1 - w) kl with respect to `logits`, in
    their type. `logits` are `(rows, padded_vocab_size)`, those of the teacher too.

    With p of the teacher, q of the model and T the temperature, d/dz of T^2 KL(p || q) is
    T (q - p), of T^2 KL(q || p) it is T q (log q/p - KL(q || p)).
    """
    is_target = (labels != IGNORE_INDEX)[:, None]
    wide, other = widened(logits[:, :vocab_size]), widened(teacher_logits[:, :vocab_size])
    tangent = None
    if soft_caps[0] is not None:
        tangent = (wide / soft_caps[0]).tanh()
        wide = tangent * soft_caps[0]
    if soft_caps[1] is not None:
        other = (other / soft_caps[1]).tanh() * soft_caps[1]
    ids = labels[:, None].where(is_target, 0)
    log_q = torch.log_softmax(wide / temperature, -1)
    log_p = torch.log_softmax(other.to(wide.dtype) / temperature, -1)
    log_own = log_q if temperature == 1.0 else torch.log_softmax(wide, -1)
    ce = -log_own.gather(-1, ids).where(is_target, 0.0).sum()
    first, second = (log_q, log_p) if is_reverse else (log_p, log_q)
    ratio = first - second
    kl_rows = (first.exp() * ratio).sum(-1, keepdim=True)
    divergence = temperature**2 * kl_rows.where(is_target, 0.0).sum()
    if not with_grad:
        return ce, divergence, None
    if is_reverse:
        grad = log_q.exp() * (ratio - kl_rows)
    else:
        grad = log_q.exp() - log_p.exp()
    grad = grad * ((1.0 - cross_entropy_weight) * temperature)
    if cross_entropy_weight:
        share = log_own.exp() * cross_entropy_weight
        grad = grad + share.scatter_add(
            -1, ids, torch.full_like(share[:, :1], -cross_entropy_weight)
        )
    grad = grad.where(is_target, 0.0)
    if tangent is not None:
        grad = grad * (1.0 - tangent.square())
    grad = nn.functional.pad(grad, (0, logits.shape[1] - vocab_size))
    return ce, divergence, grad.to(logits.dtype)


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        options: dict[str, Any],
        chunk_size: int,
        kernel: Callable[..., Any],
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden_grad, weight_grad = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        ce, divergence = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if hidden_grad else None
        grad_weight: Tensor | None = None
        own, other = weight.to(hidden.dtype), teacher_weight.to(teacher_hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in equal_chunks(hidden.shape[0], chunk_size):
                chunk = hidden[part]
                chunk_ce, chunk_divergence, grad = kernel(
                    chunk @ own.t(),
                    teacher_hidden[part] @ other.t(),
                    labels[part],
                    with_grad=hidden_grad or weight_grad,
                    **options,
                )
                ce += chunk_ce
                divergence += chunk_divergence
                if grad_hidden is not None and grad is not None:
                    torch.mm(grad, own, out=grad_hidden[part])
                if weight_grad and grad is not None:
                    grad_weight = add_product(grad_weight, grad.t(), chunk, wide)
        if weight_grad and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        share = options["cross_entropy_weight"]
        ctx.mark_non_differentiable(ce, divergence)
        return share * ce + (1.0 - share) * divergence, ce, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad_loss), *([None] * 7)
