"""Configs of models. They import no torch; `build` makes the model."""

from typing import Any, ClassVar

import msgspec

from toolkit.config import Config, convert
from toolkit.config.base import check_not_negative, check_positive
from toolkit.config.named import named, users_object, users_subclass
from toolkit.errors import ConfigError
from toolkit.models import shapes
from toolkit.models.architecture import Architecture
from toolkit.models.presets import preset

LARGEST: dict[str, int] = {
    "vocab_size": 1 << 31,
    "vocab_multiple": 1 << 31,
    "d_model": 1 << 24,
    "num_layers": 10_000,
    "num_heads": 1 << 20,
    "num_key_value_heads": 1 << 20,
    "head_dim": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_experts": 100_000,
    "num_mtp_layers": 100,
    "max_sequence_length": 1 << 40,
}
"""By the names of our configs."""
MOST_EXPERTS = 1_000_000
"""Of all layers together."""
MOST_PARAMETERS = 10**16


def check_sizes(sizes: dict[str, int | None], names: dict[str, str] | None = None) -> None:
    """Raise ValueError for a size that is larger than any model's: what is made of it would fill
    the memory before an error is found. `names` are what messages call those of `LARGEST`.
    """
    for name, value in sizes.items():
        largest = LARGEST[name]
        if value is not None and value > largest:
            shown = (names or {}).get(name, name)
            size = f"{value:,}" if value < 10**18 else "of more than 18 digits"
            raise ValueError(f"{shown} {size} is larger than any model's (at most {largest:,})")
    experts = (sizes.get("num_experts") or 0) * (sizes.get("num_layers") or 1)
    if experts > MOST_EXPERTS:
        raise ValueError(
            f"{experts:,} experts in all layers are more than any model has (at most "
            f"{MOST_EXPERTS:,})"
        )


class _Counts:
    """Numbers of a model config, told from the Transformer that it stands for."""

    __slots__ = ()

    def to_transformer(self) -> "TransformerConfig":
        """The same model in the general vocabulary."""
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters of the built model, padding rows included."""
        return shapes.num_parameters(self.to_transformer())

    @property
    def num_active_parameters(self) -> int:
        """Of these, the ones that one token uses: fewer than all where there are experts."""
        return shapes.num_active_parameters(self.to_transformer())

    @property
    def num_non_embedding_parameters(self) -> int:
        """All but the lookup tables of token ids and positions. A head of its own is counted."""
        return shapes.num_non_embedding_parameters(self.to_transformer())

    @property
    def shown_parameters(self) -> str:
        """The number of parameters for a reader, with the active ones where there are fewer."""
        total, active = self.num_parameters, self.num_active_parameters
        return f"{total:,}" if active == total else f"{total:,} ({active:,} active)"

    def flops_per_token(self, sequence_length: int) -> int:
        """Model FLOPs to train one token; see `shapes.flops_per_token`."""
        return shapes.flops_per_token(self.to_transformer(), sequence_length)


_OF_NGPT = {
    "vocab_size", "vocab_multiple", "d_model", "num_layers", "num_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_sequence_length", "norm_placement", "norm_eps",
    "rope_theta", "rope_scaling", "rotary_fraction", "rope_pattern", "sliding_rope_theta",
    "sliding_window", "attention_pattern", "attention_gate", "attention_sinks",
    "attention_soft_cap", "logit_soft_cap", "feed_forward", "tie_embeddings", "init_std",
    "loss_chunk_size",
}  # fmt: skip
"""Fields that go with `norm_placement: normalized`."""


class TransformerConfig(
    _Counts, Architecture, frozen=True, kw_only=True, tag_field="type", tag="transformer"
):
    """A decoder-only Transformer from parts."""

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_size", "vocab_multiple", "d_model", "num_layers", "num_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "max_sequence_length",
            "norm_eps", "rope_theta", "sliding_rope_theta", "rotary_fraction", "sliding_window",
            "attention_scale", "attention_soft_cap", "logit_soft_cap", "embedding_scale",
            "residual_scale", "logit_scale", "clip_qkv", "init_std", "loss_chunk_size",
            "num_scores",
        )  # fmt: skip
        check_not_negative(self, "num_mtp_layers", "mtp_loss_multiplier")
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
        if ("linear" in self.attention_pattern) != (self.delta_net is not None):
            raise ValueError(
                "attention_pattern: linear layers need delta_net, which says what they are made of"
                if self.delta_net is None
                else "delta_net: no layer is linear; name some in attention_pattern, such as "
                '["linear", "linear", "linear", "full"]'
            )
        if not self.rope_pattern:
            raise ValueError("rope_pattern: empty; name at least one kind, rope or none")
        if "none" in self.rope_pattern and self.positions != "rope":
            raise ValueError(f"rope_pattern goes with positions rope, not {self.positions}")
        if self.is_normalized:
            self._check_normalized()
        if self.norm_weight_offset and self.norm != "rms_norm":
            raise ValueError(f"norm_weight_offset goes with norm rms_norm, not {self.norm}")
        linear_placement = None if self.delta_net is None else self.delta_net.norm_placement
        placements = {self.norm_placement, linear_placement or self.norm_placement}
        if self.parallel_residual and placements != {"pre"}:
            raise ValueError("parallel_residual goes with norm_placement pre only")
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("shared_norm goes with parallel_residual only")
        if not self.norm_weights and (self.norm != "layer_norm" or self.qk_norm != "none"):
            raise ValueError("norm_weights false goes with norm layer_norm, without qk_norm")
        if self.moe is not None and not self.is_gated:
            raise ValueError(f"moe: experts are gated; feed_forward {self.feed_forward} is not")
        for layer in self.moe.dense_layers if self.moe is not None else ():
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"moe.dense_layers: there is no layer {layer}; num_layers is {self.num_layers}"
                )
        if self.num_parameters > MOST_PARAMETERS:
            raise ValueError(
                f"{self.num_parameters:.1e} parameters are more than any model has (at most "
                f"{MOST_PARAMETERS:.0e})"
            )

    def _check_normalized(self) -> None:
        """Raise ValueError: it has a part that an nGPT has not."""
        for field in msgspec.structs.fields(Architecture):
            given = getattr(self, field.name)
            is_usual = given == field.default or not (given or field.default)
            if field.name not in _OF_NGPT and not is_usual:
                raise ValueError(
                    f"{field.name} does not go with norm_placement normalized; leave it out"
                )
        if not self.is_gated:
            raise ValueError(
                f"norm_placement normalized goes with feed_forward swiglu or geglu, not "
                f"{self.feed_forward}"
            )

    @classmethod
    def preset(cls, name: str) -> "TransformerConfig":
        """A named size, `toolkit models` lists them. Raises ConfigError: there is none."""
        data = preset(name)
        if data["type"] == "gpt":
            return convert(data, GPTConfig).to_transformer()
        return convert(data, TransformerConfig)

    def to_transformer(self) -> "TransformerConfig":
        return self

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> Any:
        """The `Transformer` on `init_device`, with initial values; on "meta" without storage."""
        transformer = named("toolkit.models.transformer:Transformer")
        return transformer(self, init_device=init_device, seed=seed)


_GPT_NAMES = {
    "vocab_size": "vocab_size", "vocab_multiple": "vocab_multiple", "d_model": "n_embd",
    "num_layers": "n_layer", "num_heads": "n_head", "intermediate_size": "n_inner",
    "max_sequence_length": "n_positions", "norm_eps": "layer_norm_epsilon", "bias": "bias",
    "tie_embeddings": "tie_word_embeddings", "init_std": "initializer_range",
    "loss_chunk_size": "loss_chunk_size", "num_scores": "num_scores",
}  # fmt: skip
"""Our name of a field -> GPT-2's."""


class GPTConfig(_Counts, Config, frozen=True, kw_only=True, tag_field="type", tag="gpt"):
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
    num_scores: int | None = None
    """Scores that the head gives each token in the place of logits (a reward model has 1); null: it
    is a language model."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights (normal, cut at 3 std); projections into the residual
    stream get this / sqrt(2 * n_layer)."""
    loss_chunk_size: int | None = None
    """Most token rows per piece of the output head and loss; bounds the memory of logits. Default:
    as many as have 1 GiB of logits in fp32 (32 MiB on a CPU), but at least 256."""

    def __post_init__(self) -> None:
        check_positive(
            self, "vocab_size", "vocab_multiple", "n_positions", "n_embd", "n_layer", "n_head",
            "n_inner", "layer_norm_epsilon", "initializer_range", "loss_chunk_size",
            "num_scores",
        )  # fmt: skip
        sizes = {ours: getattr(self, own) for ours, own in _GPT_NAMES.items() if ours in LARGEST}
        check_sizes(sizes, _GPT_NAMES)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.to_transformer()  # whatever no model may have

    def to_transformer(self) -> TransformerConfig:
        """The same model in the general vocabulary."""
        values = {ours: getattr(self, own) for ours, own in _GPT_NAMES.items()}
        values["intermediate_size"] = self.n_inner or 4 * self.n_embd
        return TransformerConfig(
            norm="layer_norm",
            positions="learned",
            feed_forward="gelu",
            init_scale_residual=True,
            **values,
        )

    @property
    def max_sequence_length(self) -> int:
        return self.n_positions

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> Any:
        """The `GPTModel` on `init_device`; see `TransformerConfig.build`."""
        gpt_model = named("toolkit.models.transformer:GPTModel")
        return gpt_model(self, init_device=init_device, seed=seed)


class ClassModelConfig(TransformerConfig, frozen=True, kw_only=True, tag_field="type", tag="class"):
    """A model of your own: `type: "my_model:Mine"` names its class, which is derived from
    `toolkit.Transformer` and made as `Mine(config, init_device=..., seed=..., **options)`. It
    computes something else with the parameters of these parts."""

    target: str
    """The class, as `module:Class`. Modules in the current folder are found too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further arguments of the class."""

    def own_class(self) -> Any:
        """The class. Raises ConfigError where it is none that can be made so."""
        base = "toolkit.models.transformer:Transformer"
        return users_subclass(self, base, self, key="model", name="type")

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> Any:
        """See `TransformerConfig.build`. Raises ConfigError where it has other parameters."""
        model = self.own_class()(self, init_device=init_device, seed=seed, **self.options)
        number = sum(parameter.numel() for parameter in model.parameters())
        if number != self.num_parameters:
            problem = f"{self.target} has {number:,} parameters, its parts {self.num_parameters:,}"
            raise ConfigError(f"{problem}; keep those of toolkit.Transformer", key="model.type")
        return model


class ModuleConfig(Config, frozen=True, kw_only=True, tag_field="type", tag="module"):
    """Any model of torch: `{"type": "my_model:Net", "options": {...}}`, without sizes of a
    Transformer, names its class, which is made as `Net(**options)`. It needs a `train_module.type`
    of your own, derived from `toolkit.BasicTrainModule`."""

    target: str
    """The class, as `module:Class`. Modules in the current folder are found too."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    """Arguments of the class."""

    # What nobody can know of it refuses nothing.
    vocab_size: ClassVar[int] = LARGEST["vocab_size"]
    max_sequence_length: ClassVar[int] = LARGEST["max_sequence_length"]

    @property
    def num_parameters(self) -> int:
        """Number of parameters; the model is made for it."""
        return sum(parameter.numel() for parameter in self.build().parameters())

    @property
    def shown_parameters(self) -> str:
        """The number of parameters for a reader."""
        return f"{self.num_parameters:,}"

    def to_transformer(self) -> TransformerConfig:
        """There is none. Raises ConfigError."""
        raise ConfigError(f"{self.target} is no language model of ours", key="model.type")

    def own_class(self) -> Any:
        """The class. Raises ConfigError where it is none that can be made so."""
        return users_subclass(self, "torch.nn:Module", key="model", name="type")

    def build(self, *, init_device: str = "cpu", seed: int = 0) -> Any:
        """The model on the CPU, with its own initial values, which are functions of `seed`."""
        with named("torch.random:fork_rng")(devices=[]):
            named("torch.random:manual_seed")(seed)
            return users_object(self.target, key="model.type", **self.options)


ModelConfig = TransformerConfig | GPTConfig | ClassModelConfig
