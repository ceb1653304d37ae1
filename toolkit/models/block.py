"""One layer: attention and feed-forward around the residual stream."""

from torch import Tensor, nn

from toolkit.models.attention import Attention
from toolkit.models.config import TransformerConfig
from toolkit.models.feed_forward import build_feed_forward
from toolkit.models.masks import AttentionMask
from toolkit.models.moe import MoE
from toolkit.models.norms import build_norm
from toolkit.models.rope import RotaryTable
from toolkit.models.router_loss import RouterSums


class Block(nn.Module):
    """x + f(x), for f = attention and then feed-forward; in parallel: x plus both of the same x.

    Norms by `norm_placement`: f(norm(x)), norm(f(x)), or output_norm(f(norm(x))).
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        moe = config.moe if layer in config.moe_layers else None
        self.placement = config.norm_placement
        self.is_parallel = config.parallel_residual
        self.attention = Attention(config)
        self.attention_norm = build_norm(config, config.d_model)
        self.has_experts = moe is not None
        self.feed_forward = build_feed_forward(config) if moe is None else MoE(config, moe)
        self.feed_forward_norm = build_norm(config, config.d_model)
        if self.placement == "sandwich":
            self.attention_output_norm = build_norm(config, config.d_model)
            self.feed_forward_output_norm = build_norm(config, config.d_model)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable | None,
        mask: AttentionMask | None = None,
        is_target: Tensor | None = None,
    ) -> tuple[Tensor, RouterSums | None]:
        """`(batch, seq, d_model)` to the same shape, and the router's sums if there is one.

        Args:
            is_target: `(batch, seq)` bool: tokens that count in the sums; None: no sums.
        """
        if self.is_parallel:
            attended = self.attention(self.attention_norm(x), rotary, mask)
            fed, sums = self._feed(self.feed_forward_norm(x), is_target)
            return x + (attended + fed), sums
        if self.placement == "reordered":
            x = x + self.attention_norm(self.attention(x, rotary, mask))
            fed, sums = self._feed(x, is_target)
            return x + self.feed_forward_norm(fed), sums
        attended = self.attention(self.attention_norm(x), rotary, mask)
        if self.placement == "sandwich":
            attended = self.attention_output_norm(attended)
        x = x + attended
        fed, sums = self._feed(self.feed_forward_norm(x), is_target)
        if self.placement == "sandwich":
            fed = self.feed_forward_output_norm(fed)
        return x + fed, sums

    def _feed(self, x: Tensor, is_target: Tensor | None) -> tuple[Tensor, RouterSums | None]:
        if self.has_experts:
            return self.feed_forward(x, is_target)
        return self.feed_forward(x), None
