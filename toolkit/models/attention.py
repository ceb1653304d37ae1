"""Causal self-attention with grouped key/value heads, by the fastest kernel that computes it.

- No mask, no soft cap: SDPA's causal kernels.
- A mask on CUDA: flex attention over blocks of keys, which knows soft caps too.
- A mask elsewhere: SDPA with values added to the scores; or, as SDPA knows no soft caps, the scores
  written out. With a window (not on CUDA) or a cap, some queries at a time with the keys that these
  may see: a window of 256 in a row of 2048 costs a third of the whole on a CPU.

`toolkit.models.kernels` says why.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from toolkit.models.compile import allow_recompilations
from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import sdpa_form
from toolkit.models.masks import AttentionMask
from toolkit.models.norms import build_norm
from toolkit.models.rope import RotaryTable, rotate

PIECE_SIZE = 256
"""Fewest queries of a piece."""

MOST_PIECES = 8
"""Pieces of a long row; each is a part of its own in a compiled block's graph."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention, inside documents and windows where there is a mask.

    Args:
        query: `(batch, heads, seq, head_dim)`.
        key, value: the same with as many heads or, for grouped queries, fewer.
        mask: None where each query sees all before it in its row. Needed with a soft cap.
        scale: multiplies the scores; default: 1 / sqrt(head_dim).
        soft_cap: scores become soft_cap * tanh(score / soft_cap) (Gemma 2).

    Returns:
        `(batch, heads, seq, head_dim)`.
    """
    if mask is None:
        return _sdpa(query, key, value, None, scale)
    if mask.blocks is not None:
        # Inside a compiled block it becomes part of the block's graph.
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return flex(
            query,
            key,
            value,
            score_mod=None if soft_cap is None else _capped(soft_cap),
            block_mask=mask.blocks,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    if soft_cap is None and (mask.window is None or query.device.type == "cuda"):
        # The fused kernel of CUDA wants a bias whose rows are aligned: not cut at any key.
        return _sdpa(query, key, value, mask.bias, scale)
    return _in_pieces(query, key, value, mask, scale, soft_cap)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> Tensor:
    """SDPA, causal where there is no bias, in the form that a fused kernel takes."""
    groups, head_dim = query.shape[1] // key.shape[1], query.shape[3]
    form = sdpa_form(
        query.device.type,
        dtype=query.dtype,
        head_dim=head_dim,
        is_grouped=groups > 1,
        has_bias=bias is not None,
    )
    if form.repeats_heads:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    if form.padding:
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = (pad(heads, (0, form.padding)) for heads in (query, key, value))
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
        enable_gqa=groups > 1 and not form.repeats_heads,
    )
    return out[..., :head_dim] if form.padding else out


def _in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float | None,
    soft_cap: float | None,
) -> Tensor:
    assert mask.bias is not None
    seq = query.shape[2]
    rows = max(PIECE_SIZE, -(-seq // MOST_PIECES))
    pieces = []
    for start in range(0, seq, rows):
        end = min(start + rows, seq)
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        queries, bias = query[:, :, start:end], mask.bias[:, :, start:end, first:end]
        keys, values = key[:, :, first:end], value[:, :, first:end]
        if soft_cap is None:
            piece = _sdpa(queries, keys, values, bias, scale)
        else:
            piece = _written_out(queries, keys, values, bias, scale, soft_cap)
        pieces.append(piece)
    return torch.cat(pieces, dim=2)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float | None,
    soft_cap: float,
) -> Tensor:
    scale = query.shape[3] ** -0.5 if scale is None else scale
    rows = query.shape[2]
    # Types are chosen here: products in the compute type, the rest in fp32.
    with torch.autocast(query.device.type, enabled=False):
        # Queries of one group are rows of one matrix: keys and values are not repeated.
        grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        products = grouped @ key.transpose(2, 3)
        wide = products if products.dtype == torch.float64 else products.float()
        capped = (wide * (scale / soft_cap)).tanh() * soft_cap
        seen = capped.unflatten(2, (-1, rows)) + bias[:, :, None]
        weights = seen.softmax(-1).to(value.dtype).flatten(2, 3)
        return (weights @ value).unflatten(2, (-1, rows)).flatten(1, 2)


def _capped(soft_cap: float) -> Any:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return capped


@cache
def _compiled_flex_attention() -> Any:
    """Fused; without compilation it would write out all scores."""
    allow_recompilations()
    return torch.compile(flex_attention, dynamic=False)


class Attention(nn.Module):
    """Multi-head or grouped-query attention.

    Layers differ in nothing that is kept here: window and angles come with each call, so that one
    compilation serves all layers of a kind.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.scale = config.attention_scale
        self.soft_cap = config.attention_soft_cap
        self.norm_per_head = config.qk_norm == "per_head"
        query_width = config.num_heads * self.head_dim
        key_width = config.kv_heads * self.head_dim
        has_bias = config.has_qkv_bias
        self.attend: Callable[..., Tensor] = attend
        """Attention of whole heads; who splits rows over ranks puts another in its place."""
        self.query = nn.Linear(config.d_model, query_width, bias=has_bias)
        self.key = nn.Linear(config.d_model, key_width, bias=has_bias)
        self.value = nn.Linear(config.d_model, key_width, bias=has_bias)
        self.output = nn.Linear(query_width, config.d_model, bias=config.has_attention_output_bias)
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm != "none":
            self.query_norm = build_norm(
                config, self.head_dim if self.norm_per_head else query_width
            )
            self.key_norm = build_norm(config, self.head_dim if self.norm_per_head else key_width)

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, mask: AttentionMask | None = None
    ) -> Tensor:
        """`(batch, seq, d_model)` to the same shape.

        Args:
            rotary: None for learned positions.
            mask: None where each query sees all before it in its row; not with soft caps.
        """
        batch, seq, _ = x.shape
        query = self._heads(self.query(x), self.query_norm)
        key = self._heads(self.key(x), self.key_norm)
        value = self._heads(self.value(x), None)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        attended = self.attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            scale=self.scale,
            soft_cap=self.soft_cap,
        )
        return self.output(attended.transpose(1, 2).reshape(batch, seq, -1))

    def _heads(self, projected: Tensor, norm: nn.Module | None) -> Tensor:
        """`(batch, seq, heads * head_dim)`, normalised, as `(batch, seq, heads, head_dim)`."""
        if norm is not None and not self.norm_per_head:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_per_head:
            heads = norm(heads)
        return heads
