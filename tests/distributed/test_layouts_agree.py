"""Tensor, context, pipeline and expert parallelism, alone and together: the same loss and the same
gradients as one process, to the rounding of float64, from the same config through the same engine.
"""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.distributed.whole import put_together
from tests.tiny import VOCAB, module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed import fully_sharded
from toolkit.distributed.config import (
    ContextParallelConfig,
    DataParallelConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.shards import local_boxes
from toolkit.models.config import TransformerConfig
from toolkit.models.init import canonical_parameters
from toolkit.models.layer_configs import DeltaNetConfig, MoEConfig
from toolkit.train.module import Metric
from toolkit.train.transformer import TransformerTrainModule

ROWS, SEQ = 8, 32
BOUND = 1e-12

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB, "vocab_multiple": 64, "d_model": 32, "num_layers": 4, "num_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_sequence_length": SEQ, "init_std": 0.08,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windows": {
        "tie_embeddings": True, "sliding_window": 12, "attention_pattern": ("sliding", "full"),
        "norm_placement": "sandwich", "num_key_value_heads": 4,
    },
    "one key head": {
        "num_key_value_heads": 1, "qk_norm": "full", "positions": "learned", "bias": True,
        "qkv_bias": False, "feed_forward": "gelu", "tie_embeddings": True,
    },
    "experts": {
        "qk_norm": "full",
        "moe": MoEConfig(
            num_experts=4, top_k=2, intermediate_size=32, dense_layers=(0,),
            shared_expert_intermediate_size=32,
            load_balancing_multiplier=0.5, router_z_loss_multiplier=0.1,
        ),
    },
    "hybrid": {
        "attention_pattern": ("linear", "full"), "norm_placement": "reordered", "qk_norm": "full",
        "delta_net": DeltaNetConfig(
            num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4,
            norm_placement="pre", allow_negative_eigenvalues=True,
        ),
    },
}  # fmt: skip

AXES: dict[str, dict[str, Any]] = {
    "fsdp": {"dp_config": DataParallelConfig(name="fsdp")},
    "hsdp": {"dp_config": DataParallelConfig(name="hsdp")},
    "zero1": {"dp_config": DataParallelConfig(name="zero1")},
    "zero3": {"dp_config": DataParallelConfig(name="zero3")},
    "tp": {"tp_config": TensorParallelConfig(degree=2)},
    "cp": {"cp_config": ContextParallelConfig(degree=2)},
    "ulysses": {"cp_config": ContextParallelConfig(degree=2, style="ulysses")},
    "ring": {"cp_config": ContextParallelConfig(degree=2, style="ring")},
    "pp": {"pp_config": PipelineParallelConfig(degree=2)},
    "pp of 3": {"pp_config": PipelineParallelConfig(degree=3)},
    "interleaved": {"pp_config": PipelineParallelConfig(degree=2, schedule="Interleaved1F1B")},
    "zbv": {"pp_config": PipelineParallelConfig(degree=2, schedule="ZBVZeroBubble")},
    "ep": {"ep_config": ExpertParallelConfig(degree=2)},
}


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    batch = {"input_ids": torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)}
    if kind != "plain":
        cuts = torch.rand(ROWS, SEQ, generator=generator) < 0.1
        keep = torch.rand(ROWS, SEQ, generator=generator) < torch.linspace(0.3, 1.0, ROWS)[:, None]
        batch |= {"document_ids": cuts.cumsum(1).int(), "label_mask": keep}
    return batch


def whole_gradients(module: TransformerTrainModule, names: list[str]) -> dict[str, torch.Tensor]:
    """Every gradient put together from what the ranks have of it. Asserts that copies are equal."""
    engine, gradients = module.engine, {}
    own = engine.gradient_shards()
    parameters: dict[str, Any] = canonical_parameters(engine.module)
    for name, shape in names_and_shapes(module, names):
        has = name in own
        boxes = local_boxes(parameters[name], engine.shards[name]) if has else []
        gradients[name] = put_together(shape, own.get(name), boxes)
    return gradients


def names_and_shapes(
    module: TransformerTrainModule, names: list[str]
) -> list[tuple[str, torch.Size]]:
    whole = canonical_parameters(module.model_config.build(init_device="meta"))
    return [(name, whole[name].shape) for name in names]


def numbers_of(
    axes: tuple[str, ...], models: tuple[str, ...], kinds: tuple[str, ...], precision: str = ""
) -> Any:
    """For each model and kind of batch: loss, evaluation, norm and gradients; two microbatches of a
    rank, or as many as there are stages, where it has rows for them. `precision`: not float64, but
    that of the config."""
    fields: dict[str, Any] = {"dp_config": None}
    fields |= {"precision": precision} if precision else {}
    for axis in axes:
        fields |= AXES[axis]
    answers = {}
    config = module_config(**fields)
    env = open_environment(config)
    exact = mock.patch.object(fully_sharded, "MixedPrecisionPolicy", in_float64)
    try:
        if not precision:
            exact.start()
        layout = env.layout
        rows, share = ROWS // layout.batch_ranks, layout.batch_rank(env.rank)
        for model in models:
            parts = TransformerConfig(**(DENSE | MODELS[model]))
            size = max(1, rows // max(2, layout.pp)) * SEQ
            cut = config.replace(rank_microbatch_size=size, max_grad_norm=None)
            whole = parts.build(init_device="meta")
            whole = whole if precision else whole.double()
            names = list(canonical_parameters(whole))
            module = cut.build(whole, environment=env)
            for kind in kinds:
                batch = {
                    name: value[share * rows : (share + 1) * rows]
                    for name, value in batch_of(kind).items()
                }
                evaluated = torch.stack(module.eval_batch(batch)[:2]).double()
                metrics = module.train_batch(batch)
                loss = metrics["loss"].value.detach().double() * layout.owns_loss(env.rank)
                sums = torch.cat([evaluated, loss[None]])
                if dist.is_initialized():
                    dist.all_reduce(sums)
                gradients = {} if layout.zero_stage else whole_gradients(module, names)
                for group in module.engine.optimizer.param_groups:
                    group["lr"] = 0.0
                norm = module.engine.step(None).grad_norm.double()
                load = metrics.get("expert_load_max", Metric(0.0)).value
                answers[model, kind] = (torch.cat([sums, norm[None]]), gradients, float(load))
        return answers
    finally:
        if not precision:
            exact.stop()
        env.close()


def in_float64(**_: Any) -> MixedPrecisionPolicy:
    """Gradients are reduced in their own type."""
    return MixedPrecisionPolicy(cast_forward_inputs=False)


@pytest.fixture(scope="module")
def alone(workers: WorkerPool) -> Any:
    return workers.run(1, numbers_of, (), tuple(MODELS), ("plain", "packed"))[0]


def slow(*case: Any, timeout: float = 300) -> Any:
    return pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.timeout(timeout)])


CASES = [
    # Alone, where tests of the axis itself or its layout with another one say as much.
    slow(2, ("tp",), ("llama", "windows", "experts")),
    slow(2, ("cp",), ("llama", "windows", "experts")),
    (2, ("ulysses",), ("llama", "windows")),
    slow(2, ("ring",), ("llama", "windows")),
    slow(2, ("pp",), ("llama", "windows", "experts")),
    slow(2, ("interleaved",), ("llama", "experts")),
    slow(2, ("zbv",), ("windows", "experts")),
    slow(2, ("ep",), ("experts",)),
    (2, ("zero1", "cp"), ("llama",)),
    (2, ("zero3", "ring"), ("llama",)),
    (4, ("fsdp", "tp"), ("one key head", "experts", "hybrid")),
    (4, ("hsdp", "cp"), ("llama",)),
    (4, ("hsdp", "tp"), ("one key head",)),
    (4, ("hsdp", "pp"), ("llama",)),
    (4, ("hsdp", "ep"), ("experts",)),
    (4, ("fsdp", "pp"), ("windows",)),
    (4, ("fsdp", "ep"), ("experts",)),
    (4, ("tp", "cp"), ("windows", "experts")),
    (4, ("tp", "pp"), ("windows", "experts", "hybrid")),
    (4, ("tp", "ep"), ("experts",)),
    slow(4, ("cp", "pp"), ("windows",)),  # as ring-zbv
    (4, ("ring", "zbv"), ("llama",)),
    (4, ("cp", "ep"), ("experts",)),
    (4, ("pp", "ep", "fsdp"), ("experts",)),
    slow(6, ("fsdp", "pp of 3"), ("windows", "one key head")),
    # Each two of them are above.
    slow(8, ("pp", "cp", "tp", "ep"), ("experts",), timeout=900),
    slow(16, ("interleaved", "fsdp", "cp", "tp", "ep"), ("experts",), timeout=900),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "axes", "models"),
    CASES,
    ids=["-".join(getattr(case, "values", case)[1]) for case in CASES],
)
def test_numbers_are_those_of_one_process(
    workers: WorkerPool, alone: Any, ranks: int, axes: tuple[str, ...], models: tuple[str, ...]
) -> None:
    kinds = ("plain", "packed")
    by_rank = workers.run(ranks, numbers_of, axes, models, kinds, timeout=800)
    for key, (sums, gradients, _) in by_rank[0].items():
        wanted_sums, wanted, wanted_load = alone[key]
        # fp32 norms, everything else float64
        torch.testing.assert_close(sums[:3], wanted_sums[:3], rtol=BOUND, atol=0.0, msg=str(key))
        assert sums[3].item() == pytest.approx(wanted_sums[3].item(), rel=1e-6), key
        assert [rank[key][2] for rank in by_rank] == [pytest.approx(wanted_load)] * ranks, key
        for name, gradient in gradients.items():
            error = (gradient - wanted[name]).norm() / wanted[name].norm()
            assert error <= BOUND, (key, name, error.item())
    first = by_rank[0]
    for other in by_rank[1:]:
        for key, (sums, gradients, _) in other.items():
            assert torch.equal(sums, first[key][0])
            assert all(torch.equal(g, first[key][1][n]) for n, g in gradients.items())


@pytest.fixture(scope="module")
def rounded(workers: WorkerPool) -> Any:
    """One process in bf16."""
    return workers.run(1, numbers_of, (), ("llama", "experts"), ("packed",), "bf16")[0]


@pytest.mark.parametrize(("axis", "model"), [
    ("tp", "llama"), ("cp", "llama"), ("pp", "llama"), ("ep", "experts"),
])  # fmt: skip
def test_bf16_rounds_no_worse_than_on_one_process(
    workers: WorkerPool, alone: Any, rounded: Any, axis: str, model: str
) -> None:
    """Against float64: the loss to the rounding of a few bf16 numbers, and all gradients with at
    most a half more error than those of one process in bf16."""
    key = model, "packed"
    (exact, wanted, _), (_, base, _) = alone[key], rounded[key]
    sums, gradients, _ = workers.run(2, numbers_of, (axis,), (model,), ("packed",), "bf16")[0][key]
    torch.testing.assert_close(sums[:3], exact[:3], rtol=1e-3, atol=0.0)
    errors = [
        torch.stack([(own[name] - wanted[name]).norm() for name in wanted]).norm().item()
        for own in (gradients, base)
    ]
    assert 0 < errors[0] <= 1.5 * errors[1]
