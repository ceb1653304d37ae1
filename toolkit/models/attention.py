"""Causal self-attention with grouped key/value heads."""

from torch import Tensor, nn

from toolkit.models.attend import attend
from toolkit.models.config import TransformerConfig
from toolkit.models.masks import AttentionMask
from toolkit.models.norms import build_norm
from toolkit.models.rope import RotaryTable, rotate


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
        attended = attend(
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
