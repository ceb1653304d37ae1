"""Which models divide by the degrees of a layout, told before process groups exist, and what one
rank has of them. No torch here.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.layout import Layout
from toolkit.errors import ConfigError, ErrorList
from toolkit.models.architecture import GRAPH_MODES, CompileMode
from toolkit.models.config import TransformerConfig
from toolkit.optim.base import OPTIM_KEY, Optimizer
from toolkit.wording import count

LARGEST_SHARE = 1.1
"""Most that a rank may hold of stacked matrices, as a multiple of an even share."""

GATHERED_SHARE = 0.1
"""Of a device's memory, the most that gathered weights take without being asked to stay."""


def check_sizes(layout: Layout, model: TransformerConfig) -> None:
    """Check that the parts of `model` divide by the degrees of `layout`. Raises ConfigError: each
    part that does not, with the degrees nearest to the one asked for that work."""
    found = ErrorList()
    for key, problem, works in _misfits(layout, model):
        degree = getattr(layout, key)
        # Best one that leaves the number of processes as it is.
        ranks = layout.world_size // (1 if key == "ep" else math.prod(_others(layout, key)))
        fitting = [d for d in works if d > 1 and not ranks % d]
        nearest = _nearest(degree, fitting or works)
        advice = f"use {nearest}" if nearest else f"leave {key}_config out"
        found.add(ConfigError(f"{problem}; {advice}", key=f"train_module.{key}_config.degree"))
    style = None if layout.cp_config is None else layout.cp_config.style
    if style == "ring" and not model.is_plain_softmax:
        part = "attention_sinks" if model.attention_sinks else "attention_soft_cap"
        problem = f"ring does not know model.{part}; use allgather or ulysses"
        found.add(ConfigError(problem, key="train_module.cp_config.style"))
    if model.is_normalized and layout.zero_stage:
        problem = (
            f"{layout.name} steps flat parts of weights, and normalized makes whole rows and "
            "columns unit vectors after each step; use ddp, fsdp or hsdp"
        )
        found.add(ConfigError(problem, key="model.norm_placement"))
    if layout.cp > 1 and model.linear_layers:
        problem = (
            "linear layers (model.attention_pattern) pass a state from token to token, so ranks "
            "cannot share rows; use fsdp or tp_config"
        )
        found.add(ConfigError(problem, key="train_module.cp_config"))
    found.ask(check_mtp, layout, model.num_mtp_layers)
    if layout.ep > 1 and model.moe is None:
        problem = "the model has no experts (model.moe is null); leave ep_config out"
        found.add(ConfigError(problem, key="train_module.ep_config"))
    found.raise_any()


def check_mtp(layout: Layout, number: int) -> None:
    """Check that a model with `number` modules for multi-token prediction goes with what `layout`
    cuts. Raises ConfigError."""
    axes = [f"{axis}_config" for axis in ("tp", "cp", "pp") if getattr(layout, axis) > 1]
    if number and axes:
        problem = f"{number} does not go with train_module.{' and '.join(axes)}"
        raise ConfigError(f"{problem}; use fsdp, or set it to 0", key="model.num_mtp_layers")


class Besides(NamedTuple):
    """What a config asks for that must go with its layout."""

    has_frozen: bool = False
    has_adapter: bool = False
    adapts_vocabulary: bool = False
    """Adapters train rows of tokens, or the table of embeddings."""
    has_dropout: bool = False
    """Of adapters."""
    own_model: str | None = None
    """The class, where it is not the toolkit's."""
    optim: Optimizer | None = None
    quantize_base: str | None = None
    """What an adapter's base is kept in."""
    compiles_selected_ops: bool = False
    """Compiled blocks keep the results of some operations (`ac_config.mode: selected_ops`)."""
    compile_mode: CompileMode = "default"


def check_combination(layout: Layout, besides: Besides) -> None:
    """Check that what `layout` cuts goes with what else is asked for. Raises ConfigError."""
    cuts = [axis for axis in ("tp", "pp", "ep") if getattr(layout, axis) > 1]
    stages = [axis for axis in cuts if axis != "tp"]
    found = ErrorList()

    def refuse(axes: Sequence[str], what: str, instead: str) -> None:
        if axes:
            names = " and ".join(f"train_module.{axis}_config" for axis in axes)
            found.add(ConfigError(f"{what} does not go with {names}; {instead}"))

    if layout.dp_config.cpu_offload:
        refuse(cuts, "train_module.dp_config.cpu_offload", "leave one of them out")
    if besides.has_adapter:
        refuse(stages, "train_module.lora", "use fsdp, tp_config or cp_config")
    whole_rows = "use fsdp, hsdp or zero alone"
    if besides.adapts_vocabulary and layout.tp > 1:
        refuse(["tp"], "train_module.lora of embeddings or tokens", whole_rows)
    if besides.has_dropout and layout.cp > 1:
        refuse(["cp"], "train_module.lora.dropout", f"{whole_rows}, or tp_config")
    if besides.quantize_base is not None:
        others = [
            f"train_module.{axis}_config"
            for axis in ["tp", "cp", "pp", "ep"]
            if getattr(layout, axis) > 1
        ]
        if layout.name not in ("single", "ddp"):
            others.insert(0, layout.name)
        if others:
            what = f"{besides.quantize_base} does not go with {' and '.join(others)}"
            problem = f"{what}, which would cut it; use single or ddp alone, or leave it out"
            found.add(ConfigError(problem, key="train_module.lora.quantize_base"))
    if besides.compiles_selected_ops and (breaks := breaks_in_blocks(layout)):
        problem = (
            f"selected_ops finds no operations in blocks that are compiled in parts ({breaks}); "
            "use mode: full, or leave train_module.compile_model out"
        )
        found.add(ConfigError(problem, key="train_module.ac_config.mode"))
    if besides.compile_mode in GRAPH_MODES:
        axes = [axis for axis in ("tp", "cp", "pp", "ep") if getattr(layout, axis) > 1]
        if layout.name not in ("single", "ddp") or axes:
            # Weights are gathered into other memory than when a graph was recorded.
            problem = f"{besides.compile_mode} records CUDA graphs, for single and ddp alone"
            problem = f"{problem}; use max-autotune-no-cudagraphs or default"
            found.add(ConfigError(problem, key="train_module.compile_mode"))
    if besides.has_frozen:
        refuse(stages, "train_module.freeze", "use fsdp, tp_config or cp_config")
    if besides.own_model is not None:
        refuse(
            [*cuts, *(["cp"] if layout.cp > 1 else [])],
            f"model.type {besides.own_model}",
            "use fsdp",
        )
    if besides.optim is not None:
        found.ask(check_optimizer, layout, besides.optim)
    found.raise_any()


def check_optimizer(layout: Layout, optim: Optimizer) -> None:
    """Check that an optimizer which needs whole parameters finds them on the ranks of `layout`.
    Raises ConfigError."""
    traits = optim.traits()
    if layout.zero_stage and getattr(optim, "state_dtype", "fp32") != "fp32":
        problem = f"bf16 does not go with {layout.name}; use ddp, fsdp or hsdp, or fp32"
        raise ConfigError(problem, key=f"{OPTIM_KEY}.state_dtype")
    are_cut = layout.is_fsdp and layout.world_size > layout.dp_replicate
    are_cut |= layout.zero_stage > 0
    needs_matrices = traits.needs_whole_matrices and not traits.takes_whole_matrices
    if are_cut and (traits.needs_whole_parameters or needs_matrices):
        what = "matrices" if needs_matrices else "parameters"
        name = getattr(optim, "target", type(optim).__struct_config__.tag)
        problem = f"{name} needs whole {what}, and {layout.description} cuts them over ranks"
        raise ConfigError(f"{problem}; use ddp, or another optimizer", key=f"{OPTIM_KEY}.type")


def tensor_degrees(model: TransformerConfig, *, experts_are_sharded: bool = False) -> list[int]:
    """Degrees of tensor parallelism by which every part of `model` divides."""
    return [d for d in range(1, model.num_heads + 1) if not _tensor(d, model, experts_are_sharded)]


def share_of_model(
    config: TransformerConfig, degree: int, *, experts_are_sharded: bool = False
) -> TransformerConfig:
    """The heads and hidden widths that one of `degree` ranks computes."""
    moe = config.moe
    if moe is not None:
        shared = moe.shared_expert_intermediate_size
        width = moe.intermediate_size // (1 if experts_are_sharded else degree)
        moe = moe.replace(
            intermediate_size=width,
            shared_expert_intermediate_size=None if shared is None else shared // degree,
        )
    net = config.delta_net
    if net is not None:
        net = net.replace(
            num_key_heads=net.num_key_heads // degree, num_value_heads=net.num_value_heads // degree
        )
    return config.replace(
        delta_net=net,
        num_heads=config.num_heads // degree,
        num_key_value_heads=max(1, config.kv_heads // degree),
        head_dim=config.attention_head_dim,
        intermediate_size=config.intermediate_size // degree,
        moe=moe,
    )


def breaks_in_blocks(layout: Layout) -> str:
    """What breaks the graph of a block: rows, or keys of a ring, on their way to other ranks, or
    hooks inside of it. Empty: nothing does."""
    is_ring = layout.cp_config is not None and layout.cp_config.style == "ring"
    is_fine = layout.dp_config.wrapping_strategy == "fine_grained"
    found = {
        "train_module.ep_config": layout.ep > 1,
        "train_module.cp_config.style ring": is_ring,
        "train_module.dp_config.wrapping_strategy fine_grained": is_fine,
    }
    return ", ".join(name for name, does in found.items() if does)


def keeps_gathered(
    settings: DataParallelConfig, gathered: int, memory: int | None, *, has_pipeline: bool
) -> bool:
    """Whether FSDP keeps weights gathered from the first forward of a step to its last backward.

    `gathered` are the bytes of all weights of a rank in the compute type, `memory` those of its
    device, None where they are not known. Left to us (`auto`), weights may take `GATHERED_SHARE` of
    the memory. torch's pipelines keep them always: freed after a forward they would only be
    gathered again for the next microbatch.
    """
    asked = settings.reshard_after_forward
    if has_pipeline or asked != "auto":
        return has_pipeline or not asked
    return memory is not None and gathered <= GATHERED_SHARE * memory


def sharded_dimension(shape: Sequence[int], ranks: int) -> int | None:
    """Along which dimension FSDP shards a parameter; None: along its first two, flattened.

    Stacked matrices of experts go to ranks whole, as every parameter goes by rows. Where that
    leaves some rank more than `LARGEST_SHARE` times its share (more ranks than experts: some have
    none), it is the first dimension that ranks divide: FSDP2 shards only dimension 0 unevenly.
    """
    if len(shape) < 3 or -(-shape[0] // ranks) * ranks <= LARGEST_SHARE * shape[0]:
        return 0
    return next((d for d in range(1, len(shape)) if shape[d] % ranks == 0), None)


def _misfits(layout: Layout, model: TransformerConfig) -> Iterator[tuple[str, str, Sequence[int]]]:
    """(axis, what does not divide, degrees that work)."""
    has_own_experts = layout.ep > 1
    if problem := _tensor(layout.tp, model, has_own_experts):
        works = tensor_degrees(model, experts_are_sharded=has_own_experts)
        yield "tp", f"tp {layout.tp} does not divide {problem}", works
    if layout.cp_config is not None and layout.cp_config.style == "ulysses":
        heads = model.num_heads // layout.tp
        if heads % layout.cp:
            works = [degree for degree in range(1, heads + 1) if heads % degree == 0]
            each = " of each tp rank" if layout.tp > 1 else ""
            yield (
                "cp",
                f"cp {layout.cp} does not divide the {count(heads, 'head')}{each} (ulysses)",
                works,
            )
    if layout.ep > 1 and model.moe is not None:
        experts, ranks = model.moe.num_experts, layout.dp_shard * layout.cp * layout.tp
        works = [d for d in range(2, min(experts, ranks) + 1) if experts % d == ranks % d == 0]
        if experts % layout.ep:
            yield "ep", f"ep {layout.ep} does not divide model.moe.num_experts {experts}", works
        elif ranks % layout.ep:
            shared = f"{count(ranks, 'rank')} that share the weights of a stage"
            yield "ep", f"ep {layout.ep} does not divide the {shared} (dp_shard x cp x tp)", works


def _tensor(degree: int, model: TransformerConfig, experts_are_sharded: bool) -> str | None:
    """The first part of `model` that tensor parallelism of `degree` does not divide."""
    kv, moe = model.kv_heads, model.moe
    widths: dict[str, Any] = {
        "model.num_heads": model.num_heads,
        "the padded vocabulary (model.vocab_multiple)": model.padded_vocab_size,
    }
    if moe is None or len(model.moe_layers) < model.num_layers:
        widths["model.intermediate_size"] = model.intermediate_size
    if moe is not None and not experts_are_sharded:
        widths["model.moe.intermediate_size"] = moe.intermediate_size
    if moe is not None and moe.shared_expert_intermediate_size is not None:
        widths["model.moe.shared_expert_intermediate_size"] = moe.shared_expert_intermediate_size
    if model.delta_net is not None:
        widths["model.delta_net.num_key_heads"] = model.delta_net.num_key_heads
    for name, width in widths.items():
        if width % degree:
            return f"{name} {width}"
    if kv % degree and degree % kv:
        return f"model.num_key_value_heads {kv}, nor is divided by it"
    return None


def _others(layout: Layout, axis: str) -> Iterator[int]:
    """Degrees of parallelism besides `axis` that are no data parallelism."""
    return (getattr(layout, other) for other in ("pp", "cp", "tp") if other != axis)


def _nearest(wanted: int, works: Sequence[int]) -> str:
    """The number below and the one above `wanted` in `works`."""
    below = max((n for n in works if n < wanted), default=None)
    above = min((n for n in works if n > wanted), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)
