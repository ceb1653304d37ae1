"""Typed JSON configs: the base struct, override parsing, layering with provenance, JSON Schema."""

from toolkit.config.base import Config
from toolkit.config.layers import ConfigLayers
from toolkit.config.overrides import Override, parse_override_args
from toolkit.config.schema import json_schema

__all__ = ["Config", "ConfigLayers", "Override", "json_schema", "parse_override_args"]
