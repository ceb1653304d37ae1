"""The callbacks of a training by name and event; what one of them raises says whose it is."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from toolkit.errors import ConfigError, ToolkitError, TrainingError
from toolkit.launch.failures import first_line, is_lost_peer
from toolkit.train.callbacks.base import Callback
from toolkit.train.module import Metric
from toolkit.train.state import TrainState

Hook = Callable[..., Any]


def by_name(callbacks: Mapping[str, Callback] | Iterable[Callback] | None) -> dict[str, Callback]:
    """Callbacks of a list under the names of their classes: `StopWhenGood` is "stop_when_good".
    Raises ConfigError: two of a list have one name."""
    if callbacks is None or isinstance(callbacks, Mapping):
        return dict(callbacks or {})
    named: dict[str, Callback] = {}
    for callback in callbacks:
        name = snake_case(type(callback).__name__)
        if name in named:
            raise ConfigError(
                f"callback {name}: the list has two of this class; give a mapping of names to "
                "callbacks"
            )
        named[name] = callback
    return named


def snake_case(name: str) -> str:
    """`LMEvaluator` -> "lm_evaluator"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def find_hooks(
    callbacks: Mapping[str, Callback], state: TrainState
) -> dict[str, list[tuple[str, Hook]]]:
    """Event -> the methods that callbacks give for it, with the names of the callbacks."""
    return {
        event: [
            (name, _guarded(name, event, getattr(callback, event), state))
            for name, callback in callbacks.items()
            if getattr(type(callback), event) is not unchanged
        ]
        for event, unchanged in vars(Callback).items()
        if not event.startswith("_")
    }


def _guarded(name: str, event: str, hook: Hook, state: TrainState) -> Hook:
    """`hook`, whose exceptions name the callback, the event and the step. Those of ours say what
    they are about by themselves; the end of another rank, and of memory, is nobody's here."""

    @functools.wraps(hook)
    def guarded(*args: Any) -> Any:
        try:
            return hook(*args)
        except (ToolkitError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:  # nor does a callback end the process
            if is_lost_peer(error):
                raise
            what = f"{type(error).__name__}: {first_line(error)}"
            raise TrainingError(f"callback {name}: {event} at step {state.step}: {what}") from error

    return guarded


def add_metrics(metrics: dict[str, Metric], found: Any, name: str, step: int) -> None:
    """Add what `post_step` of the callback `name` returned to the metrics of the step.

    Raises:
        TrainingError: it is no mapping of names to `Metric`s of one number, or a name is taken.
    """
    where = f"callback {name}: post_step at step {step}"
    if not isinstance(found, Mapping):
        raise TrainingError(f"{where}: returns {_said(found)}; {_FORM}")
    for key, metric in found.items():
        if not isinstance(key, str):
            raise TrainingError(f"{where}: a metric is called {_said(key)}; {_FORM}")
        if key in metrics or key in _COUNTERS:
            raise TrainingError(f"{where}: there is a metric {key!r} already; choose another name")
        value = metric.value if isinstance(metric, Metric) else None
        if isinstance(value, torch.Tensor):
            is_number = value.numel() == 1
        else:
            is_number = isinstance(value, float | int) and abs(value) < _LARGEST
        if not is_number:
            raise TrainingError(f"{where}: {key!r} is {_said(metric)}; {_FORM}")
        metrics[key] = metric


_FORM = 'return {"name": Metric(number)}, of toolkit.train.module, or nothing'
_LARGEST = 1 << 1023
"""What float64 holds."""
_COUNTERS = frozenset({"step", "tokens", "epoch", "time", "attempt", "ppl", "instances"})
"""What a line of train.jsonl holds beside metrics."""


def _said(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}"
