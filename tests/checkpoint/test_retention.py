"""Which checkpoints stay."""

from typing import Any

import pytest

from toolkit.checkpoint.retention import Retention, Saved

TEN = [Saved(step) for step in range(10, 110, 10)]


@pytest.mark.parametrize(
    ("rule", "saved", "kept"),
    [
        ({}, TEN, {80, 90, 100}),
        ({"keep_last": None}, TEN, set(range(10, 110, 10))),
        ({"keep_last": 1, "keep_every": 40}, TEN, {40, 80, 100}),
        ({"keep_last": 1}, [Saved(5, "fixed"), *TEN], {5, 100}),
        # The newest stays whatever it is; of ephemeral ones no other.
        ({"keep_last": 1}, [Saved(10), Saved(12, "ephemeral"), Saved(14, "ephemeral")], {10, 14}),
        ({"keep_last": 1}, [Saved(10), Saved(12, "ephemeral"), Saved(20)], {20}),
        ({"keep_every": 4}, [Saved(12, "ephemeral"), Saved(20)], {20}),
        (
            {"keep_last": 1, "keep_best": 2},
            [Saved(1, score=3.0), Saved(2, score=1.0), Saved(3, score=2.0), Saved(4), Saved(5)],
            {2, 3, 5},
        ),
        (
            {"keep_last": 1, "keep_best": 1, "best_mode": "max"},
            [Saved(1, score=3.0), Saved(2, score=1.0), Saved(3)],
            {1, 3},
        ),
        # Equal scores: the older one.
        ({"keep_last": 1, "keep_best": 1}, [Saved(n, score=1.0) for n in (1, 2, 3)], {1, 3}),
        ({}, [], set()),
    ],
)
def test_rule(rule: dict[str, Any], saved: list[Saved], kept: set[int]) -> None:
    assert Retention(**rule).kept(saved) == kept
