"""The same training on one GPU as on the CPU, under every engine that one process can run."""

import pytest
import torch

from tests.distributed.test_precision_and_memory_options import losses
from tests.workers import WorkerPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENGINES = ["single", "fsdp", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def on_cpu() -> list[float]:
    pool = WorkerPool({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    try:
        return pool.run(1, losses, "single", {})[0]
    finally:
        pool.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_losses_equal_the_cpu_ones(
    workers: WorkerPool, on_cpu: list[float], engine: str
) -> None:
    assert workers.run(1, losses, engine, {}, timeout=280)[0] == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.parametrize("compile_model", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_losses_follow(
    workers: WorkerPool, on_cpu: list[float], engine: str, compile_model: bool
) -> None:
    changes = {"precision": "bf16", "compile_model": compile_model}
    got = workers.run(1, losses, engine, changes, timeout=280)[0]
    assert got == pytest.approx(on_cpu, rel=1e-2)
