"""Parameter groups by name pattern."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch

from toolkit.errors import ConfigError
from toolkit.optim.config import GroupOverride


def parameter_groups(
    named_parameters: dict[str, torch.nn.Parameter],
    settings: dict[str, Any],
    overrides: Sequence[GroupOverride],
) -> list[dict[str, Any]]:
    """One optimizer group per override that applies, and one for the rest, in a fixed order.

    Frozen parameters are in no group, but a pattern may match them.

    Raises:
        ConfigError: for a pattern that matches no parameter, or an unknown setting.
    """
    members: list[list[torch.nn.Parameter]] = [[] for _ in range(len(overrides) + 1)]
    unmatched = {(i, p) for i, override in enumerate(overrides) for p in override.params}
    for name, parameter in named_parameters.items():
        group = len(overrides)
        for index, override in enumerate(overrides):
            hits = [p for p in override.params if fnmatch.fnmatchcase(name, p)]
            unmatched -= {(index, p) for p in hits}
            if hits and group == len(overrides):
                group = index
        if parameter.requires_grad:
            members[group].append(parameter)
    where = "train_module.optim.group_overrides"
    for index, pattern in sorted(unmatched):
        examples = ", ".join(list(named_parameters)[:3])
        raise ConfigError(
            f"{where}.{index}.params: {pattern!r} matches no parameter (names look like {examples})"
        )
    groups = []
    for index, override in enumerate(overrides):
        unknown = sorted(set(override.opts) - set(settings))
        if unknown:
            raise ConfigError(
                f"{where}.{index}.opts: no setting {unknown[0]!r}; known: {', '.join(settings)}"
            )
        opts = {k: tuple(v) if isinstance(v, list) else v for k, v in override.opts.items()}
        groups.append({"params": members[index], **settings, **opts})
    groups.append({"params": members[-1], **settings})
    return [group for group in groups if group["params"]]
