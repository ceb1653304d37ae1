"""What FSDP2 is told, on rank 0 of ranks that only seem to be there."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.tiny import tiny_model
from tests.workers import WorkerPool
from toolkit.distributed import fully_sharded
from toolkit.distributed.config import DataParallelConfig, ExpertParallelConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.layout import resolve_layout
from toolkit.distributed.materialize import materialize
from toolkit.models.layer_configs import MoEConfig

RANKS = 4
MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)


def told(asked: Any, ep: int, memory: int | None) -> dict[str, Any]:
    """Of each unit, whether a forward frees it; which units a backward within a step does not free;
    what the first block asks for ahead; and what the run's record says."""
    os.environ.update(RANK="0", WORLD_SIZE=str(RANKS))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    known = mock.patch.object(fully_sharded, "device_memory", return_value=memory)
    try:
        dp_config = DataParallelConfig(name="fsdp", reshard_after_forward=asked)
        parallel = {"ep_config": ExpertParallelConfig(degree=ep)} if ep > 1 else {}
        layout = resolve_layout("fp32", dp_config, os.environ, **parallel)
        environment = TrainingEnvironment(
            rank=0, local_rank=0, device=torch.device("cpu"), layout=layout, seed=0
        )
        changes = {"moe": MOE} if ep > 1 else {}
        model: Any = tiny_model(**changes).build(init_device="meta")
        with known:
            materialize(model, environment)
        names = {m: name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
        states = {m._get_fsdp_state(): name for m, name in names.items()}  # type: ignore[operator]
        groups = {name: state._fsdp_param_groups for state, name in states.items()}
        fully_sharded.free_after_backward(model, frees=False)
        found = {
            "freed": {n: g[0].post_forward_mesh_info is not None for n, g in groups.items()},
            "kept": {n for n, g in groups.items() if not g[0].reshard_after_backward},
            "said": fully_sharded.describe_gathers(model),
        }
        first = model.blocks[0]._get_fsdp_state()
        found["ahead"] = [states[state] for state in first._states_to_forward_prefetch]
        fully_sharded.free_after_backward(model, frees=True)
        assert all(g[0].reshard_after_backward for g in groups.values())
        return found
    finally:
        dist.destroy_process_group()


def test_the_smallest_device_decides_for_all_ranks() -> None:
    environment: Any = mock.Mock(gather=lambda own: [own, 8 << 30])
    with mock.patch.object(fully_sharded, "device_memory", return_value=16 << 30):
        assert fully_sharded._least_memory(environment) == 8 << 30


@pytest.mark.parametrize(
    ("asked", "memory", "freed", "said"),
    [
        (True, 1 << 40, {"blocks.0"}, "gathers, two of each block but the last in each microbatch"),
        ("auto", None, {"blocks.0"}, "gathers, two of each block but the last in each microbatch"),
        ("auto", 1 << 40, set(), "gathers, one a step"),
        (False, None, set(), "gathers, one a step"),
    ],
)
def test_what_backward_begins_with_is_not_freed(
    workers: WorkerPool, asked: Any, memory: int | None, freed: set[str], said: str
) -> None:
    found = workers.run(1, told, asked, 1, memory)[0]
    units = {"", "blocks.0", "blocks.1", "head"}
    assert {name for name, is_freed in found["freed"].items() if is_freed} == freed
    assert found["kept"] == units - freed
    assert (found["said"], found["ahead"]) == (said, [])


def test_experts_of_others_are_asked_for_ahead(workers: WorkerPool) -> None:
    """There the host waits for numbers of tokens in each block."""
    found = workers.run(1, told, True, 2, None)[0]
    assert found["ahead"] == ["blocks.0.feed_forward.experts", "blocks.1"]
