"""Losses of preference learning, of each unit by itself; the caller takes the mean over all units.

Every function takes log-probabilities of whole answers, `(rows, units)`, summed over their tokens,
and gives tensors of the same shape, with gradients.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from toolkit.train.preference.config import (
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SimPOConfig,
)

Parts = dict[str, Tensor]
"""Name -> a number of each unit; "loss" is trained, the others are detached."""


class Answers(NamedTuple):
    """Two documents of each unit, `(rows, units)` each."""

    first: Tensor
    """Log-probability of the first one's answer: chosen; or of a binary unit the answer itself."""
    second: Tensor
    """Of the second one: rejected; or the answer that belongs to another prompt."""
    first_tokens: Tensor
    """Tokens of the answer; at least 1."""
    second_tokens: Tensor


def dpo(config: DPOConfig, own: Answers, reference: Answers) -> Parts:
    """Rafailov et al. 2023, equation 7; IPO by Azar et al. 2023, equation 17, and the
    length-normalised form of Lambert et al. 2024, both of log-probabilities per token.

    `label_smoothing` e (cDPO): (1 - e) of the loss, and e of that with the answers exchanged.
    """
    chosen, rejected = own.first - reference.first, own.second - reference.second
    rewards = _rewards(config.beta * chosen.detach(), config.beta * rejected.detach())
    if config.loss != "sigmoid":
        chosen, rejected = chosen / own.first_tokens, rejected / own.second_tokens
    margin = chosen - rejected
    if config.loss == "ipo":
        loss = (margin - 1.0 / (2.0 * config.beta)).square()
    else:
        loss = _smoothed(config.beta * margin, config.label_smoothing)
    return {"loss": loss, **rewards, **_log_probs(own)}


def simpo(config: SimPOConfig, own: Answers) -> Parts:
    """Meng et al. 2024, equation 6."""
    chosen, rejected = own.first / own.first_tokens, own.second / own.second_tokens
    loss = _smoothed(config.beta * (chosen - rejected) - config.gamma, config.label_smoothing)
    rewards = _rewards(config.beta * chosen.detach(), config.beta * rejected.detach())
    return {"loss": loss, **rewards, **_log_probs(own)}


def orpo(config: ORPOConfig, own: Answers) -> Parts:
    """The odds ratio loss of Hong et al. 2024, equations 4 and 7: -beta log sigmoid(log odds of
    chosen - log odds of rejected), with probabilities per token. Cross entropy is not in it."""
    chosen, rejected = own.first / own.first_tokens, own.second / own.second_tokens
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    ratio = logsigmoid(log_odds)
    rewards = _rewards(config.beta * chosen.detach(), config.beta * rejected.detach())
    return {
        "loss": -config.beta * ratio,
        **rewards,
        **_log_probs(own),
        "log_odds_ratio": ratio.detach(),
    }


def kto(
    config: KTOConfig, own: Answers, reference: Answers, is_desirable: Tensor, kl: Tensor
) -> Parts:
    """Ethayarajh et al. 2024, equation 8; `kl` is their reference point, 0-d, without a
    gradient. `kl` and the two rewards are no means over units: see `PreferenceTrainModule`."""
    ratio = own.first - reference.first
    toward = torch.where(is_desirable, ratio - kl, kl - ratio)
    weight = torch.where(is_desirable, config.desirable_weight, config.undesirable_weight)
    return {"loss": weight * (1.0 - torch.sigmoid(config.beta * toward))}


def reward(config: RewardConfig, chosen: Tensor, rejected: Tensor) -> Parts:
    """-log sigmoid(chosen - rejected - margin), and the square of the sum where scores are
    centered (Eisenstein et al. 2023, equation 7)."""
    loss = -logsigmoid(chosen - rejected - config.margin)
    if config.centering is not None:
        loss = loss + config.centering * (chosen + rejected).square()
    return {"loss": loss, **_rewards(chosen.detach(), rejected.detach())}


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact at both ends (Maechler 2012). A probability that is rounded
    to 1 counts as the next smaller one, which keeps the result and its gradient finite."""
    x = x + (x.clamp(max=-torch.finfo(x.dtype).eps) - x).detach()
    near_zero = x > -math.log(2.0)
    # Each branch sees values that it is exact for: a gradient of the other one may be NaN.
    small = torch.log(-torch.expm1(x.where(near_zero, -1.0)))
    large = torch.log1p(-torch.exp(x.where(~near_zero, -1.0)))
    return torch.where(near_zero, small, large)


def _smoothed(margin: Tensor, share: float) -> Tensor:
    loss = -logsigmoid(margin)
    if share:
        loss = (1.0 - share) * loss - share * logsigmoid(-margin)
    return loss


def _rewards(chosen: Tensor, rejected: Tensor) -> Parts:
    return {
        "reward_accuracy": (chosen > rejected).to(chosen.dtype),
        "reward_margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def _log_probs(own: Answers) -> Parts:
    return {"chosen_log_prob": own.first.detach(), "rejected_log_prob": own.second.detach()}
