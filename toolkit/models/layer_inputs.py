"""What layers are given besides the residual stream: rotary angles and masks, once per kind."""

from typing import NamedTuple

import torch
from torch import Tensor

from toolkit.models.config import TransformerConfig
from toolkit.models.masks import AttentionMask
from toolkit.models.rope import RotaryTable, rotary_table


class LayerInputs(NamedTuple):
    """For one layer in one forward."""

    rotary: RotaryTable | None
    """None for learned positions."""
    mask: AttentionMask | None
    """None where plain causal attention does."""


def layer_inputs(
    config: TransformerConfig, x: Tensor, starts: Tensor | None, positions: Tensor | None
) -> list[LayerInputs]:
    """Of every layer, in order; those of one kind share theirs.

    Args:
        x: embeddings `(batch, seq, d_model)`; for their shape, type and device.
        starts, positions: of documents, `(batch, seq)`; None where each row is one document.
    """
    angles: dict[bool, RotaryTable | None] = {}
    masks: dict[int | None, AttentionMask | None] = {}
    seq, inputs = x.shape[1], []
    for layer in range(config.num_layers):
        window = config.window_of(layer)
        is_local = window is not None and config.sliding_rope_theta is not None
        if is_local not in angles:
            angles[is_local] = _angles(config, x, positions, is_local=is_local)
        if window is not None and window >= seq:
            window = None
        if window not in masks:
            masks[window] = _mask(config, x, starts, window)
        inputs.append(LayerInputs(angles[is_local], masks[window]))
    return inputs


def _angles(
    config: TransformerConfig, x: Tensor, positions: Tensor | None, *, is_local: bool
) -> RotaryTable | None:
    if config.positions != "rope":
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    if is_local:
        assert config.sliding_rope_theta is not None
        theta, scaling = config.sliding_rope_theta, None
    table = rotary_table(x.shape[1], config.rotary_dim, theta, x.device, scaling)
    return table if positions is None else table.at(positions)


def _mask(
    config: TransformerConfig, x: Tensor, starts: Tensor | None, window: int | None
) -> AttentionMask | None:
    if starts is None:
        if window is None and config.attention_soft_cap is None:
            return None
        starts = torch.zeros(1, x.shape[1], dtype=torch.int64, device=x.device)
    return AttentionMask(starts, window=window, dtype=x.dtype, head_dim=config.attention_head_dim)
