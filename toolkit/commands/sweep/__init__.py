"""`toolkit sweep`: one config at several values, each of them a run of its own.

`points.py` makes the points of a grid and checks each as a dry run would; `running.py` starts what
is not finished yet, as `toolkit train` and `toolkit resume`, and gathers what came out.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.commands.sweep import points, running

__all__ = ["points", "running"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
