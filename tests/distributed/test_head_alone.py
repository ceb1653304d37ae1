"""A head that is trained alone learns in every engine: its hidden state needs no gradient."""

import pytest

from tests.tiny import build, global_batch, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.errors import TrainingError

ALL_BUT_HEAD = ("embeddings.*", "blocks.*", "head.norm.weight")


def losses_of(engine: str, ac: bool = False) -> list[float]:
    from toolkit.distributed.config import ActivationCheckpointingConfig

    config = module_config(
        engine,
        freeze=ALL_BUT_HEAD,
        ac_config=ActivationCheckpointingConfig(mode="full") if ac else None,
    )
    env = open_environment(config)
    try:
        module = build(config, env)
        history = train_steps(module, 0, 4, lambda step: global_batch(0))
        return [metrics["loss"] for metrics in history]
    finally:
        env.close()


@pytest.fixture(scope="module")
def alone(workers: WorkerPool) -> list[float]:
    return workers.run(1, losses_of, "single")[0]


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_it_learns_as_in_one_process(workers: WorkerPool, alone: list[float], engine: str) -> None:
    assert alone[0] > alone[1] > alone[2] > alone[3]
    for losses in workers.run(2, losses_of, engine):
        assert losses == pytest.approx(alone, rel=1e-5)


def test_activation_checkpointing_changes_nothing(workers: WorkerPool, alone: list[float]) -> None:
    assert workers.run(1, losses_of, "single", True)[0] == alone


def test_a_kernel_that_forgets_a_gradient_ends_training(monkeypatch) -> None:
    config = module_config(freeze=ALL_BUT_HEAD[:2])
    env = open_environment(config)
    try:
        module = build(config, env)
        forward = type(module.engine.module.head).forward

        def forgets(head, x, labels, tied_weight, **options):
            weight, head.weight.requires_grad = head.weight, False
            try:
                return forward(head, x, labels, tied_weight, **options)
            finally:
                weight.requires_grad = True

        monkeypatch.setattr(type(module.engine.module.head), "forward", forgets)
        with pytest.raises(TrainingError, match=r"^head\.weight: trained, but without a gradient"):
            module.train_batch({"input_ids": global_batch(0)})
    finally:
        env.close()
