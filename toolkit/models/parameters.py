"""Which parameters of a model are trained, told from its config.

No torch: a dry run and the first moments of a real one check patterns against these names, and
`lora.choose_trained` applies the same answer to the model itself.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from toolkit.config.base import matching
from toolkit.errors import ConfigError, ErrorList
from toolkit.models.architecture import Architecture
from toolkit.models.config import LoRAConfig
from toolkit.models.shapes import (
    SCORE,
    Shape,
    attended_keys,
    head_flops_per_token,
    used_weights,
    whole_model,
)
from toolkit.models.shapes import flops_per_token as flops_of_all
from toolkit.wording import count, prefixed

FREEZE, LORA = "train_module.freeze", "train_module.lora"
QUANTIZE = f"{LORA}.quantize_base"
BLOCK, GROUP = 64, 256
"""Of `nf4`: weights that share a scale, and scales that share a step."""
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ADAPTER = re.compile(r"\.lora_[AB]\.weight\Z")


class ParameterInfo(NamedTuple):
    shape: Shape
    is_trained: bool


class TrainedParameters(NamedTuple):
    """All parameters of a model by canonical name, its adapters among them."""

    infos: dict[str, ParameterInfo]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.infos.values())

    @property
    def num_trained(self) -> int:
        return sum(math.prod(info.shape) for info in self.infos.values() if info.is_trained)

    def __str__(self) -> str:
        trained, total = self.num_trained, self.num_parameters
        return f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g}%)"


def parameter_shapes(model: Architecture, lora: LoRAConfig | None = None) -> dict[str, Shape]:
    """Canonical name -> shape, in the model's order; with `lora`, its adapters beside the weights.
    Raises ConfigError: see `adapted_layers`."""
    whole = dict(whole_model(model))
    if lora is None:
        return whole
    adapted, shapes = set(adapted_layers(model, lora)), {}
    for name, shape in whole.items():
        shapes[name] = shape
        layer, _, kind = name.rpartition(".")
        # peft's module comes last in a layer: behind its bias, where it has one.
        if layer in adapted and (kind == "bias" or f"{layer}.bias" not in whole):
            rows, columns = whole[f"{layer}.weight"]
            shapes[f"{layer}.lora_A.weight"] = (lora.rank, columns)
            shapes[f"{layer}.lora_B.weight"] = (rows, lora.rank)
    return shapes


def linear_layers(model: Architecture) -> dict[str, Shape]:
    """Name of each linear layer of the blocks -> `(out, in)`, in the model's order."""
    named = whole_model(model)
    return {name.removesuffix(".weight"): shape for name, shape in named if _is_linear(name)}


def adapted_layers(model: Architecture, lora: LoRAConfig) -> list[str]:
    """Names of the linear layers that get an adapter, in the model's order. Raises ConfigError: a
    pattern matches no linear layer, or stacked weights of experts, which take no adapter."""
    shapes, linear = dict(whole_model(model)), list(linear_layers(model))
    chosen: set[str] = set()
    found = ErrorList()
    for pattern in lora.target_modules:
        hits = fnmatch.filter(linear, pattern)
        stacked = [n for n in shapes if len(shapes[n]) > 2 and fnmatch.fnmatchcase(n, pattern)]
        problem = "" if hits else f"matches no linear layer{_examples(shapes, pattern, linear)}"
        if stacked:
            problem = (
                f"matches {stacked[0]}, stacked weights of experts, which take no adapter; name "
                "linear layers only, such as *.attention.*"
            )
        if problem:
            found.add(ConfigError(f"{pattern!r} {problem}", key=f"{LORA}.target_modules"))
        chosen.update(hits)
    found.raise_any()
    return [name for name in linear if name in chosen]


class QuantisedLayers(NamedTuple):
    """Linear layers whose weights are kept in few bits."""

    kind: str
    """`nf4` or `int8`."""
    layers: dict[str, Shape]
    """Name -> `(out, in)`, in the model's order."""

    @property
    def bytes(self) -> int:
        return sum(quantised_bytes(shape, self.kind) for shape in self.layers.values())


def quantised_layers(model: Architecture, lora: LoRAConfig | None) -> QuantisedLayers | None:
    """The layers that `quantize_base` means: those with an adapter, or all of the blocks, but for
    what `train_also` trains; None: it is off. Raises ConfigError: none is left."""
    if lora is None or lora.quantize_base is None:
        return None
    linear = linear_layers(model)
    names = linear if lora.quantize_all else adapted_layers(model, lora)
    chosen = {name: linear[name] for name in names if not is_trained(f"{name}.weight", lora)}
    if not chosen:
        problem = "every layer with an adapter is trained whole (train_also); leave it out"
        raise ConfigError(problem, key=QUANTIZE)
    return QuantisedLayers(lora.quantize_base, chosen)


def quantised_bytes(shape: Shape, kind: str) -> int:
    """Bytes that are kept of the weight of a linear layer; see `toolkit.models.quantised`."""
    rows, columns = shape
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = -(-rows * columns // BLOCK)
    return blocks * BLOCK // 2 + blocks + 8 * -(-blocks // GROUP) + 4 * 16


def describe_quantised(model: Architecture, quantised: QuantisedLayers) -> str:
    """One line about what is kept in few bits."""
    chosen, of_all = len(quantised.layers), count(len(linear_layers(model)), "layer")
    whole = 4 * sum(math.prod(shape) for shape in quantised.layers.values())
    return (
        f"base in {quantised.kind}, {chosen} of {of_all}, {prefixed(quantised.bytes, 'B')} in the "
        f"place of {prefixed(whole, 'B')}"
    )


def trained_parameters(
    model: Architecture, *, freeze: Sequence[str] = (), lora: LoRAConfig | None = None
) -> TrainedParameters:
    """All parameters, and which of them training changes: all, or with `lora` the adapters and what
    `train_also` names; but for those that `freeze` names by shell-style patterns, the adapters'
    among them. Raises ConfigError: a pattern matches nothing, or nothing is left to train."""
    shapes = parameter_shapes(model, lora)
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
        problem = f"{', '.join(freeze)} leaves no parameter to train"
        found.add(ConfigError(problem, key=FREEZE))
    found.raise_any()
    return TrainedParameters(
        {name: ParameterInfo(shape, name in trained) for name, shape in shapes.items()}
    )


def is_adapter(name: str) -> bool:
    """Whether the parameter of this canonical name is one of a low-rank adapter."""
    return _ADAPTER.search(name) is not None


def is_trained(name: str, lora: LoRAConfig) -> bool:
    """Whether the parameter is one that the base's checkpoint does not hold as it is: of an
    adapter, or named by `train_also`."""
    return is_adapter(name) or any(fnmatch.fnmatchcase(name, p) for p in lora.train_also)


def flops_per_token(
    model: Architecture, parameters: TrainedParameters, sequence_length: int
) -> int:
    """Model FLOPs to train one token with a model some of whose parameters may be frozen.

    `shapes.flops_per_token`, in which a weight of a matrix takes 6 (forward, gradient of the
    input, gradient of the weight: 2 each), and

    - 2 less for each frozen weight, which needs no gradient of its own;
    - in blocks below the lowest trained parameter, where backward never comes: another 2 less for
      each weight, and of attention the forward third alone;
    - 6 more for each weight of an adapter (4 where it is frozen).

    The block of the lowest trained parameter counts whole; of experts, the share that a token uses.
    """
    total, infos = flops_of_all(model, sequence_length), parameters.infos
    trained = {name for name, info in infos.items() if info.is_trained}
    lowest = min((_first_block(name, model.num_layers) for name in trained), default=0)
    head = "embeddings.tokens.weight" if model.tie_embeddings else "head.weight"
    head = head if model.num_scores is None else SCORE
    if head not in trained or trained == {"head.weight"}:
        total -= head_flops_per_token(model) // 3
    for name, info in infos.items():
        block = _BLOCK.match(name)
        if block is None or len(info.shape) < 2:
            continue
        used = used_weights(model, info.shape)
        if is_adapter(name):
            total += 6 * used
        if not info.is_trained:
            total -= 2 * used
        if int(block[1]) < lowest:
            total -= 2 * used
    width = model.num_heads * model.attention_head_dim
    keys = sum(attended_keys(model, layer, sequence_length) for layer in range(lowest))
    return total - 8 * width * keys // sequence_length


def _first_block(name: str, num_layers: int) -> int:
    """The first block through which backward comes for the sake of this parameter."""
    block = _BLOCK.match(name)
    if block is not None:
        return int(block[1])
    return 0 if name.startswith("embeddings.") else num_layers


def _is_linear(name: str) -> bool:
    """Whether the parameter is the weight of a linear layer: a router's is not one."""
    return (
        name.startswith("blocks.")
        and name.endswith(".weight")
        and not name.endswith(("norm.weight", ".router.weight"))
    )


def _examples(names: Iterable[str], pattern: str, linear: list[str]) -> str:
    for name in names:
        layer = name.rpartition(".")[0]
        if fnmatch.fnmatchcase(layer, pattern) or fnmatch.fnmatchcase(name, pattern):
            return f" ({name} is none; train_module.lora.train_also trains it whole)"
    return f" (names look like {', '.join(linear[:2])})"
