"""Which class of `transformers` a model is exported as: one whose config.json is read back as the
same computation on the same weights."""

import math
from typing import Any

import msgspec

from toolkit.config import Config
from toolkit.errors import CheckpointError
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Family, Settings
from toolkit.models.config import ClassModelConfig, ModelConfig, TransformerConfig
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig

_SHOWN = 4
_NO_MATTER = (
    "vocab_multiple", "init_std", "init_scale_residual", "loss_chunk_size",
    "num_mtp_layers", "mtp_loss_multiplier",
)  # fmt: skip
"""Fields that decide neither weights nor logits; all others count."""


_INITIAL_STATES = {
    name: field.default
    for name, field in ((f.name, f) for f in msgspec.structs.fields(DeltaNetConfig))
    if name.startswith(("min_", "max_"))
}
"""Of linear attention: what only training from scratch looks at."""


def hf_architecture(config: ModelConfig, model_type: str | None = None) -> str | None:
    """The `transformers` class that computes what this model computes; None where there is none.
    `model_type`: see `choose_family`."""
    try:
        return choose_family(config, model_type).class_of(config.to_transformer())
    except CheckpointError:
        return None


def choose_family(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family that can hold the model. Where several can, it is that of `model_type`, which the
    weights came from, else the first. Raises CheckpointError: none can; names the nearest, and the
    parts that it does not have."""
    if isinstance(config, ClassModelConfig):
        raise CheckpointError(
            f"model: its class {config.target} is none of transformers, so it cannot be exported"
        )
    transformer = config.to_transformer()
    # Sorting keeps the order of equals.
    ordered = sorted(FAMILIES, key=lambda family: family.model_type != model_type)
    found = [(family, misfits(family, transformer)) for family in ordered]
    nearest, parts = min(found, key=lambda pair: len(pair[1]))
    if parts:
        raise CheckpointError(
            "model: no transformers class has this combination of parts, so it cannot be exported; "
            f"the nearest, {nearest.architecture}, does not have: {', '.join(parts[:_SHOWN])}"
        )
    return nearest


def misfits(family: Family, config: TransformerConfig) -> list[str]:
    """Every part of `config` that the family cannot express, as "name value"; where its config.json
    cannot even be read back, the reason and all parts."""
    written = {"model_type": family.model_type, **family.write_config(config)}
    try:
        back = TransformerConfig(**family.read_config(Settings(written)))
    except (CheckpointError, ValueError) as error:
        return [str(error), *defining_values(config)]
    if family.can_score:  # whose head is no part of config.json's architecture
        back = back.replace(num_scores=config.num_scores)
    return differences(config, back)


def defining_values(config: TransformerConfig) -> dict[str, Any]:
    """What decides shapes and logits, with defaults filled in and layers spelled out."""
    fields = {n: getattr(config, n) for n in config.__struct_fields__ if n not in _NO_MATTER}
    bases = fields.pop("rope_theta"), fields.pop("sliding_rope_theta")
    scaling = fields.pop("rope_scaling")
    del fields["sliding_window"], fields["attention_pattern"], fields["rope_pattern"]
    windows = tuple(config.window_of(layer) for layer in range(config.num_layers))
    rotates = tuple(config.has_rope(layer) for layer in range(config.num_layers))
    frequencies = tuple(
        (bases[0], scaling) if window is None or bases[1] is None else (bases[1], None)
        for window, is_rotated in zip(windows, rotates, strict=True)
        if is_rotated
    )
    has_rope, linear = any(rotates), config.linear_layers
    net = None
    if config.delta_net is not None and linear:
        placement = config.norm_placement_of(linear[0])
        net = config.delta_net.replace(norm_placement=placement, **_INITIAL_STATES)
    has_dense = len(config.moe_layers) < config.num_layers
    # The terms of the training loss decide nothing here.
    alike = {"dense_layers": (), "load_balancing_multiplier": 0.0, "router_z_loss_multiplier": 0.0}
    return {
        **fields,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_dim,
        "intermediate_size": config.intermediate_size if has_dense else None,
        "rotary_fraction": config.rotary_dim if has_rope else None,
        "rope_pattern": rotates,
        "rope_theta, rope_scaling or sliding_rope_theta": frequencies if has_rope else (),
        "sliding_window or attention_pattern": windows,
        "attention_scale": config.attention_scale or config.attention_head_dim**-0.5,
        "bias": config.bias if config.norm == "layer_norm" and config.norm_weights else None,
        "qkv_bias": config.has_qkv_bias,
        "attention_output_bias": config.has_attention_output_bias,
        "feed_forward_bias": config.has_feed_forward_bias if has_dense else None,
        "delta_net": net and (linear, net),
        "moe": config.moe and (config.moe_layers, config.moe.replace(**alike, **_rate(config.moe))),
    }


def _rate(moe: MoEConfig) -> dict[str, float | None]:
    """Whether experts have biases counts, not how fast those move."""
    return {"bias_update_rate": None if moe.bias_update_rate is None else 0.0}


def differences(one: TransformerConfig, other: TransformerConfig) -> list[str]:
    """All parts of `one` in which `other` differs, as "name value"."""
    second = defining_values(other)
    return [
        part
        for name, value in defining_values(one).items()
        if not _equal(value, second[name])
        for part in _parts(name, value, second[name])
    ]


def _parts(name: str, value: Any, other: Any) -> list[str]:
    """What differs: a field, or of (layers, their config) what is not alike in them."""
    if not isinstance(value, tuple) or not value or not isinstance(value[-1], Config):
        return [f"{name} {value!r}"]
    if other is None:
        return [name]
    (layers, own), (other_layers, others) = value, other
    found = [f"layers of {name} {layers}"] if layers != other_layers else []
    return found + [
        f"{name}.{field} {getattr(own, field)!r}"
        for field in own.__struct_fields__
        if not _equal(getattr(own, field), getattr(others, field))
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return one == other
