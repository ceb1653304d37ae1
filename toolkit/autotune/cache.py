"""Timings in the user's cache folder: a file for each question, so that nobody waits for others.

The first measurement of a question stays: two runs of one config on one machine choose the same.
One that was taken beside other programs is for its own start alone. Of several that start at once
one measures while the others wait a moment.
"""

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import msgspec

from toolkit.autotune.choices import Timings
from toolkit.errors import RunError, ToolkitError
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import read_json, reason_of

_MAX_BYTES = 1 << 20
_SECONDS_TO_WAIT = 10.0
"""For another process that measures the same."""


class _Entry(msgspec.Struct):
    key: dict[str, Any]
    timings: Timings


def folder() -> Path:
    """`$XDG_CACHE_HOME/toolkit/tuning`; `~/.cache` by default."""
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not os.path.isabs(cache):
        is_set = bool(os.environ.get("XDG_CACHE_HOME"))
        problem = (
            "XDG_CACHE_HOME is relative" if is_set else "no home folder, and no XDG_CACHE_HOME"
        )
        raise FileNotFoundError(errno.ENOENT, problem, cache)
    return Path(cache, "toolkit", "tuning")


def find(key: dict[str, Any], notices: list[str] | None = None) -> Timings | None:
    """The timings of `key`; None where there are none. What is wrong with the file becomes one of
    `notices`."""
    try:
        path = _path(key)
        entry = read_json(path, RunError, _Entry, max_bytes=_MAX_BYTES)
        if not _is_valid(entry.timings):
            raise RunError(f"{path}: not the timings that belong there")
    except FileNotFoundError:
        return None
    except (ToolkitError, OSError) as error:
        if notices is not None:
            notices.append(f"{error}; measured again")
        return None
    return entry.timings if entry.key == json.loads(json.dumps(key)) else None


def find_or_measure(
    key: dict[str, Any], measure: Callable[[], Timings], notices: list[str]
) -> Timings:
    """The timings of `key`, measured where there are none yet, and kept if they last. What went
    wrong becomes at most one of `notices`: this run goes on with its own measurement."""
    found, known = find(key), None
    if found is not None:
        return found
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path):
            found = find(key, notices)  # of whoever measured meanwhile
            if found is not None:
                return found
            known = measure()
            if known.lasts:
                write_json_atomic(path, _Entry(key, known))
    except OSError as error:
        known = known or measure()
        del notices[:]
        why = f"{error.filename or folder()}: {reason_of(error)}"
        notices.append(f"measurements cannot be kept ({why}); each start measures")
    return known


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock, or go on without one where there are none, or its holder takes too long."""
    lock = filelock.FileLock(path.with_suffix(".lock"))
    with contextlib.suppress(filelock.Timeout, NotImplementedError):
        lock.acquire(timeout=_SECONDS_TO_WAIT, poll_interval=0.02)
    try:
        yield
    finally:
        lock.release()


def _path(key: dict[str, Any]) -> Path:
    import xxhash

    text = json.dumps(key, sort_keys=True)
    return folder() / f"{xxhash.xxh3_64_hexdigest(text.encode())}.json"


def _is_valid(timings: Timings) -> bool:
    parts: list[dict[Any, float]] = [timings.precision, timings.threads, timings.attention]
    return all(math.isfinite(s) and s > 0 for part in parts for s in part.values())
