"""What layers are given besides the residual stream, made once in a forward for all of a kind."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.models.config import TransformerConfig
from toolkit.models.delta_net import RowDocuments
from toolkit.models.kernels import MaskedBackend
from toolkit.models.masks import AttentionMask
from toolkit.models.rope import RotaryTable, rotary_table


class LayerInputs(NamedTuple):
    """What a layer is given besides the residual stream."""

    rotary: RotaryTable | None
    """None where the layer has none."""
    mask: Any
    """What its `attend` takes: an `AttentionMask`, or None where plain causal attention does. Of
    linear attention: `RowDocuments`, or None where each row is one."""


MaskMaker = Callable[..., Callable[[int | None], Any]]
"""As `row_masks`; who splits rows puts another in its place."""


def row_masks(
    config: TransformerConfig,
    x: Tensor,
    starts: Tensor | None,
    length: int,
    *,
    backend: MaskedBackend | None = None,
) -> Callable[[int | None], AttentionMask | None]:
    """A function from a layer's window to its mask, one for all layers of a kind, over rows of
    `length` tokens; `x` is for type and device, `starts` see `layer_inputs`, `backend` is how it is
    to be computed: None: as `attention_backend` says."""

    @cache
    def mask(window: int | None) -> "AttentionMask | None":
        needs_one = not config.is_plain_softmax or backend == "flex"
        if starts is None and window is None and not needs_one:
            return None
        places = starts
        if places is None:
            places = torch.zeros(1, length, dtype=torch.int64, device=x.device)
        head_dim = config.attention_head_dim
        return AttentionMask(
            places, window=window, dtype=x.dtype, head_dim=head_dim, backend=backend
        )

    return lambda window: mask(None if window is None or window >= length else window)


def layer_inputs(
    config: TransformerConfig,
    x: Tensor,
    starts: Tensor | None,
    positions: Tensor | None,
    *,
    layers: Iterable[int] | None = None,
    table_length: int | None = None,
    masks: MaskMaker = row_masks,
) -> list[LayerInputs]:
    """Of each of `layers`, by default all; those of one kind share theirs.

    Args:
        x: embeddings `(batch, seq, d_model)`; for their shape, type and device.
        starts, positions: of documents, `(batch, seq)`; None where each row is one document.
        table_length: positions that there may be; default: as many as here.
        masks: what makes the masks.
    """
    seq = x.shape[1] if positions is None else positions.shape[1]

    @cache
    def rotary(is_local: bool) -> RotaryTable:
        theta, scaling = config.rope_theta, config.rope_scaling
        if is_local and config.sliding_rope_theta is not None:
            theta, scaling = config.sliding_rope_theta, None
        table = rotary_table(table_length or seq, config.rotary_dim, theta, x.device, scaling)
        return table if positions is None else table.at(positions)

    mask = masks(config, x, starts, seq)
    numbers = range(config.num_layers) if layers is None else tuple(layers)
    has_two = config.sliding_rope_theta is not None
    documents = None
    if starts is not None and any(config.kind_of(layer) == "linear" for layer in numbers):
        documents = RowDocuments(starts, dtype=x.dtype)

    return [
        LayerInputs(
            rotary(window is not None and has_two) if config.has_rope(layer) else None,
            documents if config.kind_of(layer) == "linear" else mask(window),
        )
        for layer, window in ((layer, config.window_of(layer)) for layer in numbers)
    ]
