"""How many weights a rank holds, gathers and updates: every parameter cut as the engines cut it."""

import functools
import math
from typing import NamedTuple

from toolkit.commands.plan.devices import CPU
from toolkit.commands.plan.job import (
    BY_ROWS,
    FACTORED,
    FP32,
    QUANTISED,
    Job,
    Parameter,
    Stage,
)
from toolkit.distributed.sizes import keeps_gathered, sharded_dimension
from toolkit.models.config import TransformerConfig
from toolkit.models.parameters import quantised_bytes
from toolkit.models.shapes import Shape
from toolkit.optim.scaling import UNDECAYED

_LEAST, _BLOCK = 4096, 256
"""Values of the smallest parameter that `adamw_8bit` quantises, and those that share a scale."""


class Holding(NamedTuple):
    """Weights of one unit (what FSDP gathers at once), on one rank."""

    whole: int = 0
    """After tensor, expert and pipeline parallelism, before FSDP."""
    held: int = 0
    """Of these, kept by this rank."""
    gathered: int = 0
    """What a gather of the unit makes, with the padding to equal shards."""
    trained: int = 0
    """Of `whole`."""
    trained_held: int = 0
    trained_gathered: int = 0
    matrices: int = 0
    """Of `whole`, weights of matrix products."""
    tensors: int = 0
    """Trained parameters of which this rank holds something."""
    partial: int = 0
    """Of `trained_held`, weights of whose gradient each tp rank has a summand."""
    factored: int = 0
    """Numbers of a second moment of `trained` that is kept by rows and columns (Adafactor)."""
    quantised: int = 0
    """Of `trained`, weights whose moments `adamw_8bit` quantises."""
    quantised_tensors: int = 0
    """Parameters of which they are."""
    by_muon: int = 0
    """Of `trained_held`, weights of matrices that Muon steps."""
    by_muon_tensors: int = 0
    """Of `tensors`, those."""
    cut: int = 0
    """Of `by_muon`, weights of matrices that lie on several ranks."""
    rows: int = 0
    """Of Muon's matrices, whole."""
    few_bits: int = 0
    """Of `matrices`, weights of a frozen base in 4 or 8 bits."""
    few_bits_bytes: int = 0
    """What those take."""
    iteration: int = 0
    """Multiplications of a Newton-Schulz iteration over Muon's matrices, whole."""

    def __add__(self, other: "Holding") -> "Holding":  # type: ignore[override]
        return Holding(*map(int.__add__, self, other))

    def times(self, number: int) -> "Holding":
        return Holding(*(value * number for value in self))


class Unit(NamedTuple):
    """A block, or all that is outside of blocks."""

    dense: Holding
    experts: Holding
    """Under expert parallelism: gathered apart, over fewer ranks."""
    all: Holding
    """Both."""


def local_shape(name: str, shape: Shape, model: TransformerConfig, tp: int, ep: int) -> Shape:
    """What tensor and expert parallelism leave of a parameter on one rank. `name` is the full one,
    or that in a block."""
    if ".experts." in name and len(shape) == 3:
        if ep > 1:
            return (shape[0] // ep, *shape[1:])
        kind = name.partition(".experts.")[2].removesuffix(".weight")
        if kind in ("down.lora_B", "gate.lora_A", "up.lora_A"):
            return shape
        return _cut(shape, 2 if kind.startswith("down") else 1, tp)
    if tp == 1 or ".router." in name:
        return shape
    part, _, kind = name.rpartition(".")
    part = part.removesuffix(".lora_A").removesuffix(".lora_B")
    last = part.rpartition(".")[2]
    if f".{name}".endswith(UNDECAYED):
        return _cut(shape, 0, tp)
    if kind == "key_scale":
        return (max(shape[0] // tp, model.attention_head_dim),)
    if kind in ("sinks", "query_scale", "gate_scale", "up_scale"):
        return _cut(shape, 0, tp)
    if part in ("embeddings.tokens", "head"):
        return _cut(shape, 0, tp)
    if last in ("output", "down"):  # cut by columns; the bias is whole
        cut_by_columns = kind == "weight" and not name.endswith("lora_B.weight")
        return _cut(shape, 1, tp) if cut_by_columns else shape
    if name.endswith("lora_A.weight"):
        return shape
    if last in ("key", "value") and _is_of_delta_net(shape, model):
        return _cut(shape, 0, tp)
    if last in ("key", "value") or (last == "key_norm" and model.qk_norm == "full"):
        return (max(shape[0] // tp, model.attention_head_dim), *shape[1:])
    if last in ("query", "gate", "up", "decay", "write") or (
        last == "query_norm" and model.qk_norm == "full"
    ):
        return _cut(shape, 0, tp)
    return shape


def _is_of_delta_net(shape: Shape, model: TransformerConfig) -> bool:
    """Whether a projection to keys or values is of linear attention, by its rows."""
    net = model.delta_net
    rows = model.kv_heads * model.attention_head_dim
    return net is not None and shape[0] != rows and shape[0] in (net.key_width, net.value_width)


def _cut(shape: Shape, dim: int, parts: int) -> Shape:
    return (*shape[:dim], -(-shape[dim] // parts), *shape[dim + 1 :])


def is_partial(name: str, local: Shape, shape: Shape, model: TransformerConfig, tp: int) -> bool:
    """Whether each tp rank has only a summand of the gradient: of what all of them hold alike."""
    if tp == 1 or ".experts." in name:
        return False
    last = name.rpartition(".")[0].rpartition(".")[2]
    is_of_keys = last in ("key", "value", "key_norm") or name.endswith("key_scale")
    shared_heads = is_of_keys and model.kv_heads < tp and not _is_of_delta_net(shape, model)
    return local == shape or shared_heads


@functools.cache
def sharded(shape: Shape, ranks: int, rank: int) -> tuple[int, int]:
    """(elements that FSDP leaves on `rank` of `ranks`, elements of a gather)."""
    dim = sharded_dimension(shape, ranks)
    rows = shape[0] * shape[1] if dim is None else shape[dim]
    inner = math.prod(shape) // rows
    chunk = -(-rows // ranks)
    held = max(0, min(chunk, rows - rank * chunk))
    return held * inner, chunk * ranks * inner


@functools.cache
def holding(
    parameters: tuple[Parameter, ...],
    model: TransformerConfig,
    *,
    tp: int,
    ep: int,
    ranks: int,
    expert_ranks: int,
    place: tuple[int, int],
) -> Unit:
    """What of `parameters` a rank holds. `place`: its numbers among the FSDP ranks, and among those
    of experts."""
    dense, experts = Holding(), Holding()
    for name, shape, is_trained, by_muon, few in parameters:
        local = local_shape(name, shape, model, tp, ep)
        apart = ep > 1 and ".experts." in name
        over, rank = (expert_ranks, place[1]) if apart else (ranks, place[0])
        held, gathered = sharded(local, over, rank)
        whole = math.prod(local)
        is_quantised = is_trained and whole >= _LEAST and whole % _BLOCK == 0
        own = Holding(
            whole=whole,
            held=held,
            gathered=gathered,
            trained=whole if is_trained else 0,
            trained_held=held if is_trained else 0,
            trained_gathered=gathered if is_trained else 0,
            matrices=whole if len(shape) > 1 and not name.startswith("embeddings.") else 0,
            tensors=int(is_trained and held > 0),
            partial=held if is_trained and is_partial(name, local, shape, model, tp) else 0,
            factored=_factored(local) if is_trained else 0,
            quantised=whole if is_quantised else 0,
            quantised_tensors=int(is_quantised),
            few_bits=whole if few else 0,
            few_bits_bytes=quantised_bytes(shape, few) if few else 0,
        )
        if by_muon:
            own = own._replace(
                by_muon=held,
                by_muon_tensors=own.tensors,
                cut=held if _is_cut(shape, local, over) else 0,
                rows=math.prod(shape[:-1]),
                iteration=_iteration(shape),
            )
        if apart:
            experts += own
        else:
            dense += own
    return Unit(dense, experts, dense + experts)


def _factored(shape: Shape) -> int:
    """Numbers of an average by rows and one by columns; of a vector, of each element."""
    if len(shape) < 2:
        return math.prod(shape)
    *stacked, rows, columns = shape
    return math.prod(stacked) * (rows + columns)


def _is_cut(shape: Shape, local: Shape, ranks: int) -> bool:
    """Whether matrices lie on several ranks; stacked ones may be whole, each on one."""
    if len(shape) == 3:
        return local[1:] != shape[1:] or (ranks > 1 and sharded_dimension(local, ranks) != 0)
    return local != shape or ranks > 1


def _iteration(shape: Shape) -> int:
    short, long = sorted(shape[-2:])
    return math.prod(shape[:-2]) * short * short * (2 * long + short)


def unit_of(job: Job, parameters: tuple[Parameter, ...], rank: int = 0) -> Unit:
    """`holding` of a block, or of what is outside of blocks, on `rank`."""
    layout = job.layout
    ranks = expert_ranks = 1
    place = (0, 0)
    if layout.is_fsdp:
        ranks = job.shard_ranks
        expert_ranks = ranks * layout.tp // layout.ep
        inside = rank % (ranks * layout.tp)
        place = (inside // layout.tp, inside // layout.ep)
    return holding(
        parameters,
        job.model,
        tp=layout.tp,
        ep=layout.ep,
        ranks=ranks,
        expert_ranks=expert_ranks,
        place=place,
    )


class Units(NamedTuple):
    """All weights of a stage on one rank."""

    blocks: list[Unit]
    """One for each of `Job.groups`."""
    outside: Unit
    total: Holding


def units_of(job: Job, stage: Stage, rank: int = 0) -> Units:
    """What of a stage `rank` holds."""
    key = "units", stage.place, rank
    if key not in job.known:
        groups = job.groups(stage)
        blocks = [unit_of(job, group.parameters, rank) for group in groups]
        outside = unit_of(job, job.outside_of(stage), rank)
        found = outside.all
        for group, unit in zip(groups, blocks, strict=True):
            found += unit.all.times(group.number)
        job.known[key] = Units(blocks, outside, found)
    return job.known[key]


def kept_blocks(job: Job, stage: Stage) -> list[int]:
    """Of each of `Job.groups`, how many blocks stay gathered from the first forward of a step to
    its last backward: all of them, or the last one of the stage."""
    groups, parts = job.groups(stage), job.parts
    if keeps_all(job, stage):
        return [group.number for group in groups]
    last = stage.layers[-1]
    kind = parts.blocks[last], last in parts.sparse
    return [int((group.parameters, group.is_sparse) == kind) for group in groups]


def keeps_all(job: Job, stage: Stage) -> bool:
    """Whether all blocks stay gathered so long."""
    memory = None if job.device.name == CPU else job.device.memory
    gathered = job.compute_bytes * total(job, stage).whole
    has_pipeline = job.layout.pp > 1
    return keeps_gathered(job.layout.dp_config, gathered, memory, has_pipeline=has_pipeline)


def total(job: Job, stage: Stage, rank: int = 0) -> Holding:
    """All weights of a stage on `rank`."""
    return units_of(job, stage, rank).total


class States(NamedTuple):
    """Bytes of weights, gradients and optimizer state that a rank keeps between microbatches."""

    weights: int
    gradients: int
    optimizer: int


def states(job: Job, stage: Stage, rank: int = 0) -> States:
    """What `rank` keeps, all but quantised moments in fp32. DeepSpeed has an fp32 copy of what it
    updates besides."""
    held, layout = total(job, stage, rank), job.layout
    moments = round(FP32 * job.state_tensors)
    counts = job.state_tensors > 1 or job.optimizer.endswith("adamw")  # not SGD, nor Lion
    steps = FP32 * held.tensors if counts else 0
    if job.optimizer == FACTORED:  # on whole parameters, like the next
        steps = FP32 * (held.tensors + held.factored)
    if job.optimizer == QUANTISED:
        codes = 2 * (held.quantised + FP32 * (held.quantised // _BLOCK))
        tables = 2 * FP32 * 256 * held.quantised_tensors
        steps = FP32 * (held.tensors + 2 * (held.trained - held.quantised)) + codes + tables
    if held.by_muon:  # a matrix has one average and no counter
        steps -= FP32 * (held.by_muon + held.by_muon_tensors)
    rows = FP32 * held.rows if job.optimizer == BY_ROWS else 0
    if not layout.zero_stage:
        on_device = 0 if job.offloads else 1
        return States(
            (FP32 * (held.held - held.few_bits) + held.few_bits_bytes) * on_device,
            FP32 * held.trained_held * on_device,
            (moments * held.trained_held + steps) * on_device + rows,
        )
    own = -(-held.trained // layout.world_size)
    updated = 0 if job.offloads else own
    gradients = held.trained if layout.zero_stage == 1 else updated
    weights = held.whole if layout.zero_stage < 3 else -(-held.whole // layout.world_size)
    averages = 0 if job.offloads else FP32 * (held.by_muon // layout.world_size)
    kept = moments * updated - averages + rows
    return States(FP32 * (weights + updated), FP32 * gradients, kept)
