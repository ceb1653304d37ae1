"""The model of a size: a config's own shape, narrower or wider.

The number that a size names, N, counts the weights that a token is multiplied with: those of the
blocks and of the output head, tied or not, without the lookup of embeddings, and of experts only
those that one token uses. With it small models follow the same law as large ones (Porian et al.
2024, arXiv:2406.19146).

Kept from the config: d_model / num_layers (at one N, the shape matters little: Kaplan et al. 2020,
arXiv:2001.08361, section 3.1), the width of a head, and the ratios of feed-forward, experts and
key-value heads to d_model.
"""

import math
from collections.abc import Iterator
from typing import Any

from toolkit.errors import ConfigError
from toolkit.models.config import TransformerConfig

OFF_BY, BENT_BY = 0.1, 2.0
"""A model that is so much (10%) off its size costs as much as one whose d_model / num_layers is
this many times the config's: with few layers there is none that has both."""
LARGEST = 10**13
"""N of the largest model that is looked for."""
_SMALLEST_HEAD = 16
_MOST_BENT = math.log(50)
"""Models that differ more in shape are not looked at."""
_FINE, _COARSE = 16, 64
"""What widths of feed-forwards are multiples of, in models narrower than `_WIDE` and in others."""
_WIDE = 512


def multiplied_weights(model: TransformerConfig) -> int:
    """N: see the top of this file."""
    lookups = model.num_parameters - model.num_non_embedding_parameters
    head = model.padded_vocab_size * model.d_model if model.tie_embeddings else 0
    return model.num_active_parameters - lookups + head


def scaled_model(model: TransformerConfig, size: int) -> TransformerConfig:
    """A model of the shape of `model` whose N is about `size`.

    Raises:
        ConfigError: no model of this vocabulary is so small.
    """
    if size > LARGEST:
        raise ConfigError(f"--sizes {size:,}: at most {LARGEST:,}")
    shape = model.d_model / model.num_layers
    best: tuple[float, TransformerConfig] | None = None
    for width, head in _widths(model, size):
        one = _of_shape(model, width, head, 1)
        layer = multiplied_weights(one.replace(num_layers=2)) - multiplied_weights(one)
        exact = (size - multiplied_weights(one)) / layer + 1
        for layers in {math.floor(exact), math.ceil(exact)}:
            if layers < 1 or abs(bent := math.log(width / layers / shape)) > _MOST_BENT:
                continue
            found = _of_shape(model, width, head, layers)
            off = math.log(multiplied_weights(found) / size)
            cost = (off / OFF_BY) ** 2 + (bent / math.log(BENT_BY)) ** 2
            if best is None or cost < best[0]:
                best = cost, found
    if best is None or multiplied_weights(best[1]) > 2 * size:
        fewest = multiplied_weights(_of_shape(model, _SMALLEST_HEAD, _SMALLEST_HEAD, 1))
        raise ConfigError(
            f"--sizes {size:,}: no model of {model.vocab_size:,} tokens in the vocabulary is so "
            f"small; the smallest has {fewest:,} weights, most of them in the output head"
        )
    return best[1]


def _widths(model: TransformerConfig, size: int) -> Iterator[tuple[int, int]]:
    """Widths to try, and the width of a head at each: the config's, halved where there would be
    fewer than two."""
    heads = [model.attention_head_dim]
    while heads[-1] % 2 == 0 and heads[-1] > _SMALLEST_HEAD:
        heads.append(heads[-1] // 2)
    # 12 * num_layers * d_model^2 weights (Kaplan et al. 2020), of the config's shape.
    likely = (size * model.d_model / model.num_layers / 12) ** (1 / 3)
    tried: set[int] = set()
    for head in heads:
        last = 2 * heads[0] if head != heads[0] else int(3 * likely) + 2 * head
        for width in range(head if head == heads[-1] else 2 * head, last + 1, head):
            if width not in tried:
                tried.add(width)
                yield width, head


def _of_shape(model: TransformerConfig, width: int, head: int, layers: int) -> TransformerConfig:
    factor = width / model.d_model
    channels = model.num_heads * model.attention_head_dim / model.d_model
    heads = max(1, round(channels * width / head))
    few = max(1, round(heads * model.kv_heads / model.num_heads))
    key_value = max(number for number in range(1, few + 1) if heads % number == 0)
    changes: dict[str, Any] = {}
    if model.moe is not None:
        shared = model.moe.shared_expert_intermediate_size
        changes["moe"] = model.moe.replace(
            intermediate_size=_rounded(model.moe.intermediate_size * factor, width),
            shared_expert_intermediate_size=None
            if shared is None
            else _rounded(shared * factor, width),
            dense_layers=tuple(layer for layer in model.moe.dense_layers if layer < layers),
        )
    if (net := model.delta_net) is not None:
        keys = max(1, round(net.num_key_heads * factor))
        values = keys * (net.num_value_heads // net.num_key_heads)
        changes["delta_net"] = net.replace(num_key_heads=keys, num_value_heads=values)
    return model.replace(
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=None if key_value == heads else key_value,
        head_dim=None if heads * head == width else head,
        intermediate_size=_rounded(model.intermediate_size * factor, width),
        **changes,
    )


def _rounded(number: float, width: int) -> int:
    step = _FINE if width < _WIDE else _COARSE
    return max(step, round(number / step) * step)
