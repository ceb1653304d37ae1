"""Initial values that depend on (seed, parameter name, shape) and on nothing else.

A parameter is seen as the flat row-major sequence of its elements, drawn in blocks of 2**20. Each
block has a generator of its own, keyed by a hash of (seed, name, block index), and is always drawn
whole, so a rank that holds elements [a, b) makes exactly the values of the unsharded parameter by
drawing only the blocks that it touches. Drawn on the CPU by NumPy, whose normal values do not vary
with the processor's vector width, as torch's do.
"""

import functools
import hashlib
import math
import re
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.models.config import TransformerConfig
from toolkit.models.normalized import lengthen_, squared_lengths, unit_dimension
from toolkit.models.shapes import HEAD, SCORE, SCORE_BIAS

BLOCK_SIZE = 2**20
"""Elements per independently drawn block."""

CUT = 3.0
"""Normal values beyond this many standard deviations are drawn again."""

_WRAPPERS = re.compile(
    r"^module\.|_checkpoint_wrapped_module\.|_orig_mod\.|_fsdp_wrapped_module\."
    r"|base_layer\.|(?<=\.experts\.)adapters\."
)
_RESIDUAL_OUTPUTS = (
    "attention.output.weight",
    "feed_forward.down.weight",
    "feed_forward.experts.down",
    "feed_forward.shared.down.weight",
)
_HIDDEN_SCALES = ("feed_forward.gate_scale", "feed_forward.up_scale")
_SCALES = (".query_scale", ".key_scale", ".alpha", "head.scale")
"""Of an nGPT; see `toolkit.models.normalized`."""


class InitSpec(NamedTuple):
    kind: Literal["normal", "zeros", "ones", "constant", "of_weight", "decay_rate", "time_step"]
    """The last two: A_log and dt_bias of Gated DeltaNet, see `DeltaNetConfig`."""
    std: float = 0.0
    """Standard deviation before the cut (`normal`)."""
    value: float = 0.0
    """Of every element (`constant`)."""
    low: float = 0.0
    high: float = 0.0
    """Of uniform numbers (`decay_rate`, `time_step`)."""
    weight: str = ""
    """The parameter that it begins as a part of (`of_weight`)."""
    rows: tuple[int, ...] | None = None
    """These rows of it; None: the norm of each of its rows."""

    def part_of(self, weight: Tensor) -> Tensor:
        """`of_weight`: the initial values, of the whole `weight`."""
        if self.rows is None:
            return torch.linalg.vector_norm(weight, dim=1)
        return weight[list(self.rows)]


def canonical_name(name: str) -> str:
    """The parameter's name without what wrappers insert (DDP, checkpoint, compile, adapters)."""
    return _WRAPPERS.sub("", name)


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of `model` by canonical name, in the model's order."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def initialize_buffers_(module: nn.Module) -> None:
    """Fill what checkpoints hold besides parameters, biases of routers, with zeros. `module` may be
    a router."""
    for name, buffer in module.named_buffers():
        if f".router.{name}".endswith(SCORE_BIAS):
            buffer.zero_()


def init_spec(model: nn.Module, width_multiplier: float = 1.0) -> dict[str, InitSpec]:
    """Canonical parameter name -> initial values, for a `Transformer`, its blocks wrapped or not.

    Norm weights are one less `config.norm_weight_offset`, so that norms multiply by one; biases and
    sinks are zero, scales of an nGPT as in its paper, the rest normal with `config.init_std`, which
    muP scales for a model `width_multiplier` times as wide as its base (`width_factor`). Of
    adapters, B is zero and A has the variance of `peft`'s; magnitudes and rows of tokens begin as
    what the weight has.
    """
    config = cast(TransformerConfig, model.config)
    residual_std = config.init_std
    if config.init_scale_residual:
        residual_std /= math.sqrt(2 * config.num_layers)
    offset = config.norm_weight_offset
    norm_weight = InitSpec("constant", value=1.0 - offset) if offset else InitSpec("ones")
    specs = {}
    for name, parameter in canonical_parameters(model).items():
        if (spec := spec_of_weight(name, model)) is not None:
            specs[name] = spec
        elif name == "embeddings.tokens.lora_A.weight":
            specs[name] = InitSpec("normal", 1.0)
        elif name.endswith(".lora_A.weight"):
            specs[name] = InitSpec("normal", 1.0 / math.sqrt(3 * parameter.shape[-1]))
        elif name.endswith((".lora_B.weight", ".bias", ".sinks")):
            specs[name] = InitSpec("zeros")
        elif name.endswith("attention.output_norm.weight"):
            specs[name] = InitSpec("ones")
        elif name.endswith("norm.weight"):
            specs[name] = norm_weight
        elif config.delta_net is not None and name.endswith("attention.A_log"):
            net = config.delta_net
            specs[name] = InitSpec("decay_rate", low=net.min_decay_rate, high=net.max_decay_rate)
        elif config.delta_net is not None and name.endswith("attention.dt_bias"):
            net = config.delta_net
            specs[name] = InitSpec("time_step", low=net.min_time_step, high=net.max_time_step)
        elif name.endswith(_HIDDEN_SCALES):
            specs[name] = InitSpec("ones")
        elif name.endswith(_SCALES):
            specs[name] = InitSpec("constant", value=1.0 / math.sqrt(config.d_model))
        else:
            is_output = name.endswith(_RESIDUAL_OUTPUTS)
            std = residual_std if is_output else config.init_std
            specs[name] = InitSpec("normal", std * width_factor(name, width_multiplier))
    return specs


def spec_of_weight(name: str, model: nn.Module) -> InitSpec | None:
    """Of a parameter of an adapter that begins as a part of a weight; None: of all others."""
    if name.endswith(".lora_magnitude"):
        return InitSpec("of_weight", weight=f"{name.rpartition('.')[0]}.weight")
    if name.endswith(".token_rows.weight"):
        weight = f"{name.removesuffix('.token_rows.weight')}.weight"
        adapters: Any = model.adapters
        return InitSpec("of_weight", weight=weight, rows=adapters.tokens)
    return None


def width_factor(name: str, multiplier: float) -> float:
    """By what muP (see `toolkit.optim.scaling`) multiplies the standard deviation of the initial
    values of the parameter `name`, of a model `multiplier` times as wide as its base."""
    if multiplier == 1.0 or name.startswith("embeddings.") or name.endswith("_conv"):
        return 1.0
    is_output = name in (HEAD, SCORE) or name.endswith(".router.weight")
    return 1.0 / (multiplier if is_output else math.sqrt(multiplier))


@torch.no_grad()
def fill_flat_(
    out: Tensor, *, name: str, numel: int, start: int, spec: InitSpec, seed: int
) -> Tensor:
    """Write elements [start, start + len(out)) of the flattened parameter with the canonical `name`
    and `numel` elements into `out`, 1-D, of any device and floating type."""
    if out.dim() != 1 or start < 0 or start + out.numel() > numel:
        raise ValueError(
            f"{name}: elements {start} to {start + out.numel()} of {numel} asked for, "
            f"into a tensor of shape {tuple(out.shape)}"
        )
    if spec.kind in ("decay_rate", "time_step"):
        return out.copy_(torch.from_numpy(_of_heads(seed, name, numel, spec))[start:][: len(out)])
    if spec.kind != "normal":
        return out.fill_({"zeros": 0.0, "ones": 1.0, "constant": spec.value}[spec.kind])
    position = start
    while position < start + out.numel():
        block, offset = divmod(position, BLOCK_SIZE)
        length = min(BLOCK_SIZE - offset, start + out.numel() - position)
        values = _normal_block(seed, name, block, min(BLOCK_SIZE, numel - block * BLOCK_SIZE))
        piece = torch.from_numpy(values[offset : offset + length]) * spec.std
        out[position - start : position - start + length].copy_(piece)
        position += length
    return out


@torch.no_grad()
def initialize_(model: nn.Module, seed: int) -> None:
    """Fill all parameters of an unsharded `model` that has storage."""
    specs, parameters = init_spec(model), canonical_parameters(model)
    is_normalized = cast(TransformerConfig, model.config).is_normalized
    initialize_buffers_(model)
    for name, parameter in parameters.items():
        flat, spec = parameter.view(-1), specs[name]
        if spec.kind != "of_weight":
            fill_flat_(flat, name=name, numel=flat.numel(), start=0, spec=spec, seed=seed)
        if is_normalized and (dim := unit_dimension(name)) is not None:
            lengthen_(parameter, squared_lengths(parameter, dim), dim)
    for name, spec in specs.items():
        if spec.kind == "of_weight":
            parameters[name].copy_(spec.part_of(parameters[spec.weight]))


@functools.lru_cache(maxsize=1)  # a rank that holds columns asks for one block again and again
def _normal_block(seed: int, name: str, block: int, length: int) -> np.ndarray:
    """The standard normal values of one block, cut at `CUT`, fp32."""
    # A generator per attempt: a longer block begins with the values of a shorter one, so more
    # padding rows in the vocabulary leave the real rows as they are.
    values = _standard_normal(f"{seed}/{name}/{block}/0", length)
    outside, attempt = np.flatnonzero(np.abs(values) > CUT), 1
    while outside.size:
        values[outside] = _standard_normal(f"{seed}/{name}/{block}/{attempt}", outside.size)
        outside = outside[np.abs(values[outside]) > CUT]
        attempt += 1
    return values


def _standard_normal(key: str, length: int) -> np.ndarray:
    return _generator(key).standard_normal(length, dtype=np.float32)


def _of_heads(seed: int, name: str, length: int, spec: InitSpec) -> np.ndarray:
    """A number for each head, fp64."""
    share = 1.0 - _generator(f"{seed}/{name}").random(length)  # above 0: its logarithm is finite
    if spec.kind == "decay_rate":
        return np.log(spec.low + (spec.high - spec.low) * share)
    low, high = math.log(spec.low), math.log(spec.high)
    step = np.exp(low + (high - low) * share)
    return step + np.log(-np.expm1(-step))  # softplus of it is the step


def _generator(key: str) -> np.random.Generator:
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.SFC64(number))
