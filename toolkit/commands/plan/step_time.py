"""How long a step takes: computing, what memory and links add, and what a pipeline waits.

An estimate for comparing layouts, not a promise. Every share below says where it is from.
"""

from typing import NamedTuple

from toolkit.commands.plan.communication import Traffic, traffic_of
from toolkit.commands.plan.devices import Link
from toolkit.commands.plan.job import FP32, Job, Stage
from toolkit.commands.plan.pieces import total

ATTENTION = 0.36
"""Of the peak, in SDPA's flash kernels, forward and backward: 350 to 400 of 989 TFLOP/s
(FlashAttention-2 on an H100; Shah et al. 2024, figure 5), less in backward."""
EXPERTS = 0.8
"""Of what one product reaches, in grouped products of experts, which are narrower."""
MEMORY = 0.80
"""Of the bandwidth of device memory, in kernels that read and write once."""
LINKS = 0.75
"""Of a link, in collectives of many MB (nccl-tests on eight H100: 340 of 450 GB/s in gathers)."""
HOP = 2e-6
"""Seconds that each further rank adds to a collective."""
HOST = 25e9
"""Bytes per second between host and device (PCIe 4.0 x16), for offloaded optimizers."""
ITERATIONS = 5
"""Of Newton-Schulz, by Muon's default."""
LARGE = 512
"""Rows of a matrix product at which half of its speed is reached."""


class StepTime(NamedTuple):
    """Seconds of a step on the slowest stage, and what they consist of."""

    computing: float
    """Products, attention, and what is bound by memory."""
    recomputing: float
    """Of activations that were not kept."""
    exchanging: float
    """Time in which computing waits for other ranks."""
    bubble: float
    """Time in which a stage waits for the pipeline to fill and drain."""
    optimizer: float
    mfu: float | None
    """Model FLOPs of the global batch, by all devices' peak in that time."""

    @property
    def total(self) -> float:
        return self.computing + self.recomputing + self.exchanging + self.bubble + self.optimizer


class _Pass(NamedTuple):
    """Seconds of one microbatch on one stage."""

    forward: float
    backward: float
    again: float
    attention: float
    """Of `forward`."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.again


def step_time(job: Job) -> StepTime:
    """Of the slowest stage."""
    times = (_stage_time(job, stage) for stage in job.distinct_stages)
    return max(times, key=lambda time: time.total)


def least_time(job: Job) -> float:
    """Seconds below which no step comes, told from the first stage alone."""
    time = _stage_time(job, job.stages[0])
    return time.total - time.bubble - time.recomputing


def model_flops(job: Job) -> float:
    """FLOPs of the model for the global batch, as `toolkit.models.parameters` counts them."""
    return job.parts.flops_per_token * job.batch_tokens


def _stage_time(job: Job, stage: Stage) -> StepTime:
    one = _pass(job, stage)
    passes, layout = job.passes, job.layout
    found = traffic_of(job, stage)
    waiting = sum(_seconds(job, traffic) for traffic in found if traffic.waits)
    beside = sum(_seconds(job, traffic) for traffic in found if not traffic.waits)
    # What runs beside computing is seen where it takes longer; and the first gather and the last
    # reduction of a step have nothing to run beside.
    computing = passes * one.total
    hidden = min(beside, 0.9 * computing)
    edges = beside / max(1.0, 2.0 * passes * max(1, len(stage.layers)))
    exchanging = waiting + max(beside - hidden, edges if beside else 0.0)
    per_pass = one.total + waiting / passes
    bubble = 0.0
    if (config := layout.pp_config) is not None:
        idle = (layout.pp - 1) * per_pass
        if config.schedule == "Interleaved1F1B":
            idle /= 2  # by the number of stages on a rank (Narayanan et al. 2021)
        elif config.schedule == "ZBVZeroBubble" and not one.again:  # else its backwards are whole
            # (p - 1) (F + B - 2 W), where attention has no gradients of weights (Qi et al. 2024).
            idle = (layout.pp - 1) * (3 * one.attention + 0.05 * per_pass)
        bubble = idle
    optimizer = _optimizer(job, stage)
    seconds = computing + exchanging + bubble + optimizer
    peak = job.device.flops(job.precision)
    mfu = model_flops(job) / (seconds * layout.world_size * peak) if peak else None
    return StepTime(
        passes * (one.forward + one.backward), passes * one.again, exchanging, bubble, optimizer,
        mfu,
    )  # fmt: skip


def _pass(job: Job, stage: Stage) -> _Pass:
    layout, model, tokens = job.layout, job.model, job.tokens
    peak = job.device.flops(job.precision)
    shared = layout.tp
    # Narrow products reach less of the peak: their rows and their columns.
    rows = tokens / (tokens + LARGE)
    columns = model.d_model / layout.tp / (model.d_model / layout.tp + LARGE / 4)
    reach = job.device.reach * rows * columns
    forward = repeated = attention = 0.0
    parts = job.parts
    products = scores = 0.0
    for group in job.groups(stage):
        share = EXPERTS if group.is_sparse else 1.0
        own = tokens * parts.products_of[group.parameters] / shared / (peak * share * reach)
        own += _streams(job, sparse=group.is_sparse)
        products += group.number * own
        repeated += group.repeated * own
    scores = sum(parts.scores[layer] for layer in stage.layers)
    attention = tokens * scores / shared / (peak * ATTENTION)
    forward = products + attention
    repeated += attention * sum(g.repeated for g in job.groups(stage)) / max(1, len(stage.layers))
    if job.ac_config is not None and job.ac_config.mode == "budget":
        repeated += (1 - job.ac_config.budget) * forward
    head = 0.0
    if stage.has_head:
        head = tokens * job.parts.head / shared / (peak * reach)
    # Backward has two products for each of forward's; the loss computes its gradients at once.
    return _Pass(forward + head, 2 * forward + 2 * head, repeated, attention)


def _streams(job: Job, *, sparse: bool) -> float:
    """Seconds of a block's forward in which memory is what counts: norms, rotations, activations
    and the residual stream, read and written; twice as often without torch.compile."""
    model, tp = job.model, job.layout.tp
    moe = model.moe
    inner = model.intermediate_size
    if sparse and moe is not None:
        inner = moe.top_k * (moe.intermediate_size + 2 * model.d_model)
    heads = (model.num_heads + 2 * model.kv_heads) * model.attention_head_dim
    numbers = job.chunk_tokens * 8 * model.d_model + job.tokens * (2 * heads + 3 * inner) / tp
    passes = 1 if job.is_compiled else 2
    return passes * numbers * job.compute_bytes / (job.device.bandwidth * MEMORY)


def _optimizer(job: Job, stage: Stage) -> float:
    """Weight, gradient and state are read, all but the gradient written. Muon's matrices are spread
    over the ranks that hold a stage."""
    held, layout = total(job, stage), job.layout
    own = held.trained_held
    if layout.zero_stage:
        own = -(-held.trained // layout.world_size)
    numbers = (3 + 2 * job.state_tensors) * own * FP32
    bandwidth = HOST if job.offloads else job.device.bandwidth * MEMORY
    products = 0.0
    if held.iteration:
        flops = 2.0 * ITERATIONS * held.iteration / (layout.world_size // layout.pp)
        products = flops / (job.device.flops("bf16") * job.device.reach)
    return numbers / bandwidth + products


def _seconds(job: Job, traffic: Traffic) -> float:
    """Of all calls, by a ring over the ranks of their axis."""
    key = "link", traffic.axis
    if key not in job.known:
        ranks, stride = _span(job, traffic.axis)
        job.known[key] = ranks, _link(job, ranks, stride)
    ranks, link = job.known[key]
    if ranks == 1:
        return 0.0
    share = {"all-reduce": 2 * (ranks - 1) / ranks, "p2p": 1.0}.get(
        traffic.kind, (ranks - 1) / ranks
    )
    steps = 1 if traffic.kind == "p2p" else ranks - 1
    latency = link.latency + HOP * min(steps, 64)
    return traffic.calls * (latency + share * traffic.bytes / (link.bandwidth * LINKS))


def _span(job: Job, axis: str) -> tuple[int, int]:
    """(ranks of a group, distance between neighbours) along an axis."""
    layout = job.layout
    inner = layout.cp * layout.tp
    whole = layout.dp_shard * inner
    match axis:
        case "tp":
            return layout.tp, 1
        case "cp":
            return layout.cp, layout.tp
        case "ep":
            return layout.ep, 1
        case "efsdp":
            return layout.expert_shape["efsdp"], layout.ep
        case "dp_replicate":
            return layout.dp_replicate, whole
        case "pp":
            return layout.pp, layout.dp_replicate * whole
        case "stage":
            return layout.dp_replicate * whole, 1
    if layout.is_fsdp:
        return layout.dp_shard * layout.cp, layout.tp
    return layout.batch_ranks * layout.cp, layout.tp


def _link(job: Job, ranks: int, stride: int) -> Link:
    """What a group of ranks is joined by: inside of a machine its own links, otherwise the network,
    of which a rank also has the shares of those of its group that are on the same machine."""
    device, machine = job.device, job.machine
    if ranks * stride <= machine:
        return device.inside
    neighbours = max(1, machine // stride)
    bandwidth = min(device.inside.bandwidth, neighbours * device.between.bandwidth)
    return Link(bandwidth, device.between.latency)
