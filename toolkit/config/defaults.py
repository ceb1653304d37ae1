"""Which values of a config differ from what it has where nothing is given."""

from collections.abc import Iterator
from typing import Any

from toolkit.config.base import Config
from toolkit.config.types import (
    choose_struct,
    field_default,
    field_types,
    item_type,
    join,
    tag_field,
    type_of,
    value_type,
)

_NONE: Any = object()
"""Stands for a default where there is none."""


def differing(config: Config) -> set[str]:
    """Paths of the leaves (see `layers.leaves`) that are not the default of their field."""
    return set(_differing(config.to_dict(), type_of(type(config)), {}, ""))


def _differing(data: Any, target: Any, default: Any, path: str) -> Iterator[str]:
    """`default` is what stands at `path` where nothing is given."""
    if isinstance(data, dict) and data:
        struct, tag = choose_struct(target, data), tag_field(target)
        fields = field_types(struct)
        is_alike = isinstance(default, dict) and default.get(tag) == data.get(tag)
        for name, value in data.items():
            if is_alike and name in default:
                own = default[name]
            else:
                has_own = struct is not None and name in fields and name != tag
                own = field_default(target, name, data) if has_own else _NONE
            yield from _differing(
                value, fields.get(name) or value_type(target), own, join(path, name)
            )
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = default if isinstance(default, list) else []
        for index, item in enumerate(data):
            own = items[index] if index < len(items) else _NONE
            yield from _differing(item, item_type(target, index), own, join(path, index))
    elif data != default:
        yield path
