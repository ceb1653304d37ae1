"""Replicas of a weight: the same wrapper, the same norm, the same bits."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool


def ddp_losses(as_on_gpus: bool) -> list[dict[str, float]]:
    """DDP as Accelerate makes it: with `device_ids` on GPUs, where it moves its inputs."""
    make = DistributedDataParallel.__init__

    def with_device_ids(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.device_ids, self.device_type = [0], "cpu"

    config = module_config("ddp")
    env = open_environment(config)
    try:
        with mock.patch.object(
            DistributedDataParallel, "__init__", with_device_ids if as_on_gpus else make
        ):
            module = build(config, env)
        assert bool(module.engine.model.device_ids) == as_on_gpus
        history = train_steps(module, 0, 2)
        with torch.no_grad():
            module.logits(torch.zeros(1, 4, dtype=torch.int64))
        return history
    finally:
        env.close()


def test_ddp_starts_where_it_moves_its_inputs(workers: WorkerPool) -> None:
    assert workers.run(2, ddp_losses, True) == workers.run(2, ddp_losses, False)


def ddp_with_another_order_of_adding() -> tuple[list[str], list[bytes]]:
    """Steps that clip, where rank 1's norms are one bit larger than rank 0's."""
    config = module_config("ddp", max_grad_norm=0.1)
    env = open_environment(config)
    add_up = torch.nn.utils.get_total_norm

    def with_one_bit_more(grads: list[torch.Tensor]) -> torch.Tensor:
        norm = add_up(grads)
        return torch.nextafter(norm, norm + 1) if env.rank else norm

    try:
        module = build(config, env)
        with mock.patch.object(torch.nn.utils, "get_total_norm", with_one_bit_more):
            norms = [step["grad_norm"].hex() for step in train_steps(module, 0, 3)]
        return norms, [p.detach().numpy().tobytes() for p in module.engine.module.parameters()]
    finally:
        env.close()


def test_ranks_of_ddp_clip_by_the_same_bits(workers: WorkerPool) -> None:
    first, second = workers.run(2, ddp_with_another_order_of_adding)
    assert first == second


def hsdp_with_another_order_of_adding() -> tuple[list[str], list[bytes]]:
    """Steps that clip, where the second replica's sums are one bit larger than the first's."""
    config = module_config("hsdp", max_grad_norm=0.1, dp={"num_replicas": 2})
    env = open_environment(config)
    add_up = dist.all_reduce

    def with_one_bit_more(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        work = add_up(tensor, *args, **options)
        if env.rank >= 2 and tensor.dim() == 0 and tensor.is_floating_point():
            tensor.copy_(torch.nextafter(tensor, tensor + 1))
        return work

    try:
        module = build(config, env)
        norms = []
        with mock.patch.object(dist, "all_reduce", with_one_bit_more):
            for step in range(3):
                norms.append(train_steps(module, step, step + 1)[0]["grad_norm"].hex())
        weights = [
            p.to_local().detach().numpy().tobytes() for p in module.engine.module.parameters()
        ]
        return norms, weights
    finally:
        env.close()


def test_replicas_of_hsdp_clip_by_the_same_bits(workers: WorkerPool) -> None:
    ranks = workers.run(4, hsdp_with_another_order_of_adding)
    assert len({tuple(norms) for norms, _ in ranks}) == 1
    for first, second in ((0, 2), (1, 3)):
        assert ranks[first][1] == ranks[second][1]
