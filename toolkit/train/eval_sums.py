"""Sums over evaluated tokens, and what they say: loss, perplexity, bits per byte.

Evaluation during training and `toolkit eval` add up and divide here, so they agree.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from toolkit.data.corpus import VAL
from toolkit.data.evaluation import EvalLoader
from toolkit.models.kernels import widest_float

Batch = dict[str, torch.Tensor]


class EvalSums(NamedTuple):
    """Sums over one evaluation batch on this rank, on the device."""

    loss: torch.Tensor
    """Summed cross entropy in nats."""
    num_targets: torch.Tensor
    """Number of target tokens."""


LossFunction = Callable[[Batch], EvalSums]
"""A model without gradients: a batch as `EvalLoader` gives them to the sums over its targets."""


class TokenSums(NamedTuple):
    """Over one set of evaluated tokens."""

    loss: float
    """Summed cross entropy in nats."""
    num_targets: float
    num_bytes: float
    """UTF-8 bytes of the targets' text; 0 where that is not known."""
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """`loss` (nats per target), `ppl`, `num_targets`, `seconds`, and where the text is known,
        `bits_per_byte` = nats / ln 2 / bytes. Without targets there is no mean: NaN."""
        mean = self.loss / self.num_targets if self.num_targets else math.nan
        numbers: dict[str, Any] = {
            "loss": mean,
            "ppl": math.exp(min(mean, 700.0)),
            "num_targets": int(self.num_targets),
            "seconds": self.seconds,
        }
        if self.num_bytes:
            numbers["bits_per_byte"] = self.loss / math.log(2) / self.num_bytes
        return numbers


def total_sums(sums: Iterable[TokenSums]) -> TokenSums:
    """All sets together; their bytes are known where those of each are."""
    loss, num_targets, num_bytes, seconds = zip(*sums, strict=True)
    known = sum(num_bytes) if all(num_bytes) else 0
    return TokenSums(sum(loss), sum(num_targets), known, sum(seconds))


def sum_batches(
    batches: Iterable[Batch],
    loss_of: LossFunction,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """Summed loss and number of targets, float64 of shape `(2,)`, on the CPU; None: asked to stop
    between two batches. The device is read once, after the last batch."""
    totals: torch.Tensor | None = None
    for batch in batches:
        if should_stop():
            return None
        sums = loss_of(batch)
        wide = widest_float(sums.loss.device)
        pair = torch.stack([sums.loss.to(wide), sums.num_targets.to(wide)])
        totals = pair if totals is None else totals + pair
    return torch.zeros(2, dtype=torch.float64) if totals is None else totals.cpu().double()


def evaluate_sets(
    loaders: Mapping[str, EvalLoader],
    loss_of: LossFunction,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    reduce: Callable[[torch.Tensor], Any] = lambda totals: None,
) -> dict[str, TokenSums] | None:
    """Sums of every set of validation instances, and where several were held out of the training
    data, of these together as "val", last; None: asked to stop. `reduce` adds up, in place, the
    sums of all ranks of one set."""
    found: dict[str, TokenSums] = {}
    for name, loader in loaders.items():
        started = time.perf_counter()
        totals = sum_batches(loader, loss_of, should_stop=should_stop)
        if totals is None:
            return None
        reduce(totals)
        loss, num_targets = totals.tolist()
        num_bytes = num_targets * loader.bytes_per_token
        found[name] = TokenSums(loss, num_targets, num_bytes, time.perf_counter() - started)
    held_out = [sums for name, sums in found.items() if loaders[name].is_held_out]
    if len(held_out) > 1:
        found[VAL] = total_sums(held_out)
    return found
