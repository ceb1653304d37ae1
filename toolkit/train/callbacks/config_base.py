"""`CallbackConfig`, the base of every callback's config, and `EvaluatorConfig`."""

from typing import Any, ClassVar

from toolkit.config import Config
from toolkit.config.named import named


class CallbackConfig(Config, kw_only=True):
    """A config holds all settings of its callback, whose class takes it as the one argument."""

    implementation: ClassVar[str]
    """The callback's class, as `module:Class`; imported where the callback is enabled only."""

    enabled: bool = True
    """Off: it is not called."""

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to call."""
        return self.enabled

    def build(self) -> Any:
        """The callback."""
        return named(self.implementation)(self)


class EvaluatorConfig(CallbackConfig, kw_only=True):
    """When an evaluation runs."""

    interval: int = 250
    """Steps between evaluations."""
    at_start: bool = False
    """Evaluate before the first step too."""
    at_end: bool = True
    """Evaluate after the last step."""
