"""Parts that many families share: fields of config.json and ours, both ways."""

from collections.abc import Callable, Sequence
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.hf.family import Part, Settings
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig

_DEFAULT_INIT_STD = 0.02

_TANH_GELU = (
    "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"
)  # fmt: skip
"""Ways to compute one formula."""
_ACTIVATIONS = {
    "swiglu": ("silu", "swish"),
    "geglu": ("gelu_pytorch_tanh", *_TANH_GELU),
    "gelu": _TANH_GELU,
    "gelu_exact": ("gelu", "gelu_python"),
}
"""Our feed-forwards and what their activation may be called; the first name is written."""
_FILLED_IN = {
    "num_key_value_heads": "kv_heads",
    "head_dim": "attention_head_dim",
    "qkv_bias": "has_qkv_bias",
    "feed_forward_bias": "has_feed_forward_bias",
    "attention_output_bias": "has_attention_output_bias",
}
"""Our fields with a default, and where it is filled in."""


def renamed(**names: str) -> Part:
    """Fields that differ in their names alone: ours="theirs"."""
    return Part(
        lambda settings: {ours: settings.take(theirs) for ours, theirs in names.items()},
        lambda config: {
            theirs: getattr(config, _FILLED_IN.get(ours, ours)) for ours, theirs in names.items()
        },
    )


def always(**fields: Any) -> Part:
    """Fields of ours that the class has no choice in."""
    return Part(lambda settings: fields)


def without_effect(*names: str) -> Part:
    """See `Settings.without_effect`."""
    return _checked(lambda settings: settings.without_effect(*names))


def no_dropout(*names: str) -> Part:
    """`without_effect`, for fields whose default is not 0."""
    return Part(without_effect(*names).read, lambda config: dict.fromkeys(names, 0.0))


def ignored(*names: str) -> Part:
    """Fields of classes that share this config and have another head."""
    return _checked(lambda settings: [settings.take(name, None) for name in names])


def required(name: str, *allowed: Any) -> Part:
    """See `Settings.require`."""
    return _checked(lambda settings: settings.require(name, *allowed))


def activation(name: str, *kinds: str) -> Part:
    """`feed_forward`, one of `kinds` of ours, from the activation in field `name`."""

    def read(settings: Settings) -> dict[str, Any]:
        known = {word: kind for kind in reversed(kinds) for word in _ACTIVATIONS[kind]}
        words = dict.fromkeys(word for kind in kinds for word in _ACTIVATIONS[kind])
        return {"feed_forward": known[settings.require(name, *words)]}

    return Part(read, lambda config: {name: _ACTIVATIONS[config.feed_forward][0]})


def _checked(check: Callable[[Settings], Any]) -> Part:
    def read(settings: Settings) -> dict[str, Any]:
        check(settings)
        return {}

    return Part(read)


def _check_whole_heads(settings: Settings) -> None:
    width, heads = settings.take("hidden_size"), settings.take("num_attention_heads")
    if width % heads:
        raise CheckpointError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}, "
            f"as {settings.model_type} asks for"
        )


SIZES = renamed(
    vocab_size="vocab_size",
    d_model="hidden_size",
    intermediate_size="intermediate_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    max_sequence_length="max_position_embeddings",
    tie_embeddings="tie_word_embeddings",
)

WHOLE_HEADS = _checked(_check_whole_heads)
"""For classes that ask for it, though their heads may have another width."""

INIT_STD = Part(
    lambda settings: {"init_std": settings.take("initializer_range", None) or _DEFAULT_INIT_STD},
    lambda config: {"initializer_range": config.init_std},
)
"""Only training from scratch uses it, so a model without one gets the usual value."""

ATTENTION_BIAS = Part(
    lambda settings: dict.fromkeys(
        ("qkv_bias", "attention_output_bias"), settings.take("attention_bias")
    ),
    lambda config: {"attention_bias": config.has_qkv_bias},
)
"""One field for all projections of attention."""

HEAD_DIM = renamed(head_dim="head_dim")


UNUSUAL_HEAD_DIM = Part(
    lambda settings: {"head_dim": settings.take("head_dim", None)},
    lambda config: (
        {}
        if config.attention_head_dim * config.num_heads == config.d_model
        else HEAD_DIM.write(config)
    ),
)
"""For classes that do not define `head_dim` but use one that is there."""


def windows(config: TransformerConfig) -> list[int | None]:
    return [config.window_of(layer) for layer in range(config.num_layers)]


def write_only_window(config: TransformerConfig) -> int | None:
    """`sliding_window` of a class that has it in all layers or in none."""
    found = set(windows(config))
    return found.pop() if len(found) == 1 else None


ONE_WINDOW = Part(
    lambda settings: {"sliding_window": settings.take("sliding_window")},
    lambda config: {"sliding_window": write_only_window(config)},
)


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """What these kinds of layers, repeated, are made of."""
    periods = (n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[: len(kinds) - n])
    return tuple(kinds[: next(periods)])


def _read_layer_types(settings: Settings) -> dict[str, Any]:
    kinds = []
    for name in settings.take("layer_types"):
        kinds.append(str(name).removesuffix("_attention"))
        if kinds[-1] not in ("full", "sliding"):
            what = settings.not_covered(f"{name!r} in layer_types")
            raise CheckpointError(f"{what}, which knows full_attention and sliding_attention")
    window = settings.take("sliding_window", None)
    if "sliding" not in kinds:
        return {"sliding_window": None}
    if window is None:
        raise CheckpointError(
            "config.json: layer_types names sliding_attention but sliding_window is null; "
            "give the number of tokens that a query sees"
        )
    return {"sliding_window": window, "attention_pattern": shortest_pattern(kinds)}


def _write_layer_types(config: TransformerConfig) -> dict[str, Any]:
    found = windows(config)
    return {
        "layer_types": ["sliding_attention" if w else "full_attention" for w in found],
        "sliding_window": next((window for window in found if window), None),
    }


LAYER_TYPES = Part(_read_layer_types, _write_layer_types)
"""`sliding_window` and `attention_pattern` from a list with a kind per layer."""


def experts(
    *,
    num_experts: str = "num_experts",
    intermediate_size: str = "intermediate_size",
    normalize_top_k: str | None = "norm_topk_prob",
    dense_layers: Callable[[Settings], list[int]] = lambda settings: [],
) -> Part:
    """Our experts. The shares of assignments in the load-balancing loss of `transformers` sum to
    the number of experts of a token, in ours to one: its coefficient counts so many times more.
    The first three are names of their fields, None: always so; `dense_layers` reads which layers
    have none."""

    def read(settings: Settings) -> dict[str, Any]:
        settings.without_effect("output_router_logits")
        try:
            top_k = settings.take("num_experts_per_tok")
            moe = MoEConfig(
                num_experts=settings.take(num_experts),
                top_k=top_k,
                intermediate_size=settings.take(intermediate_size),
                normalize_top_k=settings.take(normalize_top_k) if normalize_top_k else True,
                dense_layers=tuple(dense_layers(settings)),
                load_balancing_multiplier=settings.take("router_aux_loss_coef") * top_k,
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"config.json: not a model that can be built: {error}") from None
        return {"moe": moe}

    def write(config: TransformerConfig) -> dict[str, Any]:
        moe = config.moe
        if moe is None:
            return {}
        return {
            num_experts: moe.num_experts,
            intermediate_size: moe.intermediate_size,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.load_balancing_multiplier / moe.top_k,
            **({normalize_top_k: moe.normalize_top_k} if normalize_top_k else {}),
        }

    return Part(read, write)
