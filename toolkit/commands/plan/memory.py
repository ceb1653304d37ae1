"""Peak memory of a rank: what it keeps all the time, and the largest moment of a step.

Moments of a step, of which the last microbatch has the largest:
- `loss`: everything is kept for backward, and a chunk of logits is computed;
- `backward`: the last block is computed backwards, everything before it still waits;
- `embeddings`: no activations are left, and the gradients of embeddings and head are reduced.
"""

from typing import NamedTuple

from toolkit.commands.plan.activations import (
    Activations,
    block_activations,
    block_input,
    casts,
    loss_memory,
)
from toolkit.commands.plan.devices import CPU
from toolkit.commands.plan.job import FP32, Job, Parameter, Stage
from toolkit.commands.plan.pieces import Unit, states, total, unit_of

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
    found = [(stage, memory_of(job, stage)) for stage in job.stages]
    return max(found, key=lambda pair: pair[1].total)


def memory_of(job: Job, stage: Stage, rank: int | None = None) -> Memory:
    """Of `rank`, by default the first rank of the stage, which has the largest shards."""
    layout = job.layout
    if rank is None:
        rank = stage.place * (layout.world_size // layout.pp)
    kept = states(job, stage, rank)
    if layout.pp > 1:  # whole gradients add up over the microbatches, and are reduced at the end
        kept = kept._replace(gradients=FP32 * total(job, stage, rank).trained)
    block = _Blocks(job, stage, rank)
    outside = unit_of(job, job.outside_of(stage), rank)
    loss = loss_memory(job, head_of(job, stage))
    flying = in_flight(job, stage)
    waiting = block.kept.times(flying)
    # Gradients come into being while activations go, unless some are left of microbatches before.
    always = job.passes > flying or layout.name in ("ddp", "zero1", "zero2", "zero3")
    base = waiting._replace(casts=block.kept.casts)
    # What went into a microbatch's last reduction stays until the next one's first.
    last = _reduction(job, outside) if job.passes > 1 else 0.0
    root = _gathered(job, outside) + last
    buckets = FP32 * total(job, stage).trained if layout.name == "ddp" and job.passes > 1 else 0.0
    always_there = buckets + _zero_buffers(job, stage, rank) + _pipeline_buffers(job, stage)
    moments = {
        "loss": _Moment(base, loss.kept + loss.working, root, 0.0, gradients=always),
        "backward": _Moment(
            base,
            0.0,
            root - last + block.buffers + _head_gradient(job, stage, outside),
            max(block.working, block.reduction, last),
            gradients=always,
        ),
        "embeddings": _Moment(
            Activations(), 0.0, root + _reduced(job, outside), _embedding_working(job, stage),
            gradients=True,
        ),
    }  # fmt: skip
    if loss.returning:
        moments["head"] = _Moment(base, loss.kept + loss.returning, root, 0.0, gradients=always)
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
    is_cpu = job.device.name == CPU
    return allocated._replace(margin=0.0 if is_cpu else MARGIN * allocated.allocated)


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

    def __init__(self, job: Job, stage: Stage, rank: int) -> None:
        self.kept, self.buffers, self.reduction = Activations(), 0.0, 0.0
        again, units = 0.0, []
        for group in job.groups(stage):
            whole, unit = (
                block_activations(job, sparse=group.is_sparse),
                unit_of(job, group.parameters, rank),
            )
            least = Activations(residual=block_input(job))
            kept = whole
            if group.repeated:
                again = max(again, whole.total - least.total)
            elif job.ac_config is not None and job.ac_config.mode == "budget":
                share = job.ac_config.budget
                kept = whole.times(share) + least.times(1 - share)
            self.kept += kept.times(group.number - group.repeated) + least.times(group.repeated)
            self.kept += Activations(casts=group.number * casts(job, unit.all.matrices))
            units.append(unit)
        # In a block that is computed again, its own activations come into being once more.
        self.working = again + _block_working(job, stage)
        if job.layout.is_fsdp and units:
            biggest = max(units, key=lambda unit: unit.all.whole)
            self.buffers = _block_buffers(job, biggest, len(stage.layers))
            self.reduction = _reduction(job, biggest)


def in_flight(job: Job, stage: Stage) -> float:
    """Microbatches whose activations of the whole stage a rank holds at once.

    1F1B: as many as there are stages from it to the last. Interleaved (Narayanan et al. 2021): of
    its chunks as many as are computed forward before the first comes back. ZBV (Qi et al. 2024): as
    the first rank of 1F1B, and a part of one more, for which gradients of weights wait.
    """
    config, layout = job.layout.pp_config, job.layout
    if config is None:
        return 1.0
    if config.schedule == "1F1B":
        return float(min(job.passes, layout.pp - stage.place))
    if config.schedule == "ZBVZeroBubble":
        return min(job.passes, layout.pp + 0.5)
    ahead = 2 * (layout.pp - stage.place - 1) + (stage.chunks - 1) * layout.pp + 1
    return min(job.passes * stage.chunks, ahead) / stage.chunks


def head_of(job: Job, stage: Stage) -> Parameter | None:
    """The weight of the output head, where a stage has it."""
    if not stage.has_head:
        return None
    name = "embeddings.tokens.weight" if job.model.tie_embeddings else "head.weight"
    return next(p for p in job.parts.outside if p.name == name)


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


def _block_buffers(job: Job, unit: Unit, layers: int) -> float:
    """Of a block in backward: its weights and those of the block before it, which are gathered
    meanwhile, and its gradients. A pipeline keeps the weights of all blocks."""
    kept = not job.layout.dp_config.reshard_after_forward or job.layout.pp > 1
    resident = layers if kept else min(layers, 2)
    return job.compute_bytes * (resident * unit.all.gathered + unit.all.trained)


def _pipeline_buffers(job: Job, stage: Stage) -> float:
    """What comes in from other stages has room for every microbatch of a step; what a stage has
    sent is kept for its backward."""
    if job.layout.pp == 1:
        return 0.0
    stream = job.chunk_tokens * job.model.d_model * job.compute_bytes
    return (stage.borders * job.passes + stage.chunks * in_flight(job, stage)) * stream


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


def _head_gradient(job: Job, stage: Stage, outside: Unit) -> float:
    """Of the head's weight, which waits whole for the gradients of the embeddings."""
    head = head_of(job, stage)
    if head is None or not job.layout.is_fsdp or not head.is_trained:
        return 0.0
    return job.compute_bytes * job.model.padded_vocab_size * job.model.d_model / job.layout.tp


def _zero_buffers(job: Job, stage: Stage, rank: int) -> float:
    """DeepSpeed's buckets, what it accumulates besides, and what ZeRO-3 has gathered."""
    zero = job.layout.zero_stage
    if not zero:
        return 0.0
    settings = job.layout.dp_config.deepspeed_config.get("zero_optimization", {})
    size = settings.get("reduce_bucket_size", "auto")
    bucket = float(FP32 * (size if isinstance(size, (int, float)) else _BUCKET))
    held = total(job, stage, rank)
    match zero:
        case 1:
            return 2 * bucket + (FP32 * held.trained if job.passes > 1 else 0)
        case 2:
            return 2 * bucket
    return bucket + FP32 * min(_LIVE, held.whole)
