"""Objects by name, "module:object": what configs build, and what users bring themselves.

A config imports nothing of what it builds. Its `build` looks the class up by name when it is
called, so configs stay free of torch and no import runs in a circle.
"""

import importlib
import inspect
import os
import re
import sys
from typing import Any

from toolkit.errors import ConfigError, ToolkitError

_folders: list[str] = []

NAME_PATTERN = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
"""What `module:Class` looks like."""


def named(name: str) -> Any:
    """The object called `name`, "module:object". For names of our own: a wrong one is a defect."""
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def look_in(folder: str) -> None:
    """Find modules of users in `folder` too, behind those of the current folder."""
    if folder not in _folders:
        _folders.append(folder)


def module_folders() -> list[str]:
    """Where modules of users are found, besides what Python looks in by itself."""
    return list(dict.fromkeys([os.getcwd(), *_folders]))


def is_name(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(NAME_PATTERN, text) is not None


def users_class(name: str, *, key: str) -> Any:
    """The class that a user's config names at `key`; `module_folders` are looked in too. Raises
    ConfigError: `name` is not of the form "module:Class", there is no such module or class, or
    importing the module fails."""
    if not is_name(name):
        raise ConfigError(f"write it as module:Class, not {name!r}", key=key)
    sys.path[:0] = [folder for folder in module_folders() if folder not in sys.path]
    try:
        found = named(name)
    except ModuleNotFoundError as error:
        where = " and ".join(module_folders())
        problem = f"{name}: {error}; modules are found in {where}, and where PYTHONPATH says"
        raise ConfigError(problem, key=key) from None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{name}: {error}", key=key) from None
    except Exception as error:
        problem = f"{name}: importing it fails: {type(error).__name__}: {error}"
        raise ConfigError(problem, key=key) from error
    if not callable(found):
        raise ConfigError(f"{name}: is no class: {found!r:.80}", key=key)
    return found


def users_subclass(config: Any, base: str, *arguments: Any, key: str, name: str = "target") -> Any:
    """The user's class `config.target` (see `users_class`), which is derived from the class named
    `base`, and takes `arguments` and `config.options`. Raises ConfigError otherwise, about the
    fields `name` and "options" at `key`."""
    found = users_class(config.target, key=f"{key}.{name}")
    if not (isinstance(found, type) and issubclass(found, named(base))):
        ours = base.partition(":")[2]
        raise ConfigError(f"{config.target}: derive it from toolkit.{ours}", key=f"{key}.{name}")
    try:
        inspect.signature(found).bind(*arguments, **config.options)
    except TypeError as error:
        raise ConfigError(f"{config.target}: {error}", key=f"{key}.options") from None
    return found


def users_object(name: str, *arguments: Any, key: str, **options: Any) -> Any:
    """An object of the class `name` (see `users_class`), made with the user's `options`. Raises
    ConfigError: see `users_class`; or the class does not take the options."""
    found = users_class(name, key=key)
    try:
        return found(*arguments, **options)
    except ToolkitError:
        raise
    except Exception as error:
        problem = f"{name} cannot be made: {type(error).__name__}: {error}; check its options"
        raise ConfigError(problem, key=key) from error
