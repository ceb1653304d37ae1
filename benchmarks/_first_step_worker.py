"""`toolkit` with the words that follow, which notes when it comes to some places of its start.

Called by first_step.py: `_first_step_worker.py FILE WORDS...` writes `{place: Unix seconds}` to
FILE when the first step is done.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import time
from types import ModuleType
from typing import Any

LOADED = "toolkit.cli.main", "torch", "toolkit.experiment.training"
"""Modules whose end of loading is a place."""
ENTERED = {"toolkit.train.trainer": ("Trainer", ("__init__", "_loop", "_train_step"))}
"""Methods whose beginning is a place; the last one's end too, `first step`."""

seconds: dict[str, float] = {"python": time.time()}


class Watching(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before Python's finders, for the modules that are watched."""

    def __init__(self) -> None:
        self._specs: dict[str, importlib.machinery.ModuleSpec] = {}

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name in self._specs or name not in (*LOADED, *ENTERED):
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert found is not None
        seconds[f"before {name}"] = time.time()
        self._specs[name] = found
        spec = importlib.machinery.ModuleSpec(name, self, origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        spec.has_location, spec.cached = True, found.cached
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        loader = self._specs[module.__name__].loader
        assert loader is not None
        loader.exec_module(module)
        seconds[module.__name__] = time.time()
        if module.__name__ in ENTERED:
            owner, methods = ENTERED[module.__name__]
            for method in methods:
                note_entry(getattr(module, owner), method)


def note_entry(owner: type, method: str) -> None:
    function = getattr(owner, method)

    def noting(*args: Any, **kwargs: Any) -> Any:
        seconds.setdefault(method, time.time())
        result = function(*args, **kwargs)
        if method == "_train_step" and "first step" not in seconds:
            seconds["first step"] = time.time()
            with open(sys.argv[0], "w") as file:
                json.dump(seconds, file)
        return result

    setattr(owner, method, noting)


if __name__ == "__main__":
    del sys.path[0]  # this folder
    sys.argv[:] = sys.argv[1:]
    sys.meta_path.insert(0, Watching())
    from toolkit.cli.main import main

    main()
