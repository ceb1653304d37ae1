"""The run at a URL as a folder of this machine: fetched where the URL has more, else left alone.

The URL is the run, and the folder here is its copy, with one exception: the machine that writes the
run is ahead of the URL until the mirror has caught up. Which of the two it is, the status tells:

- the folder has a later attempt than the URL, or the same one: it is the writer's, and stays;
- the URL has another attempt: the run went on elsewhere, and the folder is replaced;
- the folder was only ever fetched (`metadata/copy_of.json`): it is fetched again.

`copy_of.json` comes first and status.json last, so that a fetch cut short is done again.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from toolkit.checkpoint.folder import (
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
from toolkit.runs.status import RunRecord, RunStatus, read_status
from toolkit.storage.atomic import remove_tree, write_atomic, write_json_atomic
from toolkit.storage.foreign import decode_json
from toolkit.storage.locks import locked
from toolkit.storage.remote import RemoteFolder

log = logging.getLogger(__name__)

_FOR_WRITERS = (RUN_FILES.tensorboard, RUN_FILES.logs, RUN_FILES.trackers)
"""Folders that nobody reads from a copy."""


def local_copy(text: str, work_dir: str | None = None, *, checkpoints: bool = True) -> Path:
    """The run at the URL `text`, or its `checkpoints/step{N}`, as a folder of this machine that is
    as new as the URL. Without `checkpoints`, those that are here already are all there is.

    Raises:
        RunError: there is no run.
        StorageError, TrainingError: the store cannot be reached, or the disk written.
    """
    url, step = run_and_step(text)
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
        log.warning(
            "%s: has gone on elsewhere (attempt %d on %s), so %s is replaced",
            url, there.attempt, there.host, folder,
        )  # fmt: skip
    (folder / RUN_FILES.metadata).mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / RUN_FILES.copy_of, {"url": url})
    _fetch_files(remote, folder, everything=is_writer)
    if checkpoints:
        _fetch_checkpoints(f"{url}/{RUN_FILES.checkpoints}", folder / RUN_FILES.checkpoints)
    _fetch_file(remote, folder, RUN_FILES.status, [RUN_FILES.status])


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


def _fetch_files(remote: RemoteFolder, folder: Path, *, everything: bool) -> None:
    """All but the status and checkpoints; what the URL does not have goes."""
    wanted: dict[str, list[str]] = {}
    for name in remote.sizes():
        top = name.partition("/")[0]
        if is_of_lease(name) or top in (RUN_FILES.checkpoints, *BULKY):
            continue
        if everything or top not in _FOR_WRITERS:
            wanted.setdefault(whole_name(name)[0], []).append(name)
    for top in {RUN_FILES.metrics, RUN_FILES.tensorboard} | {n.partition("/")[0] for n in wanted}:
        for path in () if (folder / top).is_symlink() else (folder / top).rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in (*wanted, RUN_FILES.status, RUN_FILES.copy_of):
                path.unlink()
    for name, pieces in wanted.items():
        if name != RUN_FILES.status:
            _fetch_file(remote, folder, name, pieces)


def _fetch_file(remote: RemoteFolder, folder: Path, name: str, pieces: list[str]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{remote}: {name!r} would be written outside {folder}")
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


def _fetch_checkpoints(url: str, root: Path) -> None:
    """The newest whole one; those here that are not there, or other ones, go."""
    there = set(saved_steps(url))
    for step in saved_steps(root):
        if step not in there or _is_another(f"{url}/step{step}", step_folder(root, step)):
            remove_tree(step_folder(root, step))
    if there:
        root.mkdir(parents=True, exist_ok=True)
        download_newest(url, root)


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
