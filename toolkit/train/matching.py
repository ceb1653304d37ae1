"""Which tensors of a checkpoint fill which of ours: where they have other names there, and where
other parameters are trained than at its saving."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch

from toolkit.checkpoint.folder import MODEL_PREFIX
from toolkit.errors import ConfigError
from toolkit.models.shapes import SCORE
from toolkit.wording import count

Value = TypeVar("Value")
_OPTIM = "optim."
_SHOWN = 3
_KEY = "trainer.load_key_mapping"


def renamed(tensors: dict[str, Value], mapping: Mapping[str, str]) -> dict[str, Value]:
    """`tensors` (`model.<name>`, `optim.<name>.<slot>`), or what else has their names, under the
    names a checkpoint has by `trainer.load_key_mapping`. Raises ConfigError where a pattern
    cannot be used."""
    result = dict(tensors)
    for pattern, replacement in mapping.items():
        try:
            expression = re.compile(pattern)
            changed = {key: _rename(key, expression, replacement) for key in result}
        except re.error as error:
            raise ConfigError(f"{pattern!r} -> {replacement!r}: {error}", key=_KEY) from None
        if all(old == new for old, new in changed.items()):
            raise ConfigError(f"{pattern!r} changes the name of no parameter", key=_KEY)
        if len(set(changed.values())) < len(changed):
            raise ConfigError(f"{pattern!r} gives two tensors one name", key=_KEY)
        result = {changed[key]: tensor for key, tensor in result.items()}
    return result


def without_new_head(tensors: Mapping[str, Value], stored: Collection[str]) -> dict[str, Value]:
    """`tensors` to be filled from a checkpoint that has the names `stored`, less the head of scores
    where that is of a language model: it is new, and keeps its initial values."""
    key = f"{MODEL_PREFIX}{SCORE}"
    return {name: value for name, value in tensors.items() if name != key or key in stored}


def _rename(key: str, expression: re.Pattern[str], replacement: str) -> str:
    kind, _, name = key.partition(".")
    suffix = ""
    if kind == "optim":
        name, dot, slot = name.rpartition(".")
        suffix = dot + slot
    return f"{kind}.{expression.sub(replacement, name)}{suffix}"


def without_new_moments(
    tensors: Mapping[str, torch.Tensor], stored: Collection[str]
) -> dict[str, torch.Tensor]:
    """`tensors` to be filled from a checkpoint that has the names `stored`, less the optimizer
    state of parameters that were frozen then: they start with fresh moments. (Under ZeRO the
    parameters of a group share one step count.)"""
    before = _with_moments(stored)
    if not before:  # not frozen: saved without an optimizer, which loading says
        return dict(tensors)
    return {
        key: tensor
        for key, tensor in tensors.items()
        if not key.startswith(_OPTIM) or _parameter_of(key) in before
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


def _parameter_of(key: str) -> str:
    """The parameter whose state `optim.<name>.<slot>` is."""
    return key.removeprefix(_OPTIM).rpartition(".")[0]


def _with_moments(stored: Iterable[Any]) -> set[str]:
    return {_parameter_of(key) for key in stored if key.startswith(_OPTIM)}


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{count(len(names), 'parameter')} ({', '.join(names[:_SHOWN])}{more})"
