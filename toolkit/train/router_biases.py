"""The biases of routers, which the load of experts moves after each optimizer step."""

from collections.abc import Iterable

import torch
from torch import nn

from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_name
from toolkit.models.router import update_biases
from toolkit.models.shapes import SCORE_BIAS


class RouterBiases:
    """Those that this rank holds; there may be none."""

    def __init__(self, model: TransformerConfig, stages: Iterable[nn.Module]) -> None:
        self._model = model
        self.tensors = {
            canonical_name(name): buffer
            for part in stages
            for name, buffer in part.named_buffers()
            if name.endswith(SCORE_BIAS)
        }
        """By canonical name, `(num_experts,)`."""

    def update(self, load: torch.Tensor, skipped: torch.Tensor) -> None:
        """See `update_biases`."""
        moe = self._model.moe
        if self.tensors and moe is not None and moe.bias_update_rate:
            biases = {self._row_of(name): bias for name, bias in self.tensors.items()}
            update_biases(biases, load, skipped, rate=moe.bias_update_rate)

    def _row_of(self, name: str) -> int:
        """The row of a bias in `RouterSums.load`."""
        kind, number, *_ = name.split(".")
        layers = self._model.moe_layers
        return layers.index(int(number)) if kind == "blocks" else len(layers) + int(number)
