"""Configs of models, with exact parameter and FLOP counts."""

from typing import TYPE_CHECKING, Literal

from toolkit.config import Config
from toolkit.config.base import check_positive

if TYPE_CHECKING:
    from toolkit.models.gpt import GPTModel
    from toolkit.models.transformer import Transformer


class TransformerConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="transformer"):
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
    init_scale_residual: bool = False
    """Divide `init_std` by sqrt(2 * num_layers) for the projections that write into the residual
    stream (GPT-2, Radford et al. 2019)."""
    loss_chunk_size: int = 1024
    """Most token rows per piece of the output head and loss (at most 256 on a CPU); bounds the
    memory of logits."""

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_size", "vocab_multiple", "d_model", "num_layers", "num_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "max_sequence_length",
            "norm_eps", "rope_theta", "init_std", "loss_chunk_size",
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
        head = 0 if self.tie_embeddings else self.padded_vocab_size * self.d_model
        return (
            self.num_embedding_parameters
            + self.num_layers * self._block_parameters
            + self._norm_parameters(self.d_model)
            + head
        )

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the lookup tables: token ids (padding rows included) and positions."""
        rows = self.padded_vocab_size
        if self.positions == "learned":
            rows += self.max_sequence_length
        return rows * self.d_model

    @property
    def num_non_embedding_parameters(self) -> int:
        """`num_parameters` without the lookup tables. An output head of its own is counted."""
        return self.num_parameters - self.num_embedding_parameters

    def flops_per_token(self, sequence_length: int) -> int:
        """Model FLOPs to train one token (forward and backward) in a sequence of that length.

        6 * (weights of the blocks' matrices + vocab_size * d_model of the output head, tied or not)
        + 6 * num_layers * num_heads * head_dim * (sequence_length + 1).

        The second term is causal attention: a token attends to (sequence_length + 1) / 2 keys on
        average; QK^T and PV are 2 FLOPs each per key and channel, and backward costs twice
        forward. Lookup of embeddings, norms, biases and padding ids are not counted, nor is
        anything that activation checkpointing computes twice.
        """
        matrices = self.num_layers * self._block_matrix_parameters + self.vocab_size * self.d_model
        width = self.num_heads * self.attention_head_dim
        return 6 * matrices + 6 * self.num_layers * width * (sequence_length + 1)

    def to_transformer(self) -> "TransformerConfig":
        """This config itself; other model configs translate themselves into one of these."""
        return self

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> "Transformer":
        """The model on `init_device`.

        "meta" leaves parameters without storage, to be sharded, materialised with `to_empty` and
        filled by `toolkit.models.init`; any other device gets its initial values here.
        """
        from toolkit.models.transformer import Transformer

        return Transformer(self, init_device=init_device, seed=seed)

    @property
    def _block_matrix_parameters(self) -> int:
        query = self.num_heads * self.attention_head_dim
        key_value = self.kv_heads * self.attention_head_dim
        feed_forward_matrices = 3 if self.feed_forward == "swiglu" else 2
        return (
            2 * self.d_model * (query + key_value)
            + feed_forward_matrices * self.d_model * self.intermediate_size
        )

    @property
    def _block_parameters(self) -> int:
        query = self.num_heads * self.attention_head_dim
        key_value = self.kv_heads * self.attention_head_dim
        total = self._block_matrix_parameters + 2 * self._norm_parameters(self.d_model)
        if self.qk_norm == "full":
            total += self._norm_parameters(query) + self._norm_parameters(key_value)
        elif self.qk_norm == "per_head":
            total += 2 * self._norm_parameters(self.attention_head_dim)
        if self.bias:
            feed_forward_inputs = 2 if self.feed_forward == "swiglu" else 1
            total += query + 2 * key_value + self.d_model
            total += feed_forward_inputs * self.intermediate_size + self.d_model
        return total

    def _norm_parameters(self, width: int) -> int:
        return 2 * width if self.norm == "layer_norm" and self.bias else width


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
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

    def to_transformer(self) -> TransformerConfig:
        """The same model in the general vocabulary."""
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


ModelConfig = TransformerConfig | GPTConfig
