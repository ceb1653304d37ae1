"""What small change makes a layout fit that does not."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from toolkit.commands.plan.job import Job
from toolkit.commands.plan.plans import Plan, changed, plan_of
from toolkit.commands.plan.search import ROOM
from toolkit.distributed.config import ActivationCheckpointingConfig, DataParallelConfig
from toolkit.distributed.layout import Layout
from toolkit.distributed.sizes import check_sizes
from toolkit.errors import ConfigError

_MODULE = "--train_module."


class Change(NamedTuple):
    """A plan that fits, and the options that ask for it."""

    plan: Plan
    flags: list[str]


def nearest_that_fits(job: Job) -> Change | None:
    """The fastest way to make `job` fit by other checkpointing, another engine or style, on as many
    ranks and with the same degrees; with room to spare if there is one. None: nothing helps."""
    found = []
    for (layout, first), (ac_config, second) in itertools.product(_layouts(job), _modes(job)):
        for rows in sorted({job.rows, 1}, reverse=True):
            other = changed(job, layout=layout, rows=rows, ac_config=ac_config, keeps_ac=False)
            plan = plan_of(other)
            if plan.fits:
                size = rows * job.sequence_length
                third = [f"{_MODULE}rank_microbatch_size={size}"] if rows != job.rows else []
                found.append(Change(plan, [*first, *second, *third]))
                break
    roomy = [own for own in found if own.plan.memory.total <= ROOM * job.device.memory]
    return min(roomy or found, key=lambda own: own.plan.time.total, default=None)


def _layouts(job: Job) -> Iterator[tuple[Layout, list[str]]]:
    """Its own and those beside it, each with the flags that ask for it."""
    layout = job.layout
    yield layout, []
    if layout.name == "ddp":
        sharded = msgspec.structs.replace(
            layout,
            dp_replicate=1,
            dp_shard=layout.dp_replicate,
            is_fsdp=True,
            dp_config=DataParallelConfig(name="fsdp"),
        )
        yield sharded, [f"{_MODULE}dp_config={{name: fsdp}}"]
    if layout.is_fsdp and layout.pp == 1 and layout.dp_config.reshard_after_forward is not True:
        freeing = layout.dp_config.replace(reshard_after_forward=True)
        flag = f"{_MODULE}dp_config.reshard_after_forward=true"
        yield msgspec.structs.replace(layout, dp_config=freeing), [flag]
    if layout.cp_config is not None and layout.cp_config.style != "ulysses":
        style = layout.cp_config.replace(style="ulysses", load_balance="head_tail")
        other = msgspec.structs.replace(layout, cp_config=style)
        try:
            check_sizes(other, job.model)
        except ConfigError:
            return
        yield other, [f"{_MODULE}cp_config.style=ulysses"]


def _modes(job: Job) -> Iterator[tuple[ActivationCheckpointingConfig | None, list[str]]]:
    yield job.ac_config, []
    for mode in ("selected_blocks", "full"):
        config = ActivationCheckpointingConfig(mode=mode)
        if config != job.ac_config:
            yield config, [f"{_MODULE}ac_config={{mode: {mode}}}"]
