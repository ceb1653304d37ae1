"""A plan as text for a terminal."""

import json
import shlex
from typing import Any

from toolkit.commands.plan.advice import nearest_that_fits
from toolkit.commands.plan.communication import Traffic
from toolkit.commands.plan.job import Job
from toolkit.commands.plan.pieces import keeps_all
from toolkit.commands.plan.plans import Plan, Target, largest_rows, length_of, model_flops
from toolkit.commands.plan.search import ROOM, Found
from toolkit.distributed.config import (
    PARALLEL_FIELDS,
    ActivationCheckpointingConfig,
    DataParallelConfig,
)
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment
from toolkit.wording import count, labelled

GIB, MIB = 2**30, 2**20
_DECIDED = (*PARALLEL_FIELDS, "rank_microbatch_size", "ac_config")
"""Fields of the train module that a search chooses."""
_SHOWN = 10
"""Rows of the table of a search."""
_LEAST = 1e6
"""Bytes a step below which an exchange is not worth a line."""


def describe(config: ExperimentConfig, source: str, plan: Plan, target: Target) -> str:
    """All about one layout."""
    job = plan.job
    float8 = config.train_module.float8_config
    note = (
        [] if float8 is None else ["float8_config is counted as bf16: time and peak are too high"]
    )
    rows = [
        ("model", _model(job) + note),
        ("layout", _layout(job)),
        ("memory", _memory(plan)),
        ("exchanges", _traffic(plan)),
        ("step", _step(plan)),
        ("run", _length(config, plan, target)),
    ]
    lines = [f"plan of {source} on {job.layout.world_size} x {job.device.name}", ""]
    return "\n".join([*lines, *labelled(rows)])


def describe_search(loaded: LoadedExperiment, found: Found, target: Target, world_size: int) -> str:
    """The table of the best layouts, and all about the best one."""
    source, best = loaded.source, found.plans[0]
    head = ["", "layout", "engine", "rows", "checkpointing", "memory", "step", "MFU"]
    has_bubbles = any(plan.job.layout.pp > 1 for plan in found.plans)
    table = [[*head, "bubble"] if has_bubbles else head]
    shown = {axes(plan.job): plan for plan in reversed(found.plans)}  # the best of each
    for number, plan in enumerate(sorted(shown.values(), key=lambda p: p.time.total)[:_SHOWN], 1):
        table.append([f"{number}", *_row(plan)][: len(table[0])])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = f" in {found.share:.0%} of the memory" if found.share < 1 else ""
    lines = [
        f"{source} on {world_size} x {target.device.name}: the fastest that fit{room} of "
        f"{count(found.num_layouts, 'layout')}, one of each shape:",
        "",
        *("  ".join(map(str.ljust, row, widths)).rstrip() for row in table),
        "",
        describe(loaded.config, source, best, target),
        "",
        "start it with",
        command(loaded, best, target),
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
        gib(plan.memory.total, 1).strip(),
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
    if layout.cp_config is not None:
        words.append(layout.cp_config.style)
    if layout.pp_config is not None:
        words.append(layout.pp_config.schedule)
    elif layout.is_fsdp and keeps_all(job, job.stages[0]):
        words[-1] += ", weights kept"
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
    passes = f"{count(job.rows, 'row')} x {count(job.passes, 'microbatch')} on each rank"
    return [
        f"{axes(job)}: {_engine(job)}{' after forward' * _engine(job).endswith('kept')}",
        f"{batch} = {count(job.layout.batch_ranks, 'share')} of {passes}",
        f"activation checkpointing: {_checkpointing(job.ac_config)}"
        + (", what is kept waits in host memory" if job.activation_offload else ""),
    ]


def _memory(plan: Plan) -> list[str]:
    memory, job = plan.memory, plan.job
    quantised = job.parts.quantised
    few = "" if quantised is None else f", base in {quantised.kind}"
    teacher = f", {gib(job.teacher_bytes).strip()} of the teacher" if job.teacher else ""
    is_small = memory.allocated < GIB / 10
    parts = [
        (f"weights, fp32{few}{teacher}", memory.weights),
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
    lines = [f"{gib(value, small=is_small)}  {name}" for name, value in parts if value]
    if not memory.gradients:
        lines.insert(1, f"{'':13} gradients come while activations go")
    limit = gib(job.device.memory, 1, small=is_small).strip()
    verdict = "fits" if plan.fits else "does NOT fit"
    if plan.fits and memory.total > ROOM * job.device.memory:
        verdict = f"fits, but leaves less than {1 - ROOM:.0%} for what a plan does not know"
    stage = f" (pipeline rank {plan.stage.place})" if job.layout.pp > 1 else ""
    lines.append(
        f"{gib(memory.total, small=is_small)}  of {limit.split()[0]}: {verdict}; the peak is in "
        f"{_MOMENTS[memory.moment]}{stage}"
    )
    rows = largest_rows(job)
    if rows is not None:
        size = rows * job.sequence_length
        flag = "" if plan.fits else f": --train_module.rank_microbatch_size={size}"
        lines.append(f"largest microbatch that fits: {count(rows, 'row')}, {size:,} tokens{flag}")
        return lines
    lines.append("not one row a microbatch fits; --search compares other layouts")
    if (change := nearest_that_fits(job)) is not None:
        needed, time = change.plan.memory.total, change.plan.time.total
        told = f"{gib(needed).strip()} and {seconds(time)} a step"
        lines.append(f"{told}: {shlex.join(change.flags)}")
    return lines


def gib(value: float, digits: int = 2, *, small: bool | None = None) -> str:
    """Bytes of memory in GiB, or in MiB where they are `small`; default: by themselves."""
    is_small = value < GIB / 10 if small is None else small
    unit, name = (MIB, "MiB") if is_small else (GIB, "GiB")
    return f"{value / unit:{6 + digits}.{digits}f} {name}"


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
    hours = days * 24
    if hours < 0.1:
        return seconds(hours * 3600)
    return f"{days:.1f} days" if days >= 1 else f"{hours:.1f} hours"


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.{0 if value >= 0.1 else 2}f} ms"
    return f"{value * 1e6:.0f} us"


def size(number: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def flags(loaded: LoadedExperiment, plan: Plan) -> list[str]:
    """The options that ask for a plan's layout: those that were given for everything else, and one
    for each part of the layout that the config has or needs."""
    job, module = plan.job, loaded.config.train_module
    decided = [f"train_module.{name}" for name in _DECIDED]
    kept = [
        override.flag
        for override in loaded.given
        if not any(
            override.path == path or override.path.startswith(f"{path}.") for path in decided
        )
    ]
    found = {"dp_config": _flow(_departures(job.layout.dp_config))}
    for name, value in job.layout.parallel_configs.items():
        if name != "dp_config" and value is not None:
            found[name] = _flow(_departures(getattr(job.layout, name)))
        elif name != "dp_config" and getattr(module, name) is not None:
            found[name] = "null"
    found["rank_microbatch_size"] = str(job.rows * job.sequence_length)
    ac = job.ac_config
    found["ac_config"] = "null" if ac is None else _flow(_departures(ac))
    return [*kept, *(f"--train_module.{name}={value}" for name, value in found.items())]


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


def command(loaded: LoadedExperiment, plan: Plan, target: Target) -> str:
    """The command that starts it, on each of its machines."""
    world = plan.job.layout.world_size
    here = max(n for n in range(1, target.machine + 1) if world % n == 0)
    machines = world // here
    start = f"toolkit train {shlex.quote(loaded.source)}"
    if world > 1:
        start += f" --processes {here}"
    if machines > 1:
        start += f" --nodes {machines} --head HOST --node-rank R"
    return " \\\n    ".join([start, *map(shlex.quote, flags(loaded, plan))])
