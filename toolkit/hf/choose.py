"""Which class of `transformers` a model is exported as."""

from toolkit.errors import CheckpointError
from toolkit.hf.equivalence import defining_values, differences
from toolkit.hf.families import FAMILIES
from toolkit.hf.family import Family, Settings
from toolkit.models.config import ModelConfig, TransformerConfig

_SHOWN = 4


def hf_architecture(config: ModelConfig, model_type: str | None = None) -> str | None:
    """The `transformers` class that computes what this model computes; None where there is none.
    `model_type`: see `fitting_family`."""
    family = fitting_family(config, model_type)
    return family.architecture if family else None


def fitting_family(config: ModelConfig, model_type: str | None = None) -> Family | None:
    """The family that can hold the model; None where none can.

    Args:
        model_type: of the model that the weights came from. Several families may fit; this one is
            preferred.
    """
    transformer = config.to_transformer()
    return next((f for f in _ordered(model_type) if not misfits(f, transformer)), None)


def choose_family(config: ModelConfig, model_type: str | None = None) -> Family:
    """`fitting_family`, or an error that says what is in the way.

    Raises:
        CheckpointError: naming the nearest family and the parts that it does not have.
    """
    family = fitting_family(config, model_type)
    if family is None:
        nearest, parts = _nearest(config.to_transformer(), model_type)
        raise CheckpointError(
            "model: no transformers class has this combination of parts, so it cannot be exported; "
            f"the nearest, {nearest.architecture}, does not have: {', '.join(parts[:_SHOWN])}"
        )
    return family


def misfits(family: Family, config: TransformerConfig) -> list[str]:
    """Every part of `config` that the family cannot express, as "name value"; where its config.json
    cannot even be read back, the reason and all parts."""
    written = {"model_type": family.model_type, **family.write_config(config)}
    try:
        back = TransformerConfig(**family.read_config(Settings(written)))
    except (CheckpointError, ValueError) as error:
        return [str(error), *defining_values(config)]
    return differences(config, back)


def _nearest(config: TransformerConfig, model_type: str | None) -> tuple[Family, list[str]]:
    found = [(family, misfits(family, config)) for family in _ordered(model_type)]
    return min(found, key=lambda pair: len(pair[1]))


def _ordered(model_type: str | None) -> list[Family]:
    # Sorting keeps the order of equals.
    return sorted(FAMILIES, key=lambda family: family.model_type != model_type)
