"""Learning-rate schedules: pure functions of the step or of the tokens seen."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from toolkit.config import Config
from toolkit.config.base import check_not_negative
from toolkit.config.named import users_object
from toolkit.errors import ConfigError

_KEY = "train_module.scheduler.type"


class Schedule(Config, kw_only=True):
    """Base of the schedules: a linear warm-up, then what `after_warmup` says."""

    units: Literal["steps", "tokens"] = "steps"
    """What `warmup` counts, and the argument of the schedule."""
    warmup: int = 0
    """Length of the linear warm-up, in `units`."""

    def __post_init__(self) -> None:
        check_not_negative(self, *({"warmup", "alpha_f"} & set(self.__struct_fields__)))

    def factor(self, current: int, total: int, *, step_size: int = 1) -> float:
        """Multiple of the peak rate at `current` of `total`; all in `units`, of which a training
        step takes `step_size`."""
        if current < self.warmup:
            # The first step (current = 0) already moves; the last of the warm-up is at the peak.
            return min(1.0, (current + step_size) / self.warmup)
        return self.after_warmup(min(1.0, (current - self.warmup) / max(1, total - self.warmup)))

    def after_warmup(self, progress: float) -> float:
        """Multiple of the peak rate; `progress` goes from 0 (end of the warm-up) to 1 (the end)."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ConfigError where a schedule of the user's own cannot be used."""


class ConstantConfig(Schedule, kw_only=True, tag_field="type", tag="constant"):
    """Linear warm-up, then the peak rate to the end."""

    def after_warmup(self, progress: float) -> float:
        """The peak."""
        return 1.0


class LinearConfig(Schedule, kw_only=True, tag_field="type", tag="linear"):
    """Linear warm-up, then a straight line down to `alpha_f` of the peak."""

    warmup: int = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.0
    """Final rate as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """A straight line."""
        return 1.0 - (1.0 - self.alpha_f) * progress


class CosineConfig(Schedule, kw_only=True, tag_field="type", tag="cosine"):
    """Linear warm-up, then half a cosine to `alpha_f` of the peak (Loshchilov & Hutter 2017)."""

    warmup: int = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.1
    """Final rate as a fraction of the peak."""

    def after_warmup(self, progress: float) -> float:
        """Half a cosine."""
        return self.alpha_f + (1.0 - self.alpha_f) * 0.5 * (1.0 + math.cos(math.pi * progress))


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


SchedulerConfig = ConstantConfig | LinearConfig | CosineConfig | ClassScheduleConfig
