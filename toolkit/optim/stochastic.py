"""AdamW whose moments are kept in bf16, rounded at random: up as often as keeps the mean.

bf16 has 8 bits: rounded to nearest, a second moment that decays by 5% a step could not grow or
shrink by less than 0.4% of itself. Rounding up with the probability of the part that is cut off
leaves every sum of updates right on average.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.foreach import prepare_gradients

_CHUNK = 1 << 22
"""Numbers that are updated at once: what is in between is 20 bytes each."""
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""splitmix64's constants (Steele et al. 2014), as signed numbers."""


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019), in fp32, with `exp_avg` and `exp_avg_sq` in bf16.

    `names` gives the names of parameters. What is rounded up is a function of (name, number of
    steps taken, place in the tensor), so runs that are resumed and replicas are bit-equal.
    """

    takes_found_inf = True

    def __init__(
        self,
        params: Iterable[Any],
        names: Mapping[str, Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self._keys = {parameter: _key_of(name) for name, parameter in names.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; uses up the gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            taken = prepare_gradients(self, [p.grad for p in params])
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["step"] += taken
                self._step(p, state, group, taken)

    def _step(self, p: Tensor, state: dict[str, Tensor], group: dict[str, Any], taken: Any) -> None:
        beta1, beta2 = group["betas"]
        step = state["step"].clamp(min=1.0)  # none is taken before the first
        rate = group["lr"] * taken
        correction1, correction2 = 1 - beta1**step, (1 - beta2**step).sqrt()
        key = _mixed(state["step"].long() + self._keys[p])
        assert p.grad is not None
        flat = [t.view(-1) for t in (p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])]
        parts = zip(*(tensor.split(_CHUNK) for tensor in flat), strict=True)
        for number, (weight, grad, first, second) in enumerate(parts):
            mean = first.float().lerp_(grad, (1 - beta1) * taken)
            square = second.float().lerp_(grad.square(), (1 - beta2) * taken)
            update = mean / correction1 / (square.sqrt() / correction2 + group["eps"])
            weight.mul_(1 - rate * group["weight_decay"]).sub_(update * rate)
            bits = random_bits(key, number * _CHUNK, weight.numel())
            first.copy_(rounded(mean, bits))
            second.copy_(rounded(square, bits >> 16))


def random_bits(key: Tensor, start: int, number: int) -> Tensor:
    """`(number,)` int64, of which each bit is set half of the time: a hash (splitmix64's) of a key,
    0-d int64, and of the places from `start` on."""
    return _mixed(torch.arange(start, start + number, device=key.device).add_(key))


def _mixed(numbers: Tensor) -> Tensor:
    """The hash of each of `numbers`, int64."""
    bits = numbers * _ODD[0]
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        bits.bitwise_xor_((bits >> shift) & ((1 << (64 - shift)) - 1)).mul_(factor)
    return bits.bitwise_xor_((bits >> 31) & ((1 << 33) - 1))


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 `values` in bf16: one of both neighbours, the nearer the likelier, by the lowest 16 of
    `bits`. A value that bf16 holds, infinite or not, stays."""
    whole = values.view(torch.int32) + (bits & 0xFFFF).int()
    return (whole & -0x10000).view(torch.float32).bfloat16()


def _key_of(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
