"""Output head and cross entropy in chunks of rows: full logits never exist.

1. The token vectors of a forward are cut into chunks of at most `chunk_size` rows.
2. For each chunk: one matrix product makes its logits, `loss_chunk` their cross entropy,
   logsumexp^2 and the gradient of both with respect to the logits, and two more products carry
   that gradient to the chunk's vectors and to the head's weight.
3. The gradients wait until backward, which only multiplies them by the incoming one.

So the largest tensor is `chunk_size * padded_vocab_size` whatever the sequence length, and the head
costs three matrix products a token (recomputing logits in backward would cost four).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import liger_function, loss_kernel
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss_kernels import has_one_softmax, softmax_loss_chunk
from toolkit.models.norms import widened
from toolkit.models.router import RouterSums, router_loss
from toolkit.models.shapes import loss_chunk_rows
from toolkit.models.weight_gradient import add_product

IGNORE_INDEX = -100
"""Label of a position that is not a target."""

ChunkKernel = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""`loss_chunk`, or its compiled form."""


def shift_labels(
    input_ids: Tensor, label_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Next-token targets `(batch, seq)`: shifted inside each document, -100 where there is none.

    `label_mask`, `(batch, seq)` bool, says which tokens of `input_ids` are targets. Without
    `document_ids`, `(batch, seq)`, each row is one document.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    wanted = None if label_mask is None else label_mask[:, 1:]
    if document_ids is not None:
        inside = document_ids[:, 1:] == document_ids[:, :-1]
        wanted = inside if wanted is None else wanted & inside
    following = input_ids[:, 1:]
    labels[:, :-1] = following if wanted is None else torch.where(wanted, following, IGNORE_INDEX)
    return labels


class MTPSums(NamedTuple):
    """Sums over the targets of all modules for multi-token prediction, 0-d, detached."""

    ce: Tensor
    """Cross entropy, summed over modules too."""
    num_targets: Tensor
    """How many targets that are, int64."""


class LossSums(NamedTuple):
    """Sums over the target tokens of one forward, 0-d in fp32 (float64 for a float64 model)."""

    loss: Tensor
    """Cross entropy + z_loss_multiplier * logsumexp^2 + losses of routers and of multi-token
    prediction; differentiable."""
    ce: Tensor
    """Cross entropy alone, detached."""
    z: Tensor
    """logsumexp(logits)^2 without the multiplier, detached; 0 where the multiplier is 0."""
    router: RouterSums | None = None
    """Of a mixture of experts, detached. Its losses are part of `loss`."""
    mtp: MTPSums | None = None
    """Of multi-token prediction in training. Its loss is part of `loss`."""

    def with_router(self, sums: RouterSums, moe: MoEConfig) -> "LossSums":
        return self._replace(loss=self.loss + router_loss(sums, moe), router=sums.detached())


class VocabularyShard(NamedTuple):
    """The rows of the head that a rank has, where each of several has some."""

    first: int
    """Id of the first row."""
    ranks: int
    """How many have as many rows. Chunks are so many times longer: their logits take the memory
    that they would take with the whole vocabulary."""
    gather: Callable[[Tensor], Tensor]
    """The tensors of all these ranks, stacked."""


class LinearCrossEntropy(nn.Module):
    """Loss sums of a head's logits against labels, by the kernel that fits; see `loss_kernel`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.soft_cap = config.logit_soft_cap
        self.padded_vocab_size = config.padded_vocab_size
        self.chunk_size = config.loss_chunk_size
        self.kernel: ChunkKernel = loss_chunk
        self.shard: VocabularyShard | None = None
        """Set from outside where `weight` has a part of the vocabulary's rows."""

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss_multiplier: float = 0.0
    ) -> LossSums:
        """See `chunked_linear_cross_entropy`; any number of dimensions before the last."""
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        trains = torch.is_grad_enabled() and weight.requires_grad
        kernel = loss_kernel(
            hidden.device.type,
            dtype=hidden.dtype,
            vocab_size=self.vocab_size,
            has_z_loss=z_loss_multiplier != 0.0,
            has_soft_cap=self.soft_cap is not None,
            is_compiled=self.kernel is not loss_chunk,
            trains_head_alone=trains and not hidden.requires_grad,
            is_cut=self.shard is not None,
        )
        if kernel == "liger" and (liger := liger_function()) is not None:
            # Autocast would round the weight anew for each of Liger's chunks.
            loss = liger(
                hidden,
                weight[: self.vocab_size].to(hidden.dtype),
                labels,
                ignore_index=IGNORE_INDEX,
                reduction="sum",
                accum_dtype=torch.float32,
            )
            return LossSums(loss, loss.detach(), torch.zeros_like(loss.detach()))
        return chunked_linear_cross_entropy(
            hidden,
            weight,
            labels,
            vocab_size=self.vocab_size,
            z_loss_multiplier=z_loss_multiplier,
            soft_cap=self.soft_cap,
            chunk_size=loss_chunk_rows(self.chunk_size, self.padded_vocab_size, hidden.device.type),
            kernel=self.kernel,
            shard=self.shard,
        )


def loss_chunk(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    z_loss_multiplier: float,
    soft_cap: float | None = None,
    shard: VocabularyShard | None = None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of cross entropy and logsumexp^2 (0-d, fp32 or wider) over one chunk, and the gradient
    of ce + z_loss_multiplier * z with respect to `logits`, in their type.

    `logits` are `(rows, padded_vocab_size)`, or the columns of a shard. See
    `chunked_linear_cross_entropy`.
    """
    is_target = (labels != IGNORE_INDEX)[:, None]
    is_plain = soft_cap is None and shard is None and not torch.compiler.is_compiling()
    if is_plain and has_one_softmax(logits.device):
        return softmax_loss_chunk(
            logits,
            labels[:, None].where(is_target, 0),
            is_target,
            vocab_size=vocab_size,
            z_loss_multiplier=z_loss_multiplier,
            with_grad=with_grad,
        )
    wide = widened(logits)
    first = 0 if shard is None else shard.first
    tangent = None
    if soft_cap is not None:
        tangent = (wide / soft_cap).tanh()
        wide = tangent * soft_cap
    if vocab_size < first + wide.shape[1]:
        column = torch.arange(wide.shape[1], device=wide.device, dtype=torch.int32)
        wide = wide.masked_fill(column >= vocab_size - first, float("-inf"))
    is_here = is_target
    if shard is not None:
        labels = labels - first
        is_here = is_target & ((labels >= 0) & (labels < wide.shape[1]))[:, None]
    ids = labels[:, None].where(is_here, 0)
    # The exponentials serve both the sum and the gradient; on CPUs they are most of the work.
    peak = wide.amax(-1, keepdim=True)
    if shard is not None:  # a shard may have nothing but padding
        peak = peak.clamp(min=torch.finfo(wide.dtype).min)
    exponentials = (wide - peak).exp_()
    total = exponentials.sum(-1, keepdim=True)
    target_logit = wide.gather(-1, ids)
    if shard is not None:
        own = torch.cat((peak, total, target_logit.where(is_here, 0.0)), dim=-1)
        peaks, totals, targets = shard.gather(own).split(1, dim=-1)
        highest = peaks.amax(0)
        total = (totals * (peaks - highest).exp()).sum(0)
        exponentials.mul_((peak - highest).exp())
        peak, target_logit = highest, targets.sum(0)
    log_sum = total.log() + peak
    ce = (log_sum - target_logit).where(is_target, 0.0).sum()
    z = log_sum.square().where(is_target, 0.0).sum()
    if not with_grad:
        return ce, z, None
    # d ce / d logits = softmax - onehot;  d logsumexp^2 / d logits = 2 logsumexp softmax.
    scale = (1.0 + 2.0 * z_loss_multiplier * log_sum).where(is_target, 0.0)
    grad = exponentials.mul_(scale / total)
    # The target's own column is replaced and not adjusted: p - 1 is rounded once.
    at_target = (target_logit - log_sum).exp() * scale - is_target.to(wide.dtype)
    if shard is not None:
        at_target = at_target.where(is_here, grad.gather(-1, ids))
    if tangent is not None:  # d cap tanh(x / cap) / dx = 1 - tanh(x / cap)^2
        slope = 1.0 - tangent.square()
        grad, at_target = grad.mul_(slope), at_target * slope.gather(-1, ids)
    return ce, z, grad.to(logits.dtype).scatter_(-1, ids, at_target.to(logits.dtype))


def soft_capped(logits: Tensor, soft_cap: float) -> Tensor:
    """soft_cap * tanh(logits / soft_cap), computed in fp32 or wider, in the type of `logits`."""
    return ((widened(logits) / soft_cap).tanh() * soft_cap).to(logits.dtype)


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    z_loss_multiplier: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int = 1024,
    kernel: ChunkKernel = loss_chunk,
    shard: VocabularyShard | None = None,
) -> LossSums:
    """Loss sums of `hidden @ weight.T` against `labels`.

    Args:
        hidden: `(rows, d_model)` in the compute type.
        weight: `(padded_vocab_size, d_model)`, or the rows of `shard`; ids from `vocab_size` on are
            padding, left out of the softmax.
        labels: `(rows,)` ids, `IGNORE_INDEX` where there is no target.
        soft_cap: the softmax is of soft_cap * tanh(logits / soft_cap); None: of the logits.
        chunk_size: most rows per chunk, times `shard.ranks`.
        shard: the gradient of `hidden` is then what this shard contributes to it.
    """
    options = {
        "vocab_size": vocab_size, "z_loss_multiplier": z_loss_multiplier, "soft_cap": soft_cap,
        "shard": shard,
    }  # fmt: skip
    # Inside a Function's forward grad mode is always off, and needs_input_grad ignores no_grad.
    grad_enabled = torch.is_grad_enabled()
    function = _ChunkedLinearCrossEntropy.apply
    return LossSums(*function(hidden, weight, labels, options, chunk_size, kernel, grad_enabled))


def equal_chunks(rows: int, chunk_size: int) -> list[slice]:
    """Chunks of at most `chunk_size` rows, equal so that a compiled kernel sees one shape (two when
    rows do not divide)."""
    size = -(-rows // max(1, -(-rows // chunk_size)))
    return [slice(start, start + size) for start in range(0, rows, size or 1)]


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """In backward, those of hidden states and weight that forward has saved, either of which may be
    None, times the gradient of the loss."""
    grad_hidden, grad_weight = ctx.saved_tensors
    if grad_hidden is not None:
        grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
    if grad_weight is not None:
        grad_weight = grad_weight * grad_loss
    return grad_hidden, grad_weight


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        options: dict[str, Any],
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
        shard: VocabularyShard | None = options["shard"]
        if shard is not None:
            chunk_size *= shard.ranks
        with torch.autocast(hidden.device.type, enabled=False):
            for part in equal_chunks(hidden.shape[0], chunk_size):
                chunk = hidden[part]
                chunk_ce, chunk_z, grad = kernel(
                    chunk @ compute_weight.t(),
                    labels[part],
                    with_grad=hidden_grad or weight_grad,
                    **options,
                )
                ce += chunk_ce
                z += chunk_z
                if grad_hidden is not None and grad is not None:
                    torch.mm(grad, compute_weight, out=grad_hidden[part])
                if weight_grad and grad is not None:
                    grad_weight = add_product(grad_weight, grad.t(), chunk, wide)
        if weight_grad and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight, dtype=wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        multiplier = options["z_loss_multiplier"]
        if multiplier == 0.0:
            z = torch.zeros_like(z)
        ctx.mark_non_differentiable(ce, z)
        return ce + multiplier * z, ce, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad_loss), *([None] * 5)
