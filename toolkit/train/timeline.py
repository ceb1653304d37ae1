"""Where a run stands and ends, in steps, tokens and epochs. No torch: dry runs ask too."""

from collections.abc import Callable
from typing import NamedTuple

from toolkit.data.order.plan import Batches
from toolkit.errors import ConfigError
from toolkit.optim.schedule import Units
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


class Progress(NamedTuple):
    """Where training stands when a step begins: what schedules are functions of."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens consumed."""
    total_steps: int
    """Steps of the whole run (`trainer.max_duration`)."""
    total_tokens: int
    """Tokens of the whole run."""
    tokens_per_step: int
    """Tokens of this step."""
    epochs_done: Callable[[int], float] = float
    """Passes over the data that so many steps are."""

    @classmethod
    def at(cls, step: int, total_steps: int, batches: Batches) -> "Progress":
        """After `step` steps of a run of these batches."""
        return cls(
            step,
            batches.tokens_done(step),
            total_steps,
            batches.tokens_done(total_steps),
            batches.batch_tokens(step),
            batches.epochs_done,
        )

    def position(self, units: Units) -> tuple[float, float, float]:
        """(done before this step, of the whole run, this step) in `units`."""
        if units == "tokens":
            return self.tokens, self.total_tokens, self.tokens_per_step
        if units == "steps":
            return self.step, self.total_steps, 1
        done = self.epochs_done(self.step)
        return done, self.epochs_done(self.total_steps), self.epochs_done(self.step + 1) - done
