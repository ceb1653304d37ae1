"""`Config`, the base of every typed config, and the checks that fields of all rooms share.

Structs are frozen, know their fields exactly (an unknown name is an error, not a surprise) and
import nothing heavy: `XConfig.build(...)` looks up by name what it builds (`named.py`).
"""

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self, dataclass_transform

import msgspec

from toolkit.config.named import named
from toolkit.errors import ConfigError

UNSIGNED = "unsigned"
"""Key under which the type of a field says that it takes whole numbers up to 2^64 - 1."""
Seed = Annotated[int, msgspec.Meta(extra={UNSIGNED: True})]
"""What torch takes as a seed."""

_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
_TIME = re.compile(r"(?:\d+(?:\.\d+)?\s*[dhms]\s*)+")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([dhms])")


# Tells type checkers what msgspec does at run time: `frozen` is inherited.
@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base struct. Subclasses add `kw_only=True` (msgspec applies it per class).

    `__post_init__` raises ValueError for what the types do not say, a line per mistake; a line that
    is about a field begins with its name.
    """

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, tags included."""
        return msgspec.json.decode(msgspec.json.encode(self))

    def to_json(self) -> bytes:
        """Indented JSON bytes that `msgspec.json.decode` reads back to an equal config."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`; `__post_init__` checks it like one that was read from a file."""
        return msgspec.structs.replace(self, **changes)

    def merge(self, overrides: Sequence[str]) -> Self:
        """A copy with values by path, as on the command line: `["optim.lr=1e-3", "--seed=3"]`.
        Raises ConfigError: a path or value does not fit."""
        return named("toolkit.config.layers:merged")(self, overrides)


def check_not_negative(config: Config, *names: str) -> None:
    """Raise `ValueError` for those of the fields `names` that are < 0, infinite or nan."""

    def problem(value: float) -> str:
        return f"must {'not be negative' if value < 0 else 'be finite'}: {value}"

    _check(config, names, lambda value: 0 <= value < math.inf, problem)


def check_positive(config: Config, *names: str) -> None:
    """Raise `ValueError` for those of the fields `names` that are not > 0, or infinite."""

    def problem(value: float) -> str:
        return f"must be greater than 0{' and finite' if value > 0 else ''}, not {value}"

    _check(config, names, lambda value: 0 < value < math.inf, problem)


def _check(
    config: Config,
    names: Sequence[str],
    is_right: Callable[[float], bool],
    problem: Callable[[float], str],
) -> None:
    values = [(name, value) for name in names if (value := getattr(config, name)) is not None]
    if lines := [f"{name} {problem(value)}" for name, value in values if not is_right(value)]:
        raise ValueError("\n".join(lines))


def matching(key: str, pattern: str, names: Sequence[str]) -> list[str]:
    """The names of parameters that a shell-style `pattern` matches, in their order. Raises
    ConfigError: about `key`, where there is none; names one that looks like it."""
    hits = fnmatch.filter(names, pattern)
    if not hits:
        near = difflib.get_close_matches(pattern[:100], names[:200], n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else f"names look like {', '.join(names[:3])}"
        raise ConfigError(f"{pattern!r} matches no parameter ({hint})", key=key)
    return hits


def in_seconds(value: float | str) -> float:
    """A length of time in seconds: 90, "90s", "11h30m", "2d". Raises ValueError: it is none, or not
    greater than zero."""
    text = str(value).strip().lower()
    if _TIME.fullmatch(text):
        seconds = sum(float(amount) * _UNITS[unit] for amount, unit in _AMOUNT.findall(text))
    else:
        try:
            seconds = float(text)
        except ValueError:
            raise ValueError(f"{value!r} is no length of time; write 11h30m or 900s") from None
    if not 0 < seconds < math.inf:
        raise ValueError(f"must be longer than nothing, not {value!r}")
    return seconds
