"""When a run is over, told from a row of values; and settings of callbacks that cannot work."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.load import load_experiment
from toolkit.train.callbacks import config_base
from toolkit.train.callbacks.config import CallbacksConfig, EarlyStoppingConfig
from toolkit.train.callbacks.early_stopping import EarlyStopping

NAN = math.nan


class Run(SimpleNamespace):
    """As much of a `TrainState` as the callback sees."""

    def finish(self, reason: str, *, is_agreed: bool) -> None:
        self.ends.append((self.step, reason, is_agreed))


def stopping(**settings: Any) -> EarlyStopping:
    callback = EarlyStopping(EarlyStoppingConfig(enabled=True, **settings))
    callback.state = Run(step=0, is_main=True, ends=[], evaluations={})  # type: ignore[assignment]
    return callback


def evaluate(callback: EarlyStopping, values: list[float], first: int = 1) -> int | None:
    """At which of the values it ends."""
    state: Any = callback.state
    for step, value in enumerate(values, first):
        state.step, state.evaluations = step, {"val": {"name": "val", "loss": value}}
        callback.post_record()
        callback.post_record()  # the same evaluation counts once
        if state.ends:
            assert state.ends == [(step, "early_stopping", True)]
            return step
    return None


@pytest.mark.parametrize(
    ("settings", "values", "end"),
    [
        ({"patience": 2}, [3, 2, 2, 2], 4),
        ({"patience": 2}, [3, 4, 2.9, 3, 2.8, 5, 5], 7),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.5, 2.4], 3),
        ({"patience": 2, "mode": "max"}, [1, 2, 3, 3, 2], 5),
        ({"patience": 1}, [3, 2, 1, 0], None),
        ({"patience": 2}, [NAN, NAN], 2),
        ({"patience": 2}, [3, NAN, 2, NAN, math.inf], 5),
    ],
)
def test_patience_counts_values_that_are_not_better(
    settings: dict[str, Any], values: list[float], end: int | None
) -> None:
    assert evaluate(stopping(**settings), values) == end


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_resumed_run_ends_where_the_whole_one_does(cut: int) -> None:
    values = [3.0, 2.0, 2.5, 2.4, 2.3]
    first, second = stopping(patience=3), stopping(patience=3)
    assert evaluate(first, values[:cut]) is None
    second.load_state_dict(first.state_dict())
    assert evaluate(second, values[cut:], cut + 1) == 5
    third = stopping(patience=3)
    third.load_state_dict(second.state_dict())
    third.pre_train()  # over already
    assert third.state.ends == [(0, "early_stopping", True)]  # type: ignore[attr-defined]
    fourth = stopping(patience=9)  # the user wants to go on
    fourth.load_state_dict(second.state_dict())
    fourth.pre_train()
    assert fourth.state.ends == []  # type: ignore[attr-defined]


def test_metrics_of_training_are_asked_for_by_name() -> None:
    callback = stopping(metric="train/grad_norm", patience=2)
    records = [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in (1, 2, 3)]
    callback.on_metrics("network", records)
    callback.on_metrics("train", records)
    assert callback.state.ends == [(0, "early_stopping", False)]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as error:
        stopping(metric="train/los").on_metrics("train", [{"step": 1, "loss": 2.0}])
    assert str(error.value) == (
        "trainer.callbacks.early_stopping.metric: there is no 'train/los'; there are "
        "train/step, train/loss"
    )


C = "trainer.callbacks"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (f"--{C}.ema.decay=1.5", f"{C}.ema: decay must lie between 0 and 1, not 1.5"),
        (f"--{C}.ema.decay=[0.9, 0.9]", f"{C}.ema: decay: [0.9, 0.9] names one twice"),
        (f"--{C}.ema.decay=[]", f"{C}.ema: decay: empty; name at least one"),
        (f"--{C}.early_stopping.metric=loss", f"{C}.early_stopping: metric: write it like val/l"),
        (f"--{C}.early_stopping.patience=0", f"{C}.early_stopping: patience must be greater than"),
        (
            f"--{C}.model_merger={{last_percent: 10, last_checkpoints: 2}}",
            f"{C}.model_merger: last_percent does not go with last_checkpoints; give one of them",
        ),
        (
            f"--{C}.model_merger={{enabled: true, last_checkpoints: 9}}",
            "trainer: callbacks.model_merger.last_checkpoints 9 is more than callbacks.checkpoi",
        ),
        (
            f"--{C}.hf_converter.interval=0",
            f"{C}: hf_converter.interval must be greater than 0, not 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_one_line(flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment("smoke", [flag])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_early_stopping_without_evaluations_is_refused() -> None:
    flags = ["--trainer.no_evals", "--trainer.callbacks.early_stopping.enabled=true"]
    with pytest.raises(ConfigError, match="val/loss is of an evaluation, and none runs"):
        load_experiment("smoke", flags)
    flags.append("--trainer.callbacks.early_stopping.metric=train/loss")
    assert load_experiment("smoke", flags).config.trainer.no_evals


def test_what_is_off_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        config_base, "named", lambda name: asked.append(name) or (lambda config: config)
    )
    config = CallbacksConfig()
    enabled = [name for name in config.__struct_fields__[:-1] if getattr(config, name).is_wanted]
    assert list(config.build()) == enabled
    assert 0 < len(asked) <= len(enabled)
    assert not any(".ema:" in name or "early_stopping" in name for name in asked)
