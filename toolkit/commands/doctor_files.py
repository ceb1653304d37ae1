"""What runs need of a file system, and the locks that dead runs left in it."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import is_locked, read_lock_info
from toolkit.storage.foreign import reason_of
from toolkit.storage.locks import locked

_CLOCK_SECONDS = 5.0
_MOST_RUNS = 2000


def missing_guarantees(place: Path) -> list[str]:
    """What the file system of the empty folder `place` does not do, though every run needs it."""
    return _failing(place, {"fsync": _syncs, "rename": _replaces, "exclusive files": _excludes})


def missing_comforts(place: Path) -> list[str]:
    """What it does not do, and runs can do without: more slowly, or with less protection."""
    return _failing(place, {"locks": _locks, "hard links": _links, "its clock": _keeps_time})


def _failing(place: Path, checks: dict[str, Callable[[Path], bool]]) -> list[str]:
    failing = []
    for name, check in checks.items():
        inside = place / name.replace(" ", "-")
        inside.mkdir()
        try:
            if not check(inside):
                failing.append(name)
        except (OSError, NotImplementedError) as error:  # the latter: filelock, of flock
            failing.append(f"{name} ({reason_of(error)})")
    return failing


def _syncs(place: Path) -> bool:
    """Files and folders."""
    path = place / "file"
    path.write_bytes(b"x")
    for each in (path, place):
        descriptor = os.open(each, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return True


def _replaces(place: Path) -> bool:
    """A file takes the place of another at once."""
    old, new = place / "old", place / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    new.replace(old)
    return old.read_bytes() == b"new" and os.listdir(place) == ["old"]


def _excludes(place: Path) -> bool:
    """Of two that create a file, one fails."""
    path = place / "file"
    path.touch(exist_ok=False)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _locks(place: Path) -> bool:
    with locked(place / "file"), locked(place / "file", wait=False) as is_free:
        return not is_free


def _links(place: Path) -> bool:
    path = place / "file"
    path.write_bytes(b"x")
    os.link(path, place / "link")
    return path.stat().st_nlink == 2


def _keeps_time(place: Path) -> bool:
    path = place / "file"
    path.touch()
    return abs(path.stat().st_mtime - time.time()) < _CLOCK_SECONDS


def kind_of_file_system(folder: Path) -> str:
    """`ext4`, `nfs4`, ...; empty where the system does not tell."""
    import psutil

    where, found = folder.resolve(), ""
    deepest = -1
    for part in psutil.disk_partitions(all=True):
        mount = Path(part.mountpoint)
        if where.is_relative_to(mount) and len(mount.parts) >= deepest:
            deepest, found = len(mount.parts), part.fstype
    return found


def stale_locks(root: Path) -> list[Path]:
    """Runs ROOT/GROUP/NAME whose writer died without releasing the folder, of the first 2,000."""
    locks = itertools.islice(root.glob(f"*/*/{RUN_FILES.lock_info}"), _MOST_RUNS)
    depth = len(Path(RUN_FILES.lock_info).parts)
    runs = [lock.parents[depth - 1] for lock in locks]
    return sorted(r for r in runs if read_lock_info(r) is not None and not is_locked(r))
