"""Which class of `transformers` a model is exported as."""

from toolkit.errors import CheckpointError
from toolkit.hf.equivalence import defining_values, differences
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Family, Settings
from toolkit.models.config import ClassModelConfig, ModelConfig, TransformerConfig

_SHOWN = 4


def hf_architecture(config: ModelConfig, model_type: str | None = None) -> str | None:
    """The `transformers` class that computes what this model computes; None where there is none.
    `model_type`: see `choose_family`."""
    family = fitting_family(config, model_type)
    return family.architecture if family else None


def fitting_family(config: ModelConfig, model_type: str | None = None) -> Family | None:
    """`choose_family`; None where there is none."""
    try:
        return choose_family(config, model_type)
    except CheckpointError:
        return None


def choose_family(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family that can hold the model. Where several can, it is that of `model_type`, which the
    weights came from, else the first.

    Raises:
        CheckpointError: none can; names the nearest, and the parts that it does not have.
    """
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
    return differences(config, back)
