"""JSON Schema of a config type, with each field's string docstring as its description."""

import ast
import functools
import inspect
import itertools
import textwrap
from typing import Any

import msgspec

from toolkit.config.base import Config
from toolkit.config.types import alternatives, type_of


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
    return schema


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
