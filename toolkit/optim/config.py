"""Configs of optimizers and learning-rate schedules."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.check import FieldError, convert

if TYPE_CHECKING:
    import torch


class GroupOverride(Config, kw_only=True):
    """Other optimizer settings for the parameters whose names match a pattern."""

    params: list[str]
    """Shell-style patterns (`*`, `?`, `[...]`) over fully qualified parameter names. A pattern that
    matches nothing is an error."""

    opts: dict[str, float | bool | list[float]]
    """Settings to replace for these parameters, for example `{"weight_decay": 0.0}`."""


class AdamWConfig(Config, kw_only=True, tag_field="type", tag="adamw"):
    """AdamW (Loshchilov & Hutter 2019), torch's fused implementation."""

    lr: float = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    group_overrides: tuple[GroupOverride, ...] = ()
    """Other settings by parameter name; the first matching entry wins."""

    def __post_init__(self) -> None:
        check_positive(self, "lr", "eps")
        check_not_negative(self, "weight_decay")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must each be in [0, 1): {list(self.betas)}")
        _check_overrides(self, self.group_overrides)

    def groups(self, named_parameters: "dict[str, torch.nn.Parameter]") -> list[dict[str, Any]]:
        """Parameter groups by `group_overrides`, each with all its settings."""
        from toolkit.optim.groups import parameter_groups

        return parameter_groups(named_parameters, self._settings, self.group_overrides)

    def check_groups(self, names: Iterable[str]) -> None:
        """Check `group_overrides` against the names of the model's parameters."""
        from toolkit.optim.groups import check_overrides

        check_overrides(names, self._settings, self.group_overrides)

    def build(self, named_parameters: "dict[str, torch.nn.Parameter]") -> "torch.optim.Optimizer":
        """The optimizer over trainable `named_parameters`, in groups by `group_overrides`."""
        import torch

        return torch.optim.AdamW(self.groups(named_parameters), **self._settings, fused=True)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }


class SGDConfig(Config, kw_only=True, tag_field="type", tag="sgd"):
    """Stochastic gradient descent with optional momentum."""

    lr: float = 1e-2
    """Peak learning rate; the schedule multiplies it."""
    momentum: float = 0.0
    """Momentum factor; 0 keeps no state."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""
    group_overrides: tuple[GroupOverride, ...] = ()
    """Other settings by parameter name; the first matching entry wins."""

    def __post_init__(self) -> None:
        check_positive(self, "lr")
        check_not_negative(self, "momentum", "weight_decay")
        _check_overrides(self, self.group_overrides)

    def groups(self, named_parameters: "dict[str, torch.nn.Parameter]") -> list[dict[str, Any]]:
        """Parameter groups by `group_overrides`, each with all its settings."""
        from toolkit.optim.groups import parameter_groups

        return parameter_groups(named_parameters, self._settings, self.group_overrides)

    def check_groups(self, names: Iterable[str]) -> None:
        """Check `group_overrides` against the names of the model's parameters."""
        from toolkit.optim.groups import check_overrides

        check_overrides(names, self._settings, self.group_overrides)

    def build(self, named_parameters: "dict[str, torch.nn.Parameter]") -> "torch.optim.Optimizer":
        """The optimizer over trainable `named_parameters`, in groups by `group_overrides`."""
        import torch

        return torch.optim.SGD(self.groups(named_parameters), **self._settings, fused=True)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }


OptimConfig = AdamWConfig | SGDConfig


def _check_overrides(config: Config, overrides: tuple[GroupOverride, ...]) -> None:
    """Each override's settings must be ones that `config` itself could have, or `lr` 0."""
    for index, override in enumerate(overrides):
        opts = {k: v for k, v in override.opts.items() if (k, v) != ("lr", 0)}
        for name in opts.keys() & set(config.__struct_fields__):
            try:
                convert({"type": config.__struct_config__.tag, name: opts[name]}, type(config))
            except FieldError as error:
                raise ValueError(f"group_overrides.{index}.opts.{error}") from None


class ConstantConfig(Config, kw_only=True, tag_field="type", tag="constant"):
    """Linear warm-up, then the peak rate to the end."""

    units: Literal["steps", "tokens"] = "steps"
    """What `warmup` counts, and the argument of the schedule."""
    warmup: int = 0
    """Length of the linear warm-up, in `units`."""

    def __post_init__(self) -> None:
        check_not_negative(self, "warmup")

    def factor(self, current: int, total: int, *, step_size: int = 1) -> float:
        """Multiple of the peak rate at `current` of `total`; all in `units`, of which a training
        step takes `step_size`."""
        return _warmup_factor(current, self.warmup, step_size)


class LinearConfig(Config, kw_only=True, tag_field="type", tag="linear"):
    """Linear warm-up, then a straight line down to `alpha_f` of the peak."""

    units: Literal["steps", "tokens"] = "steps"
    """What `warmup` counts, and the argument of the schedule."""
    warmup: int = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.0
    """Final rate as a fraction of the peak."""

    def __post_init__(self) -> None:
        check_not_negative(self, "warmup", "alpha_f")

    def factor(self, current: int, total: int, *, step_size: int = 1) -> float:
        """Multiple of the peak rate at `current` of `total`; all in `units`, of which a training
        step takes `step_size`."""
        if current < self.warmup:
            return _warmup_factor(current, self.warmup, step_size)
        progress = _progress(current, self.warmup, total)
        return 1.0 - (1.0 - self.alpha_f) * progress


class CosineConfig(Config, kw_only=True, tag_field="type", tag="cosine"):
    """Linear warm-up, then half a cosine to `alpha_f` of the peak (Loshchilov & Hutter 2017)."""

    units: Literal["steps", "tokens"] = "steps"
    """What `warmup` counts, and the argument of the schedule."""
    warmup: int = 100
    """Length of the linear warm-up, in `units`."""
    alpha_f: float = 0.1
    """Final rate as a fraction of the peak."""

    def __post_init__(self) -> None:
        check_not_negative(self, "warmup", "alpha_f")

    def factor(self, current: int, total: int, *, step_size: int = 1) -> float:
        """Multiple of the peak rate at `current` of `total`; all in `units`, of which a training
        step takes `step_size`."""
        import math

        if current < self.warmup:
            return _warmup_factor(current, self.warmup, step_size)
        progress = _progress(current, self.warmup, total)
        return self.alpha_f + (1.0 - self.alpha_f) * 0.5 * (1.0 + math.cos(math.pi * progress))


SchedulerConfig = ConstantConfig | LinearConfig | CosineConfig


def _warmup_factor(current: int, warmup: int, step_size: int) -> float:
    # The first step (current = 0) already moves; the last of the warm-up is at the peak.
    return min(1.0, (current + step_size) / warmup) if warmup > 0 else 1.0


def _progress(current: int, warmup: int, total: int) -> float:
    return min(1.0, (current - warmup) / max(1, total - warmup))
