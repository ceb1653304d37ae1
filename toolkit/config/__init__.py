"""Typed JSON configs: the base struct, override parsing, layering with provenance, JSON Schema."""

from toolkit.config.base import Config
from toolkit.config.check import convert
from toolkit.config.files import parse_json_mapping, read_json_mapping
from toolkit.config.layers import DEFAULT_ORIGIN, ConfigLayers, leaves
from toolkit.config.overrides import Override, is_override, parse_override_args
from toolkit.config.types import nearest

__all__ = [
    "DEFAULT_ORIGIN",
    "Config",
    "ConfigLayers",
    "Override",
    "convert",
    "is_override",
    "leaves",
    "nearest",
    "parse_json_mapping",
    "parse_override_args",
    "read_json_mapping",
]
