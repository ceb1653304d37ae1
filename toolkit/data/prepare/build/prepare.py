"""Token files for a config: those that exist, or new ones (`build.py`): `ensure_prepared`."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import filelock

from toolkit.data.config import DatasetConfig, StoreConfig
from toolkit.data.prepare.build.build import build_dataset, remove_unfinished
from toolkit.data.prepare.build.progress import Progress
from toolkit.data.prepare.build.settings import check_settings
from toolkit.data.prepare.store.cache import build_lock, raw_text_cache
from toolkit.data.prepare.store.store import make_room, obtain, settle
from toolkit.data.tokens.in_use import mark_used
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    PreparedDataset,
    dataset_folder,
    localize,
    open_prepared,
)
from toolkit.errors import DataError

LOCK_POLL_SECONDS = 0.25


def ensure_prepared(
    config: DatasetConfig,
    *,
    store: StoreConfig | None = None,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> PreparedDataset:
    """The prepared data set of `config`; it is copied from the permanent store, or prepared, now if
    it does not exist yet.

    Many processes may call this at once: one prepares, the others wait. The folder is marked as in
    use as long as the result or an array of it lives.

    Args:
        store: where permanent and local copies are; default: `config.root` is all there is.
        work_dir: folder for unfinished parts; default: beside the data set.
        progress: show a progress bar on a terminal, a few lines elsewhere (standard error).
        check_text: compare data that exists with the source's files, which reads a little of each,
            and with the permanent copy; one process of a machine is enough.

    Raises:
        DataError: the text, the tokenizer or files that exist already cannot be used.
        StorageError: the permanent store is out of reach, and there is no local copy.
    """
    store = store or StoreConfig()
    config = localize(config, store)
    try:
        prepared = open_prepared(config)
    except DataError:
        if store.permanent_root is None:
            raise
        prepared = None  # perhaps the permanent copy can replace it
    if prepared is None:
        return prepare_dataset(
            config, store=store, work_dir=work_dir, progress=progress, check_text=check_text
        )
    check_settings(prepared, config, check_text=check_text)
    if check_text:
        _remove_left_over(prepared.folder, work_dir)
        settle(prepared, config, store, note=Progress(enabled=progress).note)
    return prepared


def prepare_dataset(
    config: DatasetConfig,
    *,
    store: StoreConfig | None = None,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> PreparedDataset:
    """Like `ensure_prepared`, without the quick look before the lock is taken."""
    store = store or StoreConfig()
    config = localize(config, store)
    folder = dataset_folder(config)
    if store.permanent_root is None:
        _check_can_build(config, folder)
    report = Progress(enabled=progress)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder, report):
            prepared = obtain(config, store, check_text=check_text, note=report.note)
            is_built = prepared is None
            if prepared is None:
                _check_can_build(config, folder)
                with report, raw_text_cache(config, store) as cache_dir:
                    prepared = build_dataset(
                        config,
                        folder,
                        work_dir,
                        report,
                        cache_dir=cache_dir,
                        make_room=functools.partial(make_room, config, store),
                    )
                prepared.in_use = mark_used(folder)
            else:
                with contextlib.suppress(OSError):
                    remove_unfinished(folder, work_dir)
        if is_built or check_text:
            settle(prepared, config, store, note=report.note)
        return prepared
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot prepare data: {error.strerror or error}; finished "
            "parts are kept, run again to continue"
        ) from error


def _check_can_build(config: DatasetConfig, folder: Path) -> None:
    if config.source is None and not (folder / MANIFEST_NAME).exists():
        raise DataError(
            f"{folder}: no prepared data ({MANIFEST_NAME}) there, and dataset.source is null; "
            "set dataset.source, or dataset.root (--data-root) to where the token files are"
        )


def _remove_left_over(folder: Path, work_dir: str | None) -> None:
    """Parts of a whole data set whose preparation was killed before it removed them."""
    if work_dir is None and not folder.with_name(f".{folder.name}.building").exists():
        return
    suppress = contextlib.suppress(filelock.Timeout, OSError)  # another time
    with suppress, build_lock(folder).acquire(timeout=0):
        if (folder / MANIFEST_NAME).exists():
            remove_unfinished(folder, work_dir)


@contextlib.contextmanager
def _exclusive(folder: Path, report: Progress) -> Iterator[None]:
    """One process at a time builds this folder; the others say once that they wait, and poll."""
    lock = build_lock(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report.note(f"waiting for another process to prepare {folder}")
        lock.acquire(poll_interval=LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
