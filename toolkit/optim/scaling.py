"""Rates by the place of a parameter: layer by layer, and by width (muP). No torch.

muP is table 3 of Yang et al. 2022, "Tensor Programs V" (arXiv 2203.03466), for Adam. With
m = width / base_width it changes, against what `train_module.optim.lr` and `model.init_std` say:

    parameter                       standard deviation of initial values    rate
    embeddings, norms, biases,
    sinks of attention              1                                       1
    matrices of blocks              1 / sqrt(m)                             1 / m
    head (of scores too), router    1 / m                                   1 / m

At the base width nothing changes, and no factor is left in the model: exports are as ever.
`toolkit.models.init.width_factor` is the column of initial values.
"""

import re
from collections.abc import Iterable

from toolkit.config import Config
from toolkit.config.base import check_positive

BLOCK_NAMES = "blocks.N. in its name"
UNDECAYED = tuple(
    f".attention.{name}" for name in ("query_conv", "key_conv", "value_conv", "A_log", "dt_bias")
)
"""Ends of names: short convolutions and decays of linear attention, which weight decay leaves alone
unless an override names them."""
_BLOCK = re.compile(r"(?:.*\.)?blocks\.(\d+)\.")


class MuPConfig(Config, kw_only=True):
    """Maximal update parametrization: see `toolkit.optim.scaling`."""

    base_width: int
    """`model.d_model` of the model whose rate and `init_std` these are."""
    width: int | None = None
    """Of this model; null: its `d_model`."""

    def __post_init__(self) -> None:
        check_positive(self, "base_width", "width")

    @property
    def multiplier(self) -> float:
        """How many times wider than the base the model is."""
        return (self.width or self.base_width) / self.base_width


def count_layers(names: Iterable[str]) -> int:
    """The number of blocks of a model with parameters of these names."""
    found = (_BLOCK.match(name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def layer_factor(name: str, layers: int, decay: float | None) -> float:
    """By what a decay per layer multiplies the rate of the parameter `name`."""
    if decay is None:
        return 1.0
    if match := _BLOCK.match(name):
        return decay ** (layers - int(match[1]))
    return decay ** (layers + 1) if name.startswith("embeddings.") else 1.0


def mup_factor(name: str, mup: MuPConfig | None) -> float:
    """By what width multiplies the rate of the parameter `name`."""
    return 1.0 if mup is None or _is_of_fixed_fan_in(name) else 1.0 / mup.multiplier


def _is_of_fixed_fan_in(name: str) -> bool:
    """Whether each element has as many inputs at any width: embeddings, norms, biases, sinks, and
    short convolutions and decays of linear attention."""
    ends = (".bias", ".sinks", "norm.weight", *UNDECAYED)
    return name.startswith("embeddings.") or name.endswith(ends)
