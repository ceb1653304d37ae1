"""Configs of models, with exact parameter and FLOP counts."""

from typing import TYPE_CHECKING, Literal

from toolkit.config import Config
from toolkit.config.base import check_positive

if TYPE_CHECKING:
    from toolkit.models.transformer import Transformer


class TransformerConfig(Config, kw_only=True, tag_field="type", tag="transformer"):
    """A decoder-only Transformer from parts."""

    vocab_size: int
    """Number of token ids; must cover the tokenizer's."""
    vocab_multiple: int = 64
    """Embedding rows are padded to a multiple of this; padding ids are never predicted."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Number of blocks."""
    num_heads: int
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads (grouped-query attention, Ainslie et al. 2023); default: num_heads."""
    head_dim: int | None = None
    """Width of one head; default: d_model / num_heads."""
    intermediate_size: int
    """Hidden width of the feed-forward."""
    max_sequence_length: int = 2048
    """Longest sequence; the table size of learned positions."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """Kind of normalisation."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    norm_placement: Literal["pre", "reordered"] = "pre"
    """`pre`: before attention and feed-forward; `reordered`: on their outputs (OLMo 2)."""
    qk_norm: Literal["none", "full", "per_head"] = "none"
    """Normalise queries and keys: over all heads at once (OLMo 2) or each head (Qwen 3)."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary (Su et al. 2021) or learned absolute positions."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    """SwiGLU (Shazeer 2020), or two layers with GELU (tanh approximation, GPT-2)."""
    bias: bool = False
    """Biases in linear layers and layer norms."""
    tie_embeddings: bool = False
    """Share the embedding with the output head."""
    init_std: float = 0.02
    """Standard deviation of initial weights (normal, cut at 3 std)."""
    loss_chunk_size: int = 1024
    """Token rows per piece of the output head and loss; bounds memory of the logits."""

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_size", "vocab_multiple", "d_model", "num_layers", "num_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "max_sequence_length",
            "norm_eps", "rope_theta", "loss_chunk_size",
        )  # fmt: skip
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}; "
                "choose another width or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by "
                f"num_key_value_heads {self.kv_heads}"
            )
        if self.positions == "rope" and self.attention_head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, not {self.attention_head_dim}")

    @property
    def kv_heads(self) -> int:
        """Key/value heads with the default filled in."""
        return self.num_key_value_heads or self.num_heads

    @property
    def attention_head_dim(self) -> int:
        """Head width with the default filled in."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters of the built model, padding rows included."""
        raise NotImplementedError

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> "Transformer":
        """The model on `init_device`: "meta" leaves parameters without storage."""
        raise NotImplementedError


ModelConfig = TransformerConfig
