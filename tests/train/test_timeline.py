"""Lengths of training as numbers of steps."""

import pytest

from toolkit.errors import ConfigError
from toolkit.train.config import Duration, TrainerConfig
from toolkit.train.timeline import Timeline, Unit, steps_of


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(7, "steps", 7), (1000, "tokens", 10), (1001, "tokens", 11), (3, "epochs", 12)],
)
def test_durations_are_whole_steps(value: int, unit: Unit, expected: int) -> None:
    assert steps_of(100, lambda epochs: 4 * epochs)(value, unit) == expected


def test_training_ends_at_the_hard_stop_if_that_comes_first() -> None:
    def timeline(stop: int | None) -> Timeline:
        hard_stop = None if stop is None else Duration(value=stop)
        return Timeline.of(
            TrainerConfig(max_duration=Duration(value=8), hard_stop=hard_stop), known
        )

    known = steps_of(100)
    assert [timeline(stop).stop_step for stop in (None, 5, 9)] == [8, 5, 8]
    assert timeline(9) == (8, 9)


def test_a_length_that_is_not_known_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_duration: epochs need prepared data"):
        Timeline.of(TrainerConfig(), steps_of(100))
