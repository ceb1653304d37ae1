"""From layers of plain data (recipe, file, flags) to one typed config with the origin of each value.

1. `ConfigLayers(T)` starts empty; every value is then T's default.
2. `add(data, origin)` merges a recipe or file; `set(path, value, origin)` and `apply(override)` set
   single values, typed by the field they are meant for.
3. `resolve()` checks every name (with the nearest known one in the message), converts, and returns
   the frozen config. `origins()` then tells for each leaf where its value came from.
"""

import difflib
import re
from typing import Any, Generic, TypeVar

import msgspec

from toolkit.config.base import Config
from toolkit.config.overrides import Override, alternatives, choose_struct, parse_value
from toolkit.errors import ConfigError

DEFAULT_ORIGIN = "default"
T = TypeVar("T", bound=Config)
C = TypeVar("C")


class ConfigLayers(Generic[T]):
    """Plain data in layers on its way to a typed config."""

    def __init__(self, config_type: type[T]) -> None:
        self.config_type = config_type
        self.data: dict[str, Any] = {}
        self._origins: dict[str, str] = {}
        self._root = msgspec.inspect.type_info(config_type)

    def add(self, data: dict[str, Any], origin: str) -> None:
        """Merge `data` over the layers so far; nested mappings merge, everything else replaces."""
        _merge(self.data, data, "", origin, self._origins)

    def set(self, path: str, value: Any, origin: str) -> None:
        """Set one value (plain JSON types) at a dotted `path`; list items by index.

        Raises:
            ConfigError: for a path that does not exist, with the nearest known name.
        """
        parts = path.split(".")
        target, here = self._root, ""
        container: Any = self.data
        for depth, part in enumerate(parts):
            known = container if isinstance(container, dict) else {}
            target = _child_type(target, part, here, known)
            here = f"{here}.{part}" if here else part
            is_last = depth == len(parts) - 1
            if isinstance(container, list):
                index = _list_index(part, container, here)
                if is_last:
                    container[index] = value
                else:
                    container = container[index]
            elif is_last:
                container[part] = value
            else:
                if not isinstance(container.get(part), dict | list):
                    container[part] = _default_of(self._default_container(here), target)
                container = container[part]
        self._forget(path)
        self._origins[path] = origin

    def apply(self, override: Override) -> None:
        """Set the value of a command-line override, converted by its target's type."""
        target = self._type_at(override.path)
        value = parse_value(override.text, target, override.path)
        self.set(override.path, value, override.flag)

    def resolve(self) -> T:
        """Check names and types and return the frozen config.

        Raises:
            ConfigError: naming the path, the value and what was expected.
        """
        _check_names(self.data, self._root, "")
        return convert(self.data, self.config_type)

    def origins(self, config: T) -> dict[str, str]:
        """`path -> origin` for every leaf value of the resolved `config`."""
        return {path: self._origin_of(path) for path, _ in leaves(config.to_dict())}

    def _origin_of(self, path: str) -> str:
        while path:
            if path in self._origins:
                return self._origins[path]
            path = path.rpartition(".")[0]
        return DEFAULT_ORIGIN

    def _forget(self, path: str) -> None:
        for known in [k for k in self._origins if k == path or k.startswith(f"{path}.")]:
            del self._origins[known]

    def _type_at(self, path: str) -> Any:
        target, here, container = self._root, "", self.data
        for part in path.split("."):
            known = container if isinstance(container, dict) else {}
            target = _child_type(target, part, here, known)
            here = f"{here}.{part}" if here else part
            if isinstance(container, list) and part.isdigit() and int(part) < len(container):
                container = container[int(part)]
            else:
                container = known.get(part, {})
        return target

    def _default_container(self, path: str) -> Any:
        """What the typed default holds at `path`, so that setting an item keeps its siblings."""
        try:
            value: Any = msgspec.convert(self.data, self.config_type).to_dict()
        except msgspec.ValidationError:
            return None
        for part in path.split("."):
            if isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif isinstance(value, dict):
                value = value.get(part)
            else:
                return None
        return list(value) if isinstance(value, tuple) else value


def convert(data: Any, config_type: type[C]) -> C:
    """`msgspec.convert` whose errors are ours: path first, then what was wrong."""
    try:
        return msgspec.convert(data, config_type)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        path = where.rstrip("`").removeprefix("$").lstrip(".").replace("[", ".").replace("]", "")
        value = _value_at(data, path)
        message = re.sub(r"\bgot `(\w+)`", lambda m: f"got {m[1]} {value!r}", message)
        message = message.replace("`", "")
        raise ConfigError(f"{path}: {message}" if path else message) from None


def leaves(data: Any, path: str = "") -> list[tuple[str, Any]]:
    """`(path, value)` of every leaf; empty mappings and lists of scalars count as leaves."""
    if isinstance(data, dict) and data:
        return [x for k, v in data.items() for x in leaves(v, f"{path}.{k}" if path else str(k))]
    if isinstance(data, list) and any(isinstance(item, dict) for item in data):
        return [x for i, v in enumerate(data) for x in leaves(v, f"{path}.{i}")]
    return [(path, data)]


def _merge(into: dict, data: dict, path: str, origin: str, origins: dict[str, str]) -> None:
    for key, value in data.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, here, origin, origins)
        else:
            into[key] = value
            for known in [k for k in origins if k.startswith(f"{here}.")]:
                del origins[known]
            origins[here] = origin


def _child_type(target: Any, name: str, path: str, known: dict[str, Any]) -> Any:
    inspect = msgspec.inspect
    options = alternatives(target)
    struct = choose_struct(target, known)
    structs = [struct] if struct else [t for t in options if isinstance(t, inspect.StructType)]
    for candidate in structs:
        if name == candidate.tag_field:
            tags = tuple(t.tag for t in options if isinstance(t, inspect.StructType))
            return inspect.LiteralType(tags)
        for field in candidate.fields:
            if field.encode_name == name:
                return field.type
    if structs:
        raise unknown_field(path, name, structs)
    for option in options:
        if isinstance(option, inspect.DictType):
            return option.value_type
        if isinstance(option, inspect.ListType | inspect.VarTupleType):
            return option.item_type
        if isinstance(option, inspect.TupleType) and name.isdigit():
            return option.item_types[min(int(name), len(option.item_types) - 1)]
        if isinstance(option, inspect.AnyType):
            return option
    raise ConfigError(f"{path}: a single value, so it has no field {name!r}")


def unknown_field(path: str, name: str, structs: list[Any]) -> ConfigError:
    """`path.name: no such field; did you mean ...?` for the given msgspec struct types."""
    names = sorted({f.encode_name for s in structs for f in s.fields})
    where = f"{path}.{name}" if path else name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "known fields: " + ", ".join(names)
    return ConfigError(f"{where}: no such field; {hint}")


def _check_names(data: Any, target: Any, path: str) -> None:
    inspect = msgspec.inspect
    if isinstance(data, dict):
        struct = choose_struct(target, data)
        if struct is not None:
            fields = {f.encode_name: f.type for f in struct.fields}
            for name, value in data.items():
                if name == struct.tag_field:
                    continue
                if name not in fields:
                    raise unknown_field(path, name, [struct])
                _check_names(value, fields[name], f"{path}.{name}" if path else name)
            return
        for option in alternatives(target):
            if isinstance(option, inspect.DictType):
                for name, value in data.items():
                    _check_names(value, option.value_type, f"{path}.{name}")
    elif isinstance(data, list):
        for option in alternatives(target):
            if isinstance(option, inspect.ListType | inspect.VarTupleType):
                for index, value in enumerate(data):
                    _check_names(value, option.item_type, f"{path}.{index}")


def _default_of(default: Any, target: Any) -> Any:
    if isinstance(default, dict | list):
        return default
    return {}


def _list_index(part: str, items: list, path: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ConfigError(f"{path}: the list has {len(items)} items; give an index below that")


def _value_at(data: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        if isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        elif isinstance(data, dict):
            data = data.get(part)
        else:
            return data
    return data
