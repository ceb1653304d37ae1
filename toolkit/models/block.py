"""One layer: attention and feed-forward around the residual stream."""

from torch import Tensor, nn

from toolkit.models.attention import Attention
from toolkit.models.config import TransformerConfig
from toolkit.models.documents import AttentionMask
from toolkit.models.feed_forward import build_feed_forward
from toolkit.models.norms import build_norm
from toolkit.models.rope import RotaryTable


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)). Reordered (OLMo 2): x + norm(f(x)). f: attention, feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.attention = Attention(config)
        self.attention_norm = build_norm(config, config.d_model)
        self.feed_forward = build_feed_forward(config)
        self.feed_forward_norm = build_norm(config, config.d_model)

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, mask: AttentionMask | None = None
    ) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), rotary, mask)
            return x + self.feed_forward(self.feed_forward_norm(x))
        x = x + self.attention_norm(self.attention(x, rotary, mask))
        return x + self.feed_forward_norm(self.feed_forward(x))
