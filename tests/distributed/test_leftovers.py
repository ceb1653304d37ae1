"""Variables that a launcher or a tool left in the shell of a run on one process."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState

from toolkit.distributed import accelerator
from toolkit.distributed.environment import single_environment

LEFTOVERS = [
    {"LOCAL_RANK": "0"},
    {"ACCELERATE_USE_MEGATRON_LM": "true"},
    {"ACCELERATE_USE_SAGEMAKER": "true"},
    {"ACCELERATE_TORCH_DEVICE": "xpu"},
    {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
    {"MV2_COMM_WORLD_SIZE": "4"},
    {"PMI_SIZE": "4", "PMI_RANK": "2"},
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("leftover", LEFTOVERS, ids=lambda leftover: next(iter(leftover)))
def test_accelerate_sees_one_process(
    leftover: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU LOCAL_RANK is always set, by ourselves."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    environment = single_environment(device="cpu")
    object.__setattr__(environment, "device", torch.device(device))
    for name, value in leftover.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    built = accelerator.build_accelerator(environment)
    assert (built.num_processes, str(built.distributed_type)) == (1, "DistributedType.NO")
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()
    AcceleratorState._reset_state(True)
