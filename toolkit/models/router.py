"""Routers: the experts of each token, and what keeps all experts in use: losses, or biases.

Losses are sums over target tokens, so that they do not depend on how a batch is split. An instance
(row) has n target tokens, expert e is chosen c_e times by them and has the mean probability p_e.
Its load-balancing loss is num_experts * sum over e of c_e / (top_k * n) * p_e: 1 where all experts
are used alike, at most num_experts / top_k (Fedus et al. 2021, equation 4, for top_k experts).
Weighted with n it adds up over instances as cross entropy does over tokens. With sigmoid scores,
the probabilities are the scores divided by their sum (DeepSeek-V3 2024, equations 17 to 20).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from toolkit.models.layer_configs import MoEConfig
from toolkit.models.norms import widened

_LEAST_SUM = 1e-20
"""Added to sums of sigmoids that something is divided by (DeepSeek-V3)."""


class Choice(NamedTuple):
    """What the router decided, for `tokens` tokens."""

    logits: Tensor
    """`(tokens, num_experts)` in fp32, or wider."""
    experts: Tensor
    """`(tokens, top_k)` int64: the experts with the highest scores, best first."""
    weights: Tensor
    """`(tokens, top_k)`: what their results are multiplied by, in the compute type."""


class Router(nn.Module):
    """Chooses the `top_k` experts of each token by their scores, in fp32; a token's choice depends
    on no other token. See `MoEConfig`."""

    score_bias: Tensor | None
    """`(num_experts,)`: added to the scores for the choice alone. No optimizer knows of it."""

    def __init__(self, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k, self.normalize = moe.top_k, moe.normalize_top_k
        self.is_sigmoid = moe.score_function == "sigmoid"
        self.scaling_factor = moe.scaling_factor
        self.num_groups, self.top_k_groups = moe.num_groups, moe.top_k_groups
        self.weight = nn.Parameter(torch.empty(moe.num_experts, d_model))
        has_bias = moe.bias_update_rate is not None
        self.register_buffer("score_bias", torch.zeros(moe.num_experts) if has_bias else None)

    def forward(self, x: Tensor) -> Choice:
        """`(tokens, d_model)` to the experts of each token."""
        logits = nn.functional.linear(x, self.weight)
        wide = widened(logits)
        scores = wide.sigmoid() if self.is_sigmoid else wide.softmax(-1)
        if self.score_bias is None and self.num_groups == 1:
            weights, experts = scores.topk(self.top_k, dim=-1)
        else:
            experts = self._preferred(scores.detach()).topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, experts)
        if self.normalize:
            total = weights.sum(-1, keepdim=True)
            # Sigmoids may all be zero; a softmax never is.
            weights = weights / (total + _LEAST_SUM if self.is_sigmoid else total)
        if self.scaling_factor != 1.0:
            weights = weights * self.scaling_factor
        return Choice(wide, experts, weights.to(x.dtype))

    def _preferred(self, scores: Tensor) -> Tensor:
        """By which experts are chosen: scores with biases, and of other groups -inf."""
        if self.score_bias is not None:
            scores = scores + self.score_bias
        if self.num_groups == 1:
            return scores
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        of_groups = grouped.topk(2, dim=-1).values.sum(-1) if self.is_sigmoid else grouped.amax(-1)
        chosen = of_groups.topk(self.top_k_groups, dim=-1).indices
        is_out = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, chosen, False)
        return grouped.masked_fill(is_out[..., None], float("-inf")).flatten(-2)


@torch.no_grad()
def update_biases(
    biases: Mapping[int, Tensor], load: Tensor, skipped: Tensor, *, rate: float
) -> None:
    """Move biases of routers towards an even load, after an optimizer step: by `rate` *
    sign(mean load - load) (Wang et al. 2024, algorithm 1).

    Args:
        biases: row of `load` -> `(num_experts,)`.
        load: how often each expert was chosen in the global batch, `(routers, num_experts)`.
        skipped: 1.0 where the step was left out, and so is this; 0-d.
    """
    signs = (load.mean(-1, keepdim=True) - load).sign() * (1.0 - skipped)
    torch._foreach_add_(list(biases.values()), [signs[row] for row in biases], alpha=rate)


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


def sums_for(moe: MoEConfig) -> Callable[..., RouterSums]:
    """`router_sums` of the routers of a model."""
    return partial(router_sums, is_sigmoid=True) if moe.score_function == "sigmoid" else router_sums


def router_sums(
    logits: Tensor,
    experts: Tensor,
    is_target: Tensor,
    *,
    is_sigmoid: bool = False,
    add: Callable[[Tensor], Tensor] | None = None,
) -> RouterSums:
    """Sums of one layer over the tokens of `is_target`, `(batch, seq)` bool, differentiable but for
    `load`. See `Choice` for the rest. `is_sigmoid`: scores are sigmoids. `add`, where rows lie in
    parts: gives the sum over all parts of what it is given of one, so that `balance` and `load` are
    of whole rows."""
    shape = (*is_target.shape, logits.shape[-1])
    log_total = logits.logsumexp(-1, keepdim=True)
    counted = is_target.to(logits.dtype)[..., None]
    shares = logits.sigmoid() if is_sigmoid else (logits - log_total).exp()
    if is_sigmoid:
        shares = shares / (shares.sum(-1, keepdim=True) + _LEAST_SUM)
    probability = (shares.view(shape) * counted).sum(1)
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


def added_routers(parts: Sequence[RouterSums]) -> RouterSums:
    """The sums over all parts of a batch."""
    return RouterSums(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))


def router_loss(sums: RouterSums, moe: MoEConfig) -> Tensor:
    return moe.load_balancing_multiplier * sums.balance + moe.router_z_loss_multiplier * sums.z
