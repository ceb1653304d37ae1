"""The position-wise half of a block."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from toolkit.models.config import TransformerConfig


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (GPT-2, Gemma)."""
    return gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": silu,
    "geglu": gelu_tanh,
    "gelu": gelu_tanh,
    "gelu_exact": gelu,
}
"""What each kind of feed-forward puts its gate, or its hidden layer, through."""


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(
        self,
        d_model: int,
        intermediate_size: int,
        *,
        activation: Callable[[Tensor], Tensor],
        bias: bool,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(d_model, intermediate_size, bias=bias)
        self.up = nn.Linear(d_model, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class FeedForward(nn.Module):
    """down(activation(up(x)))."""

    def __init__(
        self,
        d_model: int,
        intermediate_size: int,
        *,
        activation: Callable[[Tensor], Tensor],
        bias: bool,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(d_model, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        return self.down(self.activation(self.up(x)))


def build_feed_forward(config: TransformerConfig) -> GatedFeedForward | FeedForward:
    """The feed-forward that `config` asks for."""
    kind = GatedFeedForward if config.num_feed_forward_matrices == 3 else FeedForward
    return kind(
        config.d_model,
        config.intermediate_size,
        activation=ACTIVATIONS[config.feed_forward],
        bias=config.has_feed_forward_bias,
    )
