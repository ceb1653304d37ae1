"""Stacked experts on more ranks than there are experts: even shares, the same initial values."""

from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, open_environment, tiny_model
from tests.workers import WorkerPool
from toolkit.distributed.shards import ShardSpec, draw_initial_values
from toolkit.distributed.sizes import LARGEST_SHARE, sharded_dimension
from toolkit.models.init import BLOCK_SIZE, canonical_parameters
from toolkit.models.layer_configs import MoEConfig

SEED = 3
ODD = {"d_model": 31, "num_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
"""With experts of width 5, no dimension that 2 or 4 ranks divide."""


def moe_of(num_experts: int, width: int, changes: dict[str, Any]) -> dict[str, Any]:
    moe = MoEConfig(num_experts=num_experts, top_k=2, intermediate_size=width, dense_layers=(0,))
    return {"moe": moe, **changes}


def shards_of(
    engine: str, dp: dict[str, Any], num_experts: int, width: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """Of each stacked tensor: the sharded dimension, this rank's share, whether all is as in one
    process."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    config = module_config(engine, dp=dp)
    env = open_environment(config, seed=SEED)
    try:
        module = build(config, env, **moe_of(num_experts, width, changes))
        alone = tiny_model(**moe_of(num_experts, width, changes)).build(seed=SEED)
        whole = canonical_parameters(alone)
        found = {}
        for name, parameter in canonical_parameters(module.engine.module).items():
            sizes, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            expected = whole[name].detach().view(parameter.shape)
            for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
                expected = expected.narrow(dim, offset if size else 0, size)
            assert torch.equal(parameter.to_local(), expected), name
            if "experts" in name:
                share = parameter.to_local().numel() / parameter.numel() * env.layout.dp_shard
                found[name.rpartition(".")[2]] = (parameter.placements[-1].dim, share)
        return found
    finally:
        env.close()


@pytest.mark.parametrize(
    ("engine", "dp", "num_experts", "width", "changes", "dimensions"),
    [
        # 32 columns where 5 rows do not divide; rows first where they do.
        ("fsdp", {}, 3, 5, {}, {"gate": 2, "up": 2, "down": 1}),
        ("fsdp", {}, 6, 8, {}, {"gate": 1, "up": 1, "down": 1}),
        ("fsdp", {}, 8, 8, {}, {"gate": 0, "up": 0, "down": 0}),
        ("hsdp", {"num_replicas": 2}, 3, 6, {}, {"gate": 1, "up": 1, "down": 1}),
        # Flattened: 15 rows of 31, 93 of 5.
        ("fsdp", {}, 3, 5, ODD, {"gate": 0, "up": 0, "down": 0}),
        ("hsdp", {"num_replicas": 2}, 3, 5, ODD, {"gate": 0, "up": 0, "down": 0}),
    ],
    ids=str,
)
def test_shares_are_even_and_values_are_those_of_one_process(
    workers: WorkerPool,
    engine: str,
    dp: dict[str, Any],
    num_experts: int,
    width: int,
    changes: dict[str, Any],
    dimensions: dict[str, int],
) -> None:
    for found in workers.run(4, shards_of, engine, dp, num_experts, width, changes):
        assert {name: dim for name, (dim, _) in found.items()} == dimensions
        assert max(share for _, share in found.values()) <= (LARGEST_SHARE if changes else 1.0)


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        ((64, 1024, 2048), 64, 0),
        ((64, 1024, 2048), 128, 1),
        ((64, 1000, 2048), 128, 2),
        ((64, 1001, 2047), 128, None),  # nothing divides
        ((60, 1408, 2048), 8, 0),  # 8 rows for 7 ranks, 4 for the last: 1.07
        ((60, 1408, 2048), 16, 0),
        ((60, 1408, 2048), 32, 0),
        ((48, 1408, 2048), 32, 1),  # two rows for 24 ranks, none for 8
        ((2, 2048), 128, 0),  # matrices go by rows
        ((5,), 8, 0),
    ],
)
def test_the_dimension_is_chosen_by_the_share_that_it_leaves(shape, ranks, expected):
    assert sharded_dimension(torch.Size(shape), ranks) == expected
    if len(shape) == 3:
        rows = shape[0] * shape[1] if expected is None else shape[expected]
        assert -(-rows // ranks) * ranks / rows <= LARGEST_SHARE


def test_columns_of_several_blocks_are_drawn_as_in_one_process(workers: WorkerPool) -> None:
    ranks = workers.run(2, columns_equal_whole)
    assert ranks == [True, True]


def columns_equal_whole() -> bool:
    """Shards along dimension 1 of a tensor whose matrices are longer than a block of values."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from toolkit.models.init import InitSpec, fill_flat_

    env = open_environment(module_config("ddp"), seed=SEED)
    try:
        shape = torch.Size((3, 4, BLOCK_SIZE // 3))
        settings: dict[str, Any] = {
            "name": "w", "numel": shape.numel(), "spec": InitSpec("normal", 0.02), "seed": SEED,
        }  # fmt: skip
        whole = fill_flat_(torch.empty(shape.numel()), start=0, **settings).view(shape)
        mesh = init_device_mesh("cpu", (2,))
        sharded = distribute_tensor(torch.zeros(shape), mesh, [Shard(1)])
        table = {"w": ShardSpec(shape)}
        draw_initial_values({"w": sharded}, {"w": settings["spec"]}, table, SEED)
        return torch.equal(sharded.to_local(), whole.chunk(2, dim=1)[env.rank])
    finally:
        env.close()
