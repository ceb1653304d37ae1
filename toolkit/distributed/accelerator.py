"""The one place that builds an `Accelerator`, for every engine on GPU and on CPU.

Accelerate's own environment handling refuses or mishandles FSDP2, HSDP and DeepSpeed on CPU, so the
launcher's variables (already read by `resolve_layout`) are taken out of its sight and the state is
set by hand; the same path serves GPUs. A scheduler is never prepared: Accelerate would advance it
once per process.
"""

import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.launcher import DEEPSPEED_FIXED

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

_OTHERS_VARIABLES = (
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"),
    *("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "PMI_", "MPI_LOCAL"),
)
"""How the variables begin from which Accelerate and DeepSpeed would guess what we know. What
`mpirun` says has torchrun's names by now; a part of it, left in a shell, is no launch."""


def build_accelerator(
    environment: TrainingEnvironment, *, max_grad_norm: float | None = None
) -> "Accelerator":
    """The accelerator for the layout; `max_grad_norm` is for DeepSpeed, which clips by itself."""
    quiet_third_parties(environment)
    layout = environment.layout
    with without_launcher_variables():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # One process may build several trainers (tests, notebooks); Accelerate's state is a
        # process-wide singleton that would keep the first engine for all of them.
        AcceleratorState._reset_state(True)
        if layout.zero_stage:
            return _deepspeed_accelerator(environment, max_grad_norm)
        on_cpu = environment.device.type == "cpu"
        accelerator = Accelerator(
            cpu=on_cpu, mixed_precision="no", step_scheduler_with_optimizer=False
        )
    if layout.is_fsdp:
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        # The model arrives sharded already (`materialize`): meta parameters would be mapped wrongly
        # by Accelerate's own preparation, so the plugin only tells it what it has in hands.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=bool(layout.dp_config.reshard_after_forward),
            cpu_ram_efficient_loading=False,
        )
    return accelerator


def ddp_options() -> "DistributedDataParallelKwargs":
    """What DDP is told: every option that numbers depend on, whatever torch's defaults are."""
    from accelerate.utils import DistributedDataParallelKwargs

    options: dict[str, Any] = {
        "dim": 0,
        "bucket_cap_mb": 25,
        "find_unused_parameters": False,
        "gradient_as_bucket_view": True,
        "static_graph": False,
        "mixed_precision": None,
        "init_sync": True,
        # Biases of routers, the only buffers that change, do so alike on every rank.
        "forward_sync_buffers": False,
        "skip_all_reduce_unused_params": False,
    }
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    if "forward_sync_buffers" not in known:  # its name before torch 2.13
        options["broadcast_buffers"] = options["forward_sync_buffers"]
    own = {name: value for name, value in options.items() if name in known}

    class Options(DistributedDataParallelKwargs):
        def to_kwargs(self) -> dict[str, Any]:
            return own  # Accelerate's leaves out what is at Accelerate's defaults

    return Options()


def deepspeed_settings(environment: TrainingEnvironment, max_grad_norm: float | None) -> dict:
    """The DeepSpeed JSON: the user's, between our defaults and the values that we own.

    Loss scaling, accumulation and batch sizes are ours (SEMANTICS 1, 2); bf16 is autocast over
    fp32 weights, not DeepSpeed's bf16 mode, which would make the weights bf16. Whatever numbers
    depend on is said here: DeepSpeed changes its defaults (it clips at 1.0 since 0.19.3).
    """
    layout = environment.layout
    asked = _without_auto(layout.dp_config.deepspeed_config)
    zero = _ZERO_DEFAULTS | asked.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "cpu":
            # Copies between pageable memory and a GPU are slow and cannot run beside anything.
            pinned = {"pin_memory": environment.device.type == "cuda"}
            zero[part] = pinned | zero[part]
    # The norm is logged, and a step whose norm is not finite is skipped.
    zero |= {"stage": layout.zero_stage, "compute_grad_norm": True}
    return {
        "communication_data_type": "fp32",
        **asked,
        **{key: value for key, (value, _) in DEEPSPEED_FIXED.items()},
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": environment.world_size,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {
            "enabled": layout.precision == "bf16",
            "dtype": "bfloat16",
            # Gather and reduce in fp32, like the other engines: autocast lowers compute only.
            "lower_precision_safe_modules": [],
        },
    }


_ZERO_DEFAULTS: dict[str, Any] = {
    "contiguous_gradients": True,
    "overlap_comm": True,
    "reduce_scatter": True,
    "allgather_partitions": True,
    "use_multi_rank_bucket_allreduce": True,
    "round_robin_gradients": False,
    "ignore_unused_parameters": True,
    "memory_efficient_linear": True,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}
"""Ours, which the user's JSON may change."""


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` without what Accelerate's users leave to it."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def quiet_third_parties(environment: TrainingEnvironment) -> None:
    """Silence chatter that says nothing about the user's run; before Accelerate is imported."""
    # Accelerate imports DeepSpeed whenever it is installed; told its device it neither guesses nor
    # warns, and a CPU run on a machine with GPUs leaves them alone.
    os.environ.setdefault("DS_ACCELERATOR", environment.device.type)
    for name in ("DeepSpeed", "deepspeed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|accelerate|deepspeed")


def _deepspeed_accelerator(
    environment: TrainingEnvironment, max_grad_norm: float | None
) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin

    # PartialState first: otherwise DeepSpeed sees a world of one on CPU machines.
    PartialState(cpu=environment.device.type == "cpu")
    init_deepspeed(environment)
    plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_settings(environment, max_grad_norm))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    return Accelerator(
        deepspeed_plugin=plugin, mixed_precision="no", step_scheduler_with_optimizer=False
    )


def init_deepspeed(environment: TrainingEnvironment) -> None:
    """Let DeepSpeed adopt the process groups that exist."""
    quiet_third_parties(environment)
    import deepspeed

    # A shared-memory op for inference that DeepSpeed would compile with g++ at its first start.
    backend_module: Any = importlib.import_module("deepspeed.comm.torch")
    backend_module.build_shm_op = lambda: None
    os.environ.setdefault("LOCAL_RANK", str(environment.local_rank))
    backend = "gloo" if environment.device.type == "cpu" else "nccl"
    deepspeed.init_distributed(
        backend, auto_mpi_discovery=False, verbose=False, timeout=environment.timeout
    )


@contextmanager
def without_launcher_variables() -> Iterator[None]:
    """Keep launchers' variables, and what is left of them in a shell, from the libraries."""
    # LOCAL_RANK without a process group is one process; Accelerate would open a group for it.
    alone = () if dist.is_initialized() else ("LOCAL_RANK",)
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_OTHERS_VARIABLES) or name in alone
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        os.environ.update(hidden)
