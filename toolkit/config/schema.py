"""JSON Schema of a config type, with each field's string docstring as its description."""

import ast
import functools
import inspect
import itertools
import textwrap
from typing import Any

import msgspec

from toolkit.config.base import Config
from toolkit.config.named import NAME_PATTERN
from toolkit.config.types import CLASS, alternatives, door_of, type_of


def json_schema(config_type: type[Config]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `config_type` and of every struct it reaches."""
    schema = msgspec.json.schema(config_type)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    types: dict[str, type] = {}
    _add_structs(type_of(config_type), types)
    for name, definition in schema.get("$defs", {}).items():
        docs = field_docs(types[name]) if name in types else {}
        for field, entry in definition.get("properties", {}).items():
            if field in docs:
                entry["description"] = docs[field]
            if CLASS in entry.get("discriminator", {}).get("mapping", {}):
                del entry["discriminator"]  # it knows no names of classes
        _allow_names(definition, types.get(name))
        if name in types and door_of(type_of(types[name])) is not None:
            definition["additionalProperties"] = {
                "type": "object",
                "properties": {"type": {"type": "string", "pattern": f"^{NAME_PATTERN}$"}},
                "required": ["type"],
            }
    return schema


def _allow_names(definition: dict[str, Any], config_type: Any) -> None:
    """Let the tag of a struct for a class of the user's be the class's name, as `expanded` does."""
    config = getattr(config_type, "__struct_config__", None)
    if config is not None and config.tag == CLASS:
        by_name = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
        definition["properties"][config.tag_field]["anyOf"] = [{"enum": [CLASS]}, by_name]
        del definition["properties"][config.tag_field]["enum"]
        definition["required"].remove("target")
        named = {"properties": {config.tag_field: by_name}}
        definition["anyOf"] = [named, {"required": ["target"]}]


@functools.cache
def field_docs(config_type: type) -> dict[str, str]:
    """`field -> docstring` from the string literals under the fields in the class's source."""
    docs: dict[str, str] = {}
    for cls in reversed(config_type.__mro__):
        if cls is Config or not issubclass(cls, Config):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        for field, doc in itertools.pairwise(body):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _add_structs(node: Any, found: dict[str, type]) -> None:
    for option in alternatives(node):
        children = [*getattr(option, "item_types", ())]
        children += [getattr(option, name, None) for name in ("item_type", "value_type")]
        if isinstance(option, msgspec.inspect.StructType) and option.cls.__name__ not in found:
            found[option.cls.__name__] = option.cls
            children += [field.type for field in option.fields]
        for child in children:
            _add_structs(child, found)
