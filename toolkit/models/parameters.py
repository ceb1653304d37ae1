"""The parameters of a model by name, told from its config, and which of them are trained.

No torch: a dry run and the first moments of a real one check patterns against these names, and
`freeze.choose_trained` applies the same answer to the model itself.
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from toolkit.config.patterns import matching
from toolkit.errors import ConfigError, ErrorList
from toolkit.models.config import TransformerConfig
from toolkit.models.counts import attended_keys
from toolkit.models.lora_config import LoRAConfig

Shape = tuple[int, ...]

FREEZE, LORA = "train_module.freeze", "train_module.lora"
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ADAPTER = re.compile(r"\.lora_[AB]\.weight\Z")


class ParameterInfo(NamedTuple):
    """One parameter before it is sharded."""

    shape: Shape
    is_trained: bool


class TrainedParameters(NamedTuple):
    """All parameters of a model by canonical name, its adapters among them."""

    infos: dict[str, ParameterInfo]

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(info.shape) for info in self.infos.values())

    @property
    def num_trained(self) -> int:
        """Of these, the ones that training changes."""
        return sum(math.prod(info.shape) for info in self.infos.values() if info.is_trained)

    def __str__(self) -> str:
        trained, total = self.num_trained, self.num_parameters
        return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g}%)"


def parameter_shapes(config: TransformerConfig, lora: LoRAConfig | None = None) -> dict[str, Shape]:
    """Canonical name -> shape, in the model's order; with `lora`, its adapters beside the weights.

    Raises:
        ConfigError: see `adapted_layers`.
    """
    adapted = set(adapted_layers(config, lora)) if lora is not None else set()
    shapes: dict[str, Shape] = {}
    for name, shape in _parameters(config):
        layer, _, kind = name.rpartition(".")
        if layer in adapted and lora is not None and kind == "weight":
            rows, columns = shape
            adapter = {"lora_A": (lora.rank, columns), "lora_B": (rows, lora.rank)}
        shapes[name] = shape
        if layer in adapted and (kind == "bias" or not _has_bias(config, layer)):
            shapes |= {f"{layer}.{part}.weight": size for part, size in adapter.items()}
    return shapes


def adapted_layers(config: TransformerConfig, lora: LoRAConfig) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order.

    Raises:
        ConfigError: a pattern matches no linear layer, or stacked weights of experts, which take
            no adapter.
    """
    shapes = dict(_parameters(config))
    linear = [name.removesuffix(".weight") for name in shapes if _is_linear(name)]
    chosen: set[str] = set()
    found = ErrorList()
    for pattern in lora.target_modules:
        hits = fnmatch.filter(linear, pattern)
        stacked = [n for n in shapes if len(shapes[n]) > 2 and fnmatch.fnmatchcase(n, pattern)]
        problem = ""
        if stacked:
            problem = (
                f"matches {stacked[0]}, stacked weights of experts, which take no adapter; name "
                "linear layers only, such as *.attention.*"
            )
        elif not hits:
            problem = f"matches no linear layer{_examples(list(shapes), pattern, linear)}"
        if problem:
            found.add(ConfigError(f"{pattern!r} {problem}", key=f"{LORA}.target_modules"))
        chosen.update(hits)
    found.raise_any()
    return [name for name in linear if name in chosen]


def trained_parameters(
    config: TransformerConfig, *, freeze: Sequence[str] = (), lora: LoRAConfig | None = None
) -> TrainedParameters:
    """All parameters, and which of them training changes: all, or with `lora` the adapters and what
    `train_also` names; but for those that `freeze` names.

    Args:
        freeze: shell-style patterns over parameter names, the adapters' among them.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left to train.
    """
    shapes = parameter_shapes(config, lora)
    names, found = list(shapes), ErrorList()
    trained = set(names)
    if lora is not None:
        trained = {name for name in names if is_adapter(name)}
        whole = [name for name in names if name not in trained]
        for pattern in lora.train_also:
            with found.collecting():
                trained.update(matching(f"{LORA}.train_also", pattern, whole))
    for pattern in freeze:
        with found.collecting():
            trained.difference_update(matching(FREEZE, pattern, names))
    if not trained and not found.errors:
        found.add(ConfigError(f"{', '.join(freeze)} leaves no parameter to train", key=FREEZE))
    found.raise_any()
    return TrainedParameters(
        {name: ParameterInfo(shape, name in trained) for name, shape in shapes.items()}
    )


def is_adapter(name: str) -> bool:
    """Whether the parameter of this canonical name is one of a low-rank adapter."""
    return _ADAPTER.search(name) is not None


def flops_per_token(
    config: TransformerConfig, parameters: TrainedParameters, sequence_length: int
) -> int:
    """Model FLOPs to train one token with a model some of whose parameters may be frozen.

    `counts.flops_per_token` of the config, in which a weight of a matrix takes 6 (forward,
    gradient of the input, gradient of the weight: 2 each), and

    - 2 less for each frozen weight, which needs no gradient of its own;
    - in blocks below the lowest trained parameter, where backward never comes: another 2 less for
      each weight, and of attention the forward third alone;
    - 6 more for each weight of an adapter (4 where it is frozen).

    The block of the lowest trained parameter counts whole; of experts, the share that a token uses.
    """
    total, infos = config.flops_per_token(sequence_length), parameters.infos
    trained = {name for name, info in infos.items() if info.is_trained}
    lowest = min((_first_block(name, config.num_layers) for name in trained), default=0)
    head = "embeddings.tokens.weight" if config.tie_embeddings else "head.weight"
    if head not in trained or trained == {"head.weight"}:
        total -= 2 * config.vocab_size * config.d_model
    for name, info in infos.items():
        block = _BLOCK.match(name)
        if block is None or len(info.shape) < 2:
            continue
        used = math.prod(info.shape)
        if len(info.shape) == 3 and config.moe is not None:
            used = used * config.moe.top_k // config.moe.num_experts
        if is_adapter(name):
            total += 6 * used
        if not info.is_trained:
            total -= 2 * used
        if int(block[1]) < lowest:
            total -= 2 * used
    width = config.num_heads * config.attention_head_dim
    keys = sum(attended_keys(config, layer, sequence_length) for layer in range(lowest))
    return total - 8 * width * keys // sequence_length


def _first_block(name: str, num_layers: int) -> int:
    """The first block through which backward comes for the sake of this parameter."""
    block = _BLOCK.match(name)
    if block is not None:
        return int(block[1])
    return 0 if name.startswith("embeddings.") else num_layers


def _parameters(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    """What `Transformer` holds, in the order in which torch names it."""
    yield "embeddings.tokens.weight", (config.padded_vocab_size, config.d_model)
    if config.positions == "learned":
        yield "embeddings.positions.weight", (config.max_sequence_length, config.d_model)
    dense, sparse = list(_block(config, sparse=False)), list(_block(config, sparse=True))
    with_experts = set(config.moe_layers)
    for layer in range(config.num_layers):
        for name, shape in sparse if layer in with_experts else dense:
            yield f"blocks.{layer}.{name}", shape
    if not config.tie_embeddings:
        yield "head.weight", (config.padded_vocab_size, config.d_model)
    yield from _norm(config, "head.norm", config.d_model)


def _block(config: TransformerConfig, *, sparse: bool) -> Iterator[tuple[str, Shape]]:
    width, head = config.d_model, config.attention_head_dim
    query, key = config.num_heads * head, config.kv_heads * head
    for name, rows in (("query", query), ("key", key), ("value", key)):
        yield from _linear(f"attention.{name}", rows, width, bias=config.has_qkv_bias)
    yield from _linear("attention.output", width, query, bias=config.has_attention_output_bias)
    if config.qk_norm != "none":
        per_head = config.qk_norm == "per_head"
        yield from _norm(config, "attention.query_norm", head if per_head else query)
        yield from _norm(config, "attention.key_norm", head if per_head else key)
    yield from _norm(config, "attention_norm", width)
    yield from _experts(config) if sparse else _feed_forward(config)
    yield from _norm(config, "feed_forward_norm", width)
    if config.norm_placement == "sandwich":
        yield from _norm(config, "attention_output_norm", width)
        yield from _norm(config, "feed_forward_output_norm", width)


def _feed_forward(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    width, inner, bias = config.d_model, config.intermediate_size, config.has_feed_forward_bias
    if config.num_feed_forward_matrices == 3:
        yield from _linear("feed_forward.gate", inner, width, bias=bias)
    yield from _linear("feed_forward.up", inner, width, bias=bias)
    yield from _linear("feed_forward.down", width, inner, bias=bias)


def _experts(config: TransformerConfig) -> Iterator[tuple[str, Shape]]:
    moe, width = config.moe, config.d_model
    if moe is None:
        return
    yield "feed_forward.router.weight", (moe.num_experts, width)
    inputs = (moe.num_experts, moe.intermediate_size, width)
    yield "feed_forward.experts.gate", inputs
    yield "feed_forward.experts.up", inputs
    yield "feed_forward.experts.down", (inputs[0], inputs[2], inputs[1])
    shared = moe.shared_expert_intermediate_size
    if shared is not None:
        yield from _linear("feed_forward.shared.gate", shared, width, bias=False)
        yield from _linear("feed_forward.shared.up", shared, width, bias=False)
        yield from _linear("feed_forward.shared.down", width, shared, bias=False)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(config: TransformerConfig, name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if config.norm == "layer_norm" and config.bias:
        yield f"{name}.bias", (width,)


def _is_linear(name: str) -> bool:
    """Whether the parameter is the weight of a linear layer: a router's is not one."""
    return (
        name.startswith("blocks.")
        and name.endswith(".weight")
        and not name.endswith(("norm.weight", ".router.weight"))
    )


def _has_bias(config: TransformerConfig, layer: str) -> bool:
    if ".attention." in layer:
        is_output = layer.endswith(".output")
        return config.has_attention_output_bias if is_output else config.has_qkv_bias
    return ".shared." not in layer and config.has_feed_forward_bias


def _examples(names: list[str], pattern: str, linear: list[str]) -> str:
    for name in names:
        layer = name.rpartition(".")[0]
        if fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(name, pattern):
            return f" ({name} is none; train_module.lora.train_also trains it whole)"
    return f" (names look like {', '.join(linear[:2])})"
