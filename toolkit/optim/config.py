"""Configs of optimizers, and their union. No torch."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from toolkit.config.base import check_positive
from toolkit.config.named import named, users_class, users_object
from toolkit.errors import ConfigError
from toolkit.optim.base import OPTIM_KEY, Optimizer, SkipStep


class AdamWConfig(Optimizer, kw_only=True, tag_field="type", tag="adamw"):
    """AdamW (Loshchilov & Hutter 2019), torch's fused implementation."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the denominator for numerical stability."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must each be in [0, 1): {list(self.betas)}")

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("torch.optim:AdamW")(
            self.groups(named_parameters), **self.settings, fused=True
        )


class SkipStepAdamWConfig(AdamWConfig, kw_only=True, tag_field="type", tag="skip_step_adamw"):
    """AdamW that leaves out steps whose loss or gradient norm is a spike (OLMo 2, Team OLMo 2025),
    decided on the device."""

    rolling_interval_length: int = 128
    """Accepted steps that a step is compared with; half as many must have been."""
    sigma_factor: float = 6.0
    """A loss or a gradient norm so many standard deviations above their mean is a spike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_skip_step(self)

    @property
    def skip_step(self) -> SkipStep:
        return SkipStep(self.rolling_interval_length, self.sigma_factor)


class SGDConfig(Optimizer, kw_only=True, tag_field="type", tag="sgd"):
    """Stochastic gradient descent with optional momentum."""

    lr: float = 1e-2
    """Peak learning rate; the schedule multiplies it."""
    momentum: float = 0.0
    """Momentum factor; 0 keeps no state."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient."""

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        return named("torch.optim:SGD")(self.groups(named_parameters), **self.settings, fused=True)


class ClassOptimConfig(Optimizer, kw_only=True, tag_field="type", tag="class"):
    """An optimizer of torch or your own: `type: "torch.optim:NAdam"` names its class, which is made
    as `NAdam(groups, lr=lr, **options)`. See `OptimizerTraits` for what the class may declare."""

    target: str
    """The class, as `module:Class`. Modules in the current folder are found too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further arguments of the class."""

    @property
    def settings(self) -> dict[str, Any]:
        """The rate and the options."""
        return {"lr": self.lr, **self.options}

    @property
    def setting_names(self) -> list[str]:
        """All arguments of the class but the first, which is the groups."""
        found = users_class(self.target, key=f"{OPTIM_KEY}.type")
        return list(inspect.signature(found).parameters)[1:]

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        groups = self.groups(named_parameters)
        return users_object(self.target, groups, key=f"{OPTIM_KEY}.type", **self.settings)

    def check_groups(self, names: Iterable[str]) -> None:
        """Check that there is such a class, that it takes the options, and `group_overrides`.

        Raises:
            ConfigError: otherwise.
        """
        found = users_class(self.target, key=f"{OPTIM_KEY}.type")
        try:
            inspect.signature(found).bind([], **self.settings)
        except TypeError as error:
            raise ConfigError(f"{self.target}: {error}", key=f"{OPTIM_KEY}.options") from None
        super().check_groups(names)


def check_skip_step(config: Any) -> None:
    """Check the settings of a skip-step optimizer. Raises ValueError."""
    check_positive(config, "sigma_factor")
    if config.rolling_interval_length < 2:
        raise ValueError(
            f"rolling_interval_length must be at least 2, not {config.rolling_interval_length}"
        )


OptimConfig = AdamWConfig | SkipStepAdamWConfig | SGDConfig | ClassOptimConfig
