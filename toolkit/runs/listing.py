"""Finding runs again: all of a root, one by its name or id, and the registry made anew."""

import contextlib
import logging
import os
import re
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import RunError
from toolkit.runs.index import (
    REGISTRY,
    read_index,
    registry_url_of,
    replace_index,
    update_index,
)
from toolkit.runs.lock import is_locked
from toolkit.runs.registry import absolute, is_run, registry_url_for
from toolkit.runs.status import RunRecord, not_a_run, record_of
from toolkit.storage.atomic import unused_name

log = logging.getLogger(__name__)

_ID = re.compile(r"[0-9a-f]{4,8}\Z")
_MOST_SHOWN = 8


def find_named(text: str, *, root: str | Path = "runs", registry_url: str | None = None) -> str:
    """The folder of the run that `toolkit runs` lists as `text` ("experiment/name", the name alone,
    its id, or the first four digits of it or more), or what is below it
    ("experiment/name/checkpoints/step10"); `text` as it is where it is a path that exists, or
    nothing is called so. Raises RunError where several runs are."""
    if not text or "://" in text or os.path.exists(os.path.expanduser(text)):
        return text
    found = _named(text, root, registry_url)
    return found[0] if found else text


def find_run(text: str, *, root: str | Path = "runs", registry_url: str | None = None) -> Path:
    """The folder of the run that is named, as `find_named` takes it, or whose folder `text` is.

    Raises:
        RunError: there is none, or several have the name.
    """
    path = Path(os.path.expanduser(text))
    if is_run(path):
        return path
    if found := _named(text, root, registry_url):
        if is_run(found[0]):
            return Path(found[0])
        raise RunError(
            f"{text}: its folder {found[0]} is gone, or on another machine; `toolkit runs reindex` "
            "takes what is gone from the list"
        )
    if not path.exists() and os.sep not in text:
        where = "" if str(root) == "runs" else f" --root {root}"
        raise RunError(f"{text}: no run has this name or id; `toolkit runs{where}` lists them")
    raise not_a_run(path)


def _named(text: str, root: str | Path, registry_url: str | None) -> list[str]:
    """The folder that is named, in a list, or nothing."""
    first, _, rest = text.partition("/")
    second, _, below = rest.partition("/")
    runs = list_runs(root, registry_url=registry_url, check=False)
    named = [(run, below) for run in runs if (run.experiment, run.name) == (first, second)]
    named = named or [(run, rest) for run in runs if run.name == first]
    if not named and _ID.match(first):
        named = [(run, rest) for run in runs if str(run.id).startswith(first)]
    if len({run.id for run, _ in named}) == 1:  # copies of one run: the one that kept its folder
        named = [(run, p) for run, p in named if Path(run.folder).name == run.name] or named
    if len(named) > 1:
        shown = [f"{run.folder} ({run.id})" for run, _ in named[:_MOST_SHOWN]]
        more = f" and {len(named) - len(shown)} more" if len(named) > len(shown) else ""
        raise RunError(
            f"{text}: several runs have this name: {', '.join(shown)}{more}; give one of them"
        )
    return [os.path.join(run.folder, path).rstrip("/") for run, path in named]


def list_runs(
    root: str | Path = "runs", *, registry_url: str | None = None, check: bool = True
) -> list[RunRecord]:
    """All runs below `root` and in its registry, oldest first.

    Every record is read from the run's folder; see `RunRecord.state`. Without `check`, the registry
    is believed, which may lag by some steps, and folders are read only of runs that it does not
    know, or whose process has vanished.
    """
    place = absolute(root)
    indexed = {record.folder: record for record in read_index(place, registry_url)}
    records: dict[str, RunRecord] = {}
    read: list[RunRecord] = []
    for folder in _run_folders(place):
        known = None if check else indexed.get(str(folder))
        if known is None or _is_outdated(known):
            known = record_of(folder)
            read += [known] if known is not None else []
        if known is not None:
            records[str(folder)] = known
    found = {record.id for record in records.values()}
    for record in indexed.values():
        if record.folder in records or Path(record.folder).parent.parent == place:
            is_gone = record.folder not in records
        else:
            is_gone = not os.path.isdir(record.folder)
            if not is_gone and (check or _is_outdated(record)):
                current = record_of(Path(record.folder))
                is_gone, record = current is None, current or record
        if is_gone:
            if record.id in found:
                continue  # it was moved
            if not _is_elsewhere(record):
                record.state = "missing"
        records.setdefault(record.folder, record)
    if not check and read and (registry_url is not None or (place / REGISTRY).exists()):
        update_index(registry_url or registry_url_of(place), read)
    return sorted(records.values(), key=lambda record: (record.created, record.folder))


def _run_folders(root: Path) -> Iterator[Path]:
    """Folders two levels below `root`, where runs are; hidden ones are not."""
    with contextlib.suppress(OSError), os.scandir(root) as experiments:
        for experiment in experiments:
            if experiment.name.startswith(".") or not _is_folder(experiment):
                continue
            with contextlib.suppress(OSError), os.scandir(experiment.path) as runs:
                for run in runs:
                    if not run.name.startswith(".") and _is_folder(run):
                        yield Path(run.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_outdated(record: RunRecord) -> bool:
    """Whether the registry is known to lag: an older release wrote it, or the run has ended."""
    return record.attempt is None or (
        record.state == "running" and not is_locked(Path(record.folder))
    )


def _is_elsewhere(record: RunRecord) -> bool:
    """Whether a folder that is not here may be on the machine that trained in it."""
    return record.host != socket.gethostname() and not os.path.isdir(os.path.dirname(record.folder))


def reindex(root: str | Path = "runs", *, registry_url: str | None = None) -> int:
    """Rebuild the registry from the folders; returns the number of runs in it.

    Runs in folders elsewhere (`save_folder`) stay as long as their folder exists. A registry of
    `root` that is damaged is set aside. Raises RunError where the registry cannot be written.
    """
    found = [r for r in list_runs(root, registry_url=registry_url) if r.state != "missing"]
    url, file = registry_url_for(root, registry_url), absolute(root) / REGISTRY
    try:
        try:
            replace_index(url, found)
        except Exception as error:
            if registry_url is not None or not _is_damage(error):
                raise
            aside = file.with_name(
                unused_name(f"{REGISTRY}.damaged", lambda name: file.with_name(name).exists())
            )
            log.warning("%s: is damaged; what was there is kept as %s", file, file.rename(aside))
            for ending in ("-wal", "-shm"):
                file.with_name(f"{REGISTRY}{ending}").unlink(missing_ok=True)
            replace_index(url, found)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise RunError(f"run registry: cannot be rebuilt: {reason}") from error
    return len(found)


def _is_damage(error: BaseException) -> bool:
    cause = getattr(error, "orig", error)
    return type(cause) is sqlite3.DatabaseError
