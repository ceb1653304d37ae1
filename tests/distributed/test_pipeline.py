"""A pipeline of stages computes what one process computes, in float64 to the last digits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny import VOCAB, module_config, open_environment, tiny_model
from tests.workers import WorkerPool
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    PipelineParallelConfig,
)
from toolkit.distributed.engine import Microbatch
from toolkit.distributed.materialize import prepare_engine
from toolkit.models.architecture import MoEConfig
from toolkit.models.loss import IGNORE_INDEX, shift_labels

SCHEDULES = ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"]
BOUND = 1e-12
Z = 1e-3
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True, "positions": "learned", "norm": "layer_norm", "bias": True},
    "moe": {
        "moe": MoEConfig(
            num_experts=4,
            top_k=2,
            intermediate_size=16,
            dense_layers=(0, 5),
            load_balancing_multiplier=0.05,
            router_z_loss_multiplier=0.01,
        )
    },
}
SHAPES = [(8, 16, 2), (4, 12, 2), (7, 16, 2)]
"""Rows, length and rows of a microbatch; of the last shape one microbatch is smaller."""


def model_config(kind: str) -> Any:
    return tiny_model(num_layers=8, d_model=16, intermediate_size=24, init_std=0.1, **MODELS[kind])


def open_engine(kind: str, schedule: str, degree: int, **options: Any) -> tuple[Any, Any]:
    pipeline = PipelineParallelConfig(degree=degree, schedule=schedule)  # type: ignore[arg-type]
    config = module_config("fsdp", pp_config=pipeline if degree > 1 else None)
    environment = open_environment(config)
    model = model_config(kind).build(init_device="meta").double()
    engine = prepare_engine(environment, model, config.optim.build, max_grad_norm=None, **options)
    return engine, environment


def batch_of(rows: int, length: int, seed: int = 0) -> Microbatch:
    """Documents, and a share of targets that grows from row to row."""
    generator = torch.Generator().manual_seed(100 * seed + rows * length)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1)
    share = torch.linspace(0.1, 0.9, rows)[:, None]
    mask = torch.rand(rows, length, generator=generator) < share
    return Microbatch(ids, shift_labels(ids, mask, documents), documents)


def targets(batch: Microbatch) -> int:
    return int((batch.labels != IGNORE_INDEX).sum())


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def apart(got: torch.Tensor, wanted: torch.Tensor, least: float = 1e-30) -> float:
    """The relative difference; of what is smaller than `least`, relative to that."""
    return float((whole(got) - wanted).norm() / wanted.norm().clamp(min=least))


def worst_differences(kind: str, schedule: str, degree: int, options: dict) -> dict[str, float]:
    """Of all ranks' results from one process's, the largest of each sort."""
    engine, environment = open_engine(kind, schedule, degree, **options)
    try:
        shapes = [(r, n, m if degree == 2 else 1) for r, n, m in SHAPES]
        reference = model_config(kind).build(seed=3).double()
        initial = dict(reference.named_parameters())
        found: dict[str, list[float]] = {
            "initial": [float((whole(p) != initial[n]).sum()) for n, p in engine._named.items()]
        }
        for rows, length, microbatch in shapes:
            batch = batch_of(rows, length)
            factor, options = 1.0 / targets(batch), {"document_ids": batch.document_ids}
            sums = engine.forward_backward(batch.split(microbatch), factor, z_loss_multiplier=Z)
            reference.zero_grad()
            wanted = reference(batch.input_ids, batch.labels, **options, z_loss_multiplier=Z)
            (wanted.loss * factor).backward()
            gradients = {name: p.grad for name, p in reference.named_parameters()}
            norm = engine._global_norm(engine.gradient_shards())
            total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            found.setdefault("norm", []).append(apart(norm, total))
            least = 1e-6 * float(total)  # the true gradient of a key's bias is zero
            for name, parameter in engine._named.items():
                off = apart(parameter.grad, gradients[name], least)
                found.setdefault("gradients", []).append(off)
                parameter.grad = None
            evaluated, logits = engine.forward(batch), engine.logits(batch.input_ids)
            with torch.no_grad():
                found.setdefault("logits", []).append(apart(logits, reference(batch.input_ids)))
                plain = reference(batch.input_ids, batch.labels, **options).ce
            for name, ours, theirs in (
                ("loss", sums.loss, wanted.loss), ("ce", sums.ce, wanted.ce),
                ("z", sums.z, wanted.z), ("evaluated", evaluated.ce, plain),
            ):  # fmt: skip
                ours = ours.clone()
                dist.all_reduce(ours)  # zeros but where the last stage is
                found.setdefault(name, []).append(apart(ours, theirs.detach()))
            if wanted.router is not None:
                assert sums.router is not None
                for name, ours, theirs in zip(
                    wanted.router._fields, sums.router, wanted.router, strict=True
                ):
                    found.setdefault(f"router {name}", []).append(apart(ours, theirs))
        return {name: max(values) for name, values in found.items()}
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("schedule", "degree", "kind", "options"),
    [
        *((schedule, 2, kind, {}) for schedule in SCHEDULES for kind in MODELS),
        ("1F1B", 4, "tied", {}),
        *((s, 2, "moe", {"ac_config": ActivationCheckpointingConfig()}) for s in SCHEDULES),
    ],
)
def test_gradients_and_sums_are_those_of_one_process(
    workers: WorkerPool, schedule: str, degree: int, kind: str, options: dict
) -> None:
    for found in workers.run(degree, worst_differences, kind, schedule, degree, options):
        assert found.pop("initial") == 0.0
        assert max(found.values()) < BOUND, found
