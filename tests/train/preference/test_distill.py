"""Distillation: the divergence, its gradient, and equal numbers whatever the split."""

from typing import Any

import pytest
import torch

from tests.tiny import (
    ROWS,
    SEQ,
    build,
    global_batch,
    module_config,
    open_environment,
    tiny_model,
    train_steps,
)
from tests.workers import WorkerPool
from toolkit.distributed.materialize import materialize_frozen
from toolkit.models.distillation import DistillationLoss, GiveRows
from toolkit.optim.config import SGDConfig
from toolkit.train.preference.config import DistillConfig
from toolkit.train.preference.frozen import FrozenModel


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize(("temperature", "share", "cap"), [(1.0, 0.0, None), (2.0, 0.25, 3.0)])
def test_the_formula_and_its_gradient(
    is_reverse: bool, temperature: float, share: float, cap: float | None
) -> None:
    config = tiny_model(logit_soft_cap=cap, loss_chunk_size=11)
    model, teacher = config.build(seed=1).double(), tiny_model(d_model=48).build(seed=2).double()
    ids, labels = global_batch(0), torch.roll(global_batch(0), -1, 1)
    labels[:, -3:] = -100
    is_target = labels != -100
    logits = model(ids)
    p = (teacher(ids) / temperature).log_softmax(-1).detach()
    q = (logits / temperature).log_softmax(-1)
    first, second = (q, p) if is_reverse else (p, q)
    kl = (first.exp() * (first - second)).sum(-1) * temperature**2
    ce = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = ((1 - share) * kl + share * ce)[is_target].sum()
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    teacher.head.loss = GiveRows()
    loss = model.head.loss = DistillationLoss(
        model.head.loss,
        is_reverse=is_reverse,
        temperature=temperature,
        cross_entropy_weight=share,
    )
    with torch.no_grad():
        loss.teacher = teacher(ids, labels)
    sums = model(ids, labels)
    sums.loss.backward()
    torch.testing.assert_close(sums.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.divergence, kl[is_target].sum().detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-11)


def history_of(engine: str, rows: int) -> list[dict[str, float]]:
    objective = DistillConfig(teacher="given", temperature=2.0, cross_entropy_weight=0.5)
    config = module_config(
        engine, objective=objective, rank_microbatch_size=rows * SEQ, optim=SGDConfig(lr=0.1)
    )
    environment = open_environment(config)
    try:
        module: Any = build(config, environment)
        teacher = tiny_model(num_layers=3).build(init_device="meta")
        teacher.head.loss = GiveRows()
        whole = tiny_model(num_layers=3).build(seed=9)
        materialize_frozen(teacher, environment)
        with torch.no_grad():
            for name, parameter in teacher.named_parameters():
                value = whole.get_parameter(name)
                if hasattr(parameter, "to_local"):
                    size = parameter.to_local().shape[0]
                    start = environment.rank * -(-value.shape[0] // environment.world_size)
                    parameter.to_local().copy_(value[start : start + size])
                else:
                    parameter.copy_(value)
        module.give_teacher(FrozenModel(teacher))
        return train_steps(module, 0, 2)
    finally:
        environment.close()


@pytest.mark.parametrize(("engine", "rows"), [("fsdp", 2), ("zero3", 4)])
def test_engines_agree(workers: WorkerPool, engine: str, rows: int) -> None:
    expected = workers.run(1, history_of, "single", ROWS)[0]
    for got, want in zip(workers.run(2, history_of, engine, rows)[0], expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
