"""What a Transformer is made of: every choice that changes its parameters or its numbers."""

from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive

AttentionKind = Literal["full", "sliding"]
AttentionBackend = Literal["auto", "flash", "flash3", "cudnn", "efficient", "math"]
CompileMode = Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"]
GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that record CUDA graphs."""


class MoEConfig(Config, frozen=True, kw_only=True):
    """Feed-forward layers of which each token uses a few (Shazeer et al. 2017).

    Dropless: every token reaches all of its experts, however unevenly they are chosen.
    """

    num_experts: int
    """Routed experts per layer."""
    top_k: int
    """Experts of one token."""
    intermediate_size: int
    """Hidden width of one expert."""
    normalize_top_k: bool = True
    """Scale the weights of a token's experts to sum to one (Mixtral, Qwen 3). Off: they are the
    softmax over all experts (OLMoE)."""
    shared_expert_intermediate_size: int | None = None
    """Hidden width of an expert that all tokens use besides the routed ones; null: none."""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that have an ordinary feed-forward of `model.intermediate_size`."""
    load_balancing_multiplier: float = 0.01
    """Weight in the loss of the load-balancing loss, num_experts * sum over experts of (share of
    assignments * mean probability) inside each instance, mean over target tokens and layers. Per
    instance (DeepSeek-V3, 2024), so that it does not depend on how a batch is split."""
    router_z_loss_multiplier: float = 0.0
    """Weight in the loss of logsumexp(router logits)^2, mean over target tokens and layers (ST-MoE,
    Zoph et al. 2022)."""

    def __post_init__(self) -> None:
        check_positive(
            self, "num_experts", "top_k", "intermediate_size", "shared_expert_intermediate_size"
        )
        check_not_negative(self, "load_balancing_multiplier", "router_z_loss_multiplier")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")


class LinearRopeConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="linear"):
    """Positions are divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float
    """How many times longer sequences become."""

    def __post_init__(self) -> None:
        check_positive(self, "factor")


class Llama3RopeConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="llama3"):
    """Slow frequencies are divided by `factor`, fast ones stay, those between go over smoothly
    (Llama 3.1, Dubey et al. 2024)."""

    factor: float
    """What slow frequencies are divided by."""
    low_freq_factor: float
    """Frequencies that turn fewer times than this in the original length are slow."""
    high_freq_factor: float
    """Those that turn more often than this are fast."""
    original_max_position_embeddings: int
    """Length in tokens that the model was trained at before."""

    def __post_init__(self) -> None:
        check_positive(
            self, "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings",
        )  # fmt: skip
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be greater than low_freq_factor "
                f"{self.low_freq_factor}"
            )


class YarnRopeConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="yarn"):
    """Interpolation by frequency, and hotter attention (YaRN, Peng et al. 2023)."""

    factor: float
    """How many times longer sequences become."""
    original_max_position_embeddings: int
    """Length in tokens that the model was trained at before."""
    beta_fast: float = 32.0
    """Frequencies that turn more often than this in the original length stay as they are."""
    beta_slow: float = 1.0
    """Those that turn fewer times are divided by `factor`."""
    attention_factor: float | None = None
    """Multiplies cosines and sines; default: 0.1 * ln(factor) + 1, or by the two below."""
    mscale: float | None = None
    """With `mscale_all_dim`: the default of `attention_factor` is the quotient of
    0.1 * m * ln(factor) + 1 for m = this and m = that (DeepSeek-V2)."""
    mscale_all_dim: float | None = None
    """See `mscale`."""
    truncate: bool = True
    """Round the channels where the transition begins and ends to whole ones."""

    def __post_init__(self) -> None:
        check_positive(
            self, "factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
            "attention_factor",
        )  # fmt: skip
        check_not_negative(self, "mscale", "mscale_all_dim")


RopeScalingConfig = LinearRopeConfig | Llama3RopeConfig | YarnRopeConfig


class Architecture(Config, frozen=True, kw_only=True):
    """The fields of `TransformerConfig`, and what follows from them."""

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
    num_scores: int | None = None
    """Scores that the head gives each token, by a linear layer without bias, in the place of logits
    over the vocabulary (a reward model has 1); null: it is a language model."""
    init_std: float = 0.02
    """Standard deviation of initial weights (normal, cut at 3 std)."""
    init_scale_residual: bool = False
    """Divide `init_std` by sqrt(2 * num_layers) for the projections that write into the residual
    stream (GPT-2, Radford et al. 2019)."""
    loss_chunk_size: int | None = None
    """Most token rows per piece of the output head and loss; bounds the memory of logits. Default:
    as many as have 1 GiB of logits in fp32 (32 MiB on a CPU), but at least 256."""

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def attention_head_dim(self) -> int:
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
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_attention_output_bias(self) -> bool:
        return self.bias if self.attention_output_bias is None else self.attention_output_bias

    @property
    def has_feed_forward_bias(self) -> bool:
        return self.bias if self.feed_forward_bias is None else self.feed_forward_bias

    @property
    def is_gated(self) -> bool:
        """Whether one input projection of the feed-forward gates the other."""
        return self.feed_forward in ("swiglu", "geglu")

    @property
    def moe_layers(self) -> tuple[int, ...]:
        if self.moe is None:
            return ()
        dense = set(self.moe.dense_layers)
        return tuple(n for n in range(self.num_layers) if n not in dense)

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer sees; None: all before it."""
        kind = self.attention_pattern[layer % len(self.attention_pattern)]
        return self.sliding_window if kind == "sliding" else None
