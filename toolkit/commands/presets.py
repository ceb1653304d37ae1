"""The named model sizes, for readers."""

from typing import NamedTuple

from toolkit.models.config import TransformerConfig
from toolkit.models.presets import PRESETS, SOURCES


class Preset(NamedTuple):
    name: str
    parameters: int
    active: int
    """Parameters that a token passes; fewer where there are experts."""
    layers: int
    width: int
    heads: str
    """Query heads, and heads of keys and values where those are fewer."""
    vocabulary: int
    longest: int
    """Tokens of the longest sequence."""
    source: str
    """The model whose shape it is."""


def describe_presets() -> list[Preset]:
    """All presets by number of parameters."""
    return sorted(map(_describe, PRESETS), key=lambda preset: preset.parameters)


def _describe(name: str) -> Preset:
    model = TransformerConfig.preset(name)
    shared = "" if model.kv_heads == model.num_heads else f"/{model.kv_heads}"
    return Preset(
        name=name,
        parameters=model.num_parameters,
        active=model.num_active_parameters,
        layers=model.num_layers,
        width=model.d_model,
        heads=f"{model.num_heads}{shared}",
        vocabulary=model.vocab_size,
        longest=model.max_sequence_length,
        source=SOURCES[name],
    )
