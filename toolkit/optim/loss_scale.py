"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), without waiting for the device."""

from typing import Any

import torch


class LossScale:
    """What the loss is multiplied by before backward, and gradients divided by after it.

    It is halved after a step whose gradients are not finite, which is skipped, and doubled after
    `interval` good steps in a row.
    """

    def __init__(
        self, device: torch.device, *, initial: float = 65_536.0, interval: int = 2_000
    ) -> None:
        self.scale = torch.tensor(initial, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)
        """Good steps since the scale last changed."""
        self._interval = interval

    def update(self, is_finite: torch.Tensor) -> None:
        """Adapt to a step whose gradients were finite, or not (0-d, bool)."""
        good = torch.where(is_finite, self._good + 1, 0)
        grows = good >= self._interval
        factor = torch.where(is_finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.scale = (self.scale * factor).clamp(min=1.0, max=2.0**24)
        self._good = torch.where(grows, 0, good)

    def state_dict(self) -> dict[str, Any]:
        """A copy on the host."""
        return {"scale": self.scale.cpu().clone(), "good": self._good.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""
        self.scale.copy_(state["scale"])
        self._good.copy_(state["good"])
