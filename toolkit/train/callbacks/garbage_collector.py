"""Python's garbage collection at steps of our choosing."""

import gc

from toolkit.train.callbacks.base import Callback
from toolkit.train.config import GarbageCollectorConfig


class GarbageCollector(Callback):
    """Automatic collection off during training: on many ranks it strikes at different steps, and
    each pause is everybody's pause."""

    def __init__(self, config: GarbageCollectorConfig) -> None:
        self._interval = config.interval
        self._was_enabled = gc.isenabled()

    def pre_train(self) -> None:
        gc.collect()
        gc.disable()

    def post_record(self) -> None:
        if self.state.step % self._interval == 0:
            gc.collect(1)

    def close(self) -> None:
        if self._was_enabled:
            gc.enable()
