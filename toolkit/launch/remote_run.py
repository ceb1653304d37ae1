"""The run at a URL as a folder of this machine: fetched where the URL has more, else left alone.

The URL is the run, and the folder here is its copy, with one exception: the machine that writes the
run is ahead of the URL until the mirror has caught up. Which of the two it is, the status tells:

- the folder has a later attempt than the URL, or the same one: it is the writer's, and stays;
- the URL has another attempt: the run went on elsewhere, and the folder is set aside;
- the folder was only ever fetched (`metadata/copy_of.json`): it is fetched again.

Nothing is removed but what was fetched before, which `copy_of.json` lists. It comes first and
status.json last, so that a fetch cut short is done again.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from toolkit.checkpoint.folder import (
    move_aside,
    read_raw_metadata,
    saved_steps,
    step_folder,
    step_of,
)
from toolkit.checkpoint.remote import download_checkpoint, download_newest
from toolkit.errors import CheckpointError, RunError
from toolkit.launch.pushing import BULKY, PIECE, piece_name, whole_name
from toolkit.runs.config import folder_of_url
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lease import is_leased, is_of_lease
from toolkit.runs.lock import is_locked
from toolkit.runs.status import RunRecord, RunStatus, read_status
from toolkit.storage.atomic import remove_tree, unused_name, write_atomic, write_json_atomic
from toolkit.storage.foreign import decode_json, read_json
from toolkit.storage.locks import locked
from toolkit.storage.remote import RemoteFolder
from toolkit.storage.urls import problem_of_store

log = logging.getLogger(__name__)

_FOR_WRITERS = (RUN_FILES.tensorboard, RUN_FILES.logs, RUN_FILES.trackers)
"""Folders that nobody reads from a copy."""


class Copy(msgspec.Struct, frozen=True, kw_only=True):
    """Content of metadata/copy_of.json: what was fetched, or begun to be."""

    url: str = ""
    files: list[str] = []
    steps: list[int] = []
    state: str | None = None
    """Of the URL, when all of it was here."""

    def is_whole(self, folder: Path) -> bool:
        """Whether everything is still there."""
        root = folder / RUN_FILES.checkpoints
        return {*self.steps} <= {*saved_steps(root)} and all(
            (folder / name).exists() for name in self.files
        )


def local_copy(text: str, work_dir: str | None = None, *, checkpoints: bool = True) -> Path:
    """The run at the URL `text`, or its `checkpoints/step{N}`, as a folder of this machine that is
    as new as the URL. Without `checkpoints`, those that are here already are all there is.

    Raises:
        RunError: there is no run.
        StorageError, TrainingError: the store cannot be reached, or the disk written.
    """
    url, step = run_and_step(text)
    if (problem := problem_of_store(url)) is not None:
        raise RunError(problem)
    folder = folder_of_url(url, work_dir)
    if not is_at(url):
        raise RunError(
            f"{text}: no run there (no {RUN_FILES.status}); a run gets there by `toolkit train "
            "--save-folder URL`"
        )
    with _one_at_a_time(folder):
        bring_up_to_date(url, folder, is_writer=False, checkpoints=checkpoints and step is None)
        if step is None:
            return folder
        own = folder / RUN_FILES.checkpoints
        download_checkpoint(f"{url}/{RUN_FILES.checkpoints}/step{step}", own)
        return step_folder(own, step)


def is_at(url: str) -> bool:
    """Whether there is a run at `url`."""
    return RemoteFolder(url).exists(RUN_FILES.status)


def take_over(url: str, folder: Path) -> None:
    """Make `folder` ready to go on with the run at `url`, if there is one, as the holder of its
    lease."""
    with _one_at_a_time(folder):
        bring_up_to_date(url, folder, is_writer=True)
        (folder / RUN_FILES.copy_of).unlink(missing_ok=True)


def check_not_ahead(url: str, folder: Path) -> None:
    """Raise RunError where the run at `url` is not an earlier state of the one in `folder`."""
    there, here = _status_at(RemoteFolder(url)), read_status(folder)
    if (folder / RUN_FILES.copy_of).exists():
        raise RunError(f"{folder}: was fetched from {url}, and nobody has trained it here")
    if there is None:
        _check_unused(RemoteFolder(url))
    if here is None or there is None or is_same_attempt(here, there):
        return
    _check_same_run(url, there, folder, here)
    if here.attempt <= there.attempt:
        raise RunError(
            f"{url}: the run has gone on elsewhere (attempt {there.attempt} on {there.host}); what "
            f"is in {folder} is not part of it"
        )


def bring_up_to_date(url: str, folder: Path, *, is_writer: bool, checkpoints: bool = True) -> None:
    """Make `folder` what the run at `url` is, unless it is ahead; see the top of this file. The
    caller holds the folder's turn."""
    remote = RemoteFolder(url)
    there, here = _status_at(remote), read_status(folder)
    is_copy = (folder / RUN_FILES.copy_of).exists()
    if there is None:
        _check_unused(remote)
        if here is not None and not is_copy:
            log.warning("%s: nothing is there yet; going on with %s", url, folder)
        return
    if here is not None and not is_copy:
        _check_same_run(url, there, folder, here)
        if is_same_attempt(here, there) or here.attempt > there.attempt:
            return
        _set_aside(url, there, folder)
    copy, versions = _read_copy(folder), remote.versions()
    state = _state_of(versions, is_writer=is_writer, checkpoints=checkpoints)
    if state is not None and state == copy.state and copy.is_whole(folder):
        return
    wanted = _wanted(remote, versions, everything=is_writer)
    log.info("%s: fetching the run into %s", url, folder)
    root = folder / RUN_FILES.checkpoints
    there_steps = set(saved_steps(f"{url}/{root.name}")) if checkpoints else set()
    if checkpoints:
        _make_room(f"{url}/{root.name}", root, there_steps, remove=is_copy)
    (folder / RUN_FILES.metadata).mkdir(parents=True, exist_ok=True)
    names = sorted({*copy.files, *wanted})
    write_json_atomic(folder / RUN_FILES.copy_of, Copy(url=url, files=names))
    for name in {*copy.files} - {*wanted}:
        _path_in(remote, folder, name).unlink(missing_ok=True)
    for name, pieces in wanted.items():
        _fetch_file(remote, folder, name, pieces)
    if there_steps:
        root.mkdir(parents=True, exist_ok=True)
        download_newest(f"{url}/{root.name}", root)
    _fetch_file(remote, folder, RUN_FILES.status, [RUN_FILES.status])
    steps = sorted(there_steps & set(saved_steps(root)))
    copy = Copy(url=url, files=sorted(wanted), steps=steps, state=state)
    write_json_atomic(folder / RUN_FILES.copy_of, copy)


def is_same_attempt(one: RunStatus, other: RunStatus) -> bool:
    """Whether both tell of one start of one run."""

    def who(status: RunStatus) -> tuple[object, ...]:
        return status.attempt, status.created, status.started, status.host, status.pid

    return who(one) == who(other)


def runs_at(url: str) -> list[RunRecord]:
    """The run at a URL, or those one or two levels below it, oldest first, as their statuses tell:
    of a run that goes on, up to half a minute old."""
    found, level = [], [RemoteFolder(url)]
    for _ in range(3):
        below = []
        for folder in level:
            status = _status_at(folder)
            if status is None:
                below += [folder / name for name in folder.folders()]
                continue
            record = RunRecord.from_status(Path(), status)
            record.folder = folder.url
            if status.state == "running" and not is_leased(folder):
                record.state = "dead"
            found.append(record)
        level = below
    return sorted(found, key=lambda record: (record.created, record.folder))


def run_and_step(text: str) -> tuple[str, int | None]:
    """The URL of a run, and a step, where `text` is that of its `checkpoints/step{N}`."""
    url = text.rstrip("/")
    root, _, name = url.rpartition("/")
    run, _, checkpoints = root.rpartition("/")
    step = step_of(name)
    return (run, step) if step is not None and checkpoints == RUN_FILES.checkpoints else (url, None)


def _check_unused(remote: RemoteFolder) -> None:
    if others := [name for name in remote.names() if not is_of_lease(name)]:
        raise RunError(
            f"{remote}: holds other files ({', '.join(others[:3])}) and no run; choose another URL"
        )


def _check_same_run(url: str, there: RunStatus, folder: Path, here: RunStatus) -> None:
    names = [f"{run.experiment}/{run.name} of {run.created}" for run in (there, here)]
    if names[0] != names[1]:
        raise RunError(
            f"{url}: holds another run ({names[0]}) than {folder} ({names[1]}); choose another URL"
        )


def _status_at(remote: RemoteFolder) -> RunStatus | None:
    try:
        raw = remote.read(RUN_FILES.status)
    except FileNotFoundError:
        return None
    return decode_json(raw, f"{remote}/{RUN_FILES.status}", RunError, RunStatus)


def _set_aside(url: str, there: RunStatus, folder: Path) -> None:
    """Give the folder of an attempt that went no further another name."""
    gone = f"{url}: has gone on elsewhere (attempt {there.attempt} on {there.host})"
    if is_locked(folder):
        raise RunError(
            f"{gone}, and another process still trains it in {folder}; stop that one, or fetch the "
            "run into another folder with --work-dir"
        )
    folder = folder.resolve()
    name = unused_name(f"{folder.name}.replaced", lambda n: os.path.lexists(folder.with_name(n)))
    try:
        aside = folder.rename(folder.with_name(name))
    except OSError as error:
        raise RunError(
            f"{gone}, and {folder} cannot be renamed ({error.strerror}); fetch the run into "
            "another folder with --work-dir"
        ) from None
    log.warning("%s; what was in %s is kept as %s", gone, folder, aside)


def _read_copy(folder: Path) -> Copy:
    try:
        return read_json(folder / RUN_FILES.copy_of, RunError, Copy)
    except (FileNotFoundError, RunError):
        return Copy()


def _state_of(versions: Mapping[str, tuple[int, str]], **how: bool) -> str | None:
    """What tells one state of the URL, and what was fetched of it, from another; None where the
    store tells no versions."""
    files = sorted((name, about) for name, about in versions.items() if not is_of_lease(name))
    if not all(version for _, (_, version) in files):
        return None
    return hashlib.md5(repr((files, how)).encode(), usedforsecurity=False).hexdigest()


def _wanted(
    remote: RemoteFolder, names: Iterable[str], *, everything: bool
) -> dict[str, list[str]]:
    """Files to fetch, and the pieces of each: all but the status and checkpoints."""
    wanted: dict[str, list[str]] = {}
    for name in names:
        if not name or name.endswith("/"):
            continue  # some tools make folders so
        if {"", ".", ".."} & {*name.split("/")}:
            raise RunError(f"{remote}: {name!r} is no name of a file of a run; remove it there")
        top, whole = name.partition("/")[0], whole_name(name)[0]
        if is_of_lease(name) or top in (RUN_FILES.checkpoints, *BULKY):
            continue
        is_wanted = everything or top not in _FOR_WRITERS
        if is_wanted and whole not in (RUN_FILES.status, RUN_FILES.copy_of):
            wanted.setdefault(whole, []).append(name)
    return wanted


def _path_in(remote: RemoteFolder, folder: Path, name: str) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{remote}: {name!r} would be written outside {folder}")
    return path


def _fetch_file(remote: RemoteFolder, folder: Path, name: str, pieces: list[str]) -> None:
    path = _path_in(remote, folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(pieces) == 1:
        write_atomic(path, remote.read(name), sync=False)
        return
    unfinished = path.with_name(f".{path.name}.fetching")
    with unfinished.open("wb") as file:
        for number in range(len(pieces)):
            data = remote.read(piece_name(name, number))
            if len(data) < PIECE and number < len(pieces) - 1:
                raise RunError(f"{remote}/{piece_name(name, number)}: is cut short")
            file.write(data)
    unfinished.replace(path)


def _make_room(url: str, root: Path, there: set[int], *, remove: bool) -> None:
    """Steps here that are not there, or other ones, go: those of a copy for good."""
    for step in saved_steps(root):
        if step not in there or _is_another(f"{url}/step{step}", step_folder(root, step)):
            if remove:
                remove_tree(step_folder(root, step))
            else:
                log.warning("no step of the run: %s", move_aside(step_folder(root, step)))


def _is_another(url: str, folder: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return read_raw_metadata(url) != read_raw_metadata(folder)
    return True


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Ranks of one machine, and verbs beside each other, fetch in turns."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise RunError(
            f"{error.filename or folder}: cannot write there ({error.strerror}); name another "
            "folder with --work-dir"
        ) from None
