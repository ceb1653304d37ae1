"""Lengths of time as users write them: 90, "90s", "11h30m", "2d"."""

import re

_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
_WHOLE = re.compile(r"(?:\d+(?:\.\d+)?\s*[dhms]\s*)+")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([dhms])")


def in_seconds(value: float | str) -> float:
    """`value` in seconds: a number, or amounts with units (d, h, m, s).

    Raises:
        ValueError: neither, or not greater than zero.
    """
    if isinstance(value, str):
        text = value.strip().lower()
        if _WHOLE.fullmatch(text):
            seconds = sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))
        else:
            try:
                seconds = float(text)
            except ValueError:
                raise ValueError(f"{value!r} is no length of time; write 11h30m or 900s") from None
    else:
        seconds = float(value)
    if not 0 < seconds < float("inf"):
        raise ValueError(f"must be longer than nothing, not {value!r}")
    return seconds
