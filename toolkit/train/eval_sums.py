"""Sums over evaluated tokens, and what they say: loss, perplexity, bits per byte.

Evaluation during training and `toolkit eval` add up and divide here, so they agree.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
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
    means: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = MappingProxyType({})
    """Further results by name: a sum, and what it is divided by once all batches are added up."""
    is_language_model: bool = True
    """Whether `loss` is of tokens; else of units of preference data."""
    added: tuple[str, ...] = ()
    """Those of `means` that the loss consists of besides."""


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
    means: Mapping[str, tuple[float, float]] = MappingProxyType({})
    """See `EvalSums`."""
    is_language_model: bool = True
    added: tuple[str, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """`loss` (nats per target), `ppl`, `num_targets`, `seconds`, and where the text is known,
        `bits_per_byte` = nats / ln 2 / bytes. Without targets there is no mean: NaN. Of preference
        data: `loss` per unit, `num_units`, `seconds`, and the means of the objective."""
        mean = self.loss / self.num_targets if self.num_targets else math.nan
        if not self.is_language_model:
            means = {
                name: total / number if number else math.nan
                for name, (total, number) in self.means.items()
            }
            units = {"num_units": int(self.num_targets), "seconds": self.seconds}
            return {"loss": mean + sum(means[name] for name in self.added), **means, **units}
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
    loss, num_targets, num_bytes, seconds, means, kinds, added = zip(*sums, strict=True)
    known = sum(num_bytes) if all(num_bytes) else 0
    both = {
        name: (sum(each[name][0] for each in means), sum(each[name][1] for each in means))
        for name in means[0]
    }
    return TokenSums(sum(loss), sum(num_targets), known, sum(seconds), both, kinds[0], added[0])


def sum_batches(
    batches: Iterable[Batch],
    loss_of: LossFunction,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """Summed loss and number of targets, then sum and divisor of each of `EvalSums.means`: float64
    of shape `(2 + 2 * means,)`, on the CPU. None: asked to stop between two batches. The device is
    read once, after the last batch."""
    totals: torch.Tensor | None = None
    for batch in batches:
        if should_stop():
            return None
        sums = loss_of(batch)
        wide = widest_float(sums.loss.device)
        values = [sums.loss, sums.num_targets, *(v for pair in sums.means.values() for v in pair)]
        row = torch.stack([value.to(wide) for value in values])
        totals = row if totals is None else totals + row
    return torch.zeros(2, dtype=torch.float64) if totals is None else totals.cpu().double()


def evaluate_sets(
    loaders: Mapping[str, EvalLoader],
    loss_of: LossFunction,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    reduce: Callable[[torch.Tensor], Any] = lambda totals: None,
    begin: Callable[[str, EvalLoader], Any] = lambda name, loader: None,
) -> dict[str, TokenSums] | None:
    """Sums of every set of validation instances, and where several were held out of the training
    data, of these together as "val", last; None: asked to stop. `reduce` adds up, in place, the
    sums of all ranks of one set; `begin` is called before each of them."""
    found: dict[str, TokenSums] = {}
    for name, loader in loaders.items():
        started = time.perf_counter()
        begin(name, loader)
        last: list[EvalSums] = []

        def noted(batch: Batch, last: list[EvalSums] = last) -> EvalSums:
            last[:] = [loss_of(batch)]
            return last[0]

        totals = sum_batches(loader, noted, should_stop=should_stop)
        if totals is None:
            return None
        reduce(totals)
        loss, num_targets, *more = totals.tolist()
        is_language_model = last[0].is_language_model
        num_bytes = num_targets * loader.bytes_per_token if is_language_model else 0
        means = dict(zip(last[0].means, zip(more[::2], more[1::2], strict=True), strict=True))
        seconds = time.perf_counter() - started
        found[name] = TokenSums(
            loss, num_targets, num_bytes, seconds, means, is_language_model, last[0].added
        )
    held_out = [sums for name, sums in found.items() if loaders[name].is_held_out]
    if len(held_out) > 1:
        found[VAL] = total_sums(held_out)
    return found
