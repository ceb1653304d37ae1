"""What the configs of optimizers share. No torch: settings and names are checked before there is a
model."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive, matching
from toolkit.config.check import convert
from toolkit.errors import ConfigError, ErrorList

OPTIM_KEY = "train_module.optim"
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
    def skip_step(self) -> SkipStep | None:
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
            key = f"{OPTIM_KEY}.group_overrides.{index}"
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


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
