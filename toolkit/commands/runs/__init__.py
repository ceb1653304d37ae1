"""`toolkit runs`: runs by name, their list, their pages, and what is done to their folders."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.commands.runs import (
        archive,
        compare,
        curves,
        listing,
        named,
        places,
        show,
        trackers,
        watch,
    )

__all__ = [
    "archive",
    "compare",
    "curves",
    "listing",
    "named",
    "places",
    "show",
    "trackers",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # a list of runs needs none of what sends them elsewhere
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
