"""What a Transformer is made of: every choice that changes its parameters or its numbers."""

from typing import Literal

from toolkit.config import Config
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig
from toolkit.models.rope_scaling import RopeScalingConfig

AttentionKind = Literal["full", "sliding", "linear"]
AttentionGate = Literal["none", "headwise", "elementwise"]
AttentionBackend = Literal[
    "auto", "sdpa", "flex", "flash", "flash3", "cudnn", "efficient", "math"
]  # fmt: skip
"""See `train_module.attention_backend`."""
CompileMode = Literal["default", "max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"]
GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that record CUDA graphs."""


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
