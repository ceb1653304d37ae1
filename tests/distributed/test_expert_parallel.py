"""Experts on several ranks compute what one process does."""

import contextlib
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.tiny import ROWS, SEQ, VOCAB, module_config, open_environment, tiny_model
from tests.workers import WorkerPool
from toolkit.distributed import fully_sharded, materialize
from toolkit.distributed.config import ActivationCheckpointingConfig, ExpertParallelConfig
from toolkit.distributed.engine import Engine, Microbatch
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.shards import ShardSpec, flat_runs, local_boxes, local_tensor
from toolkit.models import compile as compiling
from toolkit.models.feed_forward import Experts
from toolkit.models.init import canonical_parameters
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import IGNORE_INDEX
from toolkit.optim.config import AdamWConfig

SEED = 3
Z_LOSS = 1e-3
PLAIN: dict[str, Any] = {"num_experts": 8, "top_k": 2, "intermediate_size": 20}
LOSSES = {"load_balancing_multiplier": 0.05, "router_z_loss_multiplier": 0.01}
SHARED = {"top_k": 3, "shared_expert_intermediate_size": 24, "dense_layers": (0,)}
ODD = {"d_model": 31, "num_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
FINE = {"wrapping_strategy": "fine_grained", "prefetch_factor": 2}
CHECKPOINTED = ActivationCheckpointingConfig(mode="full")


def batch_of(kind: str) -> Microbatch:
    """Eight rows; `packed`: of several documents and with very different numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].clone()
    if kind == "plain":
        return Microbatch(inputs, labels)
    place = torch.arange(SEQ)
    for row in range(ROWS):
        labels[row, 2 + row :] = IGNORE_INDEX
    documents = torch.stack([place * (row + 1) // SEQ for row in range(ROWS)])
    return Microbatch(inputs, labels, documents)


def in_own_type(**_: Any) -> MixedPrecisionPolicy:
    """Gradients are reduced in the type that they have."""
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def engine_of(
    env: TrainingEnvironment,
    model: dict[str, Any],
    dtype: torch.dtype,
    **options: Any,
) -> Engine:
    built = tiny_model(init_std=0.1, **model).build(init_device="meta").to(dtype)
    return materialize.prepare_engine(
        env, built, AdamWConfig(lr=1e-3).build, max_grad_norm=1.0, **options
    )


def part_of(whole: torch.Tensor, held: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    """What of `whole` lies in `held`, flat."""
    part = torch.full((local_tensor(held).numel(),), float("nan"), dtype=whole.dtype)
    for box in local_boxes(held, spec):
        for position, start, length in flat_runs(spec.shape, box):
            part[position : position + length] = whole.reshape(-1)[start : start + length]
    return part


def compare(
    engine_name: str,
    ep: int,
    dp: dict[str, Any],
    moe: dict[str, Any],
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
) -> dict[str, float]:
    """Relative errors of this rank against one process, `gradient` the worst of all tensors; how
    many `rows` this rank's experts had in the first MoE; how many `graphs` were compiled, and
    `more_graphs` in another step."""
    options = dict(options)
    model = options.pop("model", {}) | {"moe": MoEConfig(**(PLAIN | moe))}
    whole = batch_of(options.pop("kind", "packed"))
    collapsed, graphs = options.pop("collapsed", False), 0
    num_targets = int((whole.labels != IGNORE_INDEX).sum())
    alone = tiny_model(init_std=0.1, **model).build(seed=SEED).to(dtype)
    expected = dict(alone.named_parameters())

    def count_graphs(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    config = module_config(engine_name, dp=dp, ep_config=ExpertParallelConfig(degree=ep))
    env = open_environment(config, seed=SEED)
    compiled = functools.partial(compiling.compile_model, backend=count_graphs)
    with (
        contextlib.closing(env),
        mock.patch.object(compiling, "compile_model", compiled),
        mock.patch.object(fully_sharded, "MixedPrecisionPolicy", in_own_type),
    ):
        engine = engine_of(env, model, dtype, **options)
        held = canonical_parameters(engine.module)
        for name, parameter in held.items():
            own = part_of(expected[name].detach(), parameter, engine.shards[name])
            assert torch.equal(local_tensor(parameter.detach()).reshape(-1), own), name
            if collapsed and "router" in name:
                # Equal logits, of which topk takes the first: all tokens go to the same experts.
                local_tensor(parameter.detach()).zero_()
                expected[name].detach().zero_()
        rows: list[int] = []
        for module in engine.module.modules():
            if isinstance(module, Experts):
                module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        sums = alone(*whole[:2], document_ids=whole.document_ids, z_loss_multiplier=Z_LOSS)
        (sums.loss / num_targets).backward()
        squares = [p.grad.square().sum() for p in expected.values() if p.grad is not None]

        share = ROWS // env.layout.batch_ranks
        mine = whole.split(share)[env.layout.batch_rank(env.rank)]
        factor = env.layout.grad_ranks / num_targets
        found = engine.forward_backward(mine.split(share // 2), factor, z_loss_multiplier=Z_LOSS)
        assert found.router is not None
        loss, load = found.loss.clone(), found.router.load.clone()
        for value in (loss, load):
            dist.all_reduce(value)
        errors = {
            "loss": relative(loss, sums.loss.detach()),
            "load": relative(load, sums.router.load),
            "gradient": max(
                relative(
                    gradient.reshape(-1), part_of(grad_of(expected[n]), held[n], engine.shards[n])
                )
                for n, gradient in engine.gradient_shards().items()
            ),
        }
        norm = engine.step(None).grad_norm
        errors["norm"] = relative(norm, torch.stack(squares).sum().sqrt())
        # The step has changed which tokens choose whom.
        before = graphs
        engine.forward_backward(mine.split(share // 2), factor, z_loss_multiplier=Z_LOSS)
        return errors | {"rows": rows[0], "graphs": before, "more_graphs": graphs - before}


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()


CASES: list[tuple[int, str, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (2, "fsdp", 2, {}, LOSSES, {"kind": "plain"}),
    (4, "fsdp", 2, {}, SHARED | LOSSES, {}),
    (4, "hsdp", 2, {"num_replicas": 2}, LOSSES, {}),
    # Three experts of one rank on two: cut along another dimension than the first two, flattened.
    (4, "fsdp", 2, {}, {"num_experts": 6, "intermediate_size": 5}, {"model": ODD}),
    (2, "fsdp", 2, FINE, SHARED, {"ac_config": CHECKPOINTED}),
]


def errors_of(found: list[dict[str, float]]) -> float:
    names = ("loss", "load", "gradient", "norm")
    return max(errors[name] for errors in found for name in names)


@pytest.mark.parametrize(("ranks", "engine", "ep", "dp", "moe", "options"), CASES, ids=str)
def test_values_losses_gradients_and_norms_are_those_of_one_process(
    workers: WorkerPool,
    ranks: int,
    engine: str,
    ep: int,
    dp: dict[str, Any],
    moe: dict[str, Any],
    options: dict[str, Any],
) -> None:
    found = workers.run(ranks, compare, engine, ep, dp, moe, options)
    assert errors_of(found) < 1e-12, found


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_add_up_in_fp32_too(workers: WorkerPool, ranks: int) -> None:
    """Where gloo has no operation for means, over one rank and over two that share experts."""
    found = workers.run(ranks, compare, "fsdp", 2, {}, LOSSES, {}, torch.float32)
    assert errors_of(found) < 1e-5, found


def test_all_tokens_on_one_expert(workers: WorkerPool) -> None:
    found = workers.run(4, compare, "fsdp", 4, {}, {"top_k": 1}, {"collapsed": True})
    assert errors_of(found) < 1e-12, found
    assert sorted(errors["rows"] for errors in found) == [1, 1, 1, ROWS * SEQ // 2]


@pytest.mark.parametrize("ac_config", [None, CHECKPOINTED])
def test_blocks_are_compiled_around_the_exchange(workers: WorkerPool, ac_config: Any) -> None:
    options = {"compile_model": True, "ac_config": ac_config}
    found = workers.run(2, compare, "fsdp", 2, {}, SHARED, options)
    assert errors_of(found) < 1e-12, found
    for errors in found:
        assert errors["graphs"] > 5, "a dense block, what lies around the experts, and the loss"
        assert errors["more_graphs"] == 0, "none for other numbers of rows"
