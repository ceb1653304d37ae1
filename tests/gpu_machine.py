"""The machine that `tests/gpu_check.py` looks at, and what its parts share."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.distributed.environment import TrainingEnvironment, is_fast_at_bf16
from toolkit.distributed.layout import Layout
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Progress
from toolkit.train.transformer import TransformerTrainModule

LENGTH, ROWS, VOCAB = 512, 16, 1000


class CheckFailed(Exception):
    """What did not hold."""


class NotHere(Exception):
    """Why a part says nothing about this machine."""


class Machine(NamedTuple):
    """Where the checks run."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        return "bf16" if self.is_gpu and is_fast_at_bf16(self.device) else "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        """Of `action`, until the device is done."""
        self.synchronize()
        start = time.perf_counter()
        action()
        self.synchronize()
        return time.perf_counter() - start

    def model(self, **changes: Any) -> TransformerConfig:
        """Small; tiny on a CPU."""
        width = 256 if self.is_gpu else 32
        settings: dict[str, Any] = {
            "vocab_size": VOCAB if self.is_gpu else 96,
            "d_model": width,
            "num_layers": 2,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 2 * width,
            "max_sequence_length": LENGTH,
        }
        return TransformerConfig(**(settings | changes))

    def moe(self) -> TransformerConfig:
        return self.model(moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=32))

    def batch(self, *, documents: bool = False, rows: int = ROWS, length: int = LENGTH) -> dict:
        rows, length = (rows, length) if self.is_gpu else (4, 64)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 96, (rows, length), generator=generator)
        batch = {"input_ids": ids.to(self.device)}
        if documents:
            numbers = (torch.arange(length) // 30).expand(rows, -1).int()
            batch["document_ids"] = numbers.contiguous().to(self.device)
        return batch

    def module(
        self, config: Any, *, tokens: int = 8 * LENGTH, **settings: Any
    ) -> TransformerTrainModule:
        """A model of `config`, ready to be trained."""
        precision: Any = settings.pop("precision", self.precision)
        environment = TrainingEnvironment(
            rank=0,
            local_rank=0,
            device=self.device,
            layout=Layout(precision=precision),
            seed=0,
        )
        train = TransformerTrainModuleConfig(
            precision=precision, rank_microbatch_size=tokens, **settings
        )
        return train.build(config.build(init_device="meta"), environment=environment)


def step(module: TransformerTrainModule, batch: dict, number: int = 0) -> tuple[float, float]:
    """One step; its loss and the norm of its gradients, still on the device."""
    metrics = module.train_batch(batch)
    module.network_norms()
    metrics |= module.optim_step(Progress(number, number, 100, 100, 1))
    loss: Any = metrics["loss"].value
    norm: Any = metrics["grad_norm"].value
    return loss, norm


def check_close(what: str, got: float, expected: float, tolerance: float) -> str:
    difference = abs(got - expected) / max(abs(expected), 1e-30)
    if not difference <= tolerance:  # NaN too
        raise CheckFailed(f"{what} {got:.6g} instead of {expected:.6g}")
    return f"{what} {got:.5g} ({difference:.0e} off)"


class _NoWaiting(TorchDispatchMode):
    """Raises where the host asks for a value: what would make it wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CheckFailed("the host asks for a value of the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(machine: Machine) -> Iterator[None]:
    """Fails where the host waits for the device."""
    if not machine.is_gpu:
        with _NoWaiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        raise CheckFailed(f"the host waits: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
