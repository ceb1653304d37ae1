"""The one place that builds an `Accelerator`, for every engine on GPU and on CPU.

Accelerate's own environment handling refuses or mishandles FSDP2, HSDP and DeepSpeed on CPU, so the
launcher's variables (already read by `resolve_engine`) are taken out of its sight and the state is
set by hand; the same path serves GPUs. A scheduler is never prepared: Accelerate would advance it
once per process.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolkit.distributed.engine import Engine
from toolkit.distributed.environment import TrainingEnvironment

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

_LAUNCHER_PREFIXES = ("FSDP_", "PARALLELISM_CONFIG_", "ACCELERATE_DYNAMO_", "ACCELERATE_DEEPSPEED_")
_LAUNCHER_FLAGS = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_CONFIG_DS_FIELDS",
)


def build_accelerator(
    environment: TrainingEnvironment, *, max_grad_norm: float | None = None
) -> "Accelerator":
    """The accelerator for the environment's engine.

    `max_grad_norm` matters to DeepSpeed only, which clips inside its own step.
    """
    quiet_third_parties(environment)
    engine = environment.engine
    with _without_launcher_variables():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        # One process may build several trainers (tests, notebooks); Accelerate's state is a
        # process-wide singleton that would keep the first engine for all of them.
        AcceleratorState._reset_state(True)
        on_cpu = environment.device.type == "cpu"
        if engine.zero_stage:
            return _deepspeed_accelerator(environment, max_grad_norm)
        accelerator = Accelerator(
            cpu=on_cpu, mixed_precision="no", step_scheduler_with_optimizer=False
        )
    if engine.is_fsdp:
        _become_fsdp(accelerator, engine)
    return accelerator


def fsdp_mesh(environment: TrainingEnvironment) -> "DeviceMesh":
    """1-D mesh ("dp_shard") for FSDP, 2-D ("dp_replicate", "dp_shard") for HSDP."""
    from torch.distributed.device_mesh import init_device_mesh

    engine, kind = environment.engine, environment.device.type
    if engine.name == "hsdp":
        shape = (engine.num_replicas, engine.shard_degree)
        return init_device_mesh(kind, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
    return init_device_mesh(kind, (environment.world_size,), mesh_dim_names=("dp_shard",))


def deepspeed_settings(environment: TrainingEnvironment, max_grad_norm: float | None) -> dict:
    """The DeepSpeed JSON: the user's, under the values that we own.

    Loss scaling, accumulation and batch sizes are ours (SEMANTICS 1, 2); bf16 is autocast over
    fp32 weights, not DeepSpeed's bf16 mode, which would make the weights bf16.
    """
    engine = environment.engine
    settings = {
        k: v for k, v in engine.deepspeed_config.items() if k not in ("bf16", "fp16", "amp")
    }
    zero: dict[str, Any] = {**settings.get("zero_optimization", {}), "stage": engine.zero_stage}
    zero = {k: v for k, v in zero.items() if v != "auto"}
    settings |= {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": environment.world_size,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "torch_autocast": {
            "enabled": engine.precision == "bf16",
            "dtype": "bfloat16",
            # Gather and reduce in fp32, like the other engines: autocast lowers compute only.
            "lower_precision_safe_modules": [],
        },
    }
    return settings


def quiet_third_parties(environment: TrainingEnvironment) -> None:
    """Silence chatter that says nothing about the user's run; before Accelerate is imported."""
    # Accelerate imports DeepSpeed whenever it is installed; told its device it neither guesses nor
    # warns, and a CPU run on a machine with GPUs leaves them alone.
    os.environ.setdefault("DS_ACCELERATOR", environment.device.type)
    for name in ("DeepSpeed", "deepspeed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|accelerate|deepspeed")


def _become_fsdp(accelerator: "Accelerator", engine: Engine) -> None:
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    # The model arrives sharded already (`materialize`): meta parameters would be mapped wrongly by
    # Accelerate's own preparation, so the plugin only tells it what it has in hands.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=engine.reshard_after_forward,
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


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
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


@contextmanager
def _without_launcher_variables() -> Iterator[None]:
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_LAUNCHER_PREFIXES) or name in _LAUNCHER_FLAGS
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        os.environ.update(hidden)
