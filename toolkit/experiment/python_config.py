"""Configs written in Python: FILE.py whose `build_config()` returns one (`FILE.py:NAME` for another
function). No torch at import."""

import contextlib
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.config.base import Config
from toolkit.config.named import look_in
from toolkit.errors import ConfigError, ToolkitError

FUNCTION = "build_config"

_SOURCE = re.compile(r"(?P<file>.+\.py)(?::(?P<function>[A-Za-z_]\w*))?")
_loading: list[str] = []
"""The files that are being imported for their config."""


def is_python_config(source: str) -> bool:
    """Whether `source` names a Python file."""
    return _SOURCE.fullmatch(source) is not None


def folder_of_modules(source: str) -> Path | None:
    """The folder of the Python file that `source` names; None: it names something else."""
    match = _SOURCE.fullmatch(source)
    return None if match is None else Path(match["file"]).expanduser().resolve().parent


def is_being_imported() -> bool:
    """Whether a file is being imported for its config alone."""
    return bool(_loading)


def call_build_config(source: str) -> str | dict[str, Any]:
    """What the function of the file returns: the name of a recipe or file, or a config as a
    mapping. Modules beside the file are found from now on.

    Raises:
        ConfigError: no such file or function; it fails; it returns something else.
    """
    match = _SOURCE.fullmatch(source)
    assert match is not None, source
    path, name = Path(match["file"]).expanduser().resolve(), match["function"] or FUNCTION
    if not path.is_file():
        raise ConfigError(f"{match['file']}: no such file")
    function = getattr(_import(path), name, None)
    if not callable(function):
        raise ConfigError(
            f"{path}: has no function {name}; define it, or name another: FILE.py:NAME"
        )
    result = _guarded(function, path, doing=f"{name}()")
    if isinstance(result, str) and not is_python_config(result):
        return result
    if isinstance(result, Config):
        return result.to_dict()
    if isinstance(result, Mapping):
        try:
            return json.loads(json.dumps(result, default=_plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: {name}() returns what JSON cannot hold: {error}") from None
    if inspect.iscoroutine(result):
        result.close()  # or Python warns that nobody awaited it
        raise ConfigError(f"{path}: {name}() is async; define it without `async`")
    said = repr(result) if isinstance(result, str | None) else f"an object of {type(result)}"
    raise ConfigError(
        f"{path}: {name}() returns {said:.60}; return a toolkit.ExperimentConfig, a mapping, "
        "or the name of a recipe or JSON file"
    )


def _import(path: Path) -> Any:
    """The module of the file, under the name by which `module:Class` finds its classes."""
    folder = str(path.parent)
    if not path.stem.isidentifier():
        raise ConfigError(f"{path}: rename it to what Python can import: letters, digits and _")
    look_in(folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    _loading.append(str(path))
    try:
        module = _guarded(lambda: importlib.import_module(path.stem), path, doing="importing it")
    finally:
        _loading.pop()
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != path:
        raise ConfigError(f"{path}: rename it, `import {path.stem}` gives {found or 'another one'}")
    return module


def _guarded(call: Callable[[], Any], path: Path, *, doing: str) -> Any:
    """What the user's code gives. What it prints is no part of our output, and the current folder
    stays the one that relative paths of a config count from."""
    here = os.getcwd()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except (ToolkitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # nor does it end this process
        lines = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f", line {lines[-1].lineno}" if lines else ""
        try:
            said = str(error)
        except Exception:  # its own
            said = "it cannot say what"
        problem = f"{path}{where}: {doing} fails: {type(error).__name__}: {said}"
        raise ConfigError(problem) from error
    finally:
        os.chdir(here)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no value of a config")
