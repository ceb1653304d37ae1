"""What an optimizer's groups hold, in words and for metadata/. No torch."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from toolkit.optim.base import Optimizer
from toolkit.optim.scaling import count_layers
from toolkit.wording import count

_MOST_LINES = 8


class GroupRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One group: its settings, and whom they are for."""

    override: int | None
    """Which entry of `group_overrides` they are from; null: none matches."""
    settings: dict[str, Any]
    num_parameters: int
    parameters: list[str]


def group_records(
    optim: Optimizer, shapes: Mapping[str, Sequence[int]], trained: Collection[str]
) -> list[GroupRecord]:
    """The groups of the parameters that are `trained`, of a model with parameters of these
    `shapes`."""
    return [
        GroupRecord(
            override=group.override,
            settings=group.settings,
            num_parameters=sum(math.prod(shapes[name]) for name in group.names),
            parameters=group.names,
        )
        for group in optim.grouped((n for n in shapes if n in trained), count_layers(shapes))
    ]


def describe_groups(optim: Optimizer, records: Sequence[GroupRecord]) -> list[str]:
    """A line for each group, the first ones where there are many."""
    lines = [_line(optim, record) for record in records]
    if len(lines) <= _MOST_LINES:
        return lines
    left = count(len(lines) - _MOST_LINES, "group")
    return [*lines[:_MOST_LINES], f"{left} more (metadata/optimizer_groups.json of the run)"]


def _line(optim: Optimizer, record: GroupRecord) -> str:
    settings, names = record.settings, ["lr", "weight_decay"]
    origin = ""
    if record.override is not None:
        names += optim.group_overrides[record.override].opts
        origin = f" (group_overrides.{record.override})"
    shown = [
        f"{name} {_shown(settings[name])}" for name in dict.fromkeys(names) if name in settings
    ]
    if "is_matrix" in settings:
        origin = f", {'matrices' if settings['is_matrix'] else 'by AdamW'}{origin}"
    what = count(len(record.parameters), "tensor")
    return f"{record.num_parameters:,} parameters in {what}: {', '.join(shown)}{origin}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
