"""`rope_parameters` of config.json (transformers >= 5) and our fields for rotary positions."""

from typing import Any

import msgspec

from toolkit.errors import CheckpointError
from toolkit.hf.settings import Settings
from toolkit.models.config import TransformerConfig
from toolkit.models.rope_config import RopeScalingConfig

_NOT_OF_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(parameters: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rotary_fraction` from one set of rope parameters.

    Raises:
        CheckpointError: a kind of scaling, or a field of one, that we do not compute.
    """
    kind = parameters.get("rope_type", "default")
    values = {k: v for k, v in parameters.items() if k not in _NOT_OF_SCALING and v is not None}
    scaling = None
    if kind != "default":
        try:
            scaling = msgspec.convert({"type": kind, **values}, RopeScalingConfig)
        except msgspec.ValidationError as error:
            raise CheckpointError(
                f"config.json: rope_parameters of type {kind!r} are not covered by the mapping of "
                f"{settings.model_type}: {error}"
            ) from None
    elif values:
        raise CheckpointError(
            f"config.json: rope_parameters.{sorted(values)[0]} is not covered by the mapping of "
            f"{settings.model_type}"
        )
    return {
        "rope_theta": float(parameters["rope_theta"]),
        "rope_scaling": scaling,
        "rotary_fraction": float(parameters.get("partial_rotary_factor") or 1.0),
    }


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """One set of rope parameters."""
    scaling: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        fields = msgspec.to_builtins(config.rope_scaling)
        kind = fields.pop("type")
        scaling = {"rope_type": kind, **{k: v for k, v in fields.items() if v is not None}}
    if config.rotary_fraction != 1.0:
        scaling["partial_rotary_factor"] = config.rotary_fraction
    return {**scaling, "rope_theta": config.rope_theta}
