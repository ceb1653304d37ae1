"""`toolkit launch` and `toolkit jobs`: runs on machines that a scheduler, or ssh, gives.

A target is one file here and one name in `TARGETS`. Its options are the fields of its class; what
it sends is always the same: on each machine one `toolkit train` with the flags that start several
processes (`job.py`). Nothing of training knows the target.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.commands.launch import jobs, submit, target

__all__ = ["TARGETS", "jobs", "submit", "target"]

TARGETS = {
    "slurm": "toolkit.commands.launch.slurm:Slurm",
    "kubernetes": "toolkit.commands.launch.kubernetes:Kubernetes",
    "beaker": "toolkit.commands.launch.beaker:Beaker",
    "ssh": "toolkit.commands.launch.ssh:SSH",
    "local": "toolkit.commands.launch.local:Local",
}
"""Name of a target -> its class, which is derived from `target.Target`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:  # the help of the command line needs no more than the names
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
