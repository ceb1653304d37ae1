"""Parameter groups by name pattern. No torch: names are checked before there is a model."""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.config.patterns import matching
from toolkit.errors import ConfigError, ErrorList
from toolkit.optim.config import GroupOverride

if TYPE_CHECKING:
    import torch

_WHERE = "train_module.optim.group_overrides"


def parameter_groups(
    named_parameters: "dict[str, torch.nn.Parameter]",
    settings: dict[str, Any],
    overrides: Sequence[GroupOverride],
) -> list[dict[str, Any]]:
    """One optimizer group per override that applies, and one for the rest, in a fixed order.

    Frozen parameters are in no group, but a pattern may match them.

    Raises:
        ConfigError: see `check_overrides`.
    """
    check_overrides(named_parameters, settings, overrides)
    members: list[list[torch.nn.Parameter]] = [[] for _ in range(len(overrides) + 1)]
    for name, parameter in named_parameters.items():
        if parameter.requires_grad:
            groups = (i for i, o in enumerate(overrides) if _matches(name, o.params))
            members[next(groups, len(overrides))].append(parameter)
    found = []
    for index, override in enumerate(overrides):
        opts = {k: tuple(v) if isinstance(v, list) else v for k, v in override.opts.items()}
        found.append({"params": members[index], **settings, **opts})
    found.append({"params": members[-1], **settings})
    return [group for group in found if group["params"]]


def check_overrides(
    names: Iterable[str], settings: Iterable[str], overrides: Sequence[GroupOverride]
) -> None:
    """Check `optim.group_overrides` against the names of the model and of the optimizer's settings.

    Raises:
        ConfigError: for a pattern that matches no parameter, or an unknown setting.
    """
    names, settings, found = list(names), list(settings), ErrorList()
    for index, override in enumerate(overrides):
        for pattern in override.params:
            with found.collecting():
                matching(f"{_WHERE}.{index}.params", pattern, names)
        for unknown in sorted(set(override.opts) - set(settings)):
            known = ", ".join(settings)
            problem = f"{_WHERE}.{index}.opts: no setting {unknown!r}; known: {known}"
            found.add(ConfigError(problem))
    found.raise_any()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
