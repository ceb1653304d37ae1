"""Nested values of a row, the same whatever kind of file they were stored in.

Columnar files (Arrow, parquet, saved data sets) give every object of a column all keys that any of
them has: null stands for a key that is absent. They also turn whole numbers into 3.0 where another
row has a fraction. JSON Lines can say the same in other words. Both are brought into one form:
objects have no keys with null, and whole numbers no fraction. The order of keys stays: a model that
writes an object learns it.
"""

import math
from typing import Any

from toolkit.errors import DataError

_EXACT = 2.0**53
"""Whole numbers below it are exact in float64."""


def uniform(value: Any, where: str) -> Any:
    """`value` in the one form.

    Raises:
        DataError: a number that JSON does not have (NaN, Infinity); `where` names the row.
    """
    if isinstance(value, dict):
        return {key: uniform(v, where) for key, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [uniform(item, where) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError(f"{where}: holds {value}, which is no number of JSON; repair the row")
        if value.is_integer() and abs(value) < _EXACT:
            return int(value)
    return value
