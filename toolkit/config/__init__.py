"""Typed JSON configs: the base struct, override parsing, layering with provenance, JSON Schema."""

from toolkit.config.base import Config as Config
from toolkit.config.check import convert as convert
from toolkit.config.files import parse_json_mapping as parse_json_mapping
from toolkit.config.files import read_json_mapping as read_json_mapping
from toolkit.config.layers import DEFAULT_ORIGIN as DEFAULT_ORIGIN
from toolkit.config.layers import ConfigLayers as ConfigLayers
from toolkit.config.layers import leaves as leaves
from toolkit.config.overrides import Override as Override
from toolkit.config.overrides import is_override as is_override
from toolkit.config.overrides import parse_override_args as parse_override_args
from toolkit.config.types import nearest as nearest
