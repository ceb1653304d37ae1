"""Matrices that lie on several ranks are computed whole, each once, and twins get the same bits."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.distributed.test_evaluating import memory
from tests.tiny import SEQ, module_config, open_environment, tiny_model, train_steps
from tests.workers import WorkerPool
from toolkit.distributed import fully_sharded
from toolkit.distributed.config import ExpertParallelConfig, TensorParallelConfig
from toolkit.distributed.shards import Box, LocalShard, ShardSpec, local_boxes
from toolkit.distributed.whole_matrices import Unit, assign_owners
from toolkit.errors import ConfigError
from toolkit.models.layer_configs import MoEConfig
from toolkit.optim.config import ClassOptimConfig, MuonConfig, NorMuonConfig
from toolkit.train.transformer import TransformerTrainModule

# 4 ranks do not divide 6 experts, nor 22 or 30; ranks of tensor parallelism share one key head.
MODEL: dict[str, Any] = {
    "d_model": 30, "num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 22,
    "moe": MoEConfig(num_experts=6, top_k=2, intermediate_size=22, dense_layers=(0,)),
}  # fmt: skip
OPTIMIZERS: dict[str, Any] = {
    "muon": MuonConfig(lr=1e-2),
    "normuon": NorMuonConfig(lr=1e-2),
    "own": ClassOptimConfig(target="tests.distributed.test_whole_matrices:Orthogonal", lr=1e-2),
}
TP = TensorParallelConfig(degree=2)
Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


class Orthogonal(torch.optim.Optimizer):
    """An optimizer as a user would write it: what has two dimensions moves by U V'."""

    needs_whole_matrices = takes_whole_matrices = True
    whole_matrices: Any = None

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.dim() > 1]
            values: list[Any] = [p.grad for p in params]
            self.whole_matrices.apply(nearest, params, values, dtype=torch.float64)
            torch._foreach_add_(params, values, alpha=-group["lr"])


def nearest(matrices: torch.Tensor, kept: None) -> torch.Tensor:
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    return (u * (values > 1e-8)[:, None]) @ v


def pieces(module: TransformerTrainModule) -> list[Piece]:
    """What this rank holds of the state: key, offsets, sizes, values."""
    found = []
    for key, tensor in module.state_tensors().items():
        boxes: list[Box]
        if isinstance(tensor, LocalShard):
            boxes = tensor.boxes
        else:
            boxes = local_boxes(tensor.detach(), ShardSpec(tensor.shape))
        flat = memory(tensor).detach().reshape(-1)
        for offsets, sizes, position in boxes:
            part = flat[position : position + torch.Size(sizes).numel()].view(sizes).clone()
            found.append((key, tuple(offsets), tuple(sizes), part))
    return found


def trained(
    engine: str, changes: dict[str, Any], names: list[str], is_exact: bool
) -> dict[str, list[Piece]]:
    """After three steps, of which the second is not finite, and changes no bit."""

    def in_float64(**_: Any) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(cast_forward_inputs=False)

    policy = in_float64 if is_exact else MixedPrecisionPolicy
    env = open_environment(module_config(engine, **changes))
    result = {}
    try:
        with mock.patch.object(fully_sharded, "MixedPrecisionPolicy", policy):
            for name in names:
                options = {"optim": OPTIMIZERS[name], "max_grad_norm": None, **changes}
                config = module_config(engine, **options)
                model = tiny_model(**MODEL).build(init_device="meta")
                model = model.double() if is_exact else model
                module = config.build(model, environment=env)
                train_steps(module, 0, 1)
                before, forward = pieces(module), module.engine.module.forward

                def poisoned(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                    sums = forward(*args, **kwargs)
                    return sums._replace(loss=sums.loss * float("nan"))

                module.engine.module.forward = poisoned
                assert train_steps(module, 1, 2)[0]["skipped"] == 1.0
                module.engine.module.forward = forward
                for old, new in zip(before, pieces(module), strict=True):
                    assert torch.equal(old[3], new[3]), old[0]
                train_steps(module, 2, 3)
                result[name] = pieces(module)
        return result
    finally:
        env.close()


@pytest.fixture(scope="module")
def alone(workers: WorkerPool) -> Any:
    return {
        is_exact: workers.run(1, trained, "single", {}, names, is_exact)[0]
        for is_exact, names in ((True, list(OPTIMIZERS)), (False, ["muon"]))
    }


@pytest.mark.parametrize(
    ("engine", "ranks", "changes", "names"),
    [
        ("ddp", 2, {}, ["muon"]),
        ("fsdp", 4, {}, ["normuon", "own"]),
        ("hsdp", 4, {"dp": {"num_replicas": 2}}, ["normuon"]),
        pytest.param("fsdp", 4, {"tp_config": TP}, ["normuon"], marks=pytest.mark.slow),
        ("fsdp", 2, {"ep_config": ExpertParallelConfig(degree=2)}, ["normuon"]),
        ("zero3", 2, {}, ["muon"]),
    ],
    ids=["ddp", "fsdp", "hsdp", "tp", "ep", "zero3"],
)
def test_weights_and_state_are_those_of_one_process_and_twins_have_the_same_bits(
    workers: WorkerPool,
    alone: Any,
    engine: str,
    ranks: int,
    changes: dict[str, Any],
    names: list[str],
) -> None:
    is_exact = engine != "zero3"
    changes = {"rank_microbatch_size": 2 * SEQ, **changes}
    by_rank = workers.run(ranks, trained, engine, changes, names, is_exact)
    for name in names:
        whole = {key: values for key, *_, values in alone[is_exact][name]}
        first: dict[Any, torch.Tensor] = {}
        for found in by_rank:
            for key, offsets, sizes, values in found[name]:
                where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
                wanted = whole[key][where]
                bound = 1e-9 if is_exact else 2e-4
                torch.testing.assert_close(values, wanted, rtol=bound, atol=bound / 10, msg=key)
                twin = first.setdefault((key, offsets, sizes), values)
                assert torch.equal(values, twin), key
        assert {key for key, *_ in first} == set(whole)
        assert any(key.endswith(".row_squares") for key in whole) == (name == "normuon")


def test_work_is_spread_by_its_cost_and_stays_where_a_matrix_is_whole() -> None:
    large = [Unit("large", n, (64, 128)) for n in range(3)]
    small = [Unit("small", n, (8, 8)) for n in range(40)]
    bound = [Unit("bound", n, (64, 128)) for n in range(2)]
    holders = dict.fromkeys((*large, *small)) | {bound[0]: [1], bound[1]: [1, 2]}
    owners = assign_owners([*large, *small, *bound], holders, 4)
    assert owners[bound[0]] == 1
    assert owners[bound[1]] == 2
    loads = [sum(unit.cost for unit, rank in owners.items() if rank == r) for r in range(4)]
    assert max(loads) <= 2 * large[0].cost
    assert min(loads) >= large[0].cost


def refusal(engine: str, optim: Any) -> str:
    config = module_config(engine, optim=optim)
    env = open_environment(config)
    try:
        config.build(tiny_model().build(init_device="meta"), environment=env)
    except ConfigError as error:
        return str(error)
    finally:
        env.close()
    return ""


def test_what_cannot_be_computed_is_refused(workers: WorkerPool) -> None:
    for message in workers.run(2, refusal, "fsdp", MuonConfig(matrices=("blocks.*",))):
        assert "blocks.0.attention_norm.weight has the shape (32,), and is no matrix" in message
    for message in workers.run(2, refusal, "zero2", OPTIMIZERS["own"]):
        assert "Orthogonal does not say by 'is_matrix' in which ones its matrices are" in message
