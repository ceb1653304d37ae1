"""A pipeline of stages computes what one process computes, in float64 to the last digits."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.tiny import VOCAB, module_config, open_environment, tiny_model
from tests.workers import WorkerPool
from toolkit.distributed import fully_sharded, materialize
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    PipelineParallelConfig,
)
from toolkit.distributed.engine import Microbatch
from toolkit.distributed.pipeline import check_microbatches, plan_pipeline
from toolkit.distributed.stages import TIED
from toolkit.errors import ConfigError
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.loss import IGNORE_INDEX, shift_labels

SCHEDULES = ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"]
BOUND = 1e-12
Z = 1e-3
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True, "positions": "learned"},
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


@contextlib.contextmanager
def engine_of(
    kind: str, schedule: str, degree: int, *, double: bool = True, **options: Any
) -> Iterator[Any]:
    """An engine of this many ranks, one of them without a pipeline; in float64, which is then the
    type of reductions too."""
    pipeline = PipelineParallelConfig(degree=degree, schedule=schedule)  # type: ignore[arg-type]
    changes = {"precision": options.pop("precision", "fp32")}
    config = module_config("fsdp", pp_config=pipeline if degree > 1 else None, **changes)
    environment = open_environment(config)
    model = model_config(kind).build(init_device="meta")
    policy = mock.Mock(return_value=MixedPrecisionPolicy(cast_forward_inputs=False))
    exact = mock.patch.object(fully_sharded, "MixedPrecisionPolicy", policy)
    try:
        with exact if double else contextlib.nullcontext():
            yield materialize.prepare_engine(
                environment,
                model.double() if double else model,
                config.optim.build,
                max_grad_norm=None,
                **options,
            )
    finally:
        environment.close()


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


def apart(got: Any, wanted: torch.Tensor) -> float:
    """The relative difference."""
    return float((whole(got) - wanted).norm() / wanted.norm().clamp(min=1e-30))


def worst_differences(kind: str, schedule: str, degree: int, options: dict) -> dict[str, float]:
    """Of this rank's results from one process's, the largest of each sort."""
    found: dict[str, list[float]] = {}

    def compare(name: str, ours: Any, theirs: torch.Tensor) -> None:
        found.setdefault(name, []).append(apart(ours, theirs.detach()))

    with engine_of(kind, schedule, degree, **options) as engine:
        reference = model_config(kind).build(seed=3).double()
        initial = dict(reference.named_parameters())
        assert all(whole(p).equal(initial[name]) for name, p in engine._named.items())
        for rows, length, microbatch in SHAPES:
            batch = batch_of(rows, length)
            factor, documents = 1.0 / targets(batch), {"document_ids": batch.document_ids}
            parts = batch.split(microbatch if degree == 2 else 1)
            sums = engine.forward_backward(parts, factor, z_loss_multiplier=Z)
            reference.zero_grad()
            wanted = reference(batch.input_ids, batch.labels, **documents, z_loss_multiplier=Z)
            (wanted.loss * factor).backward()
            gradients = {name: p.grad for name, p in reference.named_parameters()}
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            compare("norm", engine._global_norm(engine.gradient_shards()), norm)
            for name, parameter in engine._named.items():
                compare("gradient", parameter.grad, gradients[name])
                parameter.grad = None
            with torch.no_grad():
                compare("logits", engine.logits(batch.input_ids), reference(batch.input_ids))
                evaluated = engine.forward(batch).ce.clone()
                plain = reference(batch.input_ids, batch.labels, **documents).ce
            dist.all_reduce(evaluated)  # zeros but where the last stage is
            compare("evaluated", evaluated, plain)
            for name in ("loss", "ce", "z"):
                ours = getattr(sums, name).clone()
                dist.all_reduce(ours)
                compare(name, ours, getattr(wanted, name))
            for ours, theirs in zip(sums.router or (), wanted.router or (), strict=True):
                compare("router", ours, theirs)
        return {name: max(values) for name, values in found.items()}


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
        assert max(found.values()) < BOUND, found


def train(engine: Any, steps: int) -> list[float]:
    """Norms of the gradients of steps of AdamW, evaluations between them."""
    norms = []
    for step in range(steps):
        batch = batch_of(8, 16, seed=step)
        engine.forward_backward(batch.split(2), 1.0 / targets(batch))
        norms.append(engine.step(None).grad_norm.item())
        engine.forward(batch)
    return norms


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: whole(p.detach()).clone() for name, p in engine._named.items()}


def trained(kind: str, schedule: str, degree: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, both copies of tied embeddings among them, and norms after three steps."""
    with engine_of(kind, schedule, degree) as engine:
        norms = train(engine, 3)
        weights = weights_of(engine)
        if degree > 1 and (twins := engine.module.twins) is not None:
            weights["twin"] = whole(twins[1].detach()).clone()
        return weights, norms


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_steps_of_adamw_are_those_of_one_process_and_of_another_run(
    workers: WorkerPool, schedule: str, kind: str
) -> None:
    wanted, wanted_norms = workers.run(1, trained, kind, schedule, 1)[0]
    by_rank = workers.run(2, trained, kind, schedule, 2)
    for weights, norms in by_rank:
        assert norms == pytest.approx(wanted_norms, rel=BOUND)
        for name, weight in weights.items():
            assert apart(weight, wanted[TIED if name == "twin" else name]) < 1e-9, name
    assert set().union(*(weights for weights, _ in by_rank)) - {"twin"} == set(wanted)
    copies = [w[n] for w, _ in by_rank for n in (TIED, "twin") if n in w]
    assert len(copies) == (2 if kind == "tied" else 1)
    assert copies[0].equal(copies[-1])
    for (weights, norms), (again, same) in zip(
        by_rank, workers.run(2, trained, kind, schedule, 2), strict=True
    ):
        assert norms == same
        assert all(again[name].equal(weight) for name, weight in weights.items())


def step_with_nan(schedule: str) -> tuple[bool, bool]:
    """Whether the step was skipped, and all weights but the broken one stayed as they were."""
    with engine_of("tied", schedule, 2) as engine:
        name = ""
        if dist.get_rank() == 1:
            name, broken = next((n, p) for n, p in engine._local.items() if n.endswith("up.weight"))
            broken.data[0, 0] = float("nan")
        before = weights_of(engine)
        batch = batch_of(8, 16, seed=7)
        engine.forward_backward(batch.split(2), 1.0 / targets(batch))
        skipped = engine.step(None).skipped.item() == 1.0
        after = weights_of(engine)
        return skipped, all(after[n].equal(before[n]) or n == name for n in before)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nan_in_one_stage_skips_the_step_of_all(workers: WorkerPool, schedule: str) -> None:
    assert workers.run(2, step_with_nan, schedule) == [(True, True)] * 2


def gradients_in_bf16(schedule: str) -> dict[str, torch.Tensor]:
    with engine_of("llama", schedule, 2, double=False, precision="bf16") as engine:
        batch = batch_of(12, 16)
        engine.forward_backward(batch.split(1), 1.0 / targets(batch))
        return {name: whole(p.grad) for name, p in engine._named.items()}


def test_zero_bubble_adds_up_bf16_gradients_in_fp32(workers: WorkerPool) -> None:
    found = [workers.run(2, gradients_in_bf16, s) for s in ("1F1B", "ZBVZeroBubble")]
    by_schedule = [{n: g for rank in ranks for n, g in rank.items()} for ranks in found]
    for name, gradient in by_schedule[0].items():
        assert apart(by_schedule[1][name], gradient) < 1e-6, name


def layers_of(schedule: str, degree: int, points: Any = None, **model: Any) -> list[int]:
    config = PipelineParallelConfig(degree=degree, schedule=schedule, split_points=points)  # type: ignore[arg-type]
    return [len(layers) for layers in plan_pipeline(tiny_model(**model), config).layers]


def test_stages_have_equal_costs_head_counted() -> None:
    assert layers_of("1F1B", 2, num_layers=8, vocab_size=64) == [4, 4]
    assert layers_of("1F1B", 2, num_layers=8, vocab_size=4096) == [7, 1]
    assert layers_of("1F1B", 4, (1, 2, 7), num_layers=8) == [1, 1, 5, 1]
    assert layers_of("ZBVZeroBubble", 2, num_layers=7, vocab_size=64) == [2, 2, 2, 1]


def test_ranks_of_stages() -> None:
    def ranks(schedule: Any) -> list[int]:
        config = PipelineParallelConfig(degree=3, schedule=schedule)
        pipeline = plan_pipeline(tiny_model(num_layers=12), config)
        by_rank = [pipeline.stages_of(rank) for rank in range(3)]
        assert all(pipeline.rank_of(s) == r for r, own in enumerate(by_rank) for s in own)
        return [pipeline.rank_of(stage) for stage in range(pipeline.num_stages)]

    assert ranks("1F1B") == [0, 1, 2]
    assert ranks("Interleaved1F1B") == [0, 1, 2, 0, 1, 2]
    assert ranks("ZBVZeroBubble") == [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize(
    ("schedule", "degree", "points", "message"),
    [
        ("1F1B", 9, None, "has 9 stages, but the model has 8 layers; use a degree of at most 8"),
        ("ZBVZeroBubble", 5, None, "has 10 stages, .* use a degree of at most 4"),
        ("1F1B", 2, (8,), "8 is not a layer of the model, whose last one is 7"),
    ],
)
def test_stages_that_do_not_fit_are_refused(
    schedule: str, degree: int, points: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        layers_of(schedule, degree, points, num_layers=8)


def test_advice_fits_the_number_of_ranks() -> None:
    pipeline = PipelineParallelConfig(degree=8)
    with pytest.raises(ConfigError, match=r"has 6 layers; use 4$"):
        plan_pipeline(tiny_model(num_layers=6), pipeline, ranks=16)
    with pytest.raises(ConfigError, match=r"has 6 layers; leave pp_config out$"):
        plan_pipeline(tiny_model(num_layers=6), pipeline, ranks=7)
    with pytest.raises(ConfigError, match=r"use data_loader.global_batch_size 384 or a multiple"):
        check_microbatches("1F1B", 4, 3, 2, length=16, batch_ranks=3)


def test_zero_bubble_of_compiled_blocks_is_refused() -> None:
    pipeline = PipelineParallelConfig(degree=2, schedule="ZBVZeroBubble")
    with pytest.raises(ValueError, match="use 1F1B or Interleaved1F1B"):
        module_config("fsdp", pp_config=pipeline, compile_model=True)


@pytest.mark.parametrize(
    ("schedule", "degree", "rows", "microbatch", "advice"),
    [
        ("1F1B", 4, 8, 4, "2 microbatches, .* needs at least 4; use 32, which makes 4"),
        ("1F1B", 4, 3, 1, "a global batch of at least 4 rows on each data-parallel rank"),
        ("Interleaved1F1B", 2, 15, 3, "a multiple of 2 of them; use 80, which makes 3"),
    ],
)
def test_microbatches_that_do_not_fit_are_refused(
    schedule: Any, degree: int, rows: int, microbatch: int, advice: str
) -> None:
    with pytest.raises(ConfigError, match=f"train_module.rank_microbatch_size: .*{advice}"):
        check_microbatches(schedule, degree, rows, microbatch, length=16)
