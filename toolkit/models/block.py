"""One block of a Transformer: attention, feed-forward, and the norms around them."""

from typing import Any

from torch import Tensor, nn

from toolkit.models.attention import Attention
from toolkit.models.config import TransformerConfig
from toolkit.models.delta_net import GatedDeltaNet
from toolkit.models.feed_forward import FeedForward, MoE
from toolkit.models.normalized import NormalizedFeedForward, SphereStep
from toolkit.models.norms import build_norm
from toolkit.models.rope import RotaryTable
from toolkit.models.router import RouterSums


class Block(nn.Module):
    """x + f(x), for f = attention and then feed-forward; in parallel: x plus both of the same x.

    Norms by `norm_placement`: f(norm(x)), norm(f(x)), or output_norm(f(norm(x))). `normalized`: see
    `toolkit.models.normalized`.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe if config.has_experts(layer) else None
        self.placement = config.norm_placement_of(layer)
        self.is_parallel = config.parallel_residual
        is_linear = config.kind_of(layer) == "linear"
        self.attention: nn.Module = GatedDeltaNet(config) if is_linear else Attention(config)
        self.residual_scale = config.residual_scale
        if not config.is_normalized:
            self.attention_norm = build_norm(config, config.d_model)
        self.has_experts = moe is not None
        self.feed_forward: nn.Module
        if config.is_normalized:
            self.feed_forward = NormalizedFeedForward(config, config.intermediate_size)
            self.attention_step = SphereStep(config)
            self.feed_forward_step = SphereStep(config)
            return
        if moe is None:
            bias = config.has_feed_forward_bias
            self.feed_forward = FeedForward(config, config.intermediate_size, bias=bias)
        else:
            self.feed_forward = MoE(config, moe)
        self.feed_forward_norm: nn.Module | None = None
        if not config.shared_norm:
            self.feed_forward_norm = build_norm(config, config.d_model)
        if self.placement == "sandwich":
            self.attention_output_norm = build_norm(config, config.d_model)
            self.feed_forward_output_norm = build_norm(config, config.d_model)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable | None,
        mask: Any = None,
        is_target: Tensor | None = None,
    ) -> tuple[Tensor, RouterSums | None]:
        """`(batch, seq, d_model)` to the same shape, and the router's sums over the tokens of
        `is_target`, `(batch, seq)` bool; None where there is no router or None is given."""
        if self.placement == "normalized":
            x = self.attention_step(x, self.attention(x, rotary, mask))
            return self.feed_forward_step(x, self.feed_forward(x)), None
        normed = x if self.placement == "reordered" else self.attention_norm(x)
        attended = self.attention(normed, rotary, mask)
        if self.is_parallel:
            if self.feed_forward_norm is not None:
                normed = self.feed_forward_norm(x)
            fed, sums = self._feed(normed, is_target)
            return x + self._scaled(attended + fed), sums
        assert self.feed_forward_norm is not None
        if self.placement == "reordered":
            x = x + self._scaled(self.attention_norm(attended))
            fed, sums = self._feed(x, is_target)
            return x + self._scaled(self.feed_forward_norm(fed)), sums
        if self.placement == "sandwich":
            attended = self.attention_output_norm(attended)
        x = x + self._scaled(attended)
        fed, sums = self._feed(self.feed_forward_norm(x), is_target)
        if self.placement == "sandwich":
            fed = self.feed_forward_output_norm(fed)
        return x + self._scaled(fed), sums

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def _feed(self, x: Tensor, is_target: Tensor | None) -> tuple[Tensor, RouterSums | None]:
        if self.has_experts:
            return self.feed_forward(x, is_target)
        return self.feed_forward(x), None
