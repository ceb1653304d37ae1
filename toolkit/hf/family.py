"""How one architecture of `transformers` relates to our parts: a table, one file per family.

A family is used in both directions. Whether it can hold a model of ours is not written down apart:
it can if the config.json that it makes of the model's config is read back as the same model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from toolkit.errors import CheckpointError
from toolkit.hf.equivalence import defining_values, differences
from toolkit.hf.settings import Settings
from toolkit.hf.transforms import SAME, Transform
from toolkit.models.config import TransformerConfig


class Rule(NamedTuple):
    """Some tensors of ours and the tensors of the family's state dict that hold the same."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform = SAME


class Family(NamedTuple):
    """One architecture of `transformers`."""

    model_type: str
    """As in config.json."""
    architecture: str
    """Class name, as in `architectures` of config.json."""
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    """Architecture fields of config.json, every one that `read_config` takes. What the class cannot
    express is simply not in it."""
    read_config: Callable[[Settings], dict[str, Any]]
    """Fields of `TransformerConfig` from those of config.json; raises CheckpointError by name for
    what our parts do not cover."""
    rules: Callable[[TransformerConfig], list[Rule]]
    """All tensors of the state dict in the model's order; a tied head is left out."""
    base_prefix: str = "model."
    """Checkpoints of the bare model lack it (`openai-community/gpt2`)."""
    buffers: tuple[str, ...] = ()
    """Regular expressions over names of tensors that some files hold and the config implies."""
    only_newer: Callable[[TransformerConfig], str | None] = lambda config: None
    """What of a model transformers 4.57 cannot compute, though 5 can; None: nothing."""


def rules_of(
    ours: str, theirs: str, kinds: tuple[str, ...], transform: Transform = SAME
) -> list[Rule]:
    """A rule for each of `kinds` ("weight", "bias") of a module."""
    return [Rule((f"{ours}.{kind}",), (f"{theirs}.{kind}",), transform) for kind in kinds]


def why_not(family: Family, config: TransformerConfig) -> str | None:
    """What of `config` the family cannot express, in a few words; None: it fits."""
    return next(iter(misfits(family, config)), None)


def misfits(family: Family, config: TransformerConfig) -> list[str]:
    """Every part of `config` that the family cannot express, as "name value"; where its config.json
    cannot even be read back, the reason and all parts."""
    written = {"model_type": family.model_type, **family.write_config(config)}
    try:
        back = TransformerConfig(**family.read_config(Settings(written)))
    except (CheckpointError, ValueError) as error:
        return [str(error), *defining_values(config)]
    return differences(config, back)
