"""Stands in for the package of beaker-py where it is not installed: the classes that are used."""

import copy
import enum
from types import ModuleType
from typing import Any

_ERRORS = {
    "BeakerServerError": "BeakerError",
    "BeakerServerUnavailableError": "BeakerServerError",
    "BeakerNotFoundError": "BeakerError",
    "BeakerWorkloadNotFound": "BeakerNotFoundError",
    "BeakerPermissionsError": "BeakerError",
    "BeakerExperimentConflict": "BeakerError",
}


class RequestException(Exception):
    response: Any = None


class HTTPError(RequestException):
    pass


class BeakerWorkloadStatus(enum.IntEnum):
    running = 5
    canceled = 8
    succeeded = 9
    failed = 10


class BeakerExperimentSpec:
    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "BeakerExperimentSpec":
        return cls(copy.deepcopy(data))

    def to_json(self) -> dict[str, Any]:
        """With the defaults that the library writes."""
        defaults = {"hostNetworking": False, "leaderSelection": False}
        return {**self._data, "tasks": [{**defaults, **task} for task in self._data["tasks"]]}


class Beaker:
    from_env: Any = None


def module() -> Any:
    """The package."""
    package, exceptions = ModuleType("beaker"), ModuleType("beaker.exceptions")
    for name in ("BeakerError", "RpcError"):
        setattr(exceptions, name, type(name, (Exception,), {}))
    for name, base in _ERRORS.items():
        setattr(exceptions, name, type(name, (getattr(exceptions, base),), {}))
    for cls in (RequestException, HTTPError):
        setattr(exceptions, cls.__name__, cls)
    for cls in (Beaker, BeakerExperimentSpec, BeakerWorkloadStatus):
        setattr(package, cls.__name__, cls)
    package.exceptions = exceptions  # type: ignore[attr-defined]
    return package
