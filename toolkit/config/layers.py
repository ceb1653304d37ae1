"""From layers of plain data (recipe, file, flags) to one typed config, with each value's origin.

1. `ConfigLayers(T)` starts empty; every value is then T's default.
2. `add(data, origin)` merges a recipe or file; `set(path, value, origin)` sets a single value, for
   an override what `parse` makes of its text by the type of its field.
3. `check()` checks every name (with the nearest known one in the message) and makes the frozen
   config. `origins()` then tells for each leaf where its value came from.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from toolkit.config.base import Config
from toolkit.config.check import Checked, check
from toolkit.config.named import is_name
from toolkit.config.overrides import Override, parse_override_args, parse_value
from toolkit.config.types import (
    CLASS,
    MODULE,
    UnknownFieldError,
    child_type,
    choose_struct,
    door_of,
    doors,
    expanded,
    field_default,
    field_types,
    is_index,
    join,
    names_class,
    no_field,
    paths_to,
    struct_types,
    tag_field,
    tags,
    through_door,
    type_of,
    value_type,
)
from toolkit.errors import ConfigError, ErrorList
from toolkit.wording import count

DEFAULT_ORIGIN = "default"
T = TypeVar("T", bound=Config)


class ConfigLayers(Generic[T]):
    """Plain data in layers on its way to a typed config."""

    def __init__(self, config_type: type[T]) -> None:
        self.config_type = config_type
        self.data: dict[str, Any] = {}
        self._origins: dict[str, str] = {}
        self._root = type_of(config_type)
        self._doors = doors(self._root)

    def add(self, data: dict[str, Any], origin: str) -> None:
        """Merge `data` over the layers so far.

        Mappings merge, everything else replaces. Where a tag changes (`"type": "sgd"` over an
        adamw), values below that the new type does not know are dropped.
        """
        self._merge(self.data, copy.deepcopy(expanded(data, self._root)), self._root, "", origin)

    def set(self, path: str, value: Any, origin: str) -> None:
        """Set one value (plain JSON types) at a dotted `path`; list items by index. Raises
        ConfigError for a path that does not exist, with the nearest known name."""
        path, value = self._through_door(path, value)
        container, name, owner = self._open(path)
        if isinstance(container, list):
            container[_list_index(name, container, path)] = value
        else:
            parent = path.rpartition(".")[0]
            value = expanded(value, child_type(owner, name, parent, container), path)
            if name == tag_field(owner):
                if CLASS in tags(owner) and is_name(value):
                    is_module = MODULE in tags(owner) and container.get(name) == MODULE
                    self.set(path, MODULE if is_module else CLASS, origin)
                    path, name = join(parent, "target"), "target"
                elif value in tags(owner):
                    self._switch_tag(container, value, owner, parent)
            container[name] = value
        self._record(path, value, origin)

    def parse(self, override: Override) -> Any:
        """What the text of `override` is as plain JSON types, for the field it is meant for."""
        path, value = self._through_door(override.path, None, text=override.text)
        if path != override.path and value is not None:
            return value
        override = override._replace(path=path)
        try:
            container, name, owner = self._open(override.path)
        except UnknownFieldError as error:
            paths = paths_to(self._root, override.path)
            if not paths or override.path in paths:  # a field of another type than is asked for
                raise
            meant = " or ".join(f"--{path}" for path in paths)
            raise ConfigError(f"no such field; did you mean {meant}?", key=error.key) from None
        target = child_type(owner, name, override.path.rpartition(".")[0], _values(container))
        return parse_value(override.text, target, override.path)

    def check(self) -> Checked:
        """The frozen config, and everything that is wrong with names, types and values, each with
        the layer that it is from; the config is without these."""
        checked = check(self.data, self.config_type, os.environ)
        return checked._replace(errors=[self._located(error) for error in checked.errors])

    def rename_origins(self, origins: Mapping[str, str]) -> None:
        """Let every value so far be from where `origins` says, by path, or else be a default."""
        for path in self._origins:
            self._origins[path] = origins.get(path, DEFAULT_ORIGIN)

    def _located(self, error: ConfigError) -> ConfigError:
        origin = self._origins.get(error.key, "")
        # A flag is in front of the user's eyes already.
        if origin and not origin.startswith("--"):
            error.args = (f"{error.problem} (in {origin})",)
        return error

    def origins(self, config: T) -> dict[str, str]:
        """`path -> origin` for every leaf value of the resolved `config`."""
        return {path: self._origin_of(path) for path, _ in leaves(config.to_dict())}

    def _through_door(self, path: str, value: Any, *, text: str | None = None) -> tuple[str, Any]:
        """Where a value is kept that belongs to what the user named himself (see `DOOR`), and as
        what; instead of the value its text may be given."""
        for around, target in self._doors.items():
            inside = path.removeprefix(f"{around}.")
            name, _, rest = inside.partition(".")
            if inside == path or name in field_types(choose_struct(target, {})):
                continue
            door = door_of(target)
            assert door is not None
            here, data = join(join(around, door[0]), name), self.data
            for part in here.split("."):
                data = data.get(part, {}) if isinstance(data, dict) else {}
            if rest == "type":
                return f"{here}.target", value
            if not rest:
                value = value if text is None else parse_value(text, None, path)
                if isinstance(value, dict) and "type" in value:
                    return here, value if text is not None else through_door(value, door[1])
            elif data:
                first = rest.partition(".")[0]
                is_own = first in field_types(choose_struct(door[1], {}))
                return f"{here}.{rest}" if is_own else f"{here}.options.{rest}", value
        above, _, last = path.rpartition(".")
        if last == "type" and names_class(self._type_at(above)):
            return join(above, "target"), value
        return path, value

    def _type_at(self, path: str) -> Any:
        """The type of what a path of names leads to; None where they are no fields."""
        target = self._root
        for name in path.split("."):
            target = field_types(choose_struct(target, {})).get(name) or value_type(target)
        return target

    def _open(self, path: str) -> tuple[dict | list, str, Any]:
        """(container, last name, type of the container) for `path`, filling in defaults on the way.

        Filled-in defaults keep the siblings of a value that is set: one beta, one callback's
        interval, one field of the default optimizer.
        """
        *parents, name = path.split(".")
        container: Any = self.data
        owner, here = self._root, ""
        for part in parents:
            target = child_type(owner, part, here, _values(container))
            here = join(here, part)
            if isinstance(container, list):
                container = container[_list_index(part, container, here)]
            else:
                if not isinstance(container.get(part), dict | list):
                    default = field_default(owner, part, container)
                    container[part] = {} if default is None else default
                container = container[part]
            if not isinstance(container, dict | list):
                raise no_field(here, name)
            owner = target
        child_type(owner, name, here, _values(container))
        return container, name, owner

    def _merge(self, into: dict, data: dict, target: Any, path: str, origin: str) -> None:
        if (tag := data.get(tag_field(target))) in tags(target):
            self._switch_tag(into, tag, target, path)
        fields = field_types(choose_struct(target, {**into, **data}))
        for key, value in data.items():
            here, below = join(path, key), fields.get(key) or value_type(target)
            if isinstance(value, dict) and value and isinstance(into.get(key, {}), dict):
                inside, default = into.setdefault(key, {}), field_default(target, key, into)
                name = tag_field(below)
                if name and name not in value and isinstance(default, dict):
                    # {"optim": {"lr": 1}} means the default optimizer.
                    inside.setdefault(name, default.get(name))
                self._merge(inside, value, below, here, origin)
            else:
                into[key] = value
                self._record(here, value, origin)

    def _switch_tag(self, container: dict, tag: Any, target: Any, path: str) -> None:
        struct = next(s for s in struct_types(target) if s.tag == tag)
        if container.get(tag_field(target), tag) != tag:
            for name in [n for n in container if n not in field_types(struct)]:
                del container[name]
                self._forget(join(path, name))

    def _record(self, path: str, value: Any, origin: str) -> None:
        self._forget(path)
        self._origins |= dict.fromkeys((leaf for leaf, _ in leaves(value, path)), origin)

    def _forget(self, path: str) -> None:
        for known in [k for k in self._origins if k == path or k.startswith(f"{path}.")]:
            del self._origins[known]

    def _origin_of(self, path: str) -> str:
        if path in self._origins:
            return self._origins[path]
        # A list of scalars is one leaf, of which a later layer may have set an item.
        inside = [origin for known, origin in self._origins.items() if known.startswith(f"{path}.")]
        return inside[-1] if inside else self._origins.get(path.rpartition(".")[0], DEFAULT_ORIGIN)


def merged(config: T, overrides: Sequence[str]) -> T:
    """`config` with overrides, `PATH=VALUE` with or without two dashes before it."""
    if isinstance(overrides, str) or not all(isinstance(word, str) for word in overrides):
        raise ConfigError('merge takes a list of texts, as in ["optim.lr=1e-3", "seed=3"]')
    layers = ConfigLayers(type(config))
    layers.add(config.to_dict(), "config")
    words = [word if word.startswith("--") else f"--{word}" for word in overrides]
    names = type(config).__struct_fields__
    for override in parse_override_args(words, sections=names, root=type_of(type(config))):
        layers.set(override.path, layers.parse(override), override.flag)
    checked = layers.check()
    ErrorList(checked.errors).raise_any()
    return checked.config


def leaves(data: Any, path: str = "") -> list[tuple[str, Any]]:
    """`(path, value)` of every leaf; empty mappings and lists of scalars count as leaves."""
    items: Any = None
    if isinstance(data, dict) and data:
        items = data.items()
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        items = enumerate(data)
    if items is None:
        return [(path, data)]
    return [leaf for name, value in items for leaf in leaves(value, join(path, name))]


def _values(container: Any) -> dict[str, Any]:
    return container if isinstance(container, dict) else {}


def _list_index(part: str, items: list, path: str) -> int:
    if is_index(part) and int(part) < len(items):
        return int(part)
    have = count(len(items), "item")
    raise ConfigError(f"the list has {have}; give an index below that, or the whole list", key=path)
