"""What blocks keep for backward: computed again but for some results, or kept on the host. Values
stay as they are to the last bit; bytes are counted."""

import contextlib
import gc
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.tiny import SEQ, build, module_config, open_environment, tiny_model, train_steps
from tests.workers import WorkerPool
from toolkit.commands.plan.counting import Counter
from toolkit.distributed import activations
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
)
from toolkit.distributed.environment import single_environment
from toolkit.distributed.materialize import materialize
from toolkit.models.layer_configs import MoEConfig

MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=16)
FULL = ActivationCheckpointingConfig()
OPS = ActivationCheckpointingConfig(mode="selected_ops")
MATMULS = OPS.replace(saved_ops=("matmuls", "attention"))
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"ac_config": FULL},
    "ops": {"ac_config": OPS},
    "matmuls": {"ac_config": MATMULS},
    "offload": {"activation_offload": True},
    "offload, full": {"activation_offload": True, "ac_config": FULL},
}


class Elsewhere:
    """Host memory that is not torch's: counting sees what is left on the device."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.array = np.array(memory.numpy())
        self.moved.append(self.array.nbytes)

    moved: list[int] = []  # noqa: RUF012


def steps_of(engine: str, kind: dict[str, Any], dp: dict[str, Any], settings: Any) -> Any:
    settings = dict(settings)
    model = settings.pop("model", {})
    config = module_config(engine, rank_microbatch_size=2 * SEQ, dp=dp, **kind, **settings)
    env = open_environment(config)
    try:
        module = build(config, env, **model)
        history = train_steps(module, 0, 3)
        weights = {n: t.clone() for n, t in module.engine.weight_shards().items()}
        return history, weights
    finally:
        env.close()


@pytest.mark.parametrize(
    ("engine", "ranks", "dp", "settings"),
    [
        ("single", 1, {}, {}),
        ("single", 1, {}, {"precision": "bf16", "model": {"attention_soft_cap": 5.0}}),
        ("single", 1, {}, {"model": {"moe": MOE}}),
        ("ddp", 2, {}, {}),
        ("fsdp", 2, {}, {"precision": "bf16"}),
        ("zero3", 2, {}, {}),
    ],
)
def test_values_are_equal_to_the_last_bit(
    workers: WorkerPool, engine: str, ranks: int, dp: Any, settings: Any
) -> None:
    plain = workers.run(ranks, steps_of, engine, {}, dp, settings)
    for kind, changes in list(KINDS.items())[1:]:
        results = workers.run(ranks, steps_of, engine, changes, dp, settings)
        for (losses, weights), (own, others) in zip(plain, results, strict=True):
            assert own == losses, kind
            assert all(torch.equal(weights[name], others[name]) for name in weights), kind


def distinct_bytes(module: Any, ids: torch.Tensor) -> int:
    """Of the storages that blocks keep in a forward, without weights, integers and a norm's few."""
    kept: dict[int, torch.Tensor] = {}
    weights = {p.untyped_storage()._cdata for p in module.engine.module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel() >= activations.LEAST:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with contextlib.ExitStack() as stack:
        for block in module.engine.module.blocks:
            hooks = saved_tensors_hooks(pack, lambda held: held)
            forward = block.forward

            def inside(*args: Any, hooks: Any = hooks, forward: Any = forward) -> Any:
                with hooks:
                    return forward(*args)

            stack.enter_context(mock.patch.object(block, "forward", inside))
        module.engine.model(ids, ids)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


def bytes_kept(kinds: list[str], rows: int, tokens: int) -> dict[str, tuple[int, int, int, int]]:
    """Of each kind: bytes kept between forward and backward, the peak, bytes moved, and those of
    distinct storages that blocks keep."""
    from toolkit.models.config import TransformerConfig

    found = {}
    for kind in kinds:
        config = module_config(rank_microbatch_size=rows * tokens, **KINDS[kind])
        model = TransformerConfig(
            vocab_size=256, d_model=128, num_layers=6, num_heads=4, num_key_value_heads=2,
            intermediate_size=256, max_sequence_length=256,
        )  # fmt: skip
        env = open_environment(config)
        moved: list[int] = []
        with (
            mock.patch.object(Elsewhere, "moved", moved),
            mock.patch.object(activations, "to_host", Elsewhere),
            mock.patch.object(activations, "from_host", lambda held, _: torch.tensor(held.array)),
            Counter() as counter,
        ):
            module = config.build(model.build(init_device="meta"), environment=env)
            ids = torch.arange(rows * tokens).view(rows, tokens) % 255
            module.train_batch({"input_ids": ids})
            gc.collect()
            counter.restart()
            moved.clear()
            before = counter.live
            sums = module.engine.model(ids, ids)
            gc.collect()
            kept = counter.live - before
            sums.loss.backward()
            peak, total = counter.peak - before, sum(moved)
            distinct = distinct_bytes(module, ids) if kind == "none" else 0
            found[kind] = kept, peak, total, distinct
        env.close()
    return found


def test_bytes_are_fewer(workers: WorkerPool) -> None:
    found = workers.run(1, bytes_kept, list(KINDS), 2, 256)[0]
    kept = {kind: numbers[0] for kind, numbers in found.items()}
    peak = {kind: numbers[1] for kind, numbers in found.items()}
    assert kept["full"] < kept["ops"] < kept["matmuls"] < kept["none"]
    assert kept["offload, full"] <= kept["offload"] < kept["full"]
    assert peak["offload, full"] < peak["full"] < peak["ops"] < peak["none"]
    assert peak["offload"] < 0.5 * peak["none"]
    assert found["none"][2] == 0 < found["offload, full"][2] < found["offload"][2]
    assert found["offload"][2] == found["none"][3]


@pytest.mark.parametrize("tokens", [128, 256])
def test_inputs_in_the_shape_of_a_weight_are_not_kept(workers: WorkerPool, tokens: int) -> None:
    kept, _, moved, _ = workers.run(1, bytes_kept, ["offload"], 1, tokens)[0]["offload"]
    assert kept < 0.05 * moved  # what the head keeps, and its copy of the weight


def original_weights_left(offload: bool) -> int:
    """Weights of blocks, of a model that had storage, which are still there once it is sharded."""
    config = module_config("fsdp", activation_offload=offload)
    env = open_environment(config)
    try:
        model = tiny_model().build()
        own = [weakref.ref(parameter) for parameter in model.blocks.parameters()]
        module = config.build(model, environment=env)
        train_steps(module, 0, 1)
        gc.collect()
        return sum(found() is not None for found in own)
    finally:
        env.close()


def test_whole_weights_are_let_go_once_they_are_sharded(workers: WorkerPool) -> None:
    assert workers.run(2, original_weights_left, True) == [0, 0]


def test_blocks_for_multi_token_prediction_keep_nothing_on_the_device_either() -> None:
    model = tiny_model(num_mtp_layers=1).build(init_device="meta")
    environment = single_environment(precision="fp32")
    materialize(model, environment, activation_offload=True)
    assert {"forward" in vars(block) for block in model.all_blocks} == {True}


def test_a_budget_ends_with_its_model() -> None:
    own = ActivationCheckpointingConfig(mode="budget", budget=0.25)
    environment = single_environment(precision="fp32")
    materialize(tiny_model().build(init_device="meta"), environment, ac_config=own)
    assert activations.partitioner.activation_memory_budget == 0.25
    materialize(tiny_model().build(init_device="meta"), environment)
    assert activations.partitioner.activation_memory_budget == 1.0


PP, EP = PipelineParallelConfig(degree=2), ExpertParallelConfig(degree=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ac_config": OPS, "pp_config": PP}, "selected_ops does not go with pp_config; use mode"),
        ({"ac_config": OPS, "ep_config": EP}, "selected_ops does not go with ep_config; use mode"),
        ({"activation_offload": True, "pp_config": PP}, "offload does not go with pp_config"),
        ({"activation_offload": True, "ac_config": OPS}, "go with ac_config.mode: selected_ops"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_config("fsdp", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "selected_ops", "saved_ops": ()}, "saved_ops: empty; use mode: full"),
        ({"saved_ops": ("attention",)}, "saved_ops goes with mode: selected_ops, not full"),
        ({"mode": "selected_ops", "saved_ops": ("matmuls", "every_second_matmul")}, "exclude"),
    ],
)
def test_operations_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationCheckpointingConfig(**settings)
