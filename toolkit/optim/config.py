"""Configs of optimizers. No torch: settings and names are checked before there is a model."""

import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive, matching
from toolkit.config.check import convert
from toolkit.config.named import named, users_class, users_object
from toolkit.errors import ConfigError, ErrorList

_KEY = "train_module.optim"
_NOT_SETTINGS = ("group_overrides", "rolling_interval_length", "sigma_factor")
"""What an optimizer's class is not built with."""


class OptimizerTraits(NamedTuple):
    """What an engine must know of an optimizer. Its class says so by attributes of these names;
    one that says nothing has none of them.

    Example: `class Lion(torch.optim.Optimizer): takes_found_inf = True`.
    """

    takes_found_inf: bool = False
    """`step` reads the tensors `optimizer.found_inf` and `optimizer.grad_scale`, as torch's fused
    kernels do: it divides gradients by the one, and changes nothing where the other is 1. For all
    other optimizers the engine scales gradients itself, and skips the call of `step`."""
    needs_whole_matrices: bool = False
    """The update mixes the rows or columns of a parameter (Muon, Shampoo), so that a rank which
    holds a part of the parameter cannot compute it alone."""


def traits_of(optimizer: object) -> OptimizerTraits:
    """What `optimizer` (an object, or its class) declares. torch's fused optimizers are known."""
    declared = {name: bool(getattr(optimizer, name, False)) for name in OptimizerTraits._fields}
    # torch sets this on an optimizer with fused=True, for its own GradScaler.
    declared["takes_found_inf"] |= bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return OptimizerTraits(**declared)


class SkipStep(NamedTuple):
    """Which steps a skip-step optimizer leaves out."""

    rolling_interval_length: int
    """Accepted steps that are looked back on."""
    sigma_factor: float
    """A loss or a gradient norm so many standard deviations above their mean is a spike."""


class GroupOverride(Config, kw_only=True):
    """Other optimizer settings for the parameters whose names match a pattern."""

    params: list[str]
    """Shell-style patterns (`*`, `?`, `[...]`) over fully qualified parameter names. A pattern that
    matches nothing is an error."""

    opts: dict[str, float | bool | list[float]]
    """Settings to replace for these parameters, for example `{"weight_decay": 0.0}`."""


class Optimizer(Config, kw_only=True):
    """Base of the optimizers' configs."""

    lr: float = 3e-4
    """Peak learning rate; the schedule multiplies it."""
    group_overrides: tuple[GroupOverride, ...] = ()
    """Other settings by parameter name; the first matching entry wins."""

    def __post_init__(self) -> None:
        check_positive(self, *({"lr", "eps"} & set(self.__struct_fields__)))
        check_not_negative(self, *({"momentum", "weight_decay"} & set(self.__struct_fields__)))
        self._check_overrides()

    @property
    def settings(self) -> dict[str, Any]:
        """What the optimizer is built with."""
        return {n: getattr(self, n) for n in self.__struct_fields__ if n not in _NOT_SETTINGS}

    @property
    def skip_step(self) -> "SkipStep | None":
        """How spikes are found, where steps that are one are left out; None: no such steps."""
        return None

    @property
    def setting_names(self) -> list[str]:
        """What a group may have another value of."""
        return list(self.settings)

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        """The torch optimizer over the trainable ones of `named_parameters`, in groups by
        `group_overrides`."""
        raise NotImplementedError

    def groups(self, named_parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """One group per override that applies, and one for the rest, each with all its settings.

        Frozen parameters are in no group, but a pattern may match them.

        Raises:
            ConfigError: see `check_groups`.
        """
        self.check_groups(named_parameters)
        patterns = [override.params for override in self.group_overrides]
        members: list[list[Any]] = [[] for _ in range(len(patterns) + 1)]
        for name, parameter in named_parameters.items():
            if parameter.requires_grad:
                hits = (i for i, p in enumerate(patterns) if _matches(name, p))
                members[next(hits, -1)].append(parameter)
        opts = [override.opts for override in self.group_overrides]
        changes = [{k: tuple(v) if isinstance(v, list) else v for k, v in o.items()} for o in opts]
        found = zip(members, [*changes, {}], strict=True)
        return [{"params": own, **self.settings, **changed} for own, changed in found if own]

    def check_groups(self, names: Iterable[str]) -> None:
        """Check `group_overrides` against the names of the model's parameters and the settings.

        Raises:
            ConfigError: for a pattern that matches no parameter, or an unknown setting.
        """
        names, known, found = list(names), self.setting_names, ErrorList()
        for index, override in enumerate(self.group_overrides):
            key = f"{_KEY}.group_overrides.{index}"
            for pattern in override.params:
                with found.collecting():
                    matching(f"{key}.params", pattern, names)
            for unknown in sorted(set(override.opts) - set(known)):
                problem = f"no setting {unknown!r}; known: {', '.join(known)}"
                found.add(ConfigError(problem, key=f"{key}.opts"))
        found.raise_any()

    def _check_overrides(self) -> None:
        """Each override's settings must be ones that `self` could have, or `lr` 0."""
        for index, override in enumerate(self.group_overrides):
            opts = {k: v for k, v in override.opts.items() if (k, v) != ("lr", 0)}
            for name in opts.keys() & set(self.__struct_fields__):
                changed = {**self.to_dict(), "group_overrides": [], name: opts[name]}
                try:
                    convert(changed, type(self))
                except ConfigError as error:
                    raise ValueError(f"group_overrides.{index}.opts.{error}") from None


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
        found = users_class(self.target, key=f"{_KEY}.type")
        return list(inspect.signature(found).parameters)[1:]

    def build(self, named_parameters: Mapping[str, Any]) -> Any:
        groups = self.groups(named_parameters)
        return users_object(self.target, groups, key=f"{_KEY}.type", **self.settings)

    def check_groups(self, names: Iterable[str]) -> None:
        """Check that there is such a class, that it takes the options, and `group_overrides`.

        Raises:
            ConfigError: otherwise.
        """
        found = users_class(self.target, key=f"{_KEY}.type")
        try:
            inspect.signature(found).bind([], **self.settings)
        except TypeError as error:
            raise ConfigError(f"{self.target}: {error}", key=f"{_KEY}.options") from None
        super().check_groups(names)


def check_skip_step(config: Any) -> None:
    """Check the settings of a skip-step optimizer. Raises ValueError."""
    check_positive(config, "sigma_factor")
    if config.rolling_interval_length < 2:
        raise ValueError(
            f"rolling_interval_length must be at least 2, not {config.rolling_interval_length}"
        )


OptimConfig = AdamWConfig | SkipStepAdamWConfig | SGDConfig | ClassOptimConfig


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
