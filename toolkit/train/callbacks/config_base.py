"""`CallbackConfig`, the base of every callback's config."""

from typing import Any, ClassVar

from toolkit.config import Config
from toolkit.config.named import named


class CallbackConfig(Config, kw_only=True):
    """A config holds all settings of its callback, whose class takes it as the one argument."""

    implementation: ClassVar[str]
    """The callback's class, as `module:Class`; imported where the callback is enabled only."""

    enabled: bool = True
    """Off: it is not called."""

    def build(self) -> Any:
        """The callback."""
        return named(self.implementation)(self)
