"""What a Transformer is made of: every choice that changes its parameters or its numbers."""

from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_not_negative, check_positive

AttentionKind = Literal["full", "sliding", "linear"]
AttentionGate = Literal["none", "headwise", "elementwise"]
AttentionBackend = Literal[
    "auto", "sdpa", "flex", "flash", "flash3", "cudnn", "efficient", "math"
]  # fmt: skip
"""See `train_module.attention_backend`."""
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
    scores of all experts as they are (OLMoE)."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """What makes the router's logits scores: a softmax over all experts, or a sigmoid of each
    (DeepSeek-V3, 2024)."""
    scaling_factor: float = 1.0
    """Multiplies the weights of a token's experts (DeepSeek's routed_scaling_factor)."""
    num_groups: int = 1
    """Groups of consecutive experts. A token first chooses `top_k_groups` groups, and its experts
    among theirs. A group's score is the sum of its two highest (DeepSeek-V3), with softmax its
    highest (DeepSeek-V2)."""
    top_k_groups: int = 1
    """Groups of one token."""
    bias_update_rate: float | None = None
    """Balance experts without a loss (Wang et al. 2024): each has a bias, which is added to its
    score when experts are chosen and never to their weights. After each optimizer step the bias
    of every expert that got fewer target tokens of the global batch than the mean goes up by this,
    of every one that got more goes down. 0: biases stay as they are; null: there are none."""
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
            self, "num_experts", "top_k", "intermediate_size", "shared_expert_intermediate_size",
            "scaling_factor", "num_groups", "top_k_groups",
        )  # fmt: skip
        check_not_negative(
            self, "load_balancing_multiplier", "router_z_loss_multiplier", "bias_update_rate"
        )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts {self.num_experts} is not divisible by num_groups {self.num_groups}"
            )
        if self.top_k_groups > self.num_groups:
            raise ValueError(
                f"top_k_groups {self.top_k_groups} is more than num_groups {self.num_groups}"
            )
        if self.top_k > (reachable := self.top_k_groups * self.group_size):
            raise ValueError(
                f"top_k {self.top_k} is more than the {reachable} experts of {self.top_k_groups} "
                f"of {self.num_groups} groups; raise top_k_groups or lower top_k"
            )
        if self.num_groups > 1 and self.group_size == 1 and self.score_function == "sigmoid":
            raise ValueError(
                f"num_groups {self.num_groups} leaves one expert a group, of whose two highest "
                "scores a group's is the sum; use fewer groups"
            )

    @property
    def group_size(self) -> int:
        """Experts of one group."""
        return self.num_experts // self.num_groups


class DeltaNetConfig(Config, frozen=True, kw_only=True):
    """Layers of linear attention by the gated delta rule (Gated DeltaNet, Yang et al. 2024): in the
    place of keys and values of all tokens before it, a head keeps one matrix of key_head_dim x
    value_head_dim numbers. See `toolkit.models.delta_net`."""

    num_key_heads: int
    """Heads of queries and keys."""
    num_value_heads: int
    """Heads of values, a multiple of `num_key_heads`; consecutive ones share a key head."""
    key_head_dim: int
    """Width of one head of queries and keys."""
    value_head_dim: int
    """Width of one head of values."""
    conv_kernel_size: int = 4
    """Tokens that the short convolution of queries, keys and values sees: each and those right
    before it."""
    allow_negative_eigenvalues: bool = False
    """Write strengths go up to 2 instead of 1, so that a step can turn what is kept along a key
    around (Grazzi et al. 2024; OLMo-hybrid)."""
    norm_eps: float = 1e-6
    """Added to the variance in the norm of each head's output."""
    norm_placement: Literal["pre", "reordered"] | None = None
    """`norm_placement` of the blocks with such a layer (OLMo-hybrid: `pre`, its other blocks
    `reordered`); null: as in the other blocks."""
    min_decay_rate: float = 0.0
    """Initial decay rates, exp(A_log), are uniform between this and `max_decay_rate`."""
    max_decay_rate: float = 16.0
    """See `min_decay_rate`."""
    min_time_step: float = 0.001
    """Initial time steps, softplus(dt_bias), are between this and `max_time_step`, uniform in their
    logarithm."""
    max_time_step: float = 0.1
    """See `min_time_step`."""

    def __post_init__(self) -> None:
        check_positive(
            self, "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim",
            "conv_kernel_size", "norm_eps", "max_decay_rate", "min_time_step", "max_time_step",
        )  # fmt: skip
        check_not_negative(self, "min_decay_rate")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads {self.num_value_heads} is not a multiple of num_key_heads "
                f"{self.num_key_heads}"
            )
        for name in ("decay_rate", "time_step"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(f"min_{name} {least} is more than max_{name} {most}")

    @property
    def key_width(self) -> int:
        """Of all heads of queries, and of keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Of all heads of values."""
        return self.num_value_heads * self.value_head_dim


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
    norm_weights: bool = True
    """Off: layer norms have neither weights nor biases (OLMo 1)."""
    norm_weight_offset: float = 0.0
    """RMS norms multiply by this + weight, in fp32; 1 in Gemma, whose weights start at zero."""
    norm_placement: Literal["pre", "reordered", "sandwich", "normalized"] = "pre"
    """`pre`: before attention and feed-forward; `reordered`: on their outputs (OLMo 2); `sandwich`:
    both (Gemma 2; Peri-LN, Kim et al. 2025). `normalized`: nGPT (Loshchilov et al. 2024), which has
    unit vectors and unit rows of weights in the place of norms."""
    residual_scale: float = 1.0
    """Multiplies what attention and feed-forward add to the residual stream (Granite)."""
    parallel_residual: bool = False
    """Attention and feed-forward read the same residual stream and add to it together (GPT-J,
    GPT-NeoX), instead of one after the other. With `norm_placement: pre`."""
    shared_norm: bool = False
    """With `parallel_residual`: both read it through one norm (Cohere)."""
    qk_norm: Literal["none", "full", "per_head"] = "none"
    """Normalise queries and keys: over all heads at once (OLMo 2) or each head (Qwen 3)."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary (Su et al. 2021) or learned absolute positions."""
    rope_pattern: tuple[Literal["rope", "none"], ...] = ("rope",)
    """Which layers rotate queries and keys, layer by layer, repeated to the last. `none`: without
    positions. SmolLM3 and Llama 4 have `["rope", "rope", "rope", "none"]`."""
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
    """Kind of attention layer by layer, repeated to the last. `sliding` is `full` without a
    `sliding_window`; `linear` is described by `delta_net`."""
    delta_net: DeltaNetConfig | None = None
    """Layers of kind `linear`; null: there are none."""
    attention_gate: AttentionGate = "none"
    """Multiply what attention reads by the sigmoid of a projection of its input, before its output
    projection: by one number per head or one per channel (Qiu et al. 2025; Qwen 3 Next)."""
    attention_sinks: bool = False
    """A learned score per head that takes part in the softmax and adds no value, so that a query
    may attend to nothing (gpt-oss)."""
    clip_qkv: float | None = None
    """Clip queries, keys and values to at most this size, before their rotation; null: not."""
    attention_scale: float | None = None
    """Multiplies query-key products; default: 1 / sqrt(head_dim)."""
    attention_soft_cap: float | None = None
    """Scores become cap * tanh(score / cap) (Gemma 2); null: no cap."""
    logit_soft_cap: float | None = None
    """The same for the logits."""
    logit_scale: float = 1.0
    """Multiplies the logits, before their soft cap (Granite: 1 / `logits_scaling`)."""
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
    num_mtp_layers: int = 0
    """Multi-token prediction (DeepSeek-V3, 2024, section 2.2): so many further blocks, of which
    number k predicts the token k + 1 places ahead. They are for training alone: they continue the
    layers' pattern, have experts where the model has any, and change no logits."""
    mtp_loss_multiplier: float = 0.3
    """Weight in the loss of the mean of their cross entropies."""
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
    def gate_width(self) -> int:
        """Gates of one token: those of `attention_gate`."""
        per_head = {"none": 0, "headwise": 1, "elementwise": self.attention_head_dim}
        return self.num_heads * per_head[self.attention_gate]

    @property
    def is_plain_softmax(self) -> bool:
        """Whether SDPA knows all that attention does with scores: no soft cap, no sinks."""
        return self.attention_soft_cap is None and not self.attention_sinks

    @property
    def is_normalized(self) -> bool:
        """Whether it is an nGPT."""
        return self.norm_placement == "normalized"

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

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers with linear attention."""
        return tuple(n for n in range(self.num_layers) if self.kind_of(n) == "linear")

    def kind_of(self, layer: int) -> AttentionKind:
        return self.attention_pattern[layer % len(self.attention_pattern)]

    def has_rope(self, layer: int) -> bool:
        """Whether this layer rotates queries and keys."""
        pattern = self.rope_pattern
        is_rotated = self.positions == "rope" and pattern[layer % len(pattern)] == "rope"
        return is_rotated and self.kind_of(layer) != "linear"

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of this layer is a mixture of experts; of blocks for multi-token
        prediction, which come after the last layer, too."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def num_routers(self) -> int:
        """Layers with experts, and blocks for multi-token prediction that have some."""
        return len(self.moe_layers) + (self.num_mtp_layers if self.moe is not None else 0)

    def window_of(self, layer: int) -> int | None:
        """Keys that a query of this layer sees; None: all before it."""
        return self.sliding_window if self.kind_of(layer) == "sliding" else None

    def norm_placement_of(self, layer: int) -> str:
        net = self.delta_net if self.kind_of(layer) == "linear" else None
        own = None if net is None else net.norm_placement
        return own or self.norm_placement
