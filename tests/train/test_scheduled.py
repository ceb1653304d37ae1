"""Any number of the optimizer's groups, and the z-loss, may follow a schedule."""

from typing import Any

import pytest

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment
from tests.workers import WorkerPool
from toolkit.config import convert
from toolkit.errors import ConfigError
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamW8bitConfig, AdamWConfig, SGDConfig
from toolkit.optim.curves import ConstantConfig, CosineConfig, LinearConfig
from toolkit.optim.schedules import SchedulerConfig
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.scheduled import check_schedules, factor_at
from toolkit.train.timeline import Progress

STEPS, SIZE = 6, ROWS * SEQ
OPTIM = AdamWConfig(
    lr=1e-3,
    weight_decay=0.2,
    group_overrides=(
        GroupOverride(params=["embeddings.*"], opts={"lr": 5e-4, "weight_decay": 0.0}),
        GroupOverride(params=["head.*"], opts={"weight_decay": 0.05, "betas": [0.8, 0.9]}),
    ),
)
SCHEDULES: Any = {
    "weight_decay": LinearConfig(warmup=0),
    "betas.0": ConstantConfig(units="tokens", warmup=4 * SIZE, warmup_min_lr=0.45),
    "z_loss_multiplier": LinearConfig(warmup=0),
}


def progress(step: int) -> Progress:
    return Progress(step, step * SIZE, STEPS, STEPS * SIZE, SIZE)


def trained(engine: str | None, changes: dict[str, Any]) -> list[dict[str, float]]:
    """What each step records, and the settings of the groups in it."""
    config = module_config(engine, rank_microbatch_size=2 * SEQ, **changes)
    environment = open_environment(config)
    try:
        module, found = build(config, environment), []
        layout = environment.layout
        rows, share = ROWS // layout.batch_ranks, layout.batch_rank(environment.rank)
        for step in range(STEPS):
            module.progress = progress(step)
            batch = global_batch(step)[share * rows : (share + 1) * rows]
            metrics = module.train_batch({"input_ids": batch})
            metrics |= module.optim_step(progress(step))
            values = {name: float(metric.value) for name, metric in metrics.items()}
            for number, group in enumerate(module.engine.optimizer.param_groups):
                for name in ("lr", "weight_decay"):
                    values[f"{name}/{number}"] = group[name]
                values[f"betas/{number}"] = tuple(group["betas"])
            found.append(values)
        return found
    finally:
        environment.close()


@pytest.mark.parametrize(("engine", "ranks"), [(None, 1), ("fsdp", 2), ("zero2", 2)])
def test_groups_keep_their_ratios_and_values_are_recorded(
    workers: WorkerPool, engine: str | None, ranks: int
) -> None:
    changes = {
        "optim": OPTIM,
        "scheduler": CosineConfig(warmup=2),
        "schedules": SCHEDULES,
        "z_loss_multiplier": 1e-3,
    }
    found = workers.run(ranks, trained, engine, changes)[0]
    for step, values in enumerate(found):
        left, warm = 1 - step / STEPS, min(1.0, 0.5 + 0.5 * (step + 1) / 4)
        rate = CosineConfig(warmup=2).factor(step, STEPS)
        assert values["lr"] == 1e-3 * rate
        assert values["weight_decay"] == pytest.approx(0.2 * left)
        assert values["betas.0"] == pytest.approx(0.9 * warm)
        assert values["z_loss_multiplier"] == pytest.approx(1e-3 * left)
        groups = {
            (values[f"lr/{n}"] / rate, round(values[f"weight_decay/{n}"], 12), values[f"betas/{n}"])
            for n in range(3)
        }
        assert {round(lr, 12) for lr, *_ in groups} == {1e-3, 5e-4}
        decays = {decay for _, decay, _ in groups}
        assert decays == {0.0, round(0.2 * left, 12), round(0.05 * left, 12)}
        firsts = {(round(first, 12), second) for *_, (first, second) in groups}
        assert firsts == {(round(0.9 * warm, 12), 0.95), (round(0.8 * warm, 12), 0.9)}


def test_the_z_loss_of_a_step_has_that_steps_multiplier(workers: WorkerPool) -> None:
    """Two steps without learning, the second one at half the multiplier."""
    frozen = {"optim": SGDConfig(lr=1e-3), "scheduler": ConstantConfig(warmup=10**9)}
    half = LinearConfig(warmup=0, t_max=2)
    with_z = frozen | {"z_loss_multiplier": 0.1}
    plain, scheduled = (
        workers.run(1, losses, frozen | with_z | {"schedules": schedules})[0]
        for schedules in ({}, {"z_loss_multiplier": half})
    )
    assert scheduled[0] == plain[0]
    assert scheduled[1]["z_loss"] == pytest.approx(plain[1]["z_loss"] / 2, rel=1e-6)


def losses(changes: dict[str, Any]) -> list[dict[str, float]]:
    config = module_config(None, **changes)
    environment = open_environment(config)
    try:
        module, found = build(config, environment), []
        for step in range(2):
            module.progress = progress(step)
            metrics = module.train_batch({"input_ids": global_batch(0)})
            metrics |= module.optim_step(progress(step))
            found.append({name: float(metrics[name].value) for name in ("loss", "z_loss")})
        return found
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("lr", {}, "train_module.schedules.lr: the learning rate follows train_module.scheduler"),
        ("weight_decy", {}, "no setting that a schedule can change; did you mean weight_decay?"),
        ("zzz", {}, "there are betas.0, betas.1, eps, weight_decay, z_loss_multiplier"),
        ("z_loss_multiplier", {}, "there is no z-loss; set train_module.z_loss_multiplier too"),
        ("z_loss_multiplier", {"z_loss_multiplier": 1e-3, "compile_model": True},
         "each value would be compiled anew"),
        ("weight_decay", {"optim": AdamWConfig(weight_decay=0.0)},
         "train_module.optim.weight_decay is 0, and a schedule multiplies it"),
        ("momentum", {"optim": AdamWConfig()}, "no setting that a schedule can change"),
        ("weight_decay", {"optim": AdamW8bitConfig()}, "its step is compiled, and each value"),
    ],
)  # fmt: skip
def test_settings_that_cannot_follow_are_refused(
    name: str, changes: dict[str, Any], expected: str
) -> None:
    config = TransformerTrainModuleConfig(schedules={name: LinearConfig()}, **changes)
    with pytest.raises(ConfigError) as error:
        check_schedules(config)
    assert expected in str(error.value)


def test_schedules_are_configs_by_name() -> None:
    given = {"schedules": {"betas.0": {"type": "wsd", "decay": 5}}}
    config = convert(given, TransformerTrainModuleConfig)
    assert config.to_dict()["schedules"]["betas.0"]["decay"] == 5
    check_schedules(config)


class Odd:
    """A schedule of a user: fine at first."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __call__(self, progress: float) -> float:
        if progress < 0.5:
            return 1.0
        return float(self.value) if self.value != "raises" else {}["gone"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nan", "step 4: gives nan; a factor is a number of 0 or more"),
        ("-1", "step 4: gives -1.0; a factor"),
        ("inf", "step 4: gives inf; a factor"),
        ("raises", "step 4: KeyError: 'gone'"),
    ],
)
def test_a_users_schedule_that_gives_no_rate_is_one_line(value: str, message: str) -> None:
    given = {"type": "tests.train.test_scheduled:Odd", "options": {"value": value}}
    schedule: Any = convert(given, SchedulerConfig)  # type: ignore[arg-type]
    assert factor_at(schedule, progress(2), 1e-3, "lr") == 1.0
    with pytest.raises(ConfigError) as error:
        factor_at(schedule, progress(3), 1e-3, "lr")
    assert str(error.value).startswith(f"train_module.scheduler: {message}")
