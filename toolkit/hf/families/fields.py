"""Fields of config.json that many families have alike, both ways."""

from typing import Any, get_args

from toolkit.errors import CheckpointError
from toolkit.hf.settings import Settings
from toolkit.models.architecture import AttentionKind
from toolkit.models.config import TransformerConfig

_DEFAULT_INIT_STD = 0.02

_TANH_GELU = (
    "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"
)  # fmt: skip
"""Ways to compute one formula."""
_EXACT_GELU = ("gelu", "gelu_python")
_SILU = ("silu", "swish")


def read_plain_activation(settings: Settings, name: str) -> str:
    """Our `feed_forward` of two layers for the activation in field `name`."""
    value = settings.require(name, *_TANH_GELU, *_EXACT_GELU)
    return "gelu" if value in _TANH_GELU else "gelu_exact"


def read_gated_activation(settings: Settings, name: str) -> str:
    """Our gated `feed_forward` for the activation in field `name`."""
    value = settings.require(name, *_SILU, *_TANH_GELU)
    return "swiglu" if value in _SILU else "geglu"


def write_activation(config: TransformerConfig) -> str:
    """The activation's name in `transformers`, of a gated feed-forward or a plain one."""
    return {
        "swiglu": "silu",
        "geglu": "gelu_pytorch_tanh",
        "gelu": "gelu_new",
        "gelu_exact": "gelu",
    }[config.feed_forward]


def read_attention_bias(settings: Settings) -> dict[str, Any]:
    """Our two fields for `attention_bias`, which means all projections of attention."""
    bias = settings.take("attention_bias")
    return {"qkv_bias": bias, "attention_output_bias": bias}


def read_init_std(settings: Settings) -> float:
    """Only training from scratch uses it, so a model without one gets the usual value."""
    return settings.take("initializer_range", None) or _DEFAULT_INIT_STD


def read_layer_types(settings: Settings) -> dict[str, Any]:
    """`sliding_window` and `attention_pattern` from a list with a kind per layer.

    Raises:
        CheckpointError: a layer is of a kind that we do not compute, or has no window.
    """
    kinds = [_layer_kind(kind, settings) for kind in settings.take("layer_types")]
    window = settings.take("sliding_window", None)
    if "sliding" not in kinds:
        return {"sliding_window": None}
    if window is None:
        raise CheckpointError(
            "config.json: layer_types names sliding_attention but sliding_window is null; "
            "give the number of tokens that a query sees"
        )
    length = next(n for n in range(1, len(kinds) + 1) if _repeats(kinds, n))
    return {"sliding_window": window, "attention_pattern": tuple(kinds[:length])}


def write_layer_types(config: TransformerConfig) -> dict[str, Any]:
    """`layer_types` and `sliding_window`."""
    windows = [config.window_of(layer) for layer in range(config.num_layers)]
    return {
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
        "sliding_window": next((window for window in windows if window), None),
    }


def write_only_window(config: TransformerConfig) -> int | None:
    """`sliding_window` of a class that has it in all layers or in none."""
    windows = {config.window_of(layer) for layer in range(config.num_layers)}
    return windows.pop() if len(windows) == 1 else None


def check_whole_heads(settings: Settings) -> None:
    """For classes that ask for it, though their heads may have another width.

    Raises:
        CheckpointError: the width is not a multiple of the number of heads.
    """
    width, heads = settings.take("hidden_size"), settings.take("num_attention_heads")
    if width % heads:
        raise CheckpointError(
            f"config.json: hidden_size {width} is not a multiple of num_attention_heads {heads}, "
            f"as {settings.model_type} asks for"
        )


def write_head_dim(config: TransformerConfig) -> dict[str, Any]:
    """`head_dim` for classes that do not define it but use one that is there."""
    if config.attention_head_dim * config.num_heads == config.d_model:
        return {}
    return {"head_dim": config.attention_head_dim}


def _layer_kind(name: Any, settings: Settings) -> str:
    kind = str(name).removesuffix("_attention")
    if kind not in get_args(AttentionKind):
        raise CheckpointError(
            f"config.json: {name!r} in layer_types is not covered by the mapping of "
            f"{settings.model_type}, which knows full_attention and sliding_attention"
        )
    return kind


def _repeats(items: list[str], period: int) -> bool:
    return all(item == items[n % period] for n, item in enumerate(items))
