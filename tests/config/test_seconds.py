"""Lengths of time, as users write them."""

import pytest

from toolkit.config.base import in_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90.0), ("90", 90.0), ("11h30m", 41_400.0), ("1.5h", 5_400.0), ("2d 3s", 172_803.0)],
)
def test_units_add_up(text: str | float, seconds: float) -> None:
    assert in_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "11:30:00", "5 minutes", "nan", "inf", "0s", -1])
def test_anything_else_is_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"no length of time|longer than nothing"):
        in_seconds(text)
