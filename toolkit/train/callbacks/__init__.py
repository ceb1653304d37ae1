"""Callbacks: what happens around the loop."""

from toolkit.config.named import named
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import CallbacksConfig

_TOOLS = {"sample_writer": "toolkit.evaluate.sample_writer"}
"""Callbacks that need more than training does, and where they lie."""


def build_callbacks(config: CallbacksConfig) -> dict[str, Callback]:
    """The enabled callbacks by name, in the order of the config's fields; then the user's own.

    A field `lm_evaluator` of type `LMEvaluatorConfig` is built by the class named like its config
    without "Config", in the module `toolkit.train.callbacks.lm_evaluator`.
    """
    callbacks: dict[str, Callback] = {}
    for field in config.__struct_fields__:
        settings = getattr(config, field)
        if field != "custom" and settings.enabled:
            module = _TOOLS.get(field, f"{__name__}.{field}")
            built_by = type(settings).__name__.removesuffix("Config")
            callbacks[field] = named(f"{module}:{built_by}")(settings)
    for name, own in config.custom.items():
        if own.enabled:
            callbacks[name] = own.own_class(name)(**own.options)
    return callbacks
