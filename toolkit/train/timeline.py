"""Durations (steps, tokens, epochs) as numbers of steps. No torch: dry runs ask too."""

from collections.abc import Callable
from typing import NamedTuple

from toolkit.errors import ConfigError
from toolkit.train.config import Duration, TrainerConfig, Unit

StepsOf = Callable[[int, Unit], int]
"""`(value, unit)` as the number of the step that ends it (`Batches.steps_of`); ValueError: that is
not known."""


class Timeline(NamedTuple):
    """Where the training of a config ends, in steps."""

    total_steps: int
    """`trainer.max_duration`, which schedules are planned for."""
    hard_stop: int | None

    @classmethod
    def of(cls, config: TrainerConfig, steps_of: StepsOf) -> "Timeline":
        """Raises ConfigError where a length is not known."""

        def end(name: str, duration: Duration) -> int:
            try:
                return steps_of(duration.value, duration.unit)
            except ValueError as error:
                raise ConfigError(str(error), key=f"trainer.{name}") from None

        stop = config.hard_stop
        return cls(
            end("max_duration", config.max_duration),
            None if stop is None else end("hard_stop", stop),
        )

    @property
    def stop_step(self) -> int:
        """The last step."""
        return min(self.total_steps, self.hard_stop or self.total_steps)
