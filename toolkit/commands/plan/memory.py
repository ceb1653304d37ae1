"""Peak memory of a rank: what it keeps all the time, and the largest moment of a step.

Moments of a step, of which the last microbatch has the largest:
- `loss`: everything is kept for backward, and a chunk of logits is computed;
- `backward`: the last block is computed backwards, everything before it still waits;
- `embeddings`: no activations are left, and the gradients of embeddings and head are reduced.
"""

import math
from typing import NamedTuple

from toolkit.commands.plan.activations import (
    Activations,
    block_activations,
    block_input,
    casts,
    joining,
    loss_memory,
    of_adapters,
    saved_results,
)
from toolkit.commands.plan.devices import CPU
from toolkit.commands.plan.job import FP32, Job, Parameter, Stage, in_flight
from toolkit.commands.plan.pieces import (
    Holding,
    States,
    Unit,
    Units,
    kept_blocks,
    states,
    unit_of,
    units_of,
)

MARGIN = 0.05
"""Of what torch allocates: memory that is free but in pieces of the wrong size."""
_BUCKET = 500_000_000
"""Numbers of each buffer for ZeRO's reductions (DeepSpeed's reduce_bucket_size), all of them there
from the first step on: two in stages 1 and 2, one in stage 3."""
_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""


class Memory(NamedTuple):
    """Bytes on one rank when it holds most."""

    weights: float
    gradients: float
    optimizer: float
    residual: float
    attention: float
    feed_forward: float
    loss: float
    """Logits, their gradients, and what the head keeps."""
    buffers: float
    """Weights gathered for computing, gradients on their way, copies in the compute type."""
    working: float
    """Intermediate results of the block that is being computed."""
    moment: str
    """When that is."""
    margin: float
    overhead: float
    """Beside torch's allocator."""

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def activations(self) -> float:
        return self.residual + self.attention + self.feed_forward

    @property
    def allocated(self) -> float:
        """By torch, at the peak."""
        return self.states + self.activations + self.loss + self.buffers + self.working

    @property
    def total(self) -> float:
        return self.allocated + self.margin + self.overhead


def fullest(job: Job) -> tuple[Stage, Memory]:
    """The stage whose first rank needs most memory."""
    found = [(stage, memory_of(job, stage)) for stage in job.distinct_stages]
    return max(found, key=lambda pair: pair[1].total)


def least_memory(job: Job) -> float:
    """Bytes below which no microbatch and no checkpointing come on this layout."""
    least = 0.0
    for stage in job.stages:
        fixed = _fixed(job, stage, _first_rank(job, stage))
        allocated = float(sum(fixed.states))
        allocated += fixed.root + fixed.reduced + fixed.buckets
        least = max(least, _with_margin(job, allocated) + job.device.overhead)
    return least


def memory_of(job: Job, stage: Stage, rank: int | None = None) -> Memory:
    """Of `rank`, by default the first rank of the stage, which has the largest shards."""
    fixed = _fixed(job, stage, _first_rank(job, stage) if rank is None else rank)
    kept = fixed.states
    block = _Blocks(job, stage, fixed)
    loss = loss_memory(job, head_of(job, stage))
    flying = in_flight(job.layout.pp_config, stage, job.passes)
    waiting = block.kept.times(flying)
    # Gradients come into being while activations go, unless some are left of microbatches before.
    always = job.passes > flying or job.layout.name in ("ddp", "zero1", "zero2", "zero3")
    base = waiting._replace(casts=block.kept.casts)
    # What went into a microbatch's last reduction stays until the next one's first.
    last = fixed.reduction if job.passes > 1 else 0.0
    always_there = fixed.buckets + _pipeline_buffers(job, stage, flying)
    if job.passes > 1:
        always_there += fixed.accumulated
    gathered = fixed.root + fixed.resident + last
    moments = {
        "loss": _Moment(base, loss.kept + loss.working, gathered, 0.0, gradients=always),
        "backward": _Moment(
            base,
            0.0,
            fixed.root + fixed.block_buffers + fixed.head_gradient,
            max(block.working, fixed.block_reduction, last),
            gradients=always,
        ),
        "embeddings": _Moment(
            Activations(), 0.0, fixed.root + last + fixed.reduced, _embedding_working(job, stage),
            gradients=True,
        ),
    }  # fmt: skip
    if loss.returning:
        moments["head"] = _Moment(base, loss.kept + loss.returning, gathered, 0.0, gradients=always)
    name, moment = max(moments.items(), key=lambda item: item[1].bytes(kept.gradients))
    kind = "loss" if name == "head" else name
    allocated = Memory(
        weights=kept.weights,
        gradients=kept.gradients if moment.gradients else 0.0,
        optimizer=kept.optimizer,
        residual=moment.activations.residual,
        attention=moment.activations.attention,
        feed_forward=moment.activations.feed_forward,
        loss=moment.loss,
        buffers=moment.buffers + moment.activations.casts + always_there,
        working=moment.working,
        moment=kind,
        margin=0.0,
        overhead=float(job.device.overhead),
    )
    own = allocated.allocated
    return allocated._replace(margin=_with_margin(job, own) - own)


def _with_margin(job: Job, allocated: float) -> float:
    return allocated if job.device.name == CPU else (1 + MARGIN) * allocated


def _first_rank(job: Job, stage: Stage) -> int:
    if "ranks" not in job.known:
        job.known["ranks"] = job.layout.world_size // job.layout.pp
    return stage.place * job.known["ranks"]


class _Fixed(NamedTuple):
    """Bytes of a stage on one rank that microbatches and checkpointing do not change."""

    states: States
    """With the gradients that add up over microbatches."""
    blocks: list[Unit]
    root: float
    """Embeddings and head, gathered."""
    reduction: float
    """What their reduction takes."""
    reduced: float
    """Their gradients, and that."""
    head_gradient: float
    resident: float
    """Weights of blocks that stay gathered from forward to backward."""
    block_buffers: float
    block_reduction: float
    buckets: float
    """DeepSpeed's."""
    accumulated: float
    """Buffers besides where a step has several microbatches."""


def _fixed(job: Job, stage: Stage, rank: int) -> _Fixed:
    key = "fixed", stage.place, rank
    if key not in job.known:
        job.known[key] = _fixed_anew(job, stage, rank)
    return job.known[key]


def _fixed_anew(job: Job, stage: Stage, rank: int) -> _Fixed:
    layout, held = job.layout, units_of(job, stage, rank)
    kept = states(job, stage, rank)
    kept = kept._replace(weights=kept.weights + int(job.teacher_bytes))
    if layout.pp > 1:  # whole gradients add up over the microbatches, and are reduced at the end
        kept = kept._replace(gradients=FP32 * held.total.trained)
    biggest = None
    if layout.is_fsdp and held.blocks:
        biggest = max(held.blocks, key=lambda unit: unit.all.whole)
    last = held.outside  # to be reduced
    if _head_is_apart(job, stage):
        last = unit_of(job, tuple(p for p in job.outside_of(stage) if not _is_head(p)), rank)
    buckets, accumulated = _zero_buffers(job, held.total)
    if layout.name == "ddp":
        accumulated = float(FP32 * held.total.trained)
    return _Fixed(
        kept,
        held.blocks,
        root=_gathered(job, held.outside),
        reduction=_reduction(job, last),
        reduced=_reduced(job, last),
        head_gradient=_head_gradient(job, stage),
        resident=_resident(job, held, stage),
        block_buffers=_block_buffers(job, biggest, held, stage) if biggest else 0.0,
        block_reduction=_reduction(job, biggest) if biggest else 0.0,
        buckets=buckets,
        accumulated=accumulated,
    )


class _Moment(NamedTuple):
    activations: Activations
    loss: float
    buffers: float
    working: float
    gradients: bool
    """Whether all gradients are there."""

    def bytes(self, gradients: float) -> float:
        own = gradients if self.gradients else 0.0
        return self.activations.total + self.loss + self.buffers + self.working + own


class _Blocks:
    """What the blocks of a stage keep and need."""

    def __init__(self, job: Job, stage: Stage, fixed: _Fixed) -> None:
        self.kept, again = Activations(), 0.0
        groups = job.groups(stage)
        least = Activations(residual=block_input(job))
        for group, unit in zip(groups, fixed.blocks, strict=True):
            kind = {"sparse": group.is_sparse, "linear": group.is_linear}
            whole = block_activations(job, **kind)
            added, spared = of_adapters(job, group.parameters, sparse=group.is_sparse)
            whole = kept = whole + added + spared.times(-1)
            saved = least + saved_results(job, **kind)
            if group.repeated:
                again = max(again, whole.total - saved.total)
            elif job.ac_config is not None and job.ac_config.mode == "budget":
                share = job.ac_config.budget
                kept = whole.times(share) + least.times(1 - share)
            if group.number > group.repeated:
                self.kept += kept.times(group.number - group.repeated)
            if group.repeated:
                self.kept += saved.times(group.repeated)
            if group.is_ahead:
                self.kept += Activations(residual=group.number * joining(job))
            if job.activation_offload:  # but for the block that is computed backwards
                again, self.kept = max(again, kept.total), Activations()
            # What is in few bits is made anew for each product, and not kept.
            matrices = unit.all.matrices - unit.all.few_bits
            self.kept += Activations(casts=group.number * casts(job, matrices))
        # In a block that is computed again, its own activations come into being once more.
        self.working = again + _block_working(job, stage) + _made(job, stage)


def _made(job: Job, stage: Stage) -> float:
    """Bytes of the largest weight while it is made of few bits: in the compute type and twice in
    fp32, or of whole numbers to look levels up by."""
    every = (p for group in job.groups(stage) for p in group.parameters if p.quantised)
    largest = max((math.prod(p.shape) for p in every), default=0)
    return largest * (job.compute_bytes + 2 * FP32)


def head_of(job: Job, stage: Stage) -> Parameter | None:
    """The weight of the output head, where a stage has one that gives logits."""
    if not stage.has_head or job.model.num_scores is not None:
        return None
    name = "embeddings.tokens.weight" if job.model.tie_embeddings else "head.weight"
    head = next(p for p in job.parts.outside if p.name == name)
    # Its gradient is needed whole for that of an adapter.
    return head._replace(is_trained=head.is_trained or name in job.parts.adapted_tables)


def _block_working(job: Job, stage: Stage) -> float:
    """Gradients of intermediate results while a feed-forward is computed backwards, beyond what it
    frees meanwhile: of both inputs of its product, and of the residual stream."""
    model, size, layout = job.model, job.compute_bytes, job.layout
    wide, width, most = 2 if model.is_gated else 1, model.d_model, 0.0
    for group in job.groups(stage):
        numbers = job.tokens * wide * model.intermediate_size / layout.tp
        if group.is_sparse and model.moe is not None:
            inner = model.moe.intermediate_size / (1 if layout.ep > 1 else layout.tp)
            tokens = job.chunk_tokens if layout.ep > 1 else job.tokens
            numbers = tokens * model.moe.top_k * (2 * inner + width)
        most = max(most, numbers)
    return size * (most + job.tokens * width)


def _embedding_working(job: Job, stage: Stage) -> float:
    return job.tokens * job.model.d_model * job.compute_bytes if stage.has_embeddings else 0.0


def _gathered(job: Job, unit: Unit) -> float:
    """Weights of a unit in the compute type while they are gathered."""
    return job.compute_bytes * unit.all.gathered if job.layout.is_fsdp else 0.0


def _resident(job: Job, held: Units, stage: Stage) -> float:
    """Weights of blocks that stay gathered from forward to backward."""
    if not job.layout.is_fsdp or not held.blocks:
        return 0.0
    groups = zip(kept_blocks(job, stage), held.blocks, strict=True)
    return job.compute_bytes * sum(number * unit.all.gathered for number, unit in groups)


def _block_buffers(job: Job, unit: Unit, held: Units, stage: Stage) -> float:
    """Of a block in backward: its weights and those of the block before it, which are gathered
    meanwhile unless all are, and its gradients."""
    two = job.compute_bytes * min(len(stage.layers), 2) * unit.all.gathered
    return max(_resident(job, held, stage), two) + job.compute_bytes * unit.all.trained


def _pipeline_buffers(job: Job, stage: Stage, flying: float) -> float:
    """What a stage has sent is kept for its backward, and there is room for what comes in next.
    Schedules of several stages a rank keep all that they send to the end of a step."""
    if job.layout.pp == 1:
        return 0.0
    stream = job.chunk_tokens * job.model.d_model * job.compute_bytes
    number = stage.borders + flying if stage.chunks == 1 else stage.borders * job.passes
    return number * stream


def _reduced(job: Job, unit: Unit) -> float:
    """Gradients of a unit: as they are computed, and in the type of reductions."""
    if not job.layout.is_fsdp:
        return 0.0
    return job.compute_bytes * unit.all.trained + _reduction(job, unit)


def _reduction(job: Job, unit: Unit) -> float:
    """What a reduce-scatter of a unit's gradients takes."""
    if not job.layout.is_fsdp:
        return 0.0
    size = FP32 if job.layout.dp_config.reduce_dtype == "float32" else 2
    return size * unit.all.trained_gathered


def _head_gradient(job: Job, stage: Stage) -> float:
    """Of the head's weight, which waits whole for the gradients of the embeddings, or is being
    reduced while the last block is computed backwards."""
    head = head_of(job, stage)
    if head is None or not job.layout.is_fsdp or not head.is_trained:
        return 0.0
    if _head_is_apart(job, stage):
        return _reduction(job, unit_of(job, tuple(filter(_is_head, job.outside_of(stage)))))
    return job.compute_bytes * job.model.padded_vocab_size * job.model.d_model / job.layout.tp


def _head_is_apart(job: Job, stage: Stage) -> bool:
    """Whether the head is gathered and reduced by itself."""
    apart = job.layout.is_fsdp and job.layout.dp_config.wrapping_strategy != "blocks"
    return apart and stage.has_head and not job.model.tie_embeddings


def _is_head(parameter: Parameter) -> bool:
    return parameter.name.startswith("head.")


def _zero_buffers(job: Job, held: Holding) -> tuple[float, float]:
    """DeepSpeed's buckets, with what ZeRO-3 has gathered, and what it accumulates besides."""
    zero = job.layout.zero_stage
    if not zero:
        return 0.0, 0.0
    settings = job.layout.dp_config.deepspeed_config.get("zero_optimization", {})
    size = settings.get("reduce_bucket_size", "auto")
    bucket = float(FP32 * (size if isinstance(size, (int, float)) else _BUCKET))
    match zero:
        case 1:
            return 2 * bucket, float(FP32 * held.trained)
        case 2:
            return 2 * bucket, 0.0
    return bucket + FP32 * min(_LIVE, held.whole), 0.0
