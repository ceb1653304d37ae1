"""The WSD-S schedule: a decay at the end of each of several periods."""

import itertools
from collections.abc import Iterator

from toolkit.errors import ConfigError
from toolkit.optim.schedule import Amount, Schedule, Span, remaining


class WSDSConfig(Schedule, kw_only=True, tag_field="type", tag="wsds"):
    """WSD-S (Wen et al. 2024): periods at the peak, each with a decay at its end, after which the
    next one goes on at the peak. The end of each period is a finished model."""

    warmup: Amount | None = None
    """Length of the linear warm-up, in `units`; part of the first period."""
    warmup_fraction: float | None = 0.05
    """The same as a fraction of the run; takes the place of `warmup`."""
    period_lengths: tuple[Amount, ...] = ()
    """Length of each period, in `units`; empty: `period_fractions`."""
    period_fractions: tuple[float, ...] = (0.25, 0.25, 0.5)
    """Length of each period as a fraction of the run; 1 in all."""
    period_lr_multipliers: tuple[float, ...] | None = None
    """Peak of each period as a multiple of the peak; null: 1 for all."""
    decay_fraction: float | None = 0.1
    """Length of each decay as a fraction of its period."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lines = []
        for name in ("period_lengths", "period_fractions", "period_lr_multipliers"):
            values = getattr(self, name)
            if values is not None and not all(value > 0 for value in values):
                lines.append(f"{name} must each be greater than 0: {list(values)}")
        if not self.period_lengths and abs(sum(self.period_fractions) - 1.0) > 1e-6:
            lines.append(
                f"period_fractions must add up to 1: {list(self.period_fractions)} are "
                f"{sum(self.period_fractions):g}"
            )
        number = len(self.period_lengths or self.period_fractions)
        if self.period_lr_multipliers is not None and len(self.period_lr_multipliers) != number:
            lines.append(
                f"period_lr_multipliers has {len(self.period_lr_multipliers)} values; give one for "
                f"each of the {number} periods"
            )
        if lines:
            raise ValueError("\n".join(lines))

    def periods(self, total: Amount) -> list[tuple[Amount, Amount, float]]:
        """(begin, end, multiple of the peak) of each period."""
        if self.period_lengths:
            ends = list(itertools.accumulate(self.period_lengths))
        else:
            fractions = itertools.accumulate(self.period_fractions)
            ends = [self._rounded(fraction * total) for fraction in fractions]
        peaks = self.period_lr_multipliers or (1.0,) * len(ends)
        return list(zip([0, *ends[:-1]], ends, peaks, strict=True))

    def decay_span(self, total: Amount) -> tuple[Amount, Amount] | None:
        """A late decay; those of the periods are part of the curve."""
        return super().decay_span(total) if self.decay_from is not None else None

    def top(self, peak: float) -> float:
        return (self.period_lr_multipliers or (1.0,))[0]

    def curve(self, current: Amount, warmup: Amount, total: Amount, peak: float) -> float:
        floor = self.decay_min_lr / peak if peak else 0.0
        for begin, end, top in self.periods(total):
            if current < end:
                length = self._decay_of(end - begin)
                left = remaining(self.decay_shape, 1 - (end - current) / length) if length else 1.0
                return floor + (top - floor) * left
        return floor

    def joints(self, total: Amount) -> list[Amount]:
        total = self.t_max or total
        found = [
            place
            for begin, end, _ in self.periods(total)
            for place in (begin, end - self._decay_of(end - begin), end)
        ]
        return [*super().joints(total), *found]

    def _decay_of(self, period: Amount) -> Amount:
        found = self._length("decay", period) or 0
        # A fraction of a short period is a step at least.
        is_fraction = self.decay is None and self.decay_fraction
        return max(1, found) if is_fraction and self.units != "epochs" else found

    def _rounded(self, amount: float) -> Amount:
        return amount if self.units == "epochs" else round(amount)

    def _problems(self, span: Span) -> Iterator[ConfigError]:
        yield from super()._problems(span)
        total, key = self.t_max or span.total, span.key
        warmup, periods = self.length_of_warmup(total), self.periods(total)
        for number, (begin, end, _) in enumerate(periods):
            left = end - max(begin, min(warmup, end))
            if (length := self._decay_of(end - begin)) > left:
                name = "decay" if self.decay is not None else "decay_fraction"
                yield ConfigError(
                    f"the decay of period {number} (from 0) takes {self.said(length)}, and "
                    f"{self.said(left)} of it are left; use {self.said(left)} or less, a longer "
                    "period, or in the first one a shorter warm-up",
                    key=f"{key}.{name}",
                )
        if (end := periods[-1][1]) < span.total and self.decay_from is None:
            yield ConfigError(
                f"the periods end after {self.said(end)}, and the run ({span.length_key}) after "
                f"{self.said(span.total)}: the rest would train at {self.decay_min_lr:g}; add a "
                f"period of {self.said(span.total - end)}, or end the run there",
                key=f"{key}.period_lengths",
            )
