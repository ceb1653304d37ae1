"""The position-wise half of a block."""

from torch import Tensor, nn

from toolkit.models.config import TransformerConfig


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, d_model: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, intermediate_size, bias=bias)
        self.up = nn.Linear(d_model, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class GELU(nn.Module):
    """down(gelu(up(x))), GELU by its tanh approximation as in GPT-2."""

    def __init__(self, d_model: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        return self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


def build_feed_forward(config: TransformerConfig) -> SwiGLU | GELU:
    """The feed-forward that `config` asks for."""
    kind = SwiGLU if config.feed_forward == "swiglu" else GELU
    return kind(config.d_model, config.intermediate_size, bias=config.bias)
