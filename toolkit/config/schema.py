"""JSON Schema of a config type, with each field's string docstring as its description."""

import ast
import functools
import inspect
import itertools
import textwrap
from typing import Any

import msgspec

from toolkit.config.base import Config


def json_schema(config_type: type[Config]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `config_type` and of every struct it reaches."""
    schema = msgspec.json.schema(config_type)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    types = {t.__name__: t for t in _reachable(msgspec.inspect.type_info(config_type))}
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
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(doc, ast.Expr)
                and isinstance(doc.value, ast.Constant)
                and isinstance(doc.value.value, str)
            ):
                docs[field.target.id] = " ".join(doc.value.value.split())
    return docs


def _reachable(node: Any) -> set[type]:
    found: set[type] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if isinstance(current, msgspec.inspect.StructType):
            if current.cls in found:
                continue
            found.add(current.cls)
            pending += [f.type for f in current.fields]
        for attribute in ("types", "item_types"):
            pending += getattr(current, attribute, ())
        for attribute in ("item_type", "value_type", "key_type"):
            child = getattr(current, attribute, None)
            if child is not None:
                pending.append(child)
    return found
