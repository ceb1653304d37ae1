"""Reading the registry fast, and keeping it in step with folders that are moved or removed.

The registry of a root is a file of SQLite, which Python reads by itself: SQLAlchemy, which writes
it and knows other databases, takes longer to import than a thousand rows to read.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from toolkit.runs.status import RunRecord

log = logging.getLogger(__name__)

REGISTRY = "registry.sqlite"
_BUSY_SECONDS = 3
_COLUMNS = RunRecord.__struct_fields__
_SQLITE = "sqlite:///"
_PROBLEM = "run registry: not reachable, reading folders only (%s)"


def registry_url_of(root: Path) -> str:
    """The registry of the absolute folder `root`."""
    return f"{_SQLITE}{root / REGISTRY}"


def read_index(root: Path, registry_url: str | None) -> list[RunRecord]:
    """Every row of the registry, oldest run first. One that cannot be read is a warning."""
    file = root / REGISTRY
    if registry_url is None and not file.exists():
        return []
    try:
        if registry_url is None:
            with contextlib.suppress(sqlite3.OperationalError):  # an older table, or read-only
                return _read_file(file)
        return _database().RunIndex(registry_url or registry_url_of(root)).all()
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, sqlite3.DatabaseError) and "locked" not in reason:
            reason += "; `toolkit runs reindex` makes it anew"
        log.warning(_PROBLEM, reason)
        return []


def _read_file(file: Path) -> list[RunRecord]:
    names = ", ".join(f'"{name}"' for name in _COLUMNS)
    place = f"file:{quote(str(file))}?mode=ro"
    with contextlib.closing(sqlite3.connect(place, uri=True, timeout=_BUSY_SECONDS)) as connection:
        try:
            rows = connection.execute(f"SELECT {names} FROM runs ORDER BY created, folder")
            return [_record(row) for row in rows]
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise sqlite3.DatabaseError(f"{file}: another process has locked it") from None
            raise


def _record(row: tuple[Any, ...]) -> RunRecord:
    return msgspec.convert(dict(zip(_COLUMNS, row, strict=True)), RunRecord)


def update_index(url: str, records: Iterable[RunRecord], gone: Iterable[str] = ()) -> bool:
    """Write `records`, and take the rows of folders that are `gone` away; False where the registry
    does not take it."""
    return _quietly(lambda: _database().RunIndex(url).update(records, gone))


def replace_index(url: str, records: Iterable[RunRecord]) -> None:
    """Make the registry hold exactly `records`. Errors are the database's."""
    _database().RunIndex(url).replace_all(records)


def _quietly(job: Callable[[], Any]) -> bool:
    try:
        job()
    except Exception as error:
        log.debug(_PROBLEM, error)
        return False
    return True


def _database() -> Any:
    """Imported where a registry is written: SQLAlchemy is slow to import."""
    from toolkit.runs import database

    return database
