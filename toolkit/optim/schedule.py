"""`Schedule`, the base of all schedules: pure functions of step, tokens or epochs.

A schedule gives the factor by which a setting's own value (the peak) is multiplied: a warm-up, then
the curve of its type, then a decay where there is one. Parameter groups keep their ratios, as all
are multiplied alike.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.errors import ConfigError, ErrorList
from toolkit.wording import count

Units = Literal["steps", "tokens", "epochs"]
Amount = int | float
"""A number of `units`. Steps and tokens are whole numbers, epochs need not be."""
Shape = Literal["linear", "cosine", "sqrt"]

_NOUNS = {"steps": "step", "tokens": "token", "epochs": "epoch"}


class Span(NamedTuple):
    """The run, as a schedule is checked against it."""

    total: Amount
    """Its length, in the schedule's units."""
    peak: float
    """The value that the schedule multiplies."""
    key: str
    """Dotted path of the schedule."""
    length_key: str = "trainer.max_duration"
    """What decides `total`."""
    refuses_warmup: bool = True
    """Whether a warm-up that is longer than the run is refused, else noticed."""


class Schedule(Config, kw_only=True):
    """A linear warm-up, the curve of its type, and a decay where one is asked for."""

    units: Units = "steps"
    """What lengths and points count: the argument of the schedule."""
    warmup: Amount | None = 0
    """Length of the linear warm-up, in `units`."""
    warmup_fraction: float | None = None
    """The same as a fraction of the run; takes the place of `warmup`."""
    warmup_min_lr: float = 0.0
    """Value that the warm-up starts from."""
    t_max: Amount | None = None
    """Where the schedule ends, in `units`; null: with the run (`trainer.max_duration`)."""
    decay: Amount | None = None
    """Length of a decay to `decay_min_lr` at the end, in `units`; null: `decay_fraction`."""
    decay_fraction: float | None = None
    """The same as a fraction of the run; null: no decay of its own."""
    decay_from: Amount | None = None
    """Start the decay here, in `units`, whatever the schedule would do then (a late decay). Without
    a length it lasts to the end."""
    decay_min_lr: float = 0.0
    """Value that the decay ends at."""
    decay_shape: Shape = "linear"
    """Course of the decay: a straight line, half a cosine, or 1 - sqrt (Hägele et al. 2024)."""

    def __post_init__(self) -> None:
        names = {"warmup", "warmup_min_lr", "decay", "decay_from", "decay_min_lr", "alpha_f"}
        check_not_negative(self, *(names & set(self.__struct_fields__)))
        check_positive(self, "t_max")
        lines = []
        for name in ("warmup", "decay"):
            fraction = getattr(self, f"{name}_fraction")
            if fraction is not None and not 0.0 <= fraction <= 1.0:
                lines.append(f"{name}_fraction must lie between 0 and 1: {fraction}")
            if self._is_given(name) and self._is_given(f"{name}_fraction"):
                lines.append(f"{name}_fraction: {name} is given too; set one of them to null")
        if (alpha_f := getattr(self, "alpha_f", None)) is not None and alpha_f > 1.0:
            lines.append(f"alpha_f must be a fraction of the peak, 0 to 1: {alpha_f}")
        if self.units != "epochs":
            for name in ("warmup", "decay", "decay_from", "t_max"):
                value = getattr(self, name)
                if isinstance(value, float) and not value.is_integer():
                    lines.append(f"{name} must be a whole number of {self.units}: {value}")
        if lines:
            raise ValueError("\n".join(lines))

    def factor(
        self,
        current: Amount,
        total: Amount,
        *,
        step_size: Amount = 1,
        peak: float = 1.0,
        start: float | None = None,
    ) -> float:
        """Multiple of the peak at `current` of `total`.

        Args:
            current, total: done before the step, and in the whole run; in `units`.
            step_size: what this step adds to `current`.
            peak: the value that is multiplied, which `warmup_min_lr` and `decay_min_lr` are told
                in the units of.
            start: where the warm-up starts, as a multiple; default: `warmup_min_lr`.
        """
        total = self.t_max or total
        if start is None:
            start = _ratio(self.warmup_min_lr, peak)
        found = self.decay_span(total)
        if found is None or current < found[0]:
            return self._before_decay(current, total, step_size, peak, start)
        begin, length = found
        top = self._before_decay(begin, total, step_size, peak, start)
        floor = _ratio(self.decay_min_lr, peak)
        return floor + (top - floor) * remaining(self.decay_shape, (current - begin) / length)

    def after_warmup(self, progress: float) -> float:
        """Multiple of the peak; `progress` goes from 0 (end of the warm-up) to 1 (the end)."""
        raise NotImplementedError

    def curve(self, current: Amount, warmup: Amount, total: Amount, peak: float) -> float:
        """Multiple of the peak at `current`, which is not in the warm-up."""
        rest = total - warmup
        return self.after_warmup(min(1.0, (current - warmup) / (rest if rest > 0 else 1)))

    def top(self, peak: float) -> float:
        """Multiple of the peak that the warm-up ends at."""
        return 1.0

    def check(self) -> None:
        """Raise ConfigError where a schedule of the user's own cannot be used."""

    def length_of_warmup(self, total: Amount) -> Amount:
        """In `units`."""
        return self._length("warmup", total) or 0

    def decay_span(self, total: Amount) -> tuple[Amount, Amount] | None:
        """(begin, length) of the decay, in `units`; None: there is none."""
        length = self._length("decay", total)
        if self.decay_from is not None:
            length = max(0, total - self.decay_from) if length is None else length
            return self.decay_from, length or 1
        # A recipe's decay may be longer than a run that only tries it.
        return (max(0, total - length), min(length, total)) if length else None

    def joints(self, total: Amount) -> list[Amount]:
        """Where the course changes, in `units`; for plots."""
        total = self.t_max or total
        found = self.decay_span(total)
        ends = () if found is None else (found[0], sum(found))
        return [self.length_of_warmup(total), *ends]

    def check_length(self, span: Span) -> None:
        """Raise ConfigError where the schedule does not fit a run of this length: it never gets
        beyond its warm-up, never starts to decay, or is not through at the end."""
        found = ErrorList(self._problems(span))
        found.raise_any()

    def notices(self, span: Span) -> Iterator[str]:
        """What does less than it says, in a line each."""
        total = self.t_max or span.total
        warmup = self.length_of_warmup(total)
        if warmup > total and not self._is_refused(span):
            yield (
                f"{span.key}.warmup is {self.said(warmup)} and the whole run ({span.length_key}) "
                f"{self.said(total)}: the rate never gets beyond the warm-up"
            )
        decay = self.decay_span(total)
        if decay is not None and self.decay_from is not None and sum(decay) < span.total:
            yield (
                f"{span.key}: the decay is over after {self.said(sum(decay))}, and the run goes on "
                f"at {self.decay_min_lr:g} to {self.said(span.total)}; end it there with "
                f"{span.length_key}, or make decay longer"
            )

    def said(self, amount: Amount) -> str:
        """`2,000 steps`, `0.5 epochs`."""
        noun = _NOUNS[self.units]
        return count(int(amount), noun) if int(amount) == amount else f"{amount:,} {noun}s"

    def _problems(self, span: Span) -> Iterator[ConfigError]:
        total, key = self.t_max or span.total, span.key
        limit = f"{key}.t_max" if self.t_max else span.length_key
        for name in ("warmup_min_lr", "decay_min_lr"):
            if (value := getattr(self, name)) and value >= span.peak > 0:
                problem = f"{value:g} is not below the peak {span.peak:g}; use less"
                yield ConfigError(problem, key=f"{key}.{name}")
        warmup = self.length_of_warmup(total)
        if warmup > total and self._is_refused(span):
            yield ConfigError(
                f"{self.said(warmup)}, and the whole run ({limit}) is {self.said(total)}: it never "
                f"gets beyond the warm-up; use {_most(total)} or less, or warmup_fraction (to try "
                "the beginning of a run, trainer.hard_stop ends it early)",
                key=f"{key}.warmup",
            )
            return
        decay = self.decay_span(total)
        if decay is None:
            return
        begin, length = decay
        asked_for = self._length("decay", total)
        name = "decay" if asked_for == self.decay else "decay_fraction"
        asked = (
            self._is_refused(span) or self._is_given("decay") or self._is_given("decay_fraction")
        )
        is_longer = asked_for is not None and asked_for > total
        if self.decay_from is None and asked and (begin < warmup <= total or is_longer):
            left = max(0, total - warmup) if warmup <= total else total
            most = left if name == "decay" else left / total
            yield ConfigError(
                f"the decay takes {self.said(asked_for or length)}, and {self.said(left)} of the "
                f"run ({limit}: {self.said(total)}) are left after the warm-up; use {_most(most)} "
                "or less",
                key=f"{key}.{name}",
            )
        elif self.decay_from is None and begin >= span.total:
            yield ConfigError(
                f"is {self.said(total)}, and the run ({span.length_key}) ends after "
                f"{self.said(span.total)}: the decay never starts; use {_most(span.total)}, or a "
                "longer run",
                key=f"{key}.t_max",
            )
        elif self.decay_from is not None and begin >= total:
            yield ConfigError(
                f"the run ({limit}) ends after {self.said(total)}, so this decay never starts; use "
                f"less than {_shown(total)}, or a longer run",
                key=f"{key}.decay_from",
            )
        elif self.decay_from is not None and begin + length > total:
            yield ConfigError(
                f"from {_shown(begin)} on the decay takes {self.said(length)}, and the run "
                f"({limit}) ends after {self.said(total)}: it never ends; use a decay of "
                f"{_most(total - begin)} or less, or set {limit} to {self.said(begin + length)}",
                key=f"{key}.{name}",
            )

    def _before_decay(
        self, current: Amount, total: Amount, step_size: Amount, peak: float, start: float
    ) -> float:
        warmup = self.length_of_warmup(total)
        if current < warmup:
            # The first step (current = 0) already moves; the last of the warm-up is at the top.
            done = min(1.0, (current + step_size) / warmup)
            return start + (self.top(peak) - start) * done
        return self.curve(current, warmup, total, peak)

    def _length(self, name: str, total: Amount) -> Amount | None:
        value, fraction = getattr(self, name), getattr(self, f"{name}_fraction")
        if fraction is not None and (value is None or self._is_given(f"{name}_fraction")):
            return fraction * total if self.units == "epochs" else round(fraction * total)
        return value

    def _is_refused(self, span: Span) -> bool:
        return span.refuses_warmup and self._is_given("warmup")

    def _is_given(self, name: str) -> bool:
        """Whether the field has another value than the type's own, or null."""
        return getattr(self, name) not in (None, default_of(type(self), name))


def remaining(shape: Shape, progress: float) -> float:
    """What is left of a way, from 1 to 0, where `progress` of it (0 to 1, then more) is done."""
    progress = min(1.0, max(0.0, progress))
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (math.sqrt(progress) if shape == "sqrt" else progress)


def default_of(config: type[Config], name: str) -> Any:
    """The value of a field that is not given."""
    fields: Any = config.__struct_fields__
    return config.__struct_defaults__[fields.index(name) - len(fields)]


def _ratio(value: float, peak: float) -> float:
    return value / peak if value and peak else 0.0


def _most(amount: Amount) -> str:
    """`_shown`, never more than `amount`: what "or less" is said of."""
    if int(amount) == amount:
        return _shown(amount)
    digits = 3 - math.floor(math.log10(abs(amount)))
    return f"{math.floor(amount * 10**digits) / 10**digits:.4g}"


def _shown(amount: Amount) -> str:
    return f"{int(amount):,}" if int(amount) == amount else f"{amount:.4g}"
