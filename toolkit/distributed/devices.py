"""The accelerator of this process: which, what it is called, and why there is none."""

import logging
import os
import weakref
from collections.abc import Collection, Mapping, Sequence

import torch

from toolkit.distributed.ranks import has_own_gpu, wants_cpu
from toolkit.distributed.tuning import cpu_name
from toolkit.errors import ConfigError
from toolkit.wording import count

log = logging.getLogger(__name__)


def compute_dtype(precision: str) -> torch.dtype | None:
    """In what a `precision` computes over fp32 weights; None: in their own type."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def usable_gpus() -> int:
    """GPUs that training on this machine may use; 0 where the CPU is asked for."""
    if wants_cpu(os.environ) or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count()


def pick_device(local_rank: int, local_world_size: int | None = None) -> torch.device:
    """This process's accelerator, or the CPU.

    `local_world_size`: processes on this machine, where known. Raises ConfigError: this process has
    no accelerator for itself."""
    devices = usable_gpus()
    if not devices:
        if torch.backends.mps.is_available() and not wants_cpu(os.environ):
            if (local_world_size or local_rank + 1) == 1:
                return torch.device("mps")
            if local_rank == 0:
                log.warning(
                    "%d processes train on this machine's CPU: torch cannot exchange tensors "
                    "between processes on Apple's GPU; one process uses it", local_world_size
                )  # fmt: skip
        if local_rank == 0 and (reason := unused_gpus()):
            log.warning("%s", reason)
        return torch.device("cpu")
    if devices == 1 and has_own_gpu(os.environ):
        local_rank, local_world_size = 0, None
    processes = local_world_size or local_rank + 1
    if processes > devices:
        asked = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = f" (CUDA_VISIBLE_DEVICES={asked})" if asked else ""
        raise ConfigError(
            f"{processes} processes on a machine that shows them {count(devices, 'GPU')}{shown}; "
            f"start at most {devices} on each machine, or train on the CPU with "
            "ACCELERATE_USE_CPU=true"
        )
    device = torch.device("cuda", local_rank)
    use_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Make `device` the current one of this thread: kernels that are not torch's own (Triton's)
    run there, wherever their tensors are."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def wait_for(device: torch.device) -> None:
    """Until what this thread asked of `device` is done."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).current_stream(device).synchronize()


class Copies:
    """Copies of tensors of `device` into host memory, under way beside what it computes.

    Args:
        pairs: (where to, what). Nobody may change the tensors before `hold_back` is called.
    """

    def __init__(
        self, device: torch.device, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self._device = device
        self._done: torch.cuda.Event | None = None
        if device.type != "cuda":
            for buffer, source in pairs:
                buffer.copy_(source, non_blocking=True)
            wait_for(device)
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for buffer, source in pairs:
                buffer.copy_(source, non_blocking=True)
        self._pairs = pairs  # the memory of a source that nobody else holds would be used again
        self._done = torch.cuda.Event(blocking=True)
        self._done.record(stream)

    def hold_back(self) -> None:
        """Have what this thread asks of the device from now on come after the copies. The caller
        does not wait."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def wait(self) -> None:
        """Until they are done; any thread may call it."""
        if self._done is not None:
            self._done.synchronize()


def host_memory(size: int, devices: Collection[torch.device]) -> torch.Tensor:
    """`size` bytes of host memory, page-locked where tensors of a GPU are copied there.

    torch's own allocator of such memory rounds up to a power of two, so ordinary memory is locked.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if size and any(device.type == "cuda" for device in devices):
        runtime, address = torch.cuda.cudart(), memory.data_ptr()
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, size, 0)))
        unlock = weakref.finalize(memory, runtime.cudaHostUnregister, address)
        unlock.atexit = False  # CUDA may be gone by then
    return memory


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} GPU" if device.type == "mps" else cpu_name()


def unused_gpus(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why GPUs that NVIDIA's driver sees are not used and what helps; None where there are none,
    or nobody wants them."""
    if wants_cpu(environ) or environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    found = nvidia_driver()
    if found is None:
        return None
    gpus, driver, cuda = found
    version = ".".join(str(part) for part in cuda)
    what = f"{gpus} not used, this runs on the CPU"
    built = torch.version.cuda
    if built is None:
        return f"{what}: torch {torch.__version__} is built for CPUs; {_install(cuda)}"
    # A driver runs every minor version of its CUDA.
    if cuda[0] < int(built.split(".")[0]):
        return (
            f"{what}: torch {torch.__version__} is built for CUDA {built}, and the driver {driver} "
            f"knows CUDA {version}; {_install(cuda, instead='update the driver, or ')}"
        )
    return f"{what}: torch {torch.__version__} cannot use CUDA: {_cuda_error()}"


def nvidia_driver() -> tuple[str, str, tuple[int, int]] | None:
    """GPUs, driver and the newest CUDA it knows, as NVML says; None where it sees none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: a machine without GPUs
        return None
    try:
        number = pynvml.nvmlDeviceGetCount()
        if not number:
            return None
        name = str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
        gpus = f"{number} x {name} are" if number > 1 else f"{name} is"
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return gpus, str(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _install(cuda: tuple[int, int], *, instead: str = "") -> str:
    """The line that installs a torch for this driver: one of CUDA 12 or 13 runs on every driver of
    the same major version (NVIDIA's minor version compatibility). torch has had no builds for
    CUDA 12 since 2.15."""
    if cuda < (12, 0):
        return "update the driver (525 or newer for CUDA 12, 580 or newer for CUDA 13)"
    torches, build = ("torch>=2.11", "cu130") if cuda >= (13, 0) else ("torch>=2.11,<2.15", "cu126")
    return (
        f"{instead}pip install --force-reinstall '{torches}' "
        f"--index-url https://download.pytorch.org/whl/{build}"
    )


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "it reports no device"
