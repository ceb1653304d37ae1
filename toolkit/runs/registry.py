"""Starting runs and finding them again.

`start_run` makes (or reopens) the run folder and locks it. The table `runs` behind it is only an
index: a registry that cannot be reached is a warning, and `reindex` rebuilds it from the folders.
"""

import logging
import os
import secrets
import time
from pathlib import Path
from typing import Any

from toolkit.errors import RunError
from toolkit.metrics.lines import last_record
from toolkit.runs.config import RunConfig
from toolkit.runs.environment import describe_command, describe_environment, describe_git
from toolkit.runs.files import RUN_FILES
from toolkit.runs.index import (
    REGISTRY,
    registry_url_of,
)
from toolkit.runs.lock import RunLock, is_locked, utc_now
from toolkit.runs.manager import RunManager
from toolkit.runs.status import (
    RunStatus,
    full_record,
    not_a_run,
    read_status,
)
from toolkit.storage.atomic import temporary_path

log = logging.getLogger(__name__)

_PAUSE_SECONDS = 60.0
"""How long a registry that failed is left alone; the run's end is written all the same."""
_TRAINED = (RUN_FILES.checkpoints, RUN_FILES.merged, RUN_FILES.exports)
"""What training leaves, besides metrics."""
_ASKED = (
    RUN_FILES.config,
    RUN_FILES.origins,
    RUN_FILES.data_config,
    RUN_FILES.model_config,
    RUN_FILES.trainer_config,
    RUN_FILES.engine,
    RUN_FILES.optimizer_groups,
    RUN_FILES.trackers,
)
"""What an attempt was started with, and whom it told."""
_FOLDERS = (
    RUN_FILES.metadata,
    RUN_FILES.metrics,
    RUN_FILES.checkpoints,
    RUN_FILES.logs,
)


def choose_run_name() -> str:
    """A name for a run that was given none: `20260131-235959-a1b2` (UTC and four hex digits). One
    rank calls this and tells the others."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def resolve_run_folder(config: RunConfig, name: str) -> Path:
    """The run folder of `config`, absolute. `name` counts only where the config gives none."""
    if config.folder is not None:
        return absolute(config.folder)
    return absolute(config.root) / config.experiment / (config.name or name)


def is_run(folder: Path | str) -> bool:
    """Whether `folder` is the folder of a run that was started once."""
    return read_status(Path(folder)) is not None


def has_trained(folder: Path) -> bool:
    """Whether `folder` is the folder of a run that has trained, or is being started now. One that
    failed or was stopped before its first step holds nothing but logs and what it was asked."""
    status = read_status(folder)
    if status is None:
        return False
    if status.state == "finished" or status.step or is_locked(folder):
        return True
    return _has_saved(folder)


def run_of_checkpoint(step: Path) -> Path | None:
    """The run that a step folder belongs to, also where it, or checkpoints/, is a link; None: none
    that is known."""
    for place in (Path(os.path.abspath(step)), step.resolve()):
        for folder in (place.parent.parent, place.parent):
            if is_run(folder):
                return folder
    return None


def check_run_folder(config: RunConfig, name: str) -> None:
    """Refuse early, without writing anything, what `start_run` would refuse.

    Raises:
        RunError: the run exists and `save_folder` is not given, its folder cannot be made, or
            `registry` can never be one. One that does not answer is a warning.
    """
    if config.registry is not None:
        _database().check_url(config.registry)
    folder = resolve_run_folder(config, name)
    if config.save_folder is None:
        _check_unused(folder)
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "permission denied" if nearest.is_dir() else "not a folder"
        raise RunError(
            f"{folder}: cannot write there ({nearest}: {reason}); "
            "choose a writable --save-folder or run.root"
        )


def start_run(
    exp_name: str,
    run_name: str | None = None,
    *,
    resume: bool = False,
    root: str | Path = "runs",
    save_folder: str | Path | None = None,
    registry_url: str | None = None,
    is_main: bool | None = None,
    environment: dict[str, Any] | None = None,
) -> RunManager:
    """Create the run folder `root/exp_name/run_name` (or `save_folder`; with `resume`, reopen it),
    lock it and note what was started. A run of this name in which nothing was trained is taken
    over: its logs stay, and what it was asked gets other names.

    Under a launcher, call it on the main rank first, then, after a barrier, with the same names on
    the others, which get a handle that writes nothing (`is_main`; default: by the rank the launcher
    gave). `environment` is added to metadata/environment.json.

    Raises:
        RunError: the run exists and `resume` is false; the folder cannot be written; another
            process holds it; `resume` of a folder that is not a run.
    """
    # A resumed run stays in the registry it was started in, wherever the command runs.
    if resume and save_folder and (absolute(save_folder).parent.parent / REGISTRY).exists():
        root = absolute(save_folder).parent.parent
    name = run_name or (absolute(save_folder).name if save_folder else choose_run_name())
    folder = absolute(save_folder) if save_folder else absolute(root) / exp_name / name
    if is_main is None:
        is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        return RunManager(folder, experiment=exp_name, name=name, is_main=False)
    if resume and not is_run(folder):
        raise not_a_run(folder)
    if not resume and save_folder is None:
        _check_unused(folder)
    _prepare_folder(folder)
    lock = RunLock(folder)
    lock.acquire()
    try:
        if save_folder is None and not resume and (before := read_status(folder)) is not None:
            # Asked again under the lock, which is ours and says nothing now.
            if before.state == "finished" or before.step or _has_saved(folder):
                raise _exists(folder)
            _set_attempt_aside(folder, before.attempt)
        run = RunManager(
            folder,
            experiment=exp_name,
            name=name,
            lock=lock,
            on_status=_IndexWriter(root, registry_url),
        )
        started = {"attempt": run.attempt, "started": utc_now()}
        run.metadata.log(describe_command() | started, RUN_FILES.command)
    except BaseException:
        lock.release()
        raise
    # Seconds on slow file systems and driver start-up, and nobody waits for the answer.
    extra = environment or {}
    run.submit(lambda: run.metadata.log(describe_git(), RUN_FILES.git))
    run.submit(lambda: run.metadata.log(describe_environment() | extra, RUN_FILES.environment))
    return run


def absolute(path: str | Path) -> Path:
    """`path` from the current folder, `~` filled in; links stay."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def registry_url_for(root: str | Path, registry_url: str | None) -> str:
    """The registry that is given, else that of `root`."""
    return registry_url or registry_url_of(absolute(root))


def _database() -> Any:
    """Imported where a registry is needed: SQLAlchemy is slow to import."""
    from toolkit.runs import database

    return database


class _IndexWriter:
    """The `on_status` of a run: one row of the registry follows the status."""

    def __init__(self, root: str | Path, registry_url: str | None) -> None:
        self._own_root = absolute(root) if registry_url is None else None
        self._url = registry_url_for(root, registry_url)
        self._index: Any = None
        self._has_warned = False
        self._pause_until = 0.0

    def __call__(self, folder: Path, status: RunStatus) -> None:
        if time.monotonic() < self._pause_until and status.state == "running":
            return
        try:
            if self._index is None:
                if self._own_root is not None:
                    self._own_root.mkdir(parents=True, exist_ok=True)
                self._index = _database().RunIndex(self._url)
            self._index.put(full_record(folder, status))
        except Exception as error:
            self._pause_until = time.monotonic() + _PAUSE_SECONDS
            if not self._has_warned:
                log.warning(
                    "run registry: not reachable, so `toolkit runs` reads folders only (%s)",
                    str(error).partition("\n")[0] or type(error).__name__,
                )
            self._has_warned = True


def _exists(folder: Path) -> RunError:
    way = f"`toolkit resume {folder}`"
    if not any((folder / file).exists() for file in (RUN_FILES.config, RUN_FILES.origins)):
        way = "the script that began it and start_run(..., resume=True)"
    return RunError(
        f"{folder}: this run exists; continue it with {way} or choose another name (--name)"
    )


def _has_saved(folder: Path) -> bool:
    is_saved = any(any((folder / name).iterdir()) for name in _TRAINED if (folder / name).is_dir())
    return is_saved or bool(last_record(folder / RUN_FILES.train_metrics))


def _set_attempt_aside(folder: Path, attempt: int) -> None:
    """Nothing of the attempt counts for the next one, which is asked anew."""
    log.info("%s: attempt %d trained nothing; it begins anew", folder, attempt)
    for name in _ASKED:
        path = folder / name
        if path.exists():
            path.rename(path.with_name(f"{path.stem}.attempt{attempt}{path.suffix}"))


def _check_unused(folder: Path) -> None:
    if has_trained(folder):
        raise _exists(folder)
    if is_run(folder):
        return
    # What a start that was cut short leaves behind is no obstacle.
    if folder.is_dir() and any(
        path.name not in (*_FOLDERS, RUN_FILES.tensorboard)
        or (path.name != RUN_FILES.metadata and any(path.iterdir()))
        for path in folder.iterdir()
    ):
        raise RunError(
            f"{folder}: exists but is not a run; move it away or choose another name (--name)"
        )


def _prepare_folder(folder: Path) -> None:
    try:
        for name in _FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        probe = temporary_path(folder / RUN_FILES.status)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"{folder}: cannot write there ({error.strerror}); "
            "choose a writable --save-folder or run.root"
        ) from None
