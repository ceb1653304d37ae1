"""The loss of a chunk of logits in few kernels, where it is not compiled."""

import torch
from torch import Tensor


def has_one_softmax(device: torch.device) -> bool:
    """Whether torch computes a log-softmax in one kernel, which reads and writes memory once: on
    CUDA. On a CPU exponentials that serve both the sum and the gradient are faster."""
    return device.type == "cuda"


def softmax_loss_chunk(
    logits: Tensor,
    ids: Tensor,
    is_target: Tensor,
    *,
    vocab_size: int,
    z_loss_multiplier: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`loss_chunk` by torch's log-softmax, in half of the passes over memory. The gradient takes
    the place of `logits`. `ids` and `is_target` are `(rows, 1)`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if vocab_size < logits.shape[1]:
        logits[:, vocab_size:] = float("-inf")
    log_shares = torch.log_softmax(logits, -1, dtype=wide)
    own = log_shares.gather(-1, ids)
    log_sum = logits.gather(-1, ids).to(wide) - own
    ce = -own.where(is_target, 0.0).sum()
    z = log_sum.square().where(is_target, 0.0).sum()
    if not with_grad:
        return ce, z, None
    # d ce / d logits = softmax - onehot;  d logsumexp^2 / d logits = 2 logsumexp softmax.
    scale = (1.0 + 2.0 * z_loss_multiplier * log_sum).where(is_target, 0.0)
    at_target = own.exp() * scale - is_target.to(wide)
    grad = torch.mul(log_shares.exp_(), scale, out=logits)
    return ce, z, grad.scatter_(-1, ids, at_target.to(logits.dtype))
