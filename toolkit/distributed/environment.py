"""Step 0 of a run: seed, devices, process groups, logging.

Everything that can fail because of bad input happens before this: once process groups exist, one
rank's error is every rank's time-out.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import random
import socket
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.devices import pick_device, use_device
from toolkit.distributed.launcher import rank_of, world_size_of
from toolkit.distributed.layout import Layout, Precision, offloads, resolve_layout
from toolkit.distributed.ranks import adopt_ranks, is_one_machine, loopback_interface
from toolkit.distributed.rendezvous import open_store
from toolkit.distributed.tuning import set_allocator_defaults, tune_cpu
from toolkit.errors import ConfigError, RunError

log = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


class _TrainModuleSettings(Protocol):
    @property
    def precision(self) -> Precision: ...

    @property
    def dp_config(self) -> DataParallelConfig | None: ...


class _TrainerSettings(Protocol):
    @property
    def deterministic(self) -> bool: ...


class EnvironmentSettings(Protocol):
    """The part of an `ExperimentConfig` this module reads."""

    @property
    def seed(self) -> int: ...

    @property
    def train_module(self) -> _TrainModuleSettings: ...

    @property
    def trainer(self) -> _TrainerSettings: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingEnvironment:
    """Where this process stands: rank, device, layout, and a CPU group for small messages."""

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

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable `value` on every rank."""
        if self.cpu_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks (CPU group)."""
        if self.cpu_group is not None:
            dist.barrier(group=self.cpu_group)

    def close(self, *, after_error: bool = False) -> None:
        """Leave the process groups; errors of ranks that are already gone do not matter.

        `after_error`: other ranks may wait in a collective that this one will not join, and NCCL's
        would hold this process too; it ends with them open.
        """
        _keep_backends()
        if dist.is_initialized() and not (after_error and self.device.type == "cuda"):
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group()
        _forget_deepspeed_groups()


def single_environment(
    *, seed: int = 0, device: str | None = None, precision: Precision = "auto"
) -> TrainingEnvironment:
    """An environment for one process without a launcher: notebooks, tests, tools.

    Raises:
        ConfigError: a launcher started several processes; each would train alone.
    """
    if world_size_of(os.environ) > 1:
        raise ConfigError(
            f"{world_size_of(os.environ)} processes were launched, and each would train by itself; "
            "give the environment from prepare_training_environment"
        )
    where = torch.device(device) if device else pick_device(local_rank=0)
    use_device(where)
    layout = settle_precision(resolve_layout(precision, None, {}), where)
    return TrainingEnvironment(rank=0, local_rank=0, device=where, layout=layout, seed=seed)


def prepare_training_environment(
    config: EnvironmentSettings, *, environ: Mapping[str, str] | None = None
) -> TrainingEnvironment:
    """Seed, pick the device, resolve the engine and open the process groups.

    Collectives run on "cpu:gloo,cuda:nccl" on GPUs and on gloo elsewhere.

    Raises:
        ConfigError: when launcher and config disagree about the engine, or there are more
            processes than accelerators.
    """
    set_allocator_defaults()
    if environ is None:
        adopt_ranks(os.environ)
        environ = os.environ
    layout = resolve_layout(config.train_module.precision, config.train_module.dp_config, environ)
    rank, world_size = rank_of(environ), world_size_of(environ)
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    # Not every launcher says how many processes share this machine.
    said = environ.get("LOCAL_WORLD_SIZE")
    device = pick_device(local_rank, int(said) if said else None)
    if device.type == "cuda":
        # By it Accelerate and DeepSpeed choose a device. A process that sees its own GPU alone has
        # device 0 whatever its number.
        os.environ["LOCAL_RANK"] = str(device.index)
    _seed_everything(config.seed)
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that it has not written: filling it would cost a pass over every
        # new tensor.
        memory: Any = torch.utils.deterministic
        memory.fill_uninitialized_memory = False
        # Its backward adds up in any order. Flash attention and the memory-efficient kernel, which
        # fp32 needs, have a fixed one in this mode.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu" or offloads(layout.dp_config):
        tune_cpu(local_world_size=int(said) if said else world_size)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = layout.precision != "fp32"
    cpu_group = metrics_group = checkpoint_group = None
    if world_size > 1 or layout.name not in ("single", "ddp"):
        _init_process_group(device, world_size)
        if world_size > 1:
            cpu_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            metrics_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            checkpoint_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return TrainingEnvironment(
        rank=rank,
        local_rank=local_rank,
        device=device,
        layout=settle_precision(layout, device),
        seed=config.seed,
        cpu_group=cpu_group,
        metrics_group=metrics_group,
        checkpoint_group=checkpoint_group,
    )


def is_fast_at_bf16(device: torch.device) -> bool:
    """Whether `auto` precision means bf16: CUDA >= 8.0, CPUs with AMX.

    AVX512-BF16 alone does not count: measured, its bf16 products run at half the speed of fp32 ones
    (docs/LOG.md).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags


def settle_precision(layout: Layout, device: torch.device) -> Layout:
    """`layout` with `auto` replaced by what this device is fast at."""
    import msgspec

    if layout.precision != "auto":
        return layout
    return msgspec.structs.replace(layout, precision="bf16" if is_fast_at_bf16(device) else "fp32")


def check_shared_folder(environment: TrainingEnvironment, folder: Path) -> None:
    """Every rank must see the run folder that rank 0 made.

    Raises:
        RunError: on every rank, naming the hosts that do not see it.
    """
    if environment.cpu_group is None:
        return
    token = environment.broadcast(uuid.uuid4().hex)
    probe = folder / f".shared-{token}"
    if environment.is_main:
        probe.touch()
    environment.barrier()
    seen: list[Any] = [None] * environment.world_size
    dist.all_gather_object(
        seen, (socket.gethostname(), probe.exists()), group=environment.cpu_group
    )
    if environment.is_main:
        probe.unlink()  # every rank has looked: its answer is here
    environment.barrier()
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        raise RunError(
            f"{folder}: not visible on {', '.join(blind)}; a run on several machines needs a "
            "shared file system: give --save-folder on one"
        )


_closed_backends: list[Any] = []
"""Of environments that were closed, until the next one is opened; see `_keep_backends`."""


def _keep_backends() -> None:
    """Let gloo's backends outlive their process groups.

    Freed together with its group, a backend waits for its threads while this one holds Python's
    lock; a thread that just then drops the tensor of the last collective wants that lock, and both
    wait for ever (seen with torch 2.13). The backend's own handle frees it without the lock.
    """
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):
            _closed_backends.append(group._get_backend(torch.device("cpu")))


def _forget_deepspeed_groups() -> None:
    """DeepSpeed keeps handles on process groups in module globals; a later environment of this
    process must not get those that are gone."""
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if comm is not None:
        comm.cdb = None
    if groups is not None:
        groups._WORLD_GROUP = groups.mesh_device = None


def set_collective_timeouts() -> None:
    """Give all process groups of this process our time-out; torch and DeepSpeed make some (meshes,
    sub-groups) with their own, ten minutes for NCCL."""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)


def _init_process_group(device: torch.device, world_size: int) -> None:
    _closed_backends.clear()
    if dist.is_initialized():
        if dist.get_world_size() != world_size:
            raise ConfigError(
                f"a process group of {dist.get_world_size()} exists, the launcher started "
                f"{world_size}; close the environment that opened it"
            )
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if is_one_machine(os.environ):
        # Nobody on another machine needs to reach this one.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    extra: dict[str, Any] = {}
    if device.type == "cuda" and world_size > 1:
        # Alone there is nobody to connect to; torch would open a communicator for every group.
        extra["device_id"] = device
    if world_size == 1:
        # A private in-memory store: no port, so parallel runs on one machine cannot collide.
        extra |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    else:
        rank = rank_of(os.environ)
        store = open_store(rank, world_size, COLLECTIVE_TIMEOUT)
        extra |= {"store": store, "rank": rank, "world_size": world_size}
    dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT, **extra)


def _seed_everything(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
