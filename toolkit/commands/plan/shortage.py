"""What a run that has no memory left is told: the plan's numbers for its layout, and what fits."""

import os
from pathlib import Path

from toolkit.commands.plan.devices import CPU, DEVICES, GIB, find_device
from toolkit.commands.plan.plans import Target, changed, job_of, largest_rows, plan_of
from toolkit.distributed.layout import Layout
from toolkit.errors import ToolkitError
from toolkit.experiment.config import ExperimentConfig
from toolkit.wording import count


def shortage(config: ExperimentConfig, layout: Layout, name: str, memory: int, file: Path) -> str:
    """One line for a run of `config` on `layout`, whose devices are called `name` and have `memory`
    bytes. `file` holds the config."""
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = find_device(CPU, 1)
    for known in DEVICES.values():
        if known.title == name:
            device = known
    memory = memory or device.memory  # of a CPU
    device = device._replace(memory=memory)
    command = f"toolkit plan {file} --world-size {layout.world_size} --gpus-per-node {machine}"
    if device.name in DEVICES:
        command += f" --device {device.name}"
    said = f"no memory left on {name} ({memory / GIB:.1f} GiB)"
    try:
        plan = plan_of(job_of(config, layout, Target(device, machine)))
        job, needed = plan.job, plan.memory
        rows = largest_rows(changed(job, rows=1))
    except ToolkitError:  # of parts that no plan knows
        return f"{said}; compare layouts with: {command} --search"
    parts = {
        "weights, gradients and optimizer": needed.states,
        "activations": needed.activations,
        "the rest": needed.total - needed.states - needed.activations,
    }
    told = ", ".join(f"{value / GIB:.1f} for {part}" for part, value in parts.items())
    advice = f"compare layouts with: {command} --search"
    if rows is not None and rows < job.rows:
        size = rows * job.sequence_length
        advice = f"--train_module.rank_microbatch_size={size} fits; or {advice}"
    return (
        f"{said}: the plan for {layout.description} with {count(job.rows, 'row')} a microbatch is "
        f"{needed.total / GIB:.1f} GiB ({told}); {advice}"
    )
