"""Configs of models."""

from typing import TYPE_CHECKING, Literal

from toolkit.config import Config
from toolkit.config.base import check_positive
from toolkit.models import counts
from toolkit.models.gpt_config import GPTConfig
from toolkit.models.moe_config import MoEConfig
from toolkit.models.rope_config import RopeScalingConfig
from toolkit.models.sizes import LARGEST, MOST_PARAMETERS, check_sizes

if TYPE_CHECKING:
    from toolkit.models.transformer import Transformer

AttentionKind = Literal["full", "sliding"]


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
    norm_weight_offset: float = 0.0
    """RMS norms multiply by this + weight, in fp32; 1 in Gemma, whose weights start at zero."""
    norm_placement: Literal["pre", "reordered", "sandwich"] = "pre"
    """`pre`: before attention and feed-forward; `reordered`: on their outputs (OLMo 2); `sandwich`:
    both (Gemma 2)."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual stream and add to it together (GPT-J,
    GPT-NeoX), instead of one after the other. With `norm_placement: pre`."""
    qk_norm: Literal["none", "full", "per_head"] = "none"
    """Normalise queries and keys: over all heads at once (OLMo 2) or each head (Qwen 3)."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary (Su et al. 2021) or learned absolute positions."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """How rotary positions are stretched; null: not."""
    rotary_fraction: float = 1.0
    """Share of each head's channels that is rotated, the first ones (GPT-NeoX, Phi)."""
    sliding_rope_theta: float | None = None
    """Base of the rotary frequencies of sliding layers, which then have no `rope_scaling` (Gemma 3,
    OLMo 3); null: they are like the others."""
    sliding_window: int | None = None
    """Keys that a query of a sliding layer sees: itself and those right before it; null: all."""
    attention_pattern: tuple[AttentionKind, ...] = ("sliding",)
    """Kind of attention layer by layer, repeated to the last. Counts with `sliding_window`."""
    attention_scale: float | None = None
    """Multiplies query-key products; default: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    """Scores become cap * tanh(score / cap) (Gemma 2); null: no cap."""
    logit_soft_cap: float | None = None
    """The same for the logits."""
    embedding_scale: float = 1.0
    """Multiplies token embeddings (Gemma: sqrt(d_model)), rounded to the compute type first."""
    feed_forward: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "swiglu"
    """SwiGLU or GEGLU (Shazeer 2020), or two layers with GELU: `gelu` and `geglu` by the tanh
    approximation (GPT-2, Gemma), `gelu_exact` by the error function (GPT-NeoX)."""
    moe: MoEConfig | None = None
    """Experts in the place of feed-forwards; null: none."""
    bias: bool = False
    """Biases in linear layers and layer norms."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections; default: `bias`."""
    attention_output_bias: bool | None = None
    """Bias of attention's output projection; default: `bias`."""
    feed_forward_bias: bool | None = None
    """Biases in feed-forwards; default: `bias`. Experts have none."""
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
            "norm_eps", "rope_theta", "sliding_rope_theta", "rotary_fraction", "sliding_window",
            "attention_scale", "attention_soft_cap", "logit_soft_cap", "embedding_scale",
            "init_std", "loss_chunk_size",
        )  # fmt: skip
        sizes = {name: getattr(self, name) for name in LARGEST if name != "num_experts"}
        check_sizes({**sizes, "num_experts": self.moe.num_experts if self.moe else None})
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
        if self.rotary_fraction > 1:
            raise ValueError(f"rotary_fraction {self.rotary_fraction} must be at most 1")
        if self.positions == "rope" and self.rotary_dim % 2:
            part = f" of it rotated ({self.rotary_fraction})" if self.rotary_fraction < 1 else ""
            raise ValueError(f"rope needs an even head_dim, not {self.rotary_dim}{part}")
        if not self.attention_pattern:
            raise ValueError("attention_pattern: empty; name at least one kind, full or sliding")
        if self.norm_weight_offset and self.norm != "rms_norm":
            raise ValueError(f"norm_weight_offset goes with norm rms_norm, not {self.norm}")
        if self.parallel_residual and self.norm_placement != "pre":
            raise ValueError("parallel_residual goes with norm_placement pre only")
        if self.moe is not None:
            self._check_experts(self.moe)
        if self.num_parameters > MOST_PARAMETERS:
            raise ValueError(
                f"{self.num_parameters:.1e} parameters are more than any model has (at most "
                f"{MOST_PARAMETERS:.0e})"
            )

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
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.attention_head_dim * self.rotary_fraction)

    @property
    def has_qkv_bias(self) -> bool:
        """`qkv_bias` with the default filled in."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        """`attention_output_bias` with the default filled in."""
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_feed_forward_bias(self) -> bool:
        """`feed_forward_bias` with the default filled in."""
        return self.bias if self.feed_forward_bias is None else self.feed_forward_bias

    @property
    def num_feed_forward_matrices(self) -> int:
        """Three where one input projection gates the other, else two."""
        return 3 if self.feed_forward in ("swiglu", "geglu") else 2

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that have experts."""
        if self.moe is None:
            return ()
        dense = set(self.moe.dense_layers)
        return tuple(n for n in range(self.num_layers) if n not in dense)

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer sees; None: all before it."""
        kind = self.attention_pattern[layer % len(self.attention_pattern)]
        return self.sliding_window if kind == "sliding" else None

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters of the built model, padding rows included."""
        return counts.num_parameters(self)

    @property
    def num_active_parameters(self) -> int:
        """Of these, the ones that one token uses: fewer than all where there are experts."""
        return counts.num_active_parameters(self)

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the lookup tables: token ids (padding rows included) and positions."""
        return counts.num_embedding_parameters(self)

    @property
    def num_non_embedding_parameters(self) -> int:
        """`num_parameters` without the lookup tables. An output head of its own is counted."""
        return self.num_parameters - self.num_embedding_parameters

    def flops_per_token(self, sequence_length: int) -> int:
        """Model FLOPs to train one token; see `counts.flops_per_token`."""
        return counts.flops_per_token(self, sequence_length)

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

    def _check_experts(self, moe: MoEConfig) -> None:
        if self.feed_forward not in ("swiglu", "geglu"):
            raise ValueError(f"moe: experts are gated; feed_forward {self.feed_forward} is not")
        wrong = [layer for layer in moe.dense_layers if not 0 <= layer < self.num_layers]
        if wrong:
            raise ValueError(
                f"moe.dense_layers: there is no layer {wrong[0]}; num_layers is {self.num_layers}"
            )


ModelConfig = TransformerConfig | GPTConfig
