"""Which linear layers compute in 8 bits, and who cannot have that: told from configs. No torch."""

from collections.abc import Sequence
from importlib.util import find_spec

from toolkit.config.base import matching
from toolkit.distributed.config import Float8Config
from toolkit.distributed.layout import Layout
from toolkit.errors import ConfigError, ErrorList
from toolkit.models.architecture import Architecture
from toolkit.models.parameters import linear_layers
from toolkit.models.shapes import Shape
from toolkit.wording import count

FLOAT8 = "train_module.float8_config"
_ALIGNMENT = {"tensorwise": 16, "rowwise": 16, "mxfp8": 32}
"""Widths must be multiples of this: of what kernels take, or of the numbers of one scale."""
KERNEL_TOKENS = 16
"""Kernels sum over a multiple of so many tokens."""
_NEEDED = {"tensorwise": (8, 9), "rowwise": (9, 0), "mxfp8": (10, 0)}
"""Lowest compute capability with kernels for a recipe."""


def float8_layers(model: Architecture, config: Float8Config) -> list[str]:
    """Names of the linear layers that compute in 8 bits, in the model's order. Raises ConfigError:
    a pattern of `filter` matches none, none is left, or the kernels do not take one that is."""
    linear, key = linear_layers(model), f"{FLOAT8}.filter"
    unit = _ALIGNMENT[config.recipe]
    if config.filter is None:
        chosen = [n for n, shape in linear.items() if _is_faster(shape, config.recipe, unit)]
        if not chosen:
            raise ConfigError(
                f"no linear layer of this model is faster in {config.recipe} float8, the largest "
                f"is {max(linear.values())}; leave float8_config out, or take all with "
                f"--{key}=[]",
                key=key,
            )
        return chosen
    left_out: set[str] = set()
    found = ErrorList()
    for pattern in config.filter:
        with found.collecting():
            left_out.update(matching(key, pattern, list(linear)))
    found.raise_any()
    chosen = [name for name in linear if name not in left_out]
    if not chosen:
        raise ConfigError("leaves no linear layer in float8; leave float8_config out", key=key)
    for name in chosen:
        if any(width % unit for width in linear[name]):
            raise ConfigError(
                f"{name} is {linear[name]}, and {config.recipe} takes multiples of {unit}; add "
                f"a pattern for it, such as '*.{name.rpartition('.')[2]}'",
                key=key,
            )
    return chosen


def _is_faster(shape: Shape, recipe: str, unit: int) -> bool:
    """As torchao measured on H100 GPUs (`_auto_filter_for_recipe`, torchao 0.18; of mxfp8 there is
    no table: as rowwise)."""
    rows, columns = shape
    if rows % unit or columns % unit:
        return False
    if recipe == "tensorwise":
        return not (columns <= 4096 and rows <= 1024)
    return rows > 2048 and columns > 1024 and not (rows <= 4096 and columns <= 2048)


def describe_float8(model: Architecture, config: Float8Config) -> str:
    """One line about what computes in 8 bits."""
    chosen, of_all = len(float8_layers(model, config)), count(len(linear_layers(model)), "layer")
    gathered = ", gathered in 8 bits" if config.fsdp_all_gather else ""
    emulated = ", emulated" if config.emulate else ""
    return f"float8 {config.recipe}, {chosen} of {of_all}{gathered}{emulated}"


def check_float8(
    config: Float8Config,
    layout: Layout,
    model: Architecture,
    *,
    sequence_length: int,
    has_adapter: bool,
) -> None:
    """Check what can be told of `config` without a device. Raises ConfigError."""
    found = ErrorList()

    def refuse(what: str, instead: str) -> None:
        found.add(ConfigError(f"does not go with {what}; {instead}", key=FLOAT8))

    chosen = found.ask(float8_layers, model, config)
    for axis in ("tp", "pp", "cp", "ep"):
        if getattr(layout, axis) > 1:
            refuse(f"train_module.{axis}_config", "use ddp, fsdp or hsdp alone")
    if layout.zero_stage:
        refuse(layout.name, "use ddp, fsdp or hsdp")
    if has_adapter:
        refuse("train_module.lora", "leave one of them out")
    if layout.precision in ("fp32", "fp16"):
        refuse(f"precision {layout.precision}", "set train_module.precision to bf16")
    if config.fsdp_all_gather and (not layout.is_fsdp or layout.dp_config.cpu_offload):
        what = "fsdp_all_gather needs fsdp or hsdp without cpu_offload"
        found.add(ConfigError(what, key=f"{FLOAT8}.fsdp_all_gather"))
    elif config.fsdp_all_gather:
        found.ask(_check_shards, model, chosen or (), layout.dp_shard)
    if config.recipe == "mxfp8" and sequence_length % _ALIGNMENT["mxfp8"]:
        what = f"mxfp8 takes rows of a multiple of 32 tokens, not {sequence_length}"
        found.add(ConfigError(what, key="dataset.sequence_length"))
    if find_spec("torchao") is None:
        what = 'needs torchao, which is not installed: pip install "toolkit[float8]"'
        found.add(ConfigError(what, key=FLOAT8))
    found.raise_any()


def _check_shards(model: Architecture, names: Sequence[str], ranks: int) -> None:
    """torchao asks each rank for the largest number of its rows."""
    linear = linear_layers(model)
    for name in names:
        rows = linear[name][0]
        if -(-rows // ranks) * (ranks - 1) >= rows:
            raise ConfigError(
                f"leaves a rank without rows of {name}, which has {rows} for "
                f"{count(ranks, 'rank')}; name it in {FLOAT8}.filter ('*.{name.rpartition('.')[2]}'"
                "), or leave fsdp_all_gather out",
                key=f"{FLOAT8}.fsdp_all_gather",
            )


def check_device(config: Float8Config, kind: str, capability: tuple[int, int] | None) -> None:
    """Check that a device of `kind` (as in `torch.device.type`) has kernels. Raises ConfigError."""
    needed = _NEEDED[config.recipe]
    if config.emulate or (capability is not None and capability >= needed):
        return
    has = "a CPU has none" if kind == "cpu" else "this device has none"
    if capability is not None:
        has = f"this GPU is sm_{capability[0]}{capability[1]}"
    raise ConfigError(
        f"{config.recipe} needs 8-bit matrix products, NVIDIA sm_{needed[0]}{needed[1]} or newer, "
        f"and {has}; leave float8_config out, or try its numbers with --{FLOAT8}.emulate=true",
        key=FLOAT8,
    )
