"""`toolkit runs rm`, `move`, `tag` and `note`: what is changed about a run that nobody trains.

A folder disappears or appears by one rename, so that whatever ends the command leaves a whole run
or none. The registry follows; what it misses, `toolkit runs reindex` finds again.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from toolkit.commands.runs.sweeping import delete, doomed_name, sweep
from toolkit.config.paths import local_path, path_problem
from toolkit.errors import ConfigError, RunError, TrainingError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.index import REGISTRY, registry_url_of, update_index
from toolkit.runs.lock import RunLock, is_locked, read_lock_info
from toolkit.runs.notes import Notes, change_note, change_tags, read_notes
from toolkit.runs.registry import absolute, is_run
from toolkit.runs.status import id_of, mirror_of, not_a_run, read_status, record_of
from toolkit.storage.atomic import (
    fsync_folder,
    hash_file,
    new_folder,
    write_json_atomic,
)
from toolkit.storage.foreign import read_json

LOCK_FILES = (RUN_FILES.lock, RUN_FILES.lock_info)


def check_free(folder: Path, *, doing: str) -> None:
    """Raise RunError where `folder` is no run, or somebody trains it."""
    if not is_run(folder):
        raise not_a_run(folder)
    if is_locked(folder):
        info = read_lock_info(folder)
        by = f" ({info.describe()})" if info is not None else ""
        raise RunError(f"{folder}: is being trained{by}; stop it before it is {doing}")


@contextlib.contextmanager
def held(folder: Path, *, doing: str) -> Iterator[None]:
    """Nobody trains the run inside the block. Raises RunError where somebody does now."""
    check_free(folder, doing=doing)
    lock = RunLock(folder)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def bytes_of(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def remove(folder: Path, *, root: str, registry_url: str | None) -> None:
    """Remove a run folder and its row of the registry. Of a link, the link alone goes.

    Raises:
        RunError: it is no run, or is being trained.
    """
    folder = absolute(folder)
    with held(folder, doing="removed"):
        doomed = doomed_name(folder)
        _rename(folder, doomed)
        (doomed / RUN_FILES.lock_info).unlink(missing_ok=True)
    _tell(_registries(folder, root, registry_url), gone=folder)
    delete(doomed)
    sweep(folder.parent)


def move(folder: Path, dest: str, *, root: str, registry_url: str | None) -> Path:
    """Bring a run folder to `dest`, or into it where `dest` is a folder; where it is then.

    Within a file system that is one rename. To another one, everything is copied, compared by
    hashes, renamed into place, and only then removed here. The run's name and experiment follow the
    names of the folders where they did before, unless it has a mirror, which knows it by them.

    Raises:
        RunError: it is no run, is being trained, or `dest` exists.
        TrainingError: it cannot be written there.
    """
    folder, target = absolute(folder), absolute(local_path(dest, "DEST"))
    if target.is_dir() and not is_run(target):
        target = target / folder.name
    if problem := path_problem(target.name, "name"):
        raise ConfigError(f"DEST: {problem}")
    if os.path.lexists(target):
        raise RunError(f"{target}: exists; give a name that is free")
    if target.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{target}: is inside the run itself; give another place")
    urls = _registries(folder, root, registry_url)
    doomed = None
    with held(folder, doing="moved"):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise _cannot(error, target) from None
            _copy(folder, target)
            doomed = doomed_name(folder)
            _rename(folder, doomed)
        for parent in (folder.parent, target.parent):
            fsync_folder(parent)
        (target / RUN_FILES.lock_info).unlink(missing_ok=True)
        follow_names(folder, target)
    if (target.parent.parent / REGISTRY).exists():
        urls = [*urls, registry_url_of(target.parent.parent)]
    _tell(dict.fromkeys(urls), gone=folder, now=target)
    if doomed is not None:
        delete(doomed)
    return target


def tag(folder: Path, words: Collection[str], *, root: str, registry_url: str | None) -> Notes:
    """Add the tags of `+x`, remove those of `-x`; what the run has then. A run that is being
    trained may be tagged. Raises ConfigError: a word is neither."""
    if odd := [word for word in words if word[:1] not in ("+", "-")]:
        raise ConfigError(f"{odd[0]}: write +{odd[0]} to add the tag, -{odd[0]} to remove it")
    add = [word[1:] for word in words if word[0] == "+"]
    notes = change_tags(folder, add, [word[1:] for word in words if word[0] == "-"])
    _tell(_registries(folder, root, registry_url), now=absolute(folder))
    return notes


def lacking(folder: Path, words: Collection[str]) -> list[str]:
    """The tags that `-x` among `words` would remove, and the run does not have."""
    tags = read_notes(folder).tags
    return [word[1:] for word in words if word[:1] == "-" and word[1:] not in tags]


def note(folder: Path, text: str, *, root: str, registry_url: str | None) -> Notes:
    """Replace the run's note; an empty text removes it."""
    notes = change_note(folder, text)
    _tell(_registries(folder, root, registry_url), now=absolute(folder))
    return notes


def _registries(folder: Path, root: str, registry_url: str | None) -> list[str]:
    """Where a run may have a row: what the user names, its root's, and its config's own."""
    places = [absolute(root), absolute(folder).parent.parent]
    found = [registry_url] if registry_url is not None else []
    found += [registry_url_of(place) for place in places if (place / REGISTRY).exists()]
    with contextlib.suppress(OSError, RunError, AttributeError):
        own = read_json(folder / RUN_FILES.config, RunError).get("run", {}).get("registry")
        if isinstance(own, str) and "${" not in own and "***" not in own:
            found.append(own)
    return list(dict.fromkeys(found))


def register(folder: Path, *, root: str, registry_url: str | None = None) -> None:
    """Give a run folder that has come its row in the registries that know its place."""
    _tell(_registries(folder, root, registry_url), now=absolute(folder))


def _tell(urls: Collection[str], *, gone: Path | None = None, now: Path | None = None) -> None:
    record = record_of(now) if now is not None else None
    for url in urls:
        update_index(
            url,
            [record] if record is not None else [],
            [str(gone)] if gone is not None and gone != now else [],
        )


def follow_names(before: Path, folder: Path) -> None:
    """Call the run as its folders are called, where it was so before."""
    status = read_status(folder)
    if status is None or mirror_of(folder) is not None:
        return
    names = {"name": status.name, "experiment": status.experiment}
    if status.name == before.name:
        names["name"] = folder.name
    if status.experiment == before.parent.name and (
        folder.parent.parent == before.parent.parent or (folder.parent.parent / REGISTRY).exists()
    ):
        names["experiment"] = folder.parent.name
    if names == {"name": status.name, "experiment": status.experiment}:
        return
    own_id = status.id or id_of(status.created, status.experiment, status.name)
    with contextlib.suppress(FileNotFoundError, RunError):
        config: dict[str, Any] = read_json(folder / RUN_FILES.config, RunError)
        if isinstance(config.get("run"), dict):
            config["run"] |= names
            write_json_atomic(folder / RUN_FILES.config, config)
    write_json_atomic(
        folder / RUN_FILES.status, msgspec.structs.replace(status, id=own_id, **names)
    )


def _copy(folder: Path, target: Path) -> None:
    try:
        with new_folder(target) as unfinished:
            shutil.copytree(folder, unfinished, symlinks=True, dirs_exist_ok=True)
            for name in LOCK_FILES:
                (unfinished / name).unlink(missing_ok=True)
            _compare(folder, unfinished)
    except OSError as error:
        raise _cannot(error, target) from None
    except shutil.Error as error:
        raise TrainingError(f"{target}: cannot be copied there: {error.args[0][0][2]}") from None


def _compare(folder: Path, copy: Path) -> None:
    """Raise TrainingError where a file of `folder` reads back differently in `copy`."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            inside = path.relative_to(folder)
            if str(inside) in LOCK_FILES or path.is_symlink():
                continue
            if not (copy / inside).is_file() or hash_file(path) != hash_file(copy / inside):
                raise TrainingError(f"{copy / inside}: reads back differently than {path}")


def _rename(folder: Path, other: Path) -> None:
    try:
        os.rename(folder, other)
        fsync_folder(folder.parent)
    except OSError as error:
        raise _cannot(error, folder) from None


def _cannot(error: OSError, path: Path) -> TrainingError:
    return TrainingError(
        f"{error.filename or path}: {error.strerror}; nothing was changed: make room there, or "
        "choose another place"
    )
