"""Which optimizer state a checkpoint has, where other parameters are trained than at its saving.

A parameter that was frozen has none: it starts with fresh moments. What a parameter had that is
frozen now is not loaded. (Under ZeRO the parameters of a group share one step count.)
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from toolkit.wording import count

_OPTIM = "optim."
_SHOWN = 3


def without_new_moments(
    tensors: Mapping[str, torch.Tensor], stored: Collection[str]
) -> dict[str, torch.Tensor]:
    """`tensors` to be filled from a checkpoint that has the names `stored`, less the optimizer
    state of parameters that were not trained then."""
    before = _with_moments(stored)
    if not before:  # not frozen: saved without an optimizer, which loading says
        return dict(tensors)
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(_OPTIM) or parameter_of(key) in before
    }


def change_of_training(stored: Collection[str], trained: Collection[str]) -> list[str]:
    """A line about the parameters that start with fresh moments, and one about those whose moments
    are dropped; none where nothing changed."""
    before = _with_moments(stored)
    if not before:
        return []
    lines = []
    if new := sorted(set(trained) - before):
        lines.append(f"fresh optimizer state for {_shown(new)}, frozen until now")
    if frozen := sorted(before - set(trained)):
        lines.append(f"optimizer state dropped of {_shown(frozen)}, frozen from now on")
    return lines


def parameter_of(key: str) -> str:
    """The parameter whose state `optim.<name>.<slot>` is."""
    return key.removeprefix(_OPTIM).rpartition(".")[0]


def _with_moments(stored: Iterable[Any]) -> set[str]:
    return {parameter_of(key) for key in stored if key.startswith(_OPTIM)}


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{count(len(names), 'parameter')} ({', '.join(names[:_SHOWN])}{more})"
