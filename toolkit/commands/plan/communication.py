"""What a rank exchanges with others in a step, collective by collective, as the engines do it.

Bytes are those of the largest tensor of the call on this rank: what a gather makes, what a
reduce-scatter takes. `toolkit plan --simulate` counts the same in the calls themselves.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from toolkit.commands.plan.activations import cp_style, loss_chunks
from toolkit.commands.plan.devices import CPU
from toolkit.commands.plan.job import BY_ROWS, FP32, Job, Stage
from toolkit.commands.plan.memory import head_of
from toolkit.commands.plan.pieces import Holding, kept_blocks, total, unit_of, units_of

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "p2p"]


class Traffic(NamedTuple):
    """Equal collectives of one step."""

    kind: Kind
    axis: str
    """`dp`, `dp_replicate`, `tp`, `cp`, `ep`, `efsdp`, `pp`, or `stage`: all ranks that hold the
    weights of a stage."""
    what: str
    """What is exchanged, for people."""
    calls: float
    """In a step."""
    bytes: float
    """Of one call."""
    waits: bool = True
    """Whether computing waits for it; otherwise it runs beside."""

    @property
    def total(self) -> float:
        return self.calls * self.bytes


def traffic_of(job: Job, stage: Stage) -> list[Traffic]:
    """All exchanges of a step on a rank of `stage`, but for a few numbers (norms, counts)."""
    layout = job.layout
    found: list[Traffic] = []
    if layout.is_fsdp:
        found += _fsdp(job, stage)
    elif layout.zero_stage:
        found += _zero(job, stage)
    elif layout.batch_ranks * layout.cp > 1:
        trained = FP32 * total(job, stage).trained
        found.append(Traffic("all-reduce", "dp", "gradients", 1, trained, waits=False))
    if layout.tp > 1:
        found += _tensor(job, stage)
    if layout.cp > 1:
        found += _context(job, stage)
    if layout.ep > 1:
        found += _experts(job, stage)
    if layout.pp > 1:
        found += _pipeline(job, stage)
    found += _whole_matrices(job, stage)
    found += _unit_weights(job, stage)
    return [traffic for traffic in found if traffic.total]


def _fsdp(job: Job, stage: Stage) -> Iterator[Traffic]:
    """Blocks that are freed are gathered in each microbatch, for forward and again for backward;
    the others, and what is outside of blocks, once. Gradients are reduced in every microbatch, over
    replicas in the last; of a pipeline at the end of the step.
    """
    reductions = job.passes if job.layout.pp == 1 else 1
    held = units_of(job, stage)
    groups = zip(held.blocks, job.groups(stage), kept_blocks(job, stage), strict=True)
    units = [
        (unit, group.number, kept + 2 * job.passes * (group.number - kept), "blocks")
        for unit, group, kept in groups
    ]
    units.append((held.outside, 1, 1, "embeddings and head"))
    inside = job.shard_ranks * job.layout.tp // job.layout.ep
    for unit, number, gathers, what in units:
        calls = gathers, number * reductions, number
        yield from _unit(job, unit.dense, calls, "dp", job.shard_ranks, what)
        yield from _unit(job, unit.experts, calls, "efsdp", inside, "experts")


def _unit_weights(job: Job, stage: Stage) -> Iterator[Traffic]:
    """Of an nGPT under FSDP: squared lengths, in float64, of the columns that it cuts, which are
    those of the last matrices of attention and feed-forward."""
    model, layers = job.model, sum(group.number for group in job.groups(stage))
    if model.is_normalized and job.layout.is_fsdp:
        columns = model.num_heads * model.attention_head_dim + model.intermediate_size
        size = 2 * FP32 * layers * columns
        yield Traffic("all-reduce", "stage", "squared lengths of weights", 1, size)


def _whole_matrices(job: Job, stage: Stage) -> Iterator[Traffic]:
    """Of Muon: directions go to the owners of matrices, updates to all that hold them. How much is
    about the same on all ranks; the rest is as it falls out. ZeRO-1 and 2 cut few matrices."""
    layout, held = job.layout, total(job, stage)
    ranks = layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp
    if ranks == 1 or not held.by_muon:
        return
    size = FP32 if job.device.name == CPU else 2
    cut, moved = held.cut, held.by_muon if layout.dp_replicate > 1 else held.cut
    if layout.zero_stage:
        cut = moved = held.by_muon // ranks if layout.zero_stage == 3 else 0
    others = size * (ranks - 1) / ranks
    yield Traffic(
        "all-to-all", "stage", "Muon's directions", 1, cut // layout.dp_replicate * others
    )
    yield Traffic("all-to-all", "stage", "Muon's updates", 1, moved * others)
    if job.optimizer == BY_ROWS:
        yield Traffic("all-reduce", "stage", "averages of rows", 1, FP32 * held.rows)


def _unit(
    job: Job, held: Holding, calls: tuple[int, int, int], axis: str, ranks: int, what: str
) -> Iterator[Traffic]:
    """Of units that are alike: `calls` gathers, reductions, and reductions over replicas."""
    layout = job.layout
    reduced = FP32 if layout.dp_config.reduce_dtype == "float32" else 2
    gathers, reductions, last = calls
    if ranks > 1:
        size = job.compute_bytes * held.gathered
        yield Traffic("all-gather", axis, f"weights of {what}", gathers, size, waits=False)
        size = reduced * held.trained_gathered
        yield Traffic("reduce-scatter", axis, f"gradients of {what}", reductions, size, waits=False)
    if layout.dp_replicate > 1:
        size = reduced * held.trained_gathered // ranks
        yield Traffic("all-reduce", "dp_replicate", f"gradients of {what}", last, size, waits=False)


def _zero(job: Job, stage: Stage) -> Iterator[Traffic]:
    """DeepSpeed reduces whole buckets with an all-reduce in stages 1 (once a step) and 2 (each
    microbatch), and gathers what was updated. Stage 3 gathers as FSDP does, in fp32."""
    held, passes = total(job, stage), job.passes
    trained, whole = FP32 * held.trained, FP32 * held.whole
    if job.layout.zero_stage < 3:
        reductions = 1 if job.layout.zero_stage == 1 else passes
        yield Traffic("all-reduce", "dp", "gradients", reductions, trained, waits=False)
        yield Traffic("all-gather", "dp", "updated weights", 1, trained)
        return
    yield Traffic("all-gather", "dp", "weights", 2 * passes, whole, waits=False)
    yield Traffic("reduce-scatter", "dp", "gradients", passes, trained, waits=False)


def _numbers(job: Job, stage: Stage, *, sparse: bool | None = None) -> tuple[int, int, int]:
    """Blocks of a stage that are computed in a step: forward for the first time, forward again, and
    backward; all of them, or those with experts, or those without."""
    groups = [g for g in job.groups(stage) if sparse in (None, g.is_sparse)]
    once = job.passes * sum(group.number for group in groups)
    return once, job.passes * sum(group.repeated for group in groups), once


def _tensor(job: Job, stage: Stage) -> Iterator[Traffic]:
    """Around attention and around feed-forward: the stream is gathered before and reduce-scattered
    behind; in backward the other way round."""
    layout, model = job.layout, job.model
    stream = job.tokens * model.d_model * job.compute_bytes
    gathers = reductions = 0
    for sparse in (False, True):
        around = 1 if sparse and layout.ep > 1 else 2  # experts: each rank sends its own part
        first, again, back = _numbers(job, stage, sparse=sparse)
        gathers += around * (first + again + back)
        reductions += around * (first + again + back)
        if around == 2 and model.norm_placement == "pre":
            reductions -= again  # nothing behind it is kept
    first, again, back = _numbers(job, stage)
    yield Traffic("all-gather", "tp", "residual stream", gathers, stream)
    yield Traffic("reduce-scatter", "tp", "residual stream", reductions, stream)
    if model.qk_norm == "full":
        statistics = job.tokens * FP32
        calls = 2 * (first + again + back)
        yield Traffic("all-reduce", "tp", "squares of queries and keys", calls, statistics)
    if stage.has_embeddings:
        yield Traffic("reduce-scatter", "tp", "embeddings", job.passes, stream)
        yield Traffic("all-gather", "tp", "embeddings", job.passes, stream)
    if stage.has_head:
        yield Traffic("all-gather", "tp", "head", job.passes, stream)
        yield Traffic("reduce-scatter", "tp", "head", job.passes, stream)
        chunks, rows = loss_chunks(job)
        statistics = 3 * layout.tp * rows * FP32
        yield Traffic("all-gather", "tp", "loss", chunks * job.passes, statistics)
    partial = FP32 * total(job, stage).partial
    yield Traffic("all-reduce", "tp", "gradients of what all ranks hold", 1, partial)


def _context(job: Job, stage: Stage) -> Iterator[Traffic]:
    model, layout, size = job.model, job.layout, job.compute_bytes
    kv_heads = max(model.kv_heads // layout.tp, 1)
    keys = 2 * kv_heads * model.attention_head_dim * size
    first, again, back = _numbers(job, stage)
    there = first + again
    style = cp_style(layout)
    if style == "allgather":
        rows = job.tokens * layout.cp * keys
        yield Traffic("all-gather", "cp", "keys and values", there, rows)
        yield Traffic("reduce-scatter", "cp", "keys and values", back, rows)
    elif style == "ulysses":
        query = model.num_heads // layout.tp * model.attention_head_dim * size
        repeated = layout.cp // math.gcd(kv_heads, layout.cp)
        own = job.tokens * (query + repeated * keys)
        yield Traffic("all-to-all", "cp", "queries, keys, values", there + back, own)
        yield Traffic("all-to-all", "cp", "outputs of heads", there + back, job.tokens * query)
    else:
        own, wide = job.tokens * keys, job.tokens * keys / size * FP32
        yield Traffic("p2p", "cp", "keys and values", (there + back) * (layout.cp - 1), own)
        yield Traffic("p2p", "cp", "gradients of keys and values", back * layout.cp, wide)


def _experts(job: Job, stage: Stage) -> Iterator[Traffic]:
    """Rows to the ranks of their experts and back, forward and backward; evenly, as the router's
    losses ask for."""
    moe, model = job.model.moe, job.model
    assert moe is not None
    rows = job.chunk_tokens * moe.top_k * model.d_model * job.compute_bytes
    first, again, back = _numbers(job, stage, sparse=True)
    calls = 2 * (first + again + back)
    yield Traffic("all-to-all", "ep", "tokens of experts", calls, rows)
    counts = moe.num_experts * 8
    yield Traffic("all-to-all", "ep", "numbers of tokens", first + again, counts)
    if job.layout.tp > 1:  # the router's losses are of whole rows
        logits = job.tokens * moe.num_experts * FP32
        choices = job.tokens * moe.top_k * 8
        yield Traffic("all-gather", "tp", "logits of the router", first + again, logits)
        yield Traffic("reduce-scatter", "tp", "logits of the router", back, logits)
        yield Traffic("all-gather", "tp", "choices of the router", first + again, choices)


def _pipeline(job: Job, stage: Stage) -> Iterator[Traffic]:
    """The residual stream to the next stage, and its gradient to the one before."""
    stream = job.chunk_tokens * job.model.d_model * job.compute_bytes
    calls = job.passes * stage.borders
    yield Traffic("p2p", "pp", "residual stream", calls, stream, waits=False)
    if job.model.tie_embeddings and stage.has_embeddings != stage.has_head:
        head = head_of(job, stage) or job.parts.outside[0]
        outside = unit_of(job, (head,)).all.trained_held
        yield Traffic("all-reduce", "pp", "gradients of tied embeddings", 1, FP32 * outside)
