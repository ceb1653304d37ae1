"""`Config`: the base of every typed config in the toolkit.

Structs are frozen, know their fields exactly (an unknown name is an error, not a surprise) and
import nothing heavy. `XConfig.build(...)` methods import what they need when they are called.
"""

import math
from typing import Annotated, Any, Self, dataclass_transform

import msgspec

UNSIGNED = "unsigned"
"""Key under which the type of a field says that it takes whole numbers up to 2^64 - 1."""
Seed = Annotated[int, msgspec.Meta(extra={UNSIGNED: True})]
"""What torch takes as a seed."""


# Tells type checkers what msgspec does at run time: `frozen` is inherited.
@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base struct. Subclasses add `kw_only=True` (msgspec applies it per class)."""

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, tags included."""
        return msgspec.json.decode(msgspec.json.encode(self))

    def to_json(self) -> bytes:
        """Indented JSON bytes that `msgspec.json.decode` reads back to an equal config."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`; `__post_init__` checks it like one that was read from a file."""
        return msgspec.structs.replace(self, **changes)


def check_not_negative(config: Config, *names: str) -> None:
    """Raise `ValueError` for those of the fields `names` that are < 0, infinite or nan; a line
    each."""
    problems = []
    for name in names:
        value = getattr(config, name)
        # Written so that nan fails.
        if value is not None and not 0 <= value < math.inf:
            what = "not be negative" if value < 0 else "be finite"
            problems.append(f"{name} must {what}: {value}")
    _raise_lines(problems)


def check_positive(config: Config, *names: str) -> None:
    """Raise `ValueError` for those of the fields `names` that are not > 0, or infinite; a line
    each."""
    problems = []
    for name in names:
        value = getattr(config, name)
        # Written so that nan fails.
        if value is not None and not 0 < value < math.inf:
            finite = " and finite" if value > 0 else ""
            problems.append(f"{name} must be greater than 0{finite}, not {value}")
    _raise_lines(problems)


def _raise_lines(problems: list[str]) -> None:
    # `convert` makes an error of each line.
    if problems:
        raise ValueError("\n".join(problems))
