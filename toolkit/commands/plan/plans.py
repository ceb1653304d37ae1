"""A plan: what one layout needs and how long it takes, put together from a config."""

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from toolkit.commands.plan.communication import Traffic, traffic_of
from toolkit.commands.plan.devices import CPU, Device
from toolkit.commands.plan.job import Job, ModelParts, Stage, state_tensors_of, type_of
from toolkit.commands.plan.memory import Memory, fullest
from toolkit.commands.plan.step_time import StepTime, model_flops, step_time
from toolkit.data.corpus_info import planned_batches
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.distributed.layout import Layout
from toolkit.experiment.checks import (
    check_parameters,
    gradient_accumulation_steps,
    rank_microbatch_size,
)
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.objectives import teacher_parameters
from toolkit.models.parameters import quantised_layers

DAY = 86_400.0


class Target(NamedTuple):
    """The machines that are planned for."""

    device: Device
    machine: int
    """Devices of one machine."""
    price: float | None = None
    """Of one device for an hour."""


class Plan(NamedTuple):
    """One layout, judged."""

    job: Job
    stage: Stage
    """The stage that needs most memory."""
    memory: Memory
    time: StepTime
    traffic: list[Traffic]
    """Of that stage."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.job.device.memory


class Length(NamedTuple):
    """The run from here to its end."""

    steps: int
    tokens: int
    days: float
    cost_per_day: float | None
    cost: float | None


def at_largest_batch(config: ExperimentConfig) -> ExperimentConfig:
    """`config` without its schedule of batch sizes, at the largest of them."""
    loader = config.data_loader
    largest = max(size for _, size in loader.batch_sizes)
    loader = loader.replace(global_batch_size=largest, batch_size_schedule=())
    return config.replace(data_loader=loader)


def job_of(config: ExperimentConfig, layout: Layout, target: Target) -> Job:
    """A step of `config` on `layout`, the largest where batches grow. Raises ConfigError: patterns
    of `freeze` or `lora` match no parameter."""
    config = at_largest_batch(config)
    module, ranks = config.train_module, layout.batch_ranks
    precision: str = layout.precision
    if precision == "auto":
        precision = "fp32" if target.device.name == CPU else "bf16"
    length, model = config.dataset.sequence_length, config.model.to_transformer()
    quantised = quantised_layers(model, module.lora)
    has_dropout = module.lora is not None and module.lora.dropout > 0
    return Job(
        model=model,
        parts=ModelParts(
            model,
            check_parameters(config),
            length,
            module.optim,
            quantised,
            has_dropout=has_dropout,
        ),
        layout=layout,
        sequence_length=length,
        rows=max(1, rank_microbatch_size(config, ranks) // length),
        passes=max(1, gradient_accumulation_steps(config, ranks)),
        precision=precision,
        ac_config=module.ac_config,
        is_compiled=module.compile_model is True,
        activation_offload=module.activation_offload,
        state_tensors=state_tensors_of(module.optim),
        device=target.device,
        machine=target.machine,
        optimizer=type_of(module.optim),
        teacher=teacher_parameters(config),
    )


def changed(
    job: Job,
    *,
    layout: Layout | None = None,
    rows: int | None = None,
    ac_config: ActivationCheckpointingConfig | None = None,
    keeps_ac: bool = True,
) -> Job:
    """`job` on another layout or with other microbatches of the same global batch."""
    new_layout = layout or job.layout
    new_rows = rows or job.rows
    share = job.batch_tokens // (job.sequence_length * new_layout.batch_ranks)
    return msgspec.structs.replace(
        job,
        layout=new_layout,
        known=job.known if new_layout is job.layout else {},
        rows=new_rows,
        passes=max(1, share // new_rows),
        ac_config=job.ac_config if keeps_ac else ac_config,
    )


def plan_of(job: Job, time: StepTime | None = None) -> Plan:
    """`time`: of its step, if somebody has asked already."""
    stage, memory = fullest(job)
    return Plan(job, stage, memory, time or step_time(job), traffic_of(job, stage))


def largest_rows(job: Job) -> int | None:
    """The most rows of a microbatch that fit and divide the rank's share of the global batch; None
    where not one row fits."""
    share = job.rows * job.passes
    best = None
    for rows in divisors(share):
        other = changed(job, rows=rows)
        if fullest(other)[1].total > job.device.memory:
            break
        best = rows
    return best


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def length_of(config: ExperimentConfig, plan: Plan, target: Target) -> Length | None:
    """None where the run's length is told in epochs of data that is not there."""
    duration, batches = config.trainer.max_duration, planned_batches(config.data, None)
    try:
        steps = batches.steps_of(duration.value, duration.unit)
    except ValueError:
        return None
    tokens = batches.tokens_done(steps)
    days = tokens / plan.job.batch_tokens * plan.time.total / DAY
    ranks = plan.job.layout.world_size
    per_day = None if target.price is None else target.price * 24 * ranks
    cost = None if per_day is None else per_day * days
    return Length(steps, tokens, days, per_day, cost)


def as_json(config: ExperimentConfig, plan: Plan, target: Target) -> Mapping[str, object]:
    """Everything that is shown, as plain data: bytes, seconds, FLOPs."""
    job, memory, length = plan.job, plan.memory, length_of(config, plan, target)
    layout = job.layout
    return {
        "device": job.device.name,
        "world_size": layout.world_size,
        "layout": {**layout.shape, "ep": layout.ep, "engine": layout.name},
        **layout.parallel_configs,
        "rank_microbatch_size": job.rows * job.sequence_length,
        "gradient_accumulation": job.passes,
        "fits": plan.fits,
        "largest_rank_microbatch_size": (largest_rows(job) or 0) * job.sequence_length,
        "memory": {**memory._asdict(), "total": memory.total, "device": job.device.memory},
        "communication": [
            {**traffic._asdict(), "total": traffic.total} for traffic in plan.traffic
        ],
        "flops_per_step": model_flops(job),
        "seconds": {**plan.time._asdict(), "total": plan.time.total},
        "tokens_per_second": job.batch_tokens / plan.time.total,
        "length": None if length is None else length._asdict(),
    }
