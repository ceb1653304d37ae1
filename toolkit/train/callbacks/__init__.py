"""Callbacks: what happens around the loop."""

from toolkit.config.named import named
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import CallbacksConfig

_HERE = __name__
_CLASSES = {
    "speed_monitor": f"{_HERE}.monitors:SpeedMonitor",
    "garbage_collector": f"{_HERE}.monitors:GarbageCollector",
    "network_monitor": f"{_HERE}.monitors:NetworkMonitor",
    "system_monitor": f"{_HERE}.monitors:SystemMonitor",
    "lm_evaluator": f"{_HERE}.lm_evaluator:LMEvaluator",
    "checkpointer": f"{_HERE}.checkpointer:Checkpointer",
    "sample_writer": "toolkit.evaluate.sample_writer:SampleWriter",
    "console_logger": f"{_HERE}.console_logger:ConsoleLogger",
}
"""Field of `CallbacksConfig` -> the class that its config makes."""


def build_callbacks(config: CallbacksConfig) -> dict[str, Callback]:
    """The enabled callbacks by name, in the order of the config's fields; then the user's own."""
    callbacks: dict[str, Callback] = {}
    for field, name in _CLASSES.items():
        settings = getattr(config, field)
        if settings.enabled:
            callbacks[field] = named(name)(settings)
    for field, own in config.custom.items():
        if own.enabled:
            callbacks[field] = own.own_class(field)(**own.options)
    return callbacks
