"""Which parameters of a model are trained, told from its config.

No torch: a dry run and the first moments of a real one check patterns against these names, and
`lora.choose_trained` applies the same answer to the model itself.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from toolkit.config.base import matching
from toolkit.errors import ConfigError, ErrorList
from toolkit.models.architecture import Architecture
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.shapes import (
    MTP_PREFIX,
    SCORE,
    Shape,
    head_flops_per_token,
    mixing_flops,
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
_ADAPTER = re.compile(r"\.(lora_[AB]\.weight|lora_magnitude|token_rows\.weight)\Z")
TOKENS = "embeddings.tokens"


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
    waiting: dict[str, Shape] = {}
    for name, shape in whole.items():
        layer, _, kind = name.rpartition(".")
        if lora.dora and kind == "weight" and layer in adapted:
            shapes[f"{layer}.lora_magnitude"] = shape[:1]
        if ".experts." not in name:
            shapes |= waiting
            waiting = {}
        shapes[name] = shape
        if name in adapted:  # stacked: behind all three of a layer's
            waiting |= _low_rank(name, shape, lora.rank)
        # A layer's modules come last: behind its bias, where it has one.
        elif layer in adapted and (kind == "bias" or f"{layer}.bias" not in whole):
            shapes |= _low_rank(layer, whole[f"{layer}.weight"], lora.rank)
        if name == f"{TOKENS}.weight" and lora.trainable_tokens:
            shapes[f"{TOKENS}.token_rows.weight"] = rows = (len(lora.trainable_tokens), shape[1])
    if lora.trainable_tokens and "head.weight" in whole:
        shapes["head.token_rows.weight"] = rows
    return shapes


def _low_rank(layer: str, shape: Shape, rank: int) -> dict[str, Shape]:
    *stacked, rows, columns = shape
    return {
        f"{layer}.lora_A.weight": (*stacked, rank, columns),
        f"{layer}.lora_B.weight": (*stacked, rows, rank),
    }


def linear_layers(model: Architecture) -> dict[str, Shape]:
    """Name of each linear layer of the blocks -> `(out, in)`, in the model's order."""
    named = whole_model(model)
    return {name.removesuffix(".weight"): shape for name, shape in named if _is_linear(name)}


def stacked_experts(model: Architecture) -> dict[str, Shape]:
    """Name of the stacked matrices of experts -> `(num_experts, out, in)`, in the model's order."""
    named = whole_model(model)
    return {name: shape for name, shape in named if ".experts." in name and len(shape) == 3}


def adapted_layers(model: Architecture, lora: LoRAConfig) -> list[str]:
    """Names of the layers that get an adapter, in the model's order. Raises ConfigError: a pattern
    matches none, a layer is narrower than the rank, or takes no adapter of that kind; a token has
    no row, or its row is trained otherwise too."""
    shapes, stacked = dict(whole_model(model)), stacked_experts(model)
    known = {name: s for name, s in shapes.items() if name in stacked or _is_linear(name)}
    layers = {name.removesuffix(".weight"): shape for name, shape in known.items()}
    chosen: set[str] = set()
    found = ErrorList()

    def refuse(problem: str, field: str = "target_modules") -> None:
        found.add(ConfigError(problem, key=f"{LORA}.{field}"))

    for pattern in lora.target_modules:
        hits = [TOKENS] if pattern == TOKENS else fnmatch.filter(layers, pattern)
        if not hits:
            where = _examples(shapes, pattern, list(layers))
            refuse(f"{pattern!r} matches no linear layer{where}")
        chosen.update(hits)
    layers[TOKENS] = shapes[f"{TOKENS}.weight"]
    names = [name.removesuffix(".weight") for name in shapes]
    adapted = [name for name in names if name in chosen]
    narrow = min(adapted, key=lambda name: min(layers[name][-2:]), default=None)
    if narrow is not None and lora.rank > (least := min(layers[narrow][-2:])):
        rows, columns = layers[narrow][-2:]
        refuse(
            f"{lora.rank} is more than {narrow} has ({rows} x {columns}); use at most {least}, or "
            "target_modules without it",
            "rank",
        )
    experts = next((name for name in adapted if name in stacked), None)
    if experts is not None and (lora.dora or lora.dropout):
        what, field = ("", "dora") if lora.dora else (f"{lora.dropout} ", "dropout")
        advice = 'target_modules: ["*.attention.*"]'
        refuse(f"{what}does not go with adapters on experts ({experts}); use {advice}", field)
    if TOKENS in chosen and lora.dora:
        refuse(f"is for linear layers; leave {TOKENS} out of target_modules", "dora")
    _check_tokens(model, lora, refuse, is_adapted=TOKENS in chosen)
    found.raise_any()
    return adapted


def _check_tokens(
    model: Architecture, lora: LoRAConfig, refuse: Callable[..., None], *, is_adapted: bool
) -> None:
    field, last = "trainable_tokens", model.vocab_size - 1
    if outside := [token for token in lora.trainable_tokens if not 0 <= token <= last]:
        refuse(f"{outside[0]} is no token of the model; its ids are 0 to {last}", field)
    if not lora.trainable_tokens:
        return
    if is_adapted:
        refuse(f"does not go with an adapter on {TOKENS}; leave one of them out", field)
    for name in (f"{TOKENS}.weight", "head.weight"):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in lora.train_also):
            refuse(f"{name} is trained whole (train_also); leave one of them out", field)


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
    frozen = [name for name in names if not is_trained(f"{name}.weight", lora)]
    chosen = {name: linear[name] for name in frozen if name in linear}
    if not chosen:
        problem = "every layer with an adapter is trained whole (train_also); leave it out"
        if frozen or not names:
            problem = "is for linear layers, and none has an adapter; leave it out"
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
    found, shapes = ErrorList(), dict[str, Shape]()
    if lora is not None and model.moe is not None and model.moe.bias_update_rate:
        rate = (
            f"{model.moe.bias_update_rate:g} changes the base, which checkpoints of an adapter do"
        )
        found.add(ConfigError(f"{rate} not hold; set it to 0", key="model.moe.bias_update_rate"))
    with found.collecting():
        shapes = parameter_shapes(model, lora)
    if not shapes:
        found.raise_any()
    names = list(shapes)
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
    head = TOKENS if model.tie_embeddings else "head"
    own = {f"{head}.{kind}" for kind in ("weight", "token_rows.weight", "lora_B.weight")}
    own = own if model.num_scores is None else {SCORE}
    if not own & trained or trained == {"head.weight"}:
        total -= head_flops_per_token(model) // 3 * (1 + model.num_mtp_layers)
    for name, info in infos.items():
        block = _BLOCK.match(name)
        if not (block or name.startswith(MTP_PREFIX)) or len(info.shape) < 2:
            continue
        used = used_weights(model, info.shape)
        if is_adapter(name):
            total += 6 * used
        if not info.is_trained:
            total -= 2 * used
        if block and int(block[1]) < lowest:
            total -= 2 * used
    mixing = sum(mixing_flops(model, layer, sequence_length) for layer in range(lowest))
    return total - 2 * mixing // 3 // sequence_length


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
