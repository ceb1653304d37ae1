"""Routers: the experts of each token, and the losses that keep all experts in use.

Losses are sums over target tokens, so that they do not depend on how a batch is split. An instance
(row) has n target tokens, expert e is chosen c_e times by them and has the mean probability p_e.
Its load-balancing loss is num_experts * sum over e of c_e / (top_k * n) * p_e: 1 where all experts
are used alike, at most num_experts / top_k (Fedus et al. 2021, equation 4, for top_k experts).
Weighted with n it adds up over instances as cross entropy does over tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolkit.models.architecture import MoEConfig
from toolkit.models.norms import widened


class Choice(NamedTuple):
    """What the router decided, for `tokens` tokens."""

    logits: Tensor
    """`(tokens, num_experts)` in fp32, or wider."""
    experts: Tensor
    """`(tokens, top_k)` int64: the likeliest experts, best first."""
    weights: Tensor
    """`(tokens, top_k)`: what their results are multiplied by, in the compute type."""


class Router(nn.Module):
    """Chooses the `top_k` experts of each token by a softmax over all of them, in fp32."""

    def __init__(self, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.normalize = moe.normalize_top_k
        self.weight = nn.Parameter(torch.empty(moe.num_experts, d_model))

    def forward(self, x: Tensor) -> Choice:
        """`(tokens, d_model)` to the experts of each token."""
        logits = nn.functional.linear(x, self.weight)
        wide = widened(logits)
        weights, experts = wide.softmax(-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Choice(wide, experts, weights.to(x.dtype))


class RouterSums(NamedTuple):
    """Sums over the target tokens of one forward, fp32 (float64 for a float64 model)."""

    balance: Tensor
    """Load-balancing loss of each instance * its number of targets, summed; 0-d."""
    z: Tensor
    """logsumexp(router logits)^2, summed; 0-d."""
    load: Tensor
    """How often each expert was chosen, `(num_experts,)`, or `(layers, num_experts)` of several."""

    def detached(self) -> "RouterSums":
        return RouterSums(*(value.detach() for value in self))


def router_sums(
    logits: Tensor,
    experts: Tensor,
    is_target: Tensor,
    *,
    add: Callable[[Tensor], Tensor] | None = None,
) -> RouterSums:
    """Sums of one layer over the tokens of `is_target`, `(batch, seq)` bool, differentiable but for
    `load`. See `Choice` for the rest. `add`, where rows lie in parts: gives the sum over all parts
    of what it is given of one, so that `balance` and `load` are of whole rows."""
    shape = (*is_target.shape, logits.shape[-1])
    log_total = logits.logsumexp(-1, keepdim=True)
    counted = is_target.to(logits.dtype)[..., None]
    probability = ((logits - log_total).exp().view(shape) * counted).sum(1)
    chosen = torch.zeros_like(logits).scatter(-1, experts, 1.0).view(shape)
    times, targets = (chosen * counted).sum(1), counted.sum(1)
    if add is not None:
        summed = add(torch.cat((probability, times, targets), dim=-1))
        probability, times, targets = summed.split((shape[-1], shape[-1], 1), dim=-1)
        times, targets = times.detach(), targets.detach()
    targets = targets.clamp(min=1.0)
    scale = shape[-1] / experts.shape[-1]
    balance = (times * probability / targets).sum() * scale
    z = (log_total.view(counted.shape).square() * counted).sum()
    return RouterSums(balance, z, times.sum(0))


def combine_layers(layers: Sequence[RouterSums], num_layers: int) -> RouterSums:
    """Sums of several layers: `balance` and `z` are this part of the mean over `num_layers`."""
    balance, z, load = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return RouterSums(balance.sum() / num_layers, z.sum() / num_layers, load)


def router_loss(sums: RouterSums, moe: MoEConfig) -> Tensor:
    return moe.load_balancing_multiplier * sums.balance + moe.router_z_loss_multiplier * sums.z
