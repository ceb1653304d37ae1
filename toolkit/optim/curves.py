"""Schedules of one curve after the warm-up."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from toolkit.config.base import check_positive
from toolkit.config.named import users_object
from toolkit.errors import ConfigError
from toolkit.optim.schedule import Amount, Schedule, Span

_KEY = "train_module.scheduler.type"


class ConstantConfig(Schedule, kw_only=True, tag_field="type", tag="constant"):
    """Linear warm-up, then the peak rate to the end."""

    def after_warmup(self, progress: float) -> float:
        """The peak."""
        return 1.0


class LinearConfig(Schedule, kw_only=True, tag_field="type", tag="linear"):
    """Linear warm-up, then a straight line down to `alpha_f` of the peak."""

    warmup: Amount | None = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.0
    """Final rate as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """A straight line."""
        return 1.0 - (1.0 - self.alpha_f) * progress


class CosineConfig(Schedule, kw_only=True, tag_field="type", tag="cosine"):
    """Linear warm-up, then half a cosine to `alpha_f` of the peak (Loshchilov & Hutter 2017)."""

    warmup: Amount | None = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.1
    """Final rate as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Half a cosine."""
        return self.alpha_f + (1.0 - self.alpha_f) * 0.5 * (1.0 + math.cos(math.pi * progress))


class HalfCosineConfig(Schedule, kw_only=True, tag_field="type", tag="half_cosine"):
    """The second half of a cosine schedule: from its middle, where the rate falls fastest, to
    `alpha_f`. The peak is that of the whole cosine, so the warm-up ends at (1 + alpha_f) / 2."""

    warmup: Amount | None = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.1
    """Final rate as a fraction of the peak."""

    def top(self, peak: float) -> float:
        """The middle of the cosine."""
        return self.after_warmup(0.0)

    def after_warmup(self, progress: float) -> float:
        """A quarter of a cosine's period, from pi / 2 to pi."""
        cosine = math.cos(math.pi * (1.0 + progress) / 2)
        return self.alpha_f + (1.0 - self.alpha_f) * 0.5 * (1.0 + cosine)


class CosineLinearConfig(CosineConfig, kw_only=True, tag_field="type", tag="cosine_linear"):
    """A cosine schedule, left before its end for a linear decay to `decay_min_lr`."""

    decay_fraction: float | None = 0.1
    """Length of the decay as a fraction of the run."""


class WSDConfig(ConstantConfig, kw_only=True, tag_field="type", tag="wsd"):
    """Warm-up, stable, decay: the peak, and a decay at the end (Hu et al. 2024, MiniCPM)."""

    warmup: Amount | None = 100
    """Length of the linear warm-up, in `units`."""
    decay_fraction: float | None = 0.1
    """Length of the decay as a fraction of the run."""


class _FromTheWarmup(Schedule, kw_only=True):
    """Curves whose scale is the length of the warm-up, not that of the run."""

    warmup: Amount | None = 100
    """Length of the linear warm-up, in `units`; the curve is a function of current / warmup."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.warmup_fraction and not self.warmup:
            raise ValueError("warmup must be greater than 0: the curve is told in lengths of it")


def _in_warmups(current: Amount, warmup: Amount) -> float:
    # A fraction of a short run may be no step at all.
    return current / warmup if warmup else max(1, current)


class InvSqrtConfig(_FromTheWarmup, kw_only=True, tag_field="type", tag="inv_sqrt"):
    """Warm-up, then sqrt(warmup / current), towards `alpha_f` (Vaswani et al. 2017)."""

    alpha_f: float = 0.1
    """Rate that is approached, as a fraction of the peak."""

    def curve(self, current: Amount, warmup: Amount, total: Amount, peak: float) -> float:
        """Does not depend on `total`."""
        return self.alpha_f + (1.0 - self.alpha_f) * math.sqrt(1 / _in_warmups(current, warmup))


class PowerConfig(_FromTheWarmup, kw_only=True, tag_field="type", tag="power"):
    """Warm-up, then (current / warmup)^b, then a decay (Shen et al. 2024, "Power Scheduler"): until
    the decay the rate does not depend on the length of the run."""

    b: float = -0.51
    """Exponent, below 0; the default is the paper's."""
    decay_fraction: float | None = 0.1
    """Length of the decay as a fraction of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.b < 0:
            raise ValueError(f"b must be less than 0, so that the rate falls: {self.b}")

    def curve(self, current: Amount, warmup: Amount, total: Amount, peak: float) -> float:
        """Does not depend on `total`."""
        return _in_warmups(current, warmup) ** self.b


class ExponentialConfig(Schedule, kw_only=True, tag_field="type", tag="exponential"):
    """The rate changes by the same factor at every step: it rises from `lr_min` to the peak, which
    finds the largest rate that trains (a range test, Smith 2017). With `alpha_f` it falls."""

    lr_min: float = 1e-9
    """Rate to begin with."""
    alpha_f: float | None = None
    """Fall from the peak to this fraction of it instead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "lr_min", "alpha_f")

    def top(self, peak: float) -> float:
        """Where the curve begins."""
        return self.curve(0, 0, 1, peak)

    def curve(self, current: Amount, warmup: Amount, total: Amount, peak: float) -> float:
        """A straight line in the logarithm of the rate."""
        rest = total - warmup
        progress = min(1.0, (current - warmup) / (rest if rest > 0 else 1))
        if self.alpha_f is not None:
            return self.alpha_f**progress
        return (self.lr_min / peak) ** (1.0 - progress) if peak else 1.0

    def _problems(self, span: Span) -> Iterator[ConfigError]:
        yield from super()._problems(span)
        if self.alpha_f is None and self.lr_min >= span.peak > 0:
            problem = f"{self.lr_min:g} is not below the peak {span.peak:g}; use less"
            yield ConfigError(problem, key=f"{span.key}.lr_min")


CurveConfig = (
    ConstantConfig
    | LinearConfig
    | CosineConfig
    | HalfCosineConfig
    | CosineLinearConfig
    | InvSqrtConfig
    | WSDConfig
    | PowerConfig
    | ExponentialConfig
)
"""Those that a stage of another schedule may have too."""


class ClassScheduleConfig(Schedule, kw_only=True, tag_field="type", tag="class"):
    """A schedule of your own, after the warm-up: `type: "my_module:MyClass"` names its class.

    `MyClass(**options)(progress)` gives the multiple of the peak rate for a progress from 0 to 1.
    """

    target: str
    """The class, as `module:Class`. Modules in the current folder are found too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Arguments of the class."""

    def after_warmup(self, progress: float) -> float:
        """What the user's object says."""
        return float(_users_schedule(self.target, msgspec.json.encode(self.options))(progress))

    def check(self) -> None:
        """Raise ConfigError where there is no such class, it does not take `options`, or what it
        makes gives no number."""
        schedule = _users_schedule(self.target, msgspec.json.encode(self.options))
        try:
            float(schedule(0.0))
        except Exception as error:
            problem = f"calling it with a progress fails: {type(error).__name__}: {error}"
            raise ConfigError(f"{self.target}: {problem}", key=_KEY) from error


@functools.cache
def _users_schedule(target: str, options: bytes) -> Callable[[float], float]:
    return users_object(target, key=_KEY, **msgspec.json.decode(options))
