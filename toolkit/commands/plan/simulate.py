"""One rank of any number of ranks, run on a laptop: the real model and engine without any storage.

Tensors are fake (they have shapes and no values), and so is the process group: a collective returns
at once. What is counted is what the code really asks for. Done without torch.compile, and for a few
microbatches, for which the arithmetic is repeated.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import InferenceMode

from toolkit.commands.plan.communication import traffic_of
from toolkit.commands.plan.counting import Counter
from toolkit.commands.plan.job import Job, type_of
from toolkit.commands.plan.memory import memory_of
from toolkit.commands.plan.pieces import states
from toolkit.commands.plan.plans import Plan
from toolkit.commands.plan.report import gib, size
from toolkit.distributed import expert_parallel, fully_sharded
from toolkit.distributed.engine import Engine, Microbatch
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.materialize import materialize
from toolkit.distributed.pipeline import plan_pipeline
from toolkit.distributed.pipeline_engine import PipelineEngine
from toolkit.distributed.shards import local_tensor
from toolkit.distributed.stages import Stages
from toolkit.distributed.torch_engine import TorchEngine
from toolkit.errors import ConfigError
from toolkit.models import rope, shapes
from toolkit.models.lora import choose_trained
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.wording import labelled

FEW = 2
"""Microbatches of a step that are simulated, where no pipeline needs more."""


class Row(NamedTuple):
    """Something that was counted, beside what the arithmetic says."""

    what: str
    counted: int
    planned: float


class Simulated(NamedTuple):
    """What a fake rank did."""

    rank: int
    passes: int
    rows: list[Row]
    seconds: float

    def __str__(self) -> str:
        head = f"{'':32}{'counted':>14}{'arithmetic':>14}"
        lines = [head]
        for row in self.rows:
            shown = _memory if row.what in _MEMORY else size
            lines.append(f"{row.what:<32}{shown(row.counted):>14}{shown(row.planned):>14}")
        title = (
            f"simulated rank {self.rank}, {self.passes} microbatches, without torch.compile, in "
            f"{self.seconds:.0f} s"
        )
        return "\n".join([title, *labelled([("", lines)])])

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "rows": [row._asdict() for row in self.rows]}


_MEMORY = ("weights", "optimizer state", "peak")


def _memory(number: float) -> str:
    return gib(number).strip()


def simulate(plan: Plan, module: TransformerTrainModuleConfig) -> Simulated:
    """Run the rank of `plan` that needs most memory through one step. Its engine is not DDP
    or DeepSpeed, which do not run without storage."""
    layout = plan.job.layout
    if module.optim.traits().takes_whole_matrices:
        raise ConfigError(
            f"--simulate: ranks tell one another what they hold of the matrices of "
            f"{type_of(module.optim)}, and one fake rank has nobody to ask; leave it out"
        )
    if dist.is_initialized():
        raise ConfigError("--simulate: this process already belongs to a group of ranks")
    begin = time.monotonic()
    passes = min(plan.job.passes, max(FEW, layout.pp))
    job = msgspec.structs.replace(plan.job, passes=passes, is_compiled=False)
    rank = plan.stage.place * (layout.world_size // layout.pp)
    with _fake_ranks(rank, layout.world_size), _as_on_a_gpu(job):
        environment = TrainingEnvironment(
            rank=rank,
            local_rank=0,
            device=torch.device("cpu"),
            layout=msgspec.structs.replace(layout, precision=job.precision),
            seed=0,
        )
        names = _open_groups(environment)  # of real ranks, so not inside
        with FakeTensorMode(allow_non_fake_inputs=True):
            counter, weights, optimizer = _step(job, environment, module)
    kept, memory = states(job, plan.stage, rank), memory_of(job, plan.stage, rank)
    rows = [
        Row("weights", weights, kept.weights),
        Row("optimizer state", optimizer, kept.optimizer),
        Row("peak", counter.peak, memory.allocated),
    ]
    planned: dict[tuple[str, str], float] = {}
    key: tuple[str, str]
    for traffic in traffic_of(job, plan.stage):
        key = traffic.kind, traffic.axis
        planned[key] = planned.get(key, 0.0) + traffic.total
    found: dict[tuple[str, str], int] = {}
    for exchange in counter.exchanges:
        key = exchange.kind, names.get(exchange.group, "all")
        found[key] = found.get(key, 0) + exchange.bytes
    rows += [
        Row(f"{kind}, {axis}", found.get((kind, axis), 0), planned.get((kind, axis), 0.0))
        for kind, axis in dict.fromkeys([*planned, *found])
        if (kind, axis) in planned
    ]
    return Simulated(rank, passes, rows, time.monotonic() - begin)


def _step(
    job: Job, environment: TrainingEnvironment, config: TransformerTrainModuleConfig
) -> tuple[Counter, int, int]:
    """Count one step; bytes of the weights and of the optimizer's state."""
    with unset_fake_temporarily():  # adapters are made on the meta device
        model: nn.Module = job.model.build(init_device="meta")
        choose_trained(model, freeze=config.freeze, lora=config.lora)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, device="cpu")
            setattr(module, key, nn.Parameter(empty, parameter.requires_grad))
    pipeline = job.layout.pp_config
    if pipeline is not None:
        place = job.layout.place(environment.rank)["pp"]
        model = Stages(model, plan_pipeline(job.model, pipeline), place)  # type: ignore[arg-type]
    model.to = lambda *_: model  # type: ignore[method-assign] # fake tensors cannot be moved
    optim = config.optim.of_model(job.model.d_model)
    counter = Counter()
    with counter:
        shards = materialize(model, environment, ac_config=config.ac_config)
        kind: Any = _Engine if pipeline is None else PipelineEngine
        engine: Engine = kind(environment, model, shards, optim.build)
        shape = job.rows, job.sequence_length
        ids = torch.zeros(shape, dtype=torch.int64)
        microbatches = [Microbatch(ids, ids) for _ in range(job.passes)]
        counter.see(*model.parameters())
        counter.restart()
        multiplier = config.z_loss_multiplier or 0.0
        engine.forward_backward(microbatches, 1.0, z_loss_multiplier=multiplier)
        engine.step(config.max_grad_norm)
    weights = _bytes([local_tensor(p.detach()) for p in model.parameters()])
    state = engine.optimizer.state.values()
    return counter, weights, _bytes([t for own in state for t in own.values()])


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Engine(TorchEngine):
    """Without Accelerate, which adds nothing to a model that FSDP2 holds."""

    def _prepare(self) -> nn.Module:
        return self.module


@contextlib.contextmanager
def _fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _as_on_a_gpu(job: Job) -> Iterator[None]:
    """Fake tensors are on a CPU, where some things are done otherwise; and they have no values, so
    tokens spread evenly over experts."""
    chunk, numbers = shapes.CPU_CHUNK_BYTES, expert_parallel.numbers_of_rows
    memory = fully_sharded.device_memory
    schedule: Any = schedules._PipelineSchedule
    vote = schedule._warmup_p2p

    def even(ours: torch.Tensor, theirs: torch.Tensor) -> list[list[int]]:
        assert job.model.moe is not None
        ranks, rows = ours.shape[0], job.chunk_tokens * job.model.moe.top_k
        each = [rows // ranks + (n < rows % ranks) for n in range(ranks)]
        return [each, each]

    def agree(_: Any, stages: list[Any], *others: Any) -> None:
        for stage in stages:  # whose shapes are told: no vote of ranks is needed
            stage._inference_mode = InferenceMode.STATIC

    shapes.CPU_CHUNK_BYTES = shapes.CHUNK_BYTES
    schedule._warmup_p2p = agree
    expert_parallel.numbers_of_rows = even
    fully_sharded.device_memory = lambda device: job.device.memory
    rope.rotary_table.cache_clear()  # it would keep fake tensors
    try:
        yield
    finally:
        shapes.CPU_CHUNK_BYTES, expert_parallel.numbers_of_rows = chunk, numbers
        fully_sharded.device_memory = memory
        schedule._warmup_p2p = vote
        rope.rotary_table.cache_clear()


def _open_groups(environment: TrainingEnvironment) -> dict[str, str]:
    """Name of a process group -> the axis that `toolkit plan` calls it by; all of them opened."""
    names: dict[str, str] = {}
    for group in (environment.weight_group, environment.group("dp_replicate")):
        if group is not None:
            names[group.group_name] = "all"
    fsdp = environment.fsdp_mesh
    for index, axis in enumerate(fsdp.mesh_dim_names or ()):
        names[fsdp.get_group(index).group_name] = "dp" if "shard" in axis else axis
    if environment.layout.ep > 1:
        for axis in ("efsdp", "ep"):
            names[environment.expert_mesh.get_group(axis).group_name] = axis
    for axis in ("tp", "cp", "pp"):
        if (group := environment.group(axis)) is not None:
            names[group.group_name] = axis
    return names
