"""Olmo3ForCausalLM: OLMo 2 with windows in some layers, which keep their own rope."""

from typing import Any

from toolkit.hf.families.fields import read_layer_types, write_layer_types
from toolkit.hf.families.llama import decoder_rules
from toolkit.hf.families.olmo2 import NORMS, read_olmo, write_olmo
from toolkit.hf.families.rope import only_newer, read_rope_by_kind, write_rope_by_kind
from toolkit.hf.family import Family
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig


def _write_config(config: TransformerConfig) -> dict[str, Any]:
    return {
        **write_olmo(config),
        **write_layer_types(config),
        **write_rope_by_kind(config),
    }


def _read_config(settings: Settings) -> dict[str, Any]:
    return {
        **read_olmo(settings),
        **read_layer_types(settings),
        **read_rope_by_kind(settings),
    }


OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    write_config=_write_config,
    read_config=_read_config,
    rules=lambda config: decoder_rules(config, NORMS),
    only_newer=only_newer,
)
