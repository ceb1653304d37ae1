"""How many graphs torch.compile makes of a model: engines add none."""

import functools
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.workers import WorkerPool
from toolkit.distributed.accelerator import ddp_options
from toolkit.distributed.config import ActivationCheckpointingConfig, DataParallelConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.layout import resolve_layout
from toolkit.distributed.materialize import materialize
from toolkit.models import compile as compiling
from toolkit.models.config import TransformerConfig

RANKS = 8
FINE_GRAINED = "fine_grained"


def graphs(name: Any, recompute: bool) -> list[int]:
    """Graphs after each of two steps of two microbatches, on rank 0 of ranks that only seem to be
    there."""
    os.environ.update(RANK="0", WORLD_SIZE=str(RANKS))
    if name == "ddp":  # its reductions need a real group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    torch._dynamo.reset()
    if name == FINE_GRAINED:
        asked = DataParallelConfig(name="fsdp", wrapping_strategy="fine_grained")
    else:
        asked = None if name == "single" else DataParallelConfig(name=name)
    layout = resolve_layout("fp32", asked, os.environ)
    environment = TrainingEnvironment(
        rank=0,
        local_rank=0,
        device=torch.device("cpu"),
        layout=layout,
        seed=0,
    )
    count = 0

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    # Blocks of 12 MB: DDP's first bucket of gradients ends inside one.
    config = TransformerConfig(
        vocab_size=100,
        d_model=512,
        num_layers=2,
        num_heads=8,
        num_key_value_heads=8,
        intermediate_size=2048,
        max_sequence_length=16,
    )
    model: Any = config.build(init_device="meta")
    compile_model = compiling.compile_model
    try:
        with mock.patch.object(
            compiling, "compile_model", functools.partial(compile_model, backend=backend)
        ):
            materialize(
                model,
                environment,
                ac_config=ActivationCheckpointingConfig(mode="full") if recompute else None,
                compile_model=True,
            )
        called: Any = model
        if name == "ddp":
            called = DistributedDataParallel(model, **ddp_options().to_kwargs())
        ids = torch.randint(0, 100, (2, 16))
        counts = []
        for _ in range(2):
            for is_last in (False, True):
                if name in ("fsdp", "hsdp", FINE_GRAINED):
                    model.set_is_last_backward(is_last)
                called(ids, ids.roll(-1, 1)).loss.backward()
            counts.append(count)
        return counts
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("recompute", "engines"), [(False, ["ddp", "fsdp"]), (True, ["hsdp"])])
def test_engines_compile_what_one_process_compiles_and_only_once(
    workers: WorkerPool, recompute: bool, engines: list[str]
) -> None:
    first, second = workers.run(1, graphs, "single", recompute)[0]
    assert first == second > 0
    for engine in engines:
        assert workers.run(1, graphs, engine, recompute)[0] == [first, first], engine


def test_checkpointed_blocks_whose_graphs_break_are_compiled(workers: WorkerPool) -> None:
    """Torch gives up on a checkpoint with a break inside, and would compile the loss alone."""
    alone, _ = workers.run(1, graphs, FINE_GRAINED, False)[0]
    checkpointed = workers.run(1, graphs, FINE_GRAINED, True)[0]
    assert checkpointed == [alone, alone]
    assert alone > 2
