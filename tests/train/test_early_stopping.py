"""When a run is over, told from a row of values; and settings of callbacks that cannot work."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.load import load_experiment
from toolkit.train.callbacks import config_base
from toolkit.train.callbacks.config import CallbacksConfig, CheckpointerConfig, EarlyStoppingConfig
from toolkit.train.callbacks.early_stopping import EarlyStopping
from toolkit.train.config import TrainerConfig
from toolkit.train.scores import check_metrics_in, check_result

NAN = math.nan


class Run(SimpleNamespace):
    """As much of a `TrainState` as the callback sees."""

    def finish(self, reason: str, *, is_agreed: bool) -> None:
        self.ends.append((self.step, reason, is_agreed))


def stopping(**settings: Any) -> EarlyStopping:
    callback = EarlyStopping(EarlyStoppingConfig(enabled=True, **settings))
    callback.state = Run(  # type: ignore[assignment]
        step=0, is_main=True, ends=[], evaluations={}, config=TrainerConfig(), eval_loaders={},
        has_own_parts=False, environment=SimpleNamespace(broadcast=lambda value: value),
        check_metrics=lambda: None,
    )  # fmt: skip
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


def test_an_evaluation_before_the_first_step_of_an_attempt_counts() -> None:
    values = [3.0, 3.1, 3.2, 3.3]
    first, second = stopping(patience=3), stopping(patience=3)
    assert evaluate(first, values[:2]) is None
    second.load_state_dict(first.state_dict())
    state: Any = second.state  # a stop broke the third one off, and it is made up for
    state.step, state.evaluations = 3, {"val": {"name": "val", "loss": values[2]}}
    second.pre_train()
    assert evaluate(second, values[3:], 4) == 4
    assert second.state_dict() == {**second.state_dict(), "best_at": 1, "without": 3}
    third = stopping(patience=1)
    third.load_state_dict({**first.state_dict(), "without": 0})
    third.state.step, third.state.evaluations = 0, state.evaluations  # type: ignore[misc]
    third.pre_train()  # long seen
    assert third.state.ends == []  # type: ignore[attr-defined]
    at_start = stopping(patience=1)
    at_start.state.evaluations = {"val": {"name": "val", "loss": 1.0}}  # type: ignore[misc]
    at_start.pre_train()
    assert evaluate(at_start, [2.0]) == 1


def test_ranks_do_what_the_first_one_decides() -> None:
    for decision in (True, False):
        callback = stopping(patience=1)
        callback.state.environment.broadcast = lambda _, decision=decision: decision
        assert evaluate(callback, [1.0]) == (1 if decision else None)


def test_only_metrics_of_training_change_the_state_in_their_thread() -> None:
    assert stopping(metric="train/loss").state_follows_metrics
    assert not stopping(metric="val/loss").state_follows_metrics


def test_a_metric_of_some_steps_only_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    callback = stopping(metric="train/instances/web", patience=2)
    callback.state.has_own_parts = True  # type: ignore[misc]
    records: list[dict[str, Any]] = [{"step": step, "loss": 1.0} for step in range(1, 7)]
    for record in records[1::2]:
        record["instances/web"] = 1
    callback.on_metrics("train", records[:1])
    assert "no train/instances/web yet; there are train/step, train/loss" in caplog.text
    callback.on_metrics("train", records[1:])
    assert callback.state_dict() == {**callback.state_dict(), "best_at": 2, "without": 2}
    caplog.clear()
    never = stopping(metric="own/accuracy")
    never.state.has_own_parts = True  # type: ignore[misc]
    assert evaluate(never, [1.0, 2.0]) is None
    assert "no own/accuracy yet; there are val" in caplog.text
    never.post_train()
    assert "there was no own/accuracy until the end" in caplog.text


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
    with pytest.raises(ConfigError, match=r"no evaluation runs .* so none gives val/loss"):
        check_experiment(load_experiment("smoke", flags).config, 1)
    flags.append("--trainer.callbacks.early_stopping.metric=train/loss")
    check_experiment(load_experiment("smoke", flags).config, 1)


OWN = f'--{C}.mine={{type: "collections:OrderedDict"}}'
TASKS = f"--{C}.downstream_evaluator.tasks=[arc_easy, ./own]"


@pytest.mark.parametrize("setting", ["early_stopping.metric", "checkpointer.best_metric"])
@pytest.mark.parametrize(
    ("metric", "flags", "message"),
    [
        ("vall/loss", [], "no evaluation gives 'vall/loss'; there are val/loss, val/ppl, val/bits"),
        ("val_ema/loss", [], "no evaluation gives 'val_ema/loss'"),
        ("val_ema/loss", [f"--{C}.ema.enabled=true"], None),
        ("val/seconds", [OWN], "val/seconds does not tell how good the model is"),
        ("own/accuracy", [OWN, f"--{C}.lm_evaluator.enabled=false"], None),
        ("own/accuracy", ["--trainer.no_evals=true", OWN], None),
        ("val/loss", [f"--{C}.lm_evaluator.enabled=false"], "no evaluation runs"),
        ("downstream/arc_easy/accuracy", [TASKS, f"--{C}.lm_evaluator.enabled=false"], None),
        ("downstream/own/accuracy", [TASKS], None),
        ("downstream/arc/accuracy", [TASKS], "val/bits_per_byte, downstream/arc_easy/..., downst"),
        ("downstream/own/accuracy", [TASKS, "--trainer.no_evals"], "no evaluation runs"),
    ],
)
def test_what_no_evaluation_gives_is_refused_before_anything_starts(
    setting: str, metric: str, flags: list[str], message: str | None
) -> None:
    flags = [f"--{C}.early_stopping.enabled=true" if "early" in setting else
             f"--{C}.checkpointer.keep_best=1", f"--{C}.{setting}={metric}", *flags]  # fmt: skip
    trainer = load_experiment("smoke", flags).config.trainer
    with pytest.raises(ConfigError) if message else nullcontext() as error:
        check_metrics_in({"val": True}, trainer)
    if message and error:
        assert message in str(error.value)
        assert str(error.value).startswith(f"{C}.{setting.partition('.')[0]}.")


def test_a_result_that_an_evaluation_lacks_ends_the_run_at_once() -> None:
    saver = CheckpointerConfig(keep_best=1, best_metric="own/acc")
    config = TrainerConfig(callbacks=CallbacksConfig(checkpointer=saver))
    check_result(config, "other", {"loss": 1.0})
    check_result(config, "own", {"acc": NAN})
    for values in ({"accuracy": 1.0, "seconds": 2.0}, {"accuracy": 1.0, "acc": "high"}):
        with pytest.raises(ConfigError, match=r"no .own/acc.; there are own/accuracy$"):
            check_result(config, "own", values)


def test_two_averages_are_refused_before_anything_starts() -> None:
    flags = [f"--{C}.ema.enabled=true", "--train_module.optim={type: schedule_free_adamw}"]
    with pytest.raises(ConfigError, match=f"^{C}.ema.enabled: the optimizer keeps an average"):
        check_experiment(load_experiment("smoke", flags).config, 1)
    check_experiment(load_experiment("smoke", flags[1:]).config, 1)


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
