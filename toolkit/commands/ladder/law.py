"""The law of losses, L(N, D) = E + A / N^alpha + B / D^beta, of N weights and D tokens (Hoffmann et
al. 2022, arXiv:2203.15556, section 3.3).

Fitted as there: the Huber loss, with delta 1e-3, between the logarithms of the law and of the
losses, from many starts, of which the best counts. Each start goes downhill by Levenberg and
Marquardt's method on residuals that are weighted down where they are larger than delta, all starts
at once.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from toolkit.errors import ConfigError
from toolkit.wording import count

DELTA = 1e-3
"""Residuals of logarithms that are larger count in proportion, not as squares."""
FEWEST = 6
"""Runs, of `FEWEST_SIZES` and two numbers of tokens per weight: E and what N adds are told apart by
three sizes, and what D adds is told from that by two."""
FEWEST_SIZES, FEWEST_RATIOS = 3, 2
_EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
_FLOORS = (0.05, 0.3, 0.6, 0.9)
"""Shares of the least loss that E begins with."""
_ITERATIONS = 300

Array = np.ndarray[Any, np.dtype[np.float64]]


class Law(NamedTuple):
    """L(N, D) = floor + a / N^alpha + b / D^beta."""

    floor: float
    """E: the loss of an endless model on endless data."""
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, size: float, tokens: float) -> float:
        """Of `size` weights after `tokens` tokens."""
        return float(self.floor + self.a / size**self.alpha + self.b / tokens**self.beta)

    def best_split(self, flops: float) -> tuple[float, float]:
        """The weights and tokens of least loss of all with 6 N D = `flops` (equation 4 there)."""
        total = self.alpha + self.beta
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        return (
            ratio * (flops / 6) ** (self.beta / total),
            (flops / 6) ** (self.alpha / total) / ratio,
        )


def lacking(sizes: Sequence[float], tokens: Sequence[float]) -> str | None:
    """What runs of these sizes and tokens lack to determine a law; None: nothing."""
    number, different = len(sizes), len({round(size) for size in sizes})
    ratios = len({round(math.log(d / n), 1) for n, d in zip(sizes, tokens, strict=True)})
    if number >= FEWEST and different >= FEWEST_SIZES and ratios >= FEWEST_RATIOS:
        return None
    given = f"{count(number, 'run')} of {count(different, 'size')} and {count(ratios, 'ratio')}"
    return (
        f"a law needs at least {FEWEST} runs, of {FEWEST_SIZES} or more --sizes and "
        f"{FEWEST_RATIOS} or more --tokens-per-parameter"
        + (f"; there {'is' if number == 1 else 'are'} {given} of tokens to size" if number else "")
    )


def fit_law(sizes: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> Law:
    """The law that fits `losses` of runs of these sizes and tokens best.

    Raises:
        ConfigError: the runs do not determine it.
    """
    if (problem := lacking(sizes, tokens)) is not None:
        raise ConfigError(problem)
    x, y, log_losses = np.log(sizes), np.log(tokens), np.log(losses)
    # Around the middle, a and alpha (b and beta) hardly depend on each other.
    middle = x.mean(), y.mean()
    starts = _starts(x - middle[0], y - middle[1], np.asarray(losses, float))
    found, badness = _descend(starts, x - middle[0], y - middle[1], log_losses)
    sensible = (found[:, 1] > 0) & (found[:, 3] > 0)
    badness = np.where(sensible & np.isfinite(badness), badness, np.inf)
    best = found[int(badness.argmin())]
    if not np.isfinite(badness).any():
        raise ConfigError("the losses do not fall with size and tokens; no law fits them")
    log_a, alpha, log_b, beta, log_e = best
    return Law(
        floor=float(np.exp(log_e)),
        a=float(np.exp(log_a + alpha * middle[0])),
        alpha=float(alpha),
        b=float(np.exp(log_b + beta * middle[1])),
        beta=float(beta),
    )


def _starts(x: Array, y: Array, losses: Array) -> Array:
    """(starts, 5): log a, alpha, log b, beta, log E around the middle."""
    least, mean = losses.min(), losses.mean()
    rows = []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            for share in _FLOORS:
                rest = max(mean - share * least, 1e-3)
                for of_size in (0.25, 0.75):
                    parts = of_size * rest, (1 - of_size) * rest
                    rows.append([np.log(parts[0]), alpha, np.log(parts[1]), beta])
                    rows[-1].append(np.log(share * least))
    return np.array(rows)


def _descend(p: Array, x: Array, y: Array, target: Array) -> tuple[Array, Array]:
    """Where every start (starts, 5) ends, and the Huber loss there."""
    damping = np.full(len(p), 1e-2)
    residuals, jacobian = _model(p, x, y, target)
    badness = _huber(residuals)
    for _ in range(_ITERATIONS):
        weights = np.minimum(1.0, DELTA / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * weights[:, :, None]
        normal = np.einsum("sni,snj->sij", weighted, jacobian)
        gradient = np.einsum("sni,sn->si", weighted, residuals)
        scale = np.einsum("sii->si", normal) + 1e-12
        ridge = (damping[:, None] * scale)[:, :, None] * np.eye(5)
        step = np.linalg.solve(normal + ridge, gradient[:, :, None])[:, :, 0]
        tried = p - np.clip(step, -2.0, 2.0)
        tried_residuals, tried_jacobian = _model(tried, x, y, target)
        tried_badness = _huber(tried_residuals)
        better = tried_badness < badness
        p = np.where(better[:, None], tried, p)
        residuals = np.where(better[:, None], tried_residuals, residuals)
        jacobian = np.where(better[:, None, None], tried_jacobian, jacobian)
        badness = np.where(better, tried_badness, badness)
        damping = np.clip(np.where(better, damping / 3, damping * 2), 1e-12, 1e12)
    return p, badness


def _model(p: Array, x: Array, y: Array, target: Array) -> tuple[Array, Array]:
    """Residuals (starts, runs) of the logarithm, and their derivatives (starts, runs, 5)."""
    log_a, alpha, log_b, beta, log_e = (p[:, k, None] for k in range(5))
    parts = np.stack(
        np.broadcast_arrays(log_a - alpha * x, log_b - beta * y, log_e + np.zeros_like(x)), axis=-1
    )
    top = parts.max(axis=-1, keepdims=True)
    powers = np.exp(parts - top)
    total = powers.sum(axis=-1, keepdims=True)
    share = powers / total  # of each part in the loss
    residuals = (top + np.log(total))[..., 0] - target
    of_size, of_tokens, of_floor = share[..., 0], share[..., 1], share[..., 2]
    jacobian = np.stack([of_size, -of_size * x, of_tokens, -of_tokens * y, of_floor], axis=-1)
    return residuals, jacobian


def _huber(residuals: Array) -> Array:
    size = np.abs(residuals)
    each = np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA))
    return np.asarray(each.sum(axis=1))
