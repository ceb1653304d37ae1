"""`rope_parameters` of config.json (transformers >= 5) and our fields for rotary positions.

What is written says the same in the fields that transformers 4.57 reads: `rope_theta`,
`rope_scaling` and, of Gemma 3, `rope_local_base_freq`. What those cannot say is told by
`only_newer`.
"""

import math
from functools import partial
from typing import Any

import msgspec

from toolkit.errors import CheckpointError
from toolkit.hf.families.parts import windows
from toolkit.hf.family import Part, Settings
from toolkit.models.config import TransformerConfig
from toolkit.models.rope_scaling import (
    LinearRopeConfig,
    Llama3RopeConfig,
    RopeScalingConfig,
    YarnRopeConfig,
)

_SCALINGS: dict[str, type[RopeScalingConfig]] = {
    "linear": LinearRopeConfig,
    "llama3": Llama3RopeConfig,
    "yarn": YarnRopeConfig,
}
_KINDS = ("full_attention", "sliding_attention")
_NOT_OF_SCALING = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def read_rope(
    settings: Settings, *, is_partial: bool = False, is_scaled: bool = True
) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rotary_fraction` from one set of rope parameters for all
    layers; raises CheckpointError for a kind of scaling, or a field of one, that we do not compute.
    `is_partial`: the class can rotate a part of each head; `is_scaled`: it computes scaled
    frequencies."""
    found = _read(settings.take("rope_parameters"), settings, is_scaled=is_scaled)
    if found["rotary_fraction"] != 1.0 and not is_partial:
        raise _not_covered("partial_rotary_factor", found["rotary_fraction"], settings)
    return found


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """`rope_parameters` for all layers, and the same as `transformers` before 5 has it."""
    parameters = _write(config.rope_theta, config.rope_scaling)
    if config.rotary_fraction != 1.0:
        parameters["partial_rotary_factor"] = config.rotary_fraction
    old = {"rope_scaling": parameters} if config.rope_scaling is not None else {}
    return {"rope_parameters": parameters, "rope_theta": config.rope_theta, **old}


ROPE = Part(read_rope, write_rope)


def rope_by_kind(sliding_base: str = "") -> Part:
    """`rope_theta`, `rope_scaling` and `sliding_rope_theta` from two sets of rope parameters, one
    for each kind of attention. That of a kind which no layer has is not looked at.

    `sliding_base`: what transformers 4.57 calls the base of sliding layers; "": it has none.
    """
    return Part(_read_by_kind, partial(_write_by_kind, sliding_base=sliding_base))


def _read_by_kind(settings: Settings) -> dict[str, Any]:
    both = settings.take("rope_parameters")
    _check_mapping(both, settings)
    for name in both.keys() - set(_KINDS):
        raise _not_covered(name, both[name], settings)
    present = [name for name in _KINDS if name in settings.take("layer_types")] or _KINDS
    full, sliding = (
        _read(both.get(name if name in present else present[0]), settings) for name in _KINDS
    )
    for found in (full, sliding):
        if found["rotary_fraction"] != 1.0:
            raise _not_covered("partial_rotary_factor", found["rotary_fraction"], settings)
        if not getattr(found["rope_scaling"], "truncate", True):
            # `transformers` overlooks this field where each kind of attention has its own.
            raise _not_covered("truncate", False, settings)
    if sliding == full:
        return full
    if sliding["rope_scaling"] is not None:
        kind = both["sliding_attention"]["rope_type"]
        raise _not_covered("sliding_attention.rope_type", kind, settings)
    return {**full, "sliding_rope_theta": sliding["rope_theta"]}


def _write_by_kind(config: TransformerConfig, *, sliding_base: str) -> dict[str, Any]:
    full = _write(config.rope_theta, config.rope_scaling)
    sliding = full
    if config.sliding_rope_theta is not None:
        sliding = _write(config.sliding_rope_theta, None)
    old = {"rope_theta": config.rope_theta}
    if sliding_base:
        old[sliding_base] = sliding["rope_theta"]
    scaling = {"rope_scaling": dict(full)} if config.rope_scaling is not None else {}
    both = {"full_attention": full, "sliding_attention": dict(sliding)}
    return {"rope_parameters": both, **old, **scaling}


def only_newer(config: TransformerConfig, *, sliding_base: str = "") -> str | None:
    """What of the rope of sliding layers transformers 4.57 cannot say; None: nothing. See
    `rope_by_kind`."""
    if not any(windows(config)):
        return None
    if config.sliding_rope_theta is None and config.rope_scaling is not None:
        return "rope_scaling of sliding layers"
    if not sliding_base and config.sliding_rope_theta not in (None, config.rope_theta):
        return "sliding_rope_theta"
    return None


def _read(parameters: Any, settings: Settings, *, is_scaled: bool = True) -> dict[str, Any]:
    _check_mapping(parameters, settings)
    kind = parameters.get("rope_type", "default")
    values = {k: v for k, v in parameters.items() if k not in _NOT_OF_SCALING and v is not None}
    scalings = _SCALINGS if is_scaled else {}
    scaling = None
    if kind == "default":
        if values:
            name, value = min(values.items())
            raise _not_covered(name, value, settings)
    elif kind not in scalings:
        known = ", ".join(("default", *scalings))
        raise CheckpointError(f"{_not_covered('rope_type', kind, settings)}, which knows {known}")
    else:
        try:
            scaling = msgspec.convert({"type": kind, **values}, scalings[kind])
        except msgspec.ValidationError as error:
            raise CheckpointError(
                f"config.json: rope_parameters of type {kind!r} are not covered by the mapping of "
                f"{settings.model_type}: {error}"
            ) from None
    fraction = parameters.get("partial_rotary_factor")
    return {
        "rope_theta": _number(parameters.get("rope_theta"), "rope_theta"),
        "rope_scaling": scaling,
        "rotary_fraction": 1.0 if fraction is None else _number(fraction, "partial_rotary_factor"),
    }


def _write(theta: float, scaling: RopeScalingConfig | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    given = {
        field.name: getattr(scaling, field.name)
        for field in msgspec.structs.fields(scaling)
        if getattr(scaling, field.name) != field.default
    }
    return {"rope_type": scaling.__struct_config__.tag, "rope_theta": theta, **given}


def _check_mapping(parameters: Any, settings: Settings) -> None:
    if not isinstance(parameters, dict):
        raise settings.not_covered(f"rope_parameters {parameters!r}")


def _number(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise CheckpointError(f"config.json: rope_parameters.{name} {value!r} is not a number")
    return float(value)


def _not_covered(name: str, value: Any, settings: Settings) -> CheckpointError:
    return settings.not_covered(f"rope_parameters.{name} {value!r}")
