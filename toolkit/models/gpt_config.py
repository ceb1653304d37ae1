"""Config of the GPT-2 family in its own vocabulary."""

from typing import TYPE_CHECKING

from toolkit.config import Config
from toolkit.config.base import check_positive
from toolkit.models.sizes import check_sizes

if TYPE_CHECKING:
    from toolkit.models.config import TransformerConfig
    from toolkit.models.gpt import GPTModel


class GPTConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="gpt"):
    """The GPT-2 family in its own vocabulary (field names of `transformers.GPT2Config`)."""

    vocab_size: int = 50_257
    """Number of token ids; must cover the tokenizer's."""
    vocab_multiple: int = 64
    """Embedding rows are padded to a multiple of this; padding ids are never predicted."""
    n_positions: int = 1024
    """Longest sequence: rows of the table of learned positions."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads."""
    n_inner: int | None = None
    """Hidden width of the feed-forward; default: 4 * n_embd."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance."""
    bias: bool = True
    """Biases in linear layers and layer norms (GPT-2 has them)."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head (GPT-2 does)."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights (normal, cut at 3 std); projections into the residual
    stream get this / sqrt(2 * n_layer)."""
    loss_chunk_size: int = 1024
    """Most token rows per piece of the output head and loss (at most 256 on a CPU); bounds the
    memory of logits."""

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_size", "vocab_multiple", "n_positions", "n_embd", "n_layer", "n_head",
            "n_inner", "layer_norm_epsilon", "initializer_range", "loss_chunk_size",
        )  # fmt: skip
        names = {
            "vocab_size": "vocab_size", "vocab_multiple": "vocab_multiple", "d_model": "n_embd",
            "num_layers": "n_layer", "num_heads": "n_head", "intermediate_size": "n_inner",
            "max_sequence_length": "n_positions",
        }  # fmt: skip
        check_sizes({name: getattr(self, own) for name, own in names.items()}, names)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.to_transformer()  # whatever no model may have

    def to_transformer(self) -> "TransformerConfig":
        """The same model in the general vocabulary."""
        from toolkit.models.config import TransformerConfig

        return TransformerConfig(
            vocab_size=self.vocab_size,
            vocab_multiple=self.vocab_multiple,
            d_model=self.n_embd,
            num_layers=self.n_layer,
            num_heads=self.n_head,
            intermediate_size=self.n_inner or 4 * self.n_embd,
            max_sequence_length=self.n_positions,
            norm="layer_norm",
            norm_eps=self.layer_norm_epsilon,
            positions="learned",
            feed_forward="gelu",
            bias=self.bias,
            tie_embeddings=self.tie_word_embeddings,
            init_std=self.initializer_range,
            init_scale_residual=True,
            loss_chunk_size=self.loss_chunk_size,
        )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.n_embd

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.n_layer

    @property
    def max_sequence_length(self) -> int:
        """Longest sequence."""
        return self.n_positions

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.to_transformer().padded_vocab_size

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters of the built model, padding rows included."""
        return self.to_transformer().num_parameters

    @property
    def num_active_parameters(self) -> int:
        """All of them: there are no experts."""
        return self.num_parameters

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the lookup tables: token ids (padding rows included) and positions."""
        return self.to_transformer().num_embedding_parameters

    @property
    def num_non_embedding_parameters(self) -> int:
        """`num_parameters` without the lookup tables."""
        return self.to_transformer().num_non_embedding_parameters

    def flops_per_token(self, sequence_length: int) -> int:
        """See `TransformerConfig.flops_per_token`."""
        return self.to_transformer().flops_per_token(sequence_length)

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> "GPTModel":
        """The model on `init_device`; see `TransformerConfig.build`."""
        from toolkit.models.gpt import GPTModel

        return GPTModel(self, init_device=init_device, seed=seed)
