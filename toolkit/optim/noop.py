"""An optimizer that changes nothing."""

from collections.abc import Iterable
from typing import Any

import torch


class Noop(torch.optim.Optimizer):
    """Leaves weights as they are, and keeps no state."""

    takes_found_inf = True

    def __init__(self, params: Iterable[Any], lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""
