"""The class of a data set written in Python: found by its name, and made once in a process."""

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from toolkit.data.config import CustomDatasetConfig
from toolkit.errors import ConfigError, DataError, ToolkitError


def load_class(config: CustomDatasetConfig) -> Callable[..., Any]:
    """Import `config.target`; the current folder is looked in too.

    Raises:
        ConfigError: there is no such module or name, or it is no class.
    """
    module_name, _, name = config.target.partition(":")
    if not module_name or not name:
        raise ConfigError(f"dataset.custom.target: write it as module:Class, not {config.target!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"dataset.custom.target {config.target}: {error}") from None
    except Exception as error:
        raise ConfigError(
            f"dataset.custom.target {config.target}: importing {module_name} fails: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"dataset.custom.target {config.target}: is no class: {found!r:.80}")
    return found


def make(config: CustomDatasetConfig, split: str, sequence_length: int) -> Any:
    """The object of the user's class for these arguments; asked for again, the same one.

    It may hold all of its data, so a process makes it once for each split.

    Raises:
        ConfigError: its arguments do not fit.
    """
    # The class itself is in the key: a module that is reloaded has another one.
    return _make(load_class(config), msgspec.json.encode(config), split, sequence_length)


# A run reads two splits of one data set.
@functools.lru_cache(maxsize=2)
def _make(factory: Callable[..., Any], encoded: bytes, split: str, sequence_length: int) -> Any:
    config = msgspec.json.decode(encoded, type=CustomDatasetConfig)
    offered = {"split": split, "sequence_length": sequence_length}
    extra = {key: value for key, value in offered.items() if takes(factory, key)}
    try:
        return factory(**config.args, **extra)
    except ToolkitError:
        raise
    except Exception as error:
        raise ConfigError(
            f"dataset.custom: {config.target} cannot be made: {type(error).__name__}: {error}; "
            "check dataset.custom.args"
        ) from error


def takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether `factory` has an argument of this name."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C, and does not say
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


@contextlib.contextmanager
def user_code(what: str) -> Iterator[None]:
    """Raises DataError, which begins with `what`, in place of any error of the user's code."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        raise DataError(f"{what}: {type(error).__name__}: {error}") from error
