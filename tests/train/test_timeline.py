"""Lengths of training as numbers of steps."""

import pytest

from toolkit.data.order.plan import Batches, BatchPlan, Segment
from toolkit.errors import ConfigError
from toolkit.train.config import Duration, TrainerConfig
from toolkit.train.timeline import Timeline, Unit


def batches(no_epochs: str | None = None) -> Batches:
    """Of 100 tokens, 4 an epoch."""
    plan = BatchPlan([Segment(0, 0, 10)], epoch_instances=43, keeps_epochs_apart=True)
    return Batches(plan, 10, no_epochs=no_epochs)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(7, "steps", 7), (1000, "tokens", 10), (1001, "tokens", 11), (3, "epochs", 12)],
)
def test_durations_are_whole_steps(value: int, unit: Unit, expected: int) -> None:
    assert batches().steps_of(value, unit) == expected


def test_training_ends_at_the_hard_stop_if_that_comes_first() -> None:
    def timeline(stop: int | None) -> Timeline:
        hard_stop = None if stop is None else Duration(value=stop)
        return Timeline.of(
            TrainerConfig(max_duration=Duration(value=8), hard_stop=hard_stop), known
        )

    known = batches().steps_of
    assert [timeline(stop).stop_step for stop in (None, 5, 9)] == [8, 5, 8]
    assert timeline(9) == (8, 9)


def test_a_length_that_is_not_known_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_duration: epochs need prepared data"):
        Timeline.of(TrainerConfig(), batches("epochs need prepared data").steps_of)
