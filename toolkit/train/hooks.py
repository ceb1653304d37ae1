"""The callbacks of a training by name and event; what one of them raises says whose it is."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from toolkit.errors import ConfigError, ToolkitError, TrainingError
from toolkit.launch.failures import first_line, is_lost_peer
from toolkit.train.callbacks.base import Callback
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
        except Exception as error:
            if is_lost_peer(error):
                raise
            what = f"{type(error).__name__}: {first_line(error)}"
            raise TrainingError(f"callback {name}: {event} at step {state.step}: {what}") from error

    return guarded
