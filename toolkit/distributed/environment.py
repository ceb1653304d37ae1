"""Step 0 of a run: seed, devices, process groups, logging.

Everything that can fail because of bad input happens before this: once process groups exist, one
rank's error is every rank's time-out.
"""

import dataclasses
import datetime
import functools
import math
import os
import random
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from toolkit.autotune.choices import Choices
from toolkit.autotune.choose import Answer
from toolkit.autotune.question import Aspect, can_compile
from toolkit.distributed.choosing import answer_of
from toolkit.distributed.config import LogRanks
from toolkit.distributed.devices import device_name, pick_device, use_device
from toolkit.distributed.launcher import offloads, rank_of, world_size_of
from toolkit.distributed.layout import Layout, layout_of, resolve_layout
from toolkit.distributed.logging import is_set_up, setup_logging
from toolkit.distributed.precision import Precision
from toolkit.distributed.process_groups import (
    COLLECTIVE_TIMEOUT,
    close_process_groups,
    open_process_groups,
)
from toolkit.distributed.ranks import adopt_ranks
from toolkit.distributed.tuning import keep_compiled_code, set_defaults, tune_cpu
from toolkit.errors import ConfigError, RunError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingEnvironment:
    """Where this process stands: rank, device, layout, and process groups by purpose."""

    rank: int
    local_rank: int
    device: torch.device
    layout: Layout
    seed: int
    cpu_group: dist.ProcessGroup | None = None
    """gloo group of all ranks for the main thread; None on one process."""
    metrics_group: dist.ProcessGroup | None = None
    """gloo group of all ranks for the metrics thread, so that the two never interleave."""
    checkpoint_group: dist.ProcessGroup | None = None
    """gloo group of all ranks for the thread that writes checkpoints."""
    timeout: datetime.timedelta = COLLECTIVE_TIMEOUT
    """Of every collective."""
    shared_filesystem: bool | None = None
    """Whether all machines see the same files; None: not known."""
    choices: Choices = dataclasses.field(default_factory=Choices)
    """What `auto` became on all ranks."""

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def owns_loss(self) -> bool:
        """Whether the sums over targets that this rank reports count."""
        return self.layout.owns_loss(self.rank)

    @property
    def loss_group(self) -> dist.ProcessGroup | None:
        """The ranks whose rows make up the global batch: counts of targets add up over them."""
        return self.group("dp_replicate", "dp_shard")

    @property
    def weight_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold one replica of the model between them: norms add up over them. None
        where this rank holds all of it."""
        is_cut = self.layout.is_fsdp or self.layout.zero_stage > 0
        return self.group("pp", "dp_shard", "cp", "tp") if is_cut else None

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks by the axes of `Layout`, without those of degree 1 (`dp_shard` stays)."""
        sizes = self.layout.shape.items()
        return self._mesh_of({a: size for a, size in sizes if size > 1 or a == "dp_shard"})

    @functools.cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """What FSDP2 takes: the ranks that share the weights (dp_shard x cp), and before them those
        that replicate them."""
        mesh, shard, layout = self.mesh, "dp_shard", self.layout
        if layout.cp > 1:
            shard = "dp_shard_cp"
            shape = layout.shape | {shard: layout.dp_shard * layout.cp}
            sizes = {axis: shape[axis] for axis in ("pp", "dp_replicate", shard, "tp")}
            mesh = self._mesh_of({a: n for a, n in sizes.items() if n > 1})
        axes = ("dp_replicate", shard) if layout.dp_replicate > 1 else (shard,)
        return mesh if axes == mesh.mesh_dim_names else mesh[axes]

    @functools.cached_property
    def expert_mesh(self) -> DeviceMesh:
        """All ranks by the axes that experts see, `Layout.expert_shape`."""
        return self._mesh_of(self.layout.expert_shape)

    def _mesh_of(self, sizes: Mapping[str, int]) -> DeviceMesh:
        return init_device_mesh(
            self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
        )

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axes` alone; None where it has no others. All
        ranks ask for the same groups in the same order."""
        if axes not in self._groups:
            self._groups[axes] = self._open_group(axes)
        return self._groups[axes]

    @functools.cached_property
    def _groups(self) -> dict[tuple[str, ...], dist.ProcessGroup | None]:
        return {}

    def _open_group(self, axes: tuple[str, ...]) -> dist.ProcessGroup | None:
        sizes = {axis: self.layout.shape[axis] for axis in axes}
        several = tuple(axis for axis, size in sizes.items() if size > 1)
        if not several:
            return None
        if math.prod(sizes.values()) == self.world_size:
            return dist.group.WORLD
        if len(several) == 1:
            return self.mesh.get_group(several[0])
        return self.mesh[several]._flatten().get_group()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every rank."""
        if self.cpu_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, on every rank."""
        values = [value] * self.world_size
        if self.cpu_group is not None:
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def wait_for_main(self, seconds: float) -> None:
        """Until all ranks are here, for at most so long. Raises RuntimeError: they are not."""
        if self.cpu_group is not None:
            wait = datetime.timedelta(seconds=seconds)
            dist.monitored_barrier(group=self.cpu_group, timeout=wait)

    def barrier(self) -> None:
        if self.cpu_group is not None:
            dist.barrier(group=self.cpu_group)

    def reduce_columns(
        self, columns: Sequence[tuple[str, str]], values: torch.Tensor
    ) -> torch.Tensor:
        """Metrics of all ranks as one: a collective per operation, in the metrics thread on a group
        of its own. A rank that does not own the loss adds 0 to sums. `columns` are name and
        reduction of each value; `values` are float64 on the CPU, and so is the answer."""
        for operation in ("sum", "mean", "max"):
            index = [i for i, (_, wanted) in enumerate(columns) if wanted == operation]
            if not index:
                continue
            part = values[index]
            if operation == "sum" and not self.owns_loss:
                part.zero_()
            how = dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM
            dist.all_reduce(part, op=how, group=self.metrics_group)
            values[index] = part / self.world_size if operation == "mean" else part
        return values

    def close(self, *, after_error: bool = False) -> None:
        """Leave the process groups. `after_error`: other ranks may wait in a collective that this
        one will not join, and NCCL's would hold this process too; it ends with them open."""
        close_process_groups(leave_open=after_error and self.device.type == "cuda")


def single_environment(
    *, seed: int = 0, device: str | None = None, precision: Precision = "auto"
) -> TrainingEnvironment:
    """An environment for one process without a launcher: notebooks, tests, tools. Raises
    ConfigError: a launcher started several processes; each would train alone."""
    if world_size_of(os.environ) > 1:
        raise ConfigError(
            f"{world_size_of(os.environ)} processes were launched, and each would train by itself; "
            "give the environment from prepare_training_environment"
        )
    where = torch.device(device) if device else pick_device(local_rank=0)
    use_device(where)
    keep_compiled_code()
    layout = settle_precision(resolve_layout(precision, None, {}), where)
    return TrainingEnvironment(rank=0, local_rank=0, device=where, layout=layout, seed=seed)


def prepare_training_environment(
    config: Any,
    *,
    environ: Mapping[str, str] | None = None,
    backend: str | None = None,
    timeout: datetime.timedelta | None = None,
    log_filter_type: LogRanks | None = None,
    shared_filesystem: bool | None = None,
    run_dir: Path | None = None,
    anew: frozenset[Aspect] = frozenset(),
) -> TrainingEnvironment:
    """Seed, pick the device, resolve the layout, open the process groups, and choose what the
    config leaves to `auto` (docs/performance.md).

    Args:
        config: an `ExperimentConfig`; `seed`, `train_module` and `trainer` are read.
        environ: variables of the launcher; default: this process's.
        backend: of collectives, as torch.distributed spells it; default: `cpu:gloo,cuda:nccl` on
            GPUs, `gloo` elsewhere.
        timeout: of every collective; default: `config.trainer.collective_timeout`.
        log_filter_type: set up the toolkit's logging, with these ranks on the console; default:
            `config.trainer.log_ranks`, and nothing where a script has set up `logging` itself.
        shared_filesystem: whether all machines see the same files; default: looked at when a run
            folder is opened.
        run_dir: of rank 0, a run that is started or goes on: what it has chosen before stays, but
            for what is chosen `anew`; default: the one that `config.run` names.

    Raises ConfigError where launcher and config disagree about the engine, or there are more
    processes than accelerators.
    """
    set_defaults()
    keep_compiled_code()
    if environ is None:
        adopt_ranks(os.environ)
        environ = os.environ
    layout = layout_of(config.train_module, environ)
    rank, world_size = rank_of(environ), world_size_of(environ)
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    if log_filter_type is not None or not is_set_up():
        log_ranks = log_filter_type or config.trainer.log_ranks
        setup_logging(rank, local_rank=local_rank, log_ranks=log_ranks)
    # Not every launcher says how many processes share this machine.
    said = environ.get("LOCAL_WORLD_SIZE")
    device = pick_device(local_rank, int(said) if said else None)
    if device.type == "mps" and layout.name not in ("single", "ddp"):
        raise ConfigError(
            f"train_module.dp_config: {layout.name} does not train on Apple's GPU; take single, or "
            "train on the CPU with ACCELERATE_USE_CPU=true"
        )
    _seed_everything(config.seed)
    if config.trainer.deterministic:
        _use_deterministic_algorithms()
    local_size = int(said) if said else world_size
    if device.type == "cpu" or offloads(layout.dp_config):
        asked = getattr(config.trainer, "num_threads", None)
        tune_cpu(local_world_size=local_size, threads=asked)
    if device.type == "cuda":
        # By it Accelerate and DeepSpeed choose a device. A process that sees its own GPU alone has
        # device 0 whatever its number.
        os.environ["LOCAL_RANK"] = str(device.index)
    timeout = timeout or datetime.timedelta(seconds=config.trainer.collective_timeout)
    groups = {}
    if world_size > 1 or layout.name not in ("single", "ddp"):
        open_process_groups(device, world_size, backend=backend, timeout=timeout)
    if world_size > 1:
        groups = {
            name: dist.new_group(backend="gloo", timeout=timeout)
            for name in ("cpu_group", "metrics_group", "checkpoint_group")
        }
    environment = TrainingEnvironment(
        rank=rank,
        local_rank=local_rank,
        device=device,
        layout=layout,
        seed=config.seed,
        timeout=timeout,
        shared_filesystem=shared_filesystem,
        **groups,
    )
    return _with_choices(environment, config, local_size, run_dir, anew)


def _with_choices(
    environment: TrainingEnvironment,
    config: Any,
    local_world_size: int,
    run_dir: Path | None,
    anew: frozenset[Aspect],
) -> TrainingEnvironment:
    """`environment` with what rank 0 has chosen, in use on this rank."""
    device, layout, answer = environment.device, environment.layout, Answer(Choices())
    if environment.is_main and getattr(config, "model", None) is not None:
        answer = answer_of(
            config,
            layout,
            device,
            fixed=settle_precision(layout, device).precision,
            name=device_name(device),
            local_world_size=local_world_size,
            run_dir=run_dir,
            anew=anew,
        )
    answer, precision = environment.broadcast((answer, _settled(layout, device)))
    choices, notices = _compiling_where_all_can(environment, answer)
    if layout.precision == "auto" and choices.precision is not None:
        precision = choices.precision
    notices = (*layout.notices, *notices)
    layout = msgspec.structs.replace(layout, precision=precision, notices=notices)
    if choices.threads is not None:  # at most this rank's own share of its machine
        torch.set_num_threads(min(choices.threads, torch.get_num_threads()))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = layout.precision != "fp32"
    return dataclasses.replace(environment, layout=layout, choices=choices)


def _compiling_where_all_can(environment: TrainingEnvironment, answer: Answer) -> Answer:
    """`answer`, uncompiled where a rank has no compiler: other machines may be other ones, as those
    of a recorded choice."""
    if not answer.choices.compile_model:
        return answer
    found = environment.gather((socket.gethostname(), can_compile()))
    if not (without := sorted({host for host, can in found if not can})):
        return answer
    notice = f"not compiled: no C++ compiler or no Python.h on {', '.join(without)}"
    choices = msgspec.structs.replace(answer.choices, compile_model=False)
    return Answer(choices, (*answer.notices, notice))


def is_fast_at_bf16(device: torch.device) -> bool:
    """Whether `auto` precision is bf16 where nothing is measured: CUDA >= 8.0. On CPUs flags do not
    tell: AVX512-BF16 is twice as fast as fp32 on some, and half as fast on others (docs/LOG.md)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def settle_precision(layout: Layout, device: torch.device) -> Layout:
    """`layout` with `auto` replaced by what it is where nothing is measured."""
    return msgspec.structs.replace(layout, precision=_settled(layout, device))


def _settled(layout: Layout, device: torch.device) -> Precision:
    if layout.precision != "auto":
        return layout.precision
    return "bf16" if is_fast_at_bf16(device) else "fp32"


def check_shared_folder(environment: TrainingEnvironment, folder: Path) -> None:
    """Every rank must see the run folder that rank 0 made. Raises RunError: on every rank, naming
    the hosts that do not see it."""
    if environment.cpu_group is None or environment.shared_filesystem:
        return
    probe = folder / f".shared-{environment.broadcast(uuid.uuid4().hex)}"
    if environment.is_main:
        probe.touch()
    environment.barrier()
    node, host = os.environ.get("GROUP_RANK"), socket.gethostname()  # not each launcher counts them
    seen = environment.gather((f"node {node} ({host})" if node else host, probe.exists()))
    if environment.is_main:
        probe.unlink()  # every rank has looked: its answer is here
    environment.barrier()
    blind = sorted({machine for machine, sees in seen if not sees})
    if blind:
        raise RunError(
            f"{folder}: not visible on {', '.join(blind)}; a run on several machines needs a "
            "shared file system: give --save-folder on one (of a run at a URL, --work-dir)"
        )


def _use_deterministic_algorithms() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written: filling it would cost a pass over every new
    # tensor.
    memory: Any = torch.utils.deterministic
    memory.fill_uninitialized_memory = False
    # Its backward adds up in any order. Flash attention and the memory-efficient kernel, which fp32
    # needs, have a fixed one in this mode.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
