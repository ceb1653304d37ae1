"""Callbacks: what happens around the loop. `build_callbacks` makes those that are enabled."""

import importlib
from typing import TYPE_CHECKING

from toolkit.train.callbacks.base import Callback

if TYPE_CHECKING:
    from toolkit.train.config import CallbacksConfig

__all__ = ["Callback", "build_callbacks"]

_TOOLS = {"sample_writer": "toolkit.evaluate.sample_writer"}
"""Callbacks that need more than training does, and where they lie."""


def build_callbacks(config: "CallbacksConfig") -> dict[str, Callback]:
    """Enabled callbacks by name, in the order of the config's fields.

    A field `lm_evaluator` of type `LMEvaluatorConfig` is built by the class named like its config
    without "Config", in the module `toolkit.train.callbacks.lm_evaluator`.
    """
    callbacks: dict[str, Callback] = {}
    for name in config.__struct_fields__:
        settings = getattr(config, name)
        if settings.enabled:
            module = importlib.import_module(_TOOLS.get(name, f"{__name__}.{name}"))
            callbacks[name] = getattr(module, type(settings).__name__.removesuffix("Config"))(
                settings
            )
    return callbacks
