"""`toolkit launch` and `toolkit jobs`: runs on machines that a scheduler, or ssh, gives.

A target is one file here and one name in `TARGETS`. Its options are the fields of its class; what
it sends is always the same: on each machine one `toolkit train` with the flags that start several
processes (`job.py`). Nothing of training knows the target.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from toolkit.config.named import is_name, named, users_class
from toolkit.config.types import nearest
from toolkit.errors import ConfigError

if TYPE_CHECKING:
    from toolkit.commands.launch import jobs, submit
    from toolkit.commands.launch.target import Target

__all__ = ["TARGETS", "jobs", "submit", "target_class"]

TARGETS = {
    "slurm": "toolkit.commands.launch.slurm:Slurm",
    "kubernetes": "toolkit.commands.launch.kubernetes:Kubernetes",
    "beaker": "toolkit.commands.launch.beaker:Beaker",
    "ssh": "toolkit.commands.launch.ssh:SSH",
    "local": "toolkit.commands.launch.local:Local",
}
"""Name of a target -> its class, which is derived from `target.Target`."""


def target_class(name: str) -> "type[Target]":
    """The class of a target: one of `TARGETS`, or a user's "module:Class". Raises ConfigError:
    there is none, or it is not derived from `Target`."""
    if name in TARGETS:
        return named(TARGETS[name])
    if not is_name(name):
        hint = nearest(name, TARGETS)
        known = f"did you mean {hint}?" if hint else f"there are {', '.join(TARGETS)}"
        raise ConfigError(f"no such target: {name!r}; {known}", key="--to")
    found = users_class(name, key="--to")
    base = named("toolkit.commands.launch.target:Target")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{name}: derive it from {base.__module__}.Target", key="--to")
    return found


def __getattr__(name: str) -> Any:
    if name not in ("jobs", "submit"):  # they import what a dry run imports
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
