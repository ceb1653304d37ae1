"""Every optimizer under every engine that can hold it: the steps of one process, resumed to the
last bit, and its state in checkpoints that any other engine loads."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from tests.checkpoint.exchange import differences, save, stored
from tests.distributed.test_evaluating import evaluated, memory
from tests.tiny import SEQ, module_config, open_environment, tiny_model, train_steps
from tests.workers import WorkerPool
from toolkit.checkpoint.load import load_checkpoint, load_weights
from toolkit.distributed import fully_sharded
from toolkit.distributed.config import PipelineParallelConfig, TensorParallelConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.optim.base import GroupOverride, Optimizer
from toolkit.optim.config import (
    AdafactorConfig,
    AdamConfig,
    AdamW8bitConfig,
    LionConfig,
    NoopConfig,
    NorMuonConfig,
    ScheduleFreeAdamWConfig,
    SGDConfig,
)
from toolkit.train.transformer import TransformerTrainModule

GROUPS = (GroupOverride(params=["*norm.weight"], opts={"weight_decay": 0.0}),)
ELEMENTWISE: dict[str, Optimizer] = {
    "adam": AdamConfig(lr=1e-3, layer_lr_decay=0.9),
    "sgd": SGDConfig(lr=1e-1, momentum=0.9),
    "lion": LionConfig(lr=1e-4, group_overrides=GROUPS),
    "schedule_free_adamw": ScheduleFreeAdamWConfig(lr=1e-3, weight_decay=0.1),
    "noop": NoopConfig(),
    "normuon": NorMuonConfig(lr=1e-3, layer_lr_decay=0.9, group_overrides=GROUPS),
}
WHOLE: dict[str, Optimizer] = {"adafactor": AdafactorConfig(), "adamw_8bit": AdamW8bitConfig()}
SAVED, LAST = 2, 4
STEP = f"step{SAVED}"

Numbers = tuple[list[dict[str, float]], float]


def build(
    engine: str, optim: Optimizer, env: TrainingEnvironment, changes: dict[str, Any], is_exact: bool
) -> TransformerTrainModule:
    config = module_config(engine, optim=optim, max_grad_norm=None, **changes)
    model = tiny_model(d_model=64).build(init_device="meta")
    return config.build(model.double() if is_exact else model, environment=env)


def load(module: TransformerTrainModule, checkpoint: Path) -> None:
    env, tensors = module.environment, module.state_tensors()
    for tensor in tensors.values():
        memory(tensor).fill_(3)  # all of it must be replaced
    load_checkpoint(checkpoint, tensors=tensors, rank=env.rank, group=env.cpu_group)
    module.state_filled()


def numbers_of(
    engine: str,
    changes: dict[str, Any],
    optimizers: dict[str, Optimizer],
    is_exact: bool,
    root: str,
    reference: str | None,
) -> dict[str, Numbers]:
    """The metrics of the steps after a checkpoint in `root`, and an evaluation at it. Asserts that
    a module which loads the checkpoint has the same; saves again what it loads of `reference`."""
    env = open_environment(module_config(engine, **changes))
    found: dict[str, Numbers] = {}

    def in_float64(**_: Any) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(cast_forward_inputs=False)

    policy = in_float64 if is_exact else MixedPrecisionPolicy
    uncompiled = mock.patch.object(torch, "compile", lambda function, **_: function)
    try:
        with mock.patch.object(fully_sharded, "MixedPrecisionPolicy", policy), uncompiled:
            for name, optim in optimizers.items():
                module = build(engine, optim, env, changes, is_exact)
                train_steps(module, 0, SAVED)
                save(module, Path(root) / name, SAVED)
                with module.evaluating():
                    evaluation = evaluated(module)
                history = train_steps(module, SAVED, LAST)
                found[name] = history, evaluation
                again = build(engine, optim, env, changes, is_exact)
                load(again, Path(root) / name / STEP)
                with again.evaluating():
                    assert evaluated(again) == evaluation, name
                assert train_steps(again, SAVED, LAST) == history, name
                if reference is not None:
                    load(again, Path(reference) / name / STEP)
                    save(again, Path(root) / f"{name}-again", SAVED)
        return found
    finally:
        env.close()


@pytest.fixture(scope="module")
def alone(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of one process, in float64 and in float32."""
    made = {}
    for is_exact, optimizers in ((True, ELEMENTWISE), (False, ELEMENTWISE | WHOLE)):
        root = str(tmp_path_factory.mktemp("alone"))
        job = ("single", {}, optimizers, is_exact, root, None)
        made[is_exact] = root, workers.run(1, numbers_of, *job)[0]
    return made


PIPELINE = {"pp_config": PipelineParallelConfig(degree=2), "rank_microbatch_size": 4 * SEQ}
TENSOR = {"tp_config": TensorParallelConfig(degree=2)}


@pytest.mark.parametrize(
    ("engine", "ranks", "changes", "is_exact", "more"),
    [
        ("ddp", 2, {}, False, WHOLE),
        ("fsdp", 2, {}, True, {}),
        pytest.param("hsdp", 4, {}, True, {}, marks=pytest.mark.slow),
        ("zero1", 2, {}, False, {}),
        pytest.param("zero2", 2, {}, False, {}, marks=pytest.mark.slow),
        ("zero3", 2, {}, False, {}),
        ("fsdp", 2, TENSOR, True, {}),
        pytest.param("fsdp", 2, PIPELINE, True, {}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3", "tp", "pp"],
)
def test_steps_are_those_of_one_process_and_resume_to_the_last_bit(
    workers: WorkerPool,
    tmp_path: Path,
    alone: Any,
    engine: str,
    ranks: int,
    changes: dict[str, Any],
    is_exact: bool,
    more: dict[str, Optimizer],
) -> None:
    reference, expected = alone[is_exact]
    optimizers = ELEMENTWISE | more
    job = (engine, changes, optimizers, is_exact, str(tmp_path), reference)
    found = workers.run(ranks, numbers_of, *job)[0]
    for name in optimizers:
        history, evaluation = found[name]
        wanted, wanted_evaluation = expected[name]
        bound = 1e-9 if is_exact else 2e-5
        assert evaluation == pytest.approx(wanted_evaluation, rel=bound), name
        losses = [step["loss"] for step in history]
        assert losses == pytest.approx([step["loss"] for step in wanted], rel=bound), name
        original = stored(Path(reference) / name / STEP)
        assert differences(stored(tmp_path / f"{name}-again" / STEP), original) == [], name
        own = stored(tmp_path / name / STEP)
        assert own.keys() == original.keys()
        if is_exact:
            for key, tensor in own.items():
                torch.testing.assert_close(tensor, original[key], rtol=1e-9, atol=1e-12, msg=key)


def evaluation_of(checkpoint: str) -> float:
    """Of the weights in a checkpoint, by a module whose optimizer knows of no average."""
    env = open_environment(module_config("single"))
    try:
        module = build("single", NoopConfig(), env, {}, is_exact=True)
        tensors = module.state_tensors()
        load_weights(
            Path(checkpoint), {k: t for k, t in tensors.items() if k[:6] == "model."}, None
        )
        return evaluated(module)
    finally:
        env.close()


def test_checkpoints_of_schedule_free_hold_the_average(workers: WorkerPool, alone: Any) -> None:
    root, expected = alone[True]
    checkpoint = Path(root) / "schedule_free_adamw" / STEP
    history, evaluation = expected["schedule_free_adamw"]
    assert workers.run(1, evaluation_of, str(checkpoint)) == [evaluation]
    assert history[0]["loss"] < expected["noop"][0][0]["loss"]
    state = stored(checkpoint)
    name = "blocks.0.attention.query.weight"
    kinds = {key.rpartition(".")[2] for key in state if key.startswith(f"optim.{name}.")}
    assert kinds == {"z", "exp_avg_sq", "step", "weight_sum", "lr_max", "beta1"}
    assert not torch.equal(state[f"model.{name}"], state[f"optim.{name}.z"])
