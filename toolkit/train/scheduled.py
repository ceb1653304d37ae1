"""Settings that follow schedules: the learning rate, and what `train_module.schedules` names.

Every group of the optimizer is multiplied by the same factor, so groups keep their ratios. Values
are Python numbers that the optimizer's kernels are called with: nothing waits for the device.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from toolkit.errors import ConfigError, ErrorList
from toolkit.optim.config import AdamW8bitConfig, Optimizer
from toolkit.optim.schedule import Schedule

if TYPE_CHECKING:
    import torch

    from toolkit.train.config import TransformerTrainModuleConfig
    from toolkit.train.timeline import Progress

LR, Z_LOSS = "lr", "z_loss_multiplier"
KEY = "train_module.schedules"
_BOUNDED = ("betas", "beta1", "beta2", "momentum")
"""Decays of averages, which must stay below 1."""


def settings_of(optim: Optimizer) -> dict[str, float]:
    """The numbers that a schedule may multiply, by name: `weight_decay`, `betas.0`."""
    return {
        name: value
        for name, value in _numbers(optim.settings)
        if name != LR and isinstance(value, float)
    }


def check_schedules(config: "TransformerTrainModuleConfig") -> None:
    """Check the schedule of the rate, and that `train_module.schedules` names settings that there
    are, and that are not zero. Raises ConfigError."""
    found, known = ErrorList(), settings_of(config.optim)
    found.ask(config.scheduler.check)
    for name, schedule in config.schedules.items():
        key, value = f"{KEY}.{name}", known.get(name)
        with found.collecting():
            if name == LR:
                raise ConfigError("the learning rate follows train_module.scheduler", key=key)
            if name == Z_LOSS:
                if config.z_loss_multiplier is None:
                    problem = f"there is no z-loss; set train_module.{Z_LOSS} too, its peak"
                    raise ConfigError(problem, key=key)
                if config.compile_model is True:
                    problem = (
                        "each value would be compiled anew (train_module.compile_model); use one "
                        "without the other"
                    )
                    raise ConfigError(problem, key=key)
            elif value is None:
                names = [*known, Z_LOSS]
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise ConfigError(f"no setting that a schedule can change; {hint}", key=key)
            elif isinstance(config.optim, AdamW8bitConfig):
                problem = "its step is compiled, and each value would be compiled anew; use adamw"
                raise ConfigError(problem, key=key)
            elif value == 0:
                problem = "is 0, and a schedule multiplies it; give it a value, its peak"
                raise ConfigError(f"train_module.optim.{name} {problem}", key=key)
            schedule.check()
    found.raise_any()


def bound_of(name: str) -> float | None:
    """What the setting must stay below; None: it has no bound."""
    return 1.0 if name.partition(".")[0] in _BOUNDED else None


def largest_of(optim: Optimizer, name: str) -> float:
    """The largest value that a group of parameters has of a setting in `settings_of`."""
    of_groups = (dict(_numbers(override.opts)).get(name) for override in optim.group_overrides)
    return max([settings_of(optim)[name], *(value for value in of_groups if value is not None)])


class ScheduledSettings:
    """The settings of an optimizer's groups that follow schedules."""

    def __init__(
        self, config: "TransformerTrainModuleConfig", optimizer: "torch.optim.Optimizer"
    ) -> None:
        """The groups of `optimizer` have their own values, which are multiplied. Raises
        ConfigError: see `check_schedules`."""
        check_schedules(config)
        own = {LR: config.optim.lr, **settings_of(config.optim)}
        self._z_loss = config.z_loss_multiplier or 0.0
        self._z_loss_schedule = config.schedules.get(Z_LOSS)
        self._schedules: dict[str, tuple[Schedule, float]] = {LR: (config.scheduler, own[LR])}
        for name, schedule in config.schedules.items():
            if name != Z_LOSS:
                self._schedules[name] = schedule, own[name]
        self._optimizer = optimizer
        self._peaks = [
            {name: float(value) for name, value in _numbers(group)}
            for group in optimizer.param_groups
        ]

    def apply(self, progress: "Progress") -> dict[str, float]:
        """Set all values for this step; those of the optimizer's own settings, to be recorded."""
        values = {}
        for name, (schedule, own) in self._schedules.items():
            factor = factor_at(schedule, progress, own, name)
            for group, peaks in zip(self._optimizer.param_groups, self._peaks, strict=True):
                if name in peaks:
                    _set(group, name, peaks[name] * factor)
            values[name] = own * factor
        if self._z_loss_schedule is not None:
            values[Z_LOSS] = self.z_loss(progress)
        return values

    def z_loss(self, progress: "Progress | None") -> float:
        """The multiplier of the z-loss in this step; None: without a schedule."""
        if self._z_loss_schedule is None or progress is None:
            return self._z_loss
        return self._z_loss * factor_at(self._z_loss_schedule, progress, self._z_loss, Z_LOSS)


def factor_at(schedule: Schedule, progress: "Progress", peak: float, name: str) -> float:
    """What the setting `name`, of value `peak`, is multiplied by in this step. Raises ConfigError:
    a schedule of the user's own raises, or gives no number of 0 or more."""
    current, total, step_size = progress.position(schedule.units)
    key = "train_module.scheduler" if name == LR else f"{KEY}.{name}"
    try:
        factor = schedule.factor(current, total, step_size=step_size, peak=peak)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"step {progress.step + 1}: {what}", key=key) from error
    if not 0.0 <= factor < math.inf:
        problem = f"step {progress.step + 1}: gives {factor!r}; a factor is a number of 0 or more"
        raise ConfigError(problem, key=key)
    return factor


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, tuple | list) and name != "params":
            found = ((f"{name}.{number}", item) for number, item in enumerate(value))
            yield from ((key, item) for key, item in found if item is not None)
        elif (isinstance(value, float | int) and not isinstance(value, bool)) or _is_tensor(value):
            yield name, value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "fill_")  # without torch: dry runs check schedules too


def _set(group: dict[str, Any], name: str, value: float) -> None:
    name, _, number = name.partition(".")
    if number:
        values = list(group[name])
        values[int(number)] = value
        group[name] = tuple(values)
    elif _is_tensor(group[name]):  # a compiled step reads it
        group[name].fill_(value)
    else:
        group[name] = value
