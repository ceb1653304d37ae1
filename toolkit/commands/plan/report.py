"""A plan as text for a terminal."""

import json
import shlex
from typing import Any

from toolkit.commands.plan.communication import Traffic
from toolkit.commands.plan.job import Job
from toolkit.commands.plan.plans import Plan, Target, largest_rows, length_of, model_flops
from toolkit.commands.plan.search import Found
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    DataParallelConfig,
)
from toolkit.experiment.config import ExperimentConfig
from toolkit.wording import count, labelled

GIB = 2**30
_SHOWN = 10
"""Rows of the table of a search."""
_LEAST = 1e6
"""Bytes a step below which an exchange is not worth a line."""


def describe(config: ExperimentConfig, source: str, plan: Plan, target: Target) -> str:
    """All about one layout."""
    job = plan.job
    rows = [
        ("model", _model(job)),
        ("layout", _layout(job)),
        ("memory", _memory(plan)),
        ("exchanges", _traffic(plan)),
        ("step", _step(plan)),
        ("run", _length(config, plan, target)),
    ]
    lines = [f"plan of {source} on {job.layout.world_size} x {job.device.name}", ""]
    return "\n".join([*lines, *labelled(rows)])


def describe_search(
    config: ExperimentConfig, source: str, found: Found, target: Target, world_size: int
) -> str:
    """The table of the best layouts, and all about the best one."""
    head = [
        "", "layout", "engine", "rows", "checkpointing", "memory", "step", "MFU", "bubble",
    ]  # fmt: skip
    table = [head]
    shown = {axes(plan.job): plan for plan in reversed(found.plans)}  # the best of each
    for number, plan in enumerate(sorted(shown.values(), key=lambda p: p.time.total)[:_SHOWN], 1):
        table.append([f"{number}", *_row(plan)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        f"{source} on {world_size} x {target.device.name}: the fastest that fit of "
        f"{count(found.num_layouts, 'layout')}, one of each shape:",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table),
        "",
        describe(config, source, found.plans[0], target),
        "",
        "start it with",
        command(source, found.plans[0], target),
    ]
    return "\n".join(lines)


def _row(plan: Plan) -> list[str]:
    job, time = plan.job, plan.time
    mfu = "-" if time.mfu is None else f"{time.mfu:.0%}"
    return [
        axes(job),
        _engine(job),
        f"{job.rows} x {job.passes}",
        _checkpointing(job.ac_config),
        f"{plan.memory.total / GIB:.1f} GiB",
        seconds(time.total),
        mfu,
        f"{time.bubble / time.total:.0%}" if job.layout.pp > 1 else "",
    ]


def axes(job: Job) -> str:
    """`dp 8 tp 2 pp 4`, without what is 1."""
    layout = job.layout
    sizes = {"dp": layout.batch_ranks, "tp": layout.tp, "cp": layout.cp, "pp": layout.pp}
    sizes["ep"] = layout.ep
    return " ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1) or "one rank"


def _engine(job: Job) -> str:
    layout, words = job.layout, [str(job.layout.name)]
    if layout.name == "hsdp":
        words = [f"hsdp {layout.dp_replicate} x {layout.dp_shard}"]
    if layout.is_fsdp and not layout.dp_config.reshard_after_forward:
        words.append("kept")
    if layout.cp_config is not None:
        words.append(layout.cp_config.style)
    if layout.pp_config is not None:
        words.append(layout.pp_config.schedule)
    return " ".join(words)


def _checkpointing(config: ActivationCheckpointingConfig | None) -> str:
    if config is None:
        return "none"
    if config.mode == "budget":
        return f"budget {config.budget:g}"
    if config.mode == "selected_ops":
        return "all but some ops"
    return config.mode if config.mode == "full" else f"1 of {config.block_interval} blocks"


def _model(job: Job) -> list[str]:
    model = job.model
    tokens = count(job.sequence_length, "token")
    return [f"{model.shown_parameters} parameters, rows of {tokens}, {job.precision}"]


def _layout(job: Job) -> list[str]:
    batch = f"{job.batch_tokens:,} tokens a step"
    passes = f"{count(job.rows, 'row')} x {job.passes:,} microbatches on each rank"
    return [
        f"{axes(job)}: {_engine(job)}",
        f"{batch} = {count(job.layout.batch_ranks, 'share')} of {passes}",
        f"activation checkpointing: {_checkpointing(job.ac_config)}"
        + (", what is kept waits in host memory" if job.activation_offload else ""),
    ]


def _memory(plan: Plan) -> list[str]:
    memory, job = plan.memory, plan.job
    parts = [
        ("weights, fp32", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("activations: residual stream and norms", memory.residual),
        ("activations: attention", memory.attention),
        ("activations: experts" if job.model.moe else "activations: feed-forward",
         memory.feed_forward),
        ("logits and loss", memory.loss),
        ("buffers: gathered weights, gradients on their way", memory.buffers),
        ("results of the block that is being computed", memory.working),
        ("margin for fragmentation", memory.margin),
        ("outside of torch's allocator", memory.overhead),
    ]  # fmt: skip
    lines = [f"{value / GIB:8.2f} GiB  {name}" for name, value in parts if value]
    if not memory.gradients:
        lines.insert(1, f"{'':13} gradients come while activations go")
    limit = job.device.memory
    verdict = "fits" if plan.fits else "does NOT fit"
    stage = f" (pipeline rank {plan.stage.place})" if job.layout.pp > 1 else ""
    lines.append(
        f"{memory.total / GIB:8.2f} GiB  of {limit / GIB:.1f}: {verdict}; the peak is in "
        f"{_MOMENTS[memory.moment]}{stage}"
    )
    rows = largest_rows(job)
    if rows is None:
        lines.append("not one row a microbatch fits; look for another layout with --search")
    else:
        size = rows * job.sequence_length
        lines.append(f"largest microbatch that fits: {count(rows, 'row')}, {size:,} tokens")
    return lines


_MOMENTS = {
    "loss": "the loss",
    "backward": "the first backward of a block",
    "embeddings": "the backward of the embeddings",
}


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["none"]
    shown = [t for t in plan.traffic if t.total >= _LEAST]
    lines = [_line(t) for t in sorted(shown, key=lambda t: -t.total)]
    rest = sum(t.total for t in plan.traffic if t.total < _LEAST)
    return [*lines, f"{size(rest):>10}  all others"] if rest else lines


def _line(traffic: Traffic) -> str:
    calls = f"{traffic.calls:,.0f} x {size(traffic.bytes)}"
    return (
        f"{size(traffic.total):>10}  {traffic.axis:<12} {traffic.kind:<14} {calls:<18} "
        f"{traffic.what}"
    )


def _step(plan: Plan) -> list[str]:
    job, time = plan.job, plan.time
    parts = {
        "computing": time.computing,
        "computing again": time.recomputing,
        "waiting for other ranks": time.exchanging,
        "pipeline bubble": time.bubble,
        "optimizer": time.optimizer,
    }
    told = ", ".join(
        f"{name} {value / time.total:.0%}" for name, value in parts.items() if value > 0
    )
    rate = job.batch_tokens / time.total
    mfu = "" if time.mfu is None else f", {time.mfu:.1%} MFU"
    return [
        f"about {seconds(time.total)} ({told})",
        f"{rate:,.0f} tokens/s, {rate / job.layout.world_size:,.0f} each{mfu}; "
        f"{model_flops(job):.3g} FLOP a step",
    ]


def _length(config: ExperimentConfig, plan: Plan, target: Target) -> list[str]:
    length = length_of(config, plan, target)
    if length is None:
        return ["its length is in epochs, which are known once the data is prepared"]
    lines = [f"{count(length.steps, 'step')}, {length.tokens:,} tokens: {_days(length.days)}"]
    if length.cost_per_day is not None and length.cost is not None:
        lines.append(f"{length.cost_per_day:,.0f} a day, {length.cost:,.0f} for the run")
    return lines


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} hours"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def size(number: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def flags(plan: Plan) -> list[str]:
    """The overrides that ask for a plan's layout."""
    job, module = plan.job, "--train_module."
    found = [f"{module}dp_config={_flow(_departures(job.layout.dp_config))}"]
    for name, value in job.layout.parallel_configs.items():
        if name != "dp_config" and value is not None:
            own = getattr(job.layout, name)
            found.append(f"{module}{name}={_flow(_departures(own))}")
    found.append(f"{module}rank_microbatch_size={job.rows * job.sequence_length}")
    ac = job.ac_config
    found.append(f"{module}ac_config={'null' if ac is None else _flow(_departures(ac))}")
    return found


def _departures(config: Any) -> dict[str, Any]:
    """The fields of a config that are not at their defaults."""
    required = {"name": "fsdp"} if isinstance(config, DataParallelConfig) else {"degree": 2}
    fields = config.to_dict()
    if isinstance(config, ActivationCheckpointingConfig):
        return {"mode": config.mode} | _changed(fields, ActivationCheckpointingConfig().to_dict())
    default = type(config)(**required).to_dict()
    return {name: fields[name] for name in required} | _changed(fields, default)


def _changed(fields: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value != default[name]}


def _flow(fields: dict[str, Any]) -> str:
    inner = ", ".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())
    return "{" + inner.replace('"', "") + "}"


def command(source: str, plan: Plan, target: Target) -> str:
    """The command that starts it."""
    world = plan.job.layout.world_size
    here = max(n for n in range(1, target.machine + 1) if world % n == 0)
    machines = world // here
    nodes = "" if machines == 1 else f" --nnodes={machines}"
    if machines > 1:
        nodes += " --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    start = f"torchrun{nodes} --nproc-per-node={here} -m toolkit train {shlex.quote(source)}"
    return " \\\n    ".join([start, *(shlex.quote(flag) for flag in flags(plan))])
