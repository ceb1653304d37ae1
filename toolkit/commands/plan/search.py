"""All layouts of a number of ranks that the engines run, and the fastest of them that fit with room
to spare.

What the engines refuse (docs/parallelism.md) is not proposed. Besides, tensor parallelism stays
inside a machine, where its links are fast enough to wait for.
"""

import bisect
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from toolkit.commands.plan.job import Job
from toolkit.commands.plan.memory import fullest, least_memory
from toolkit.commands.plan.plans import Plan, changed, divisors, plan_of
from toolkit.commands.plan.step_time import StepTime, least_time, step_time
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ContextParallelConfig,
    ContextStyle,
    DataParallelConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
    PipelineSchedule,
    TensorParallelConfig,
)
from toolkit.distributed.layout import Layout
from toolkit.distributed.pipeline import fits_microbatches
from toolkit.distributed.sizes import Besides, check_combination, check_sizes
from toolkit.errors import ConfigError

SHORTEST = 512
"""Tokens of a row that a cp rank has at least: with fewer there is nothing to gain."""
SLOWER = 1.5
"""Times the fastest: what surely takes longer is not looked at further."""
ROOM = 0.95
"""Share of a device's memory that a layout may use by the plan, whose peaks are within a tenth."""
_STYLES: tuple[ContextStyle, ...] = ("allgather", "ulysses")
_SCHEDULES: tuple[PipelineSchedule, ...] = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")


KEPT = ("param_dtype", "reduce_dtype", "wrapping_strategy", "prefetch_factor", "cpu_offload")
"""Fields of `dp_config` that a search leaves as they are."""


class Limits(NamedTuple):
    """What of the config a layout must go with."""

    besides: Besides
    batch_rows: int
    """Of the global batch."""
    settings: Mapping[str, Any] = {}
    """Fields of `dp_config` that every layout keeps: `KEPT`."""


class Found(NamedTuple):
    """What a search found."""

    plans: list[Plan]
    """One for each layout that fits and is not much slower than the best, the fastest first."""
    num_layouts: int
    """Legal ones, whether they fit or not."""
    share: float = 1.0
    """Of a device's memory that they may use: `ROOM`, or all of it where nothing fits into that."""


def search(job: Job, world_size: int, limits: Limits) -> Found:
    """The best plan of each layout that fits, with the microbatch and the activation checkpointing
    that make it fastest; without layouts that are slower than `SLOWER` times the best."""
    found = _search(job, world_size, limits, ROOM)
    return found if found.plans else _search(job, world_size, limits, 1.0)


def _search(job: Job, world_size: int, limits: Limits, share: float) -> Found:
    memory = share * job.device.memory
    plans: list[Plan] = []
    number, limit = 0, math.inf
    for layout in layouts(job, world_size, limits):
        number += 1
        best = _best(changed(job, layout=layout, rows=1), memory, limit)
        if best is not None:
            plans.append(best)
            limit = min(limit, SLOWER * best.time.total)
    return Found(sorted(plans, key=lambda plan: plan.time.total), number, share)


def layouts(job: Job, world_size: int, limits: Limits) -> Iterator[Layout]:
    """Every layout of `world_size` ranks that nothing refuses."""
    for layout in _candidates(job, world_size, limits.settings):
        if limits.batch_rows % layout.batch_ranks:
            continue
        if limits.batch_rows // layout.batch_ranks < layout.pp:
            continue  # fewer microbatches than stages
        try:
            check_sizes(layout, job.model)
            check_combination(layout, limits.besides)
        except ConfigError:
            continue
        yield layout


def _candidates(job: Job, world_size: int, settings: Mapping[str, Any]) -> Iterator[Layout]:
    model, length = job.model, job.sequence_length
    experts = divisors(model.moe.num_experts) if model.moe is not None else [1]
    for tp in divisors(world_size):
        if tp > job.machine:
            break
        for cp in divisors(world_size // tp):
            if cp > 1 and length // cp < SHORTEST:
                break
            for pp in divisors(world_size // (tp * cp)):
                if pp > model.num_layers:
                    break
                ranks = world_size // (tp * cp * pp)
                for ep in experts:
                    if (ranks * cp * tp) % ep or (ep > 1 and model.moe is None):
                        continue
                    yield from _with_data(job, settings, tp, cp, pp, ep, ranks)


def _with_data(
    job: Job, settings: Mapping[str, Any], tp: int, cp: int, pp: int, ep: int, ranks: int
) -> Iterator[Layout]:
    """All ways to share rows and weights among what is left, and all styles of cp and pp."""
    tp_config = TensorParallelConfig(degree=tp) if tp > 1 else None
    ep_config = ExpertParallelConfig(degree=ep) if ep > 1 else None
    contexts: list[Any] = [None]
    if cp > 1:
        contexts = [ContextParallelConfig(degree=cp, style=style) for style in _STYLES]
    pipelines: list[Any] = [None]
    if pp > 1:
        # Zero bubble halves the backward of a block, which a compiled one cannot.
        names = _SCHEDULES[:-1] if job.is_compiled else _SCHEDULES
        found = (PipelineParallelConfig(degree=pp, schedule=name) for name in names)
        pipelines = [config for config in found if config.stages <= job.model.num_layers]
    for cp_config in contexts:
        for pp_config in pipelines:
            axes: dict[str, Any] = {
                "tp": tp, "cp": cp, "pp": pp, "ep": ep, "precision": job.precision,
                "tp_config": tp_config, "cp_config": cp_config, "pp_config": pp_config,
                "ep_config": ep_config,
            }  # fmt: skip
            if max(tp, pp, ep) == 1 and not settings.get("cpu_offload"):
                name: Any = "ddp" if ranks * cp > 1 else "single"
                dp_config = DataParallelConfig(name=name, param_dtype=settings.get("param_dtype"))
                yield Layout(dp_replicate=ranks, dp_config=dp_config, **axes)
            for replicas in divisors(ranks):
                shards = ranks // replicas
                if (shards * cp * tp) % ep or (replicas > 1 and shards * cp == 1):
                    continue
                for reshards in (True, False) if pp == 1 else (True,):  # a pipeline never does
                    fsdp: Any = {**settings, "reshard_after_forward": reshards}
                    if replicas > 1:
                        fsdp |= {"num_replicas": replicas, "shard_degree": shards}
                    dp_config = DataParallelConfig(name="hsdp" if replicas > 1 else "fsdp", **fsdp)
                    yield Layout(
                        dp_replicate=replicas, dp_shard=shards, is_fsdp=True,
                        dp_config=dp_config, **axes,
                    )  # fmt: skip


def _best(job: Job, memory: float, limit: float) -> Plan | None:
    """The fastest of the microbatches and ways of checkpointing that fit into `memory` bytes on one
    layout. None where nothing fits, or nothing can take less than `limit` seconds."""
    if least_memory(job) > memory:
        return None
    sizes = [rows for rows in divisors(job.rows * job.passes) if _runs(changed(job, rows=rows))]
    if not sizes or least_time(changed(job, rows=sizes[-1], keeps_ac=False)) > limit:
        return None
    best: tuple[StepTime, Job] | None = None
    for mode in _checkpointing(job):
        jobs = [changed(job, rows=rows, ac_config=mode, keeps_ac=False) for rows in sizes]
        number = bisect.bisect_right(jobs, memory, key=lambda own: fullest(own)[1].total)
        for other in jobs[max(0, number - 2) : number]:
            time = step_time(other)
            if best is None or time.total < best[0].total:
                best = time, other
        if number == len(jobs):
            break  # the largest microbatch fits: computing again has nothing to give
    return None if best is None else plan_of(best[1], best[0])


def _runs(job: Job) -> bool:
    """Whether the schedule of the pipeline runs with so many microbatches."""
    config = job.layout.pp_config
    return config is None or fits_microbatches(config.schedule, config.degree, job.passes)


def _checkpointing(job: Job) -> list[ActivationCheckpointingConfig | None]:
    modes: list[ActivationCheckpointingConfig | None] = [
        None,
        ActivationCheckpointingConfig(mode="selected_blocks"),
        ActivationCheckpointingConfig(mode="full"),
    ]
    return modes if job.ac_config in modes else [job.ac_config, *modes]
