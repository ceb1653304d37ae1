"""Local copies within a limit: what was used longest ago goes first, what is needed never.

Beside the folder `<name>` of a data set lie

    .<name>.used          who uses it, and when it was last used (`in_use.py`)
    .<name>.stored.json   `StoredRecord`: where its verified permanent copy is
    .<name>.download/     files of a copy that is being made, with `reserved.json`
    .<name>.lock          held while it is made

A folder is removed by giving it a hidden name first, so that what is left of a removal that was cut
short is recognised, and removed the next time.
"""

import contextlib
import datetime
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from toolkit.data.config import DatasetConfig, HubSourceConfig, StoreConfig
from toolkit.data.prepare.store.permanent import content_fingerprint, find_permanent
from toolkit.data.tokens.in_use import has_mark, last_used, mark_used, unused
from toolkit.data.tokens.prepared import MANIFEST_NAME, Manifest
from toolkit.errors import ConfigError, DataError, StorageError
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import read_json
from toolkit.storage.locks import locked

log = logging.getLogger(__name__)

RESERVED_NAME = "reserved.json"
_REMOVED = re.compile(r"^\..+\.removed-[0-9a-f]{8}$")


class StoredRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A verified permanent copy of a local data set exists. Not part of what the data set is."""

    permanent_root: str
    name: str
    """Folder below it."""
    content: str
    """`content_fingerprint` of the data set."""
    verified_at: str
    """UTC."""


class Entry(NamedTuple):
    """Something in a cache that takes space."""

    folder: Path
    num_bytes: int
    remove: Callable[[], str | None]
    """Removes it, or says why it has to stay."""


def ensure_local_dataset_cache_cap(
    root: str | os.PathLike[str],
    max_cache_gb: float,
    *,
    needed_bytes: int = 0,
    keep: Path | None = None,
) -> list[Path]:
    """Remove whole data sets under `root`, the least recently used first, until the rest fits.

    Data sets that a live process uses stay, and those without a verified permanent copy that can
    be reached now. Where too little can go, one warning names what stays. Other files under `root`
    neither count nor go. The data set `keep` is not removed, and has to fit: with `needed_bytes`,
    or (0) the size that it has; DataError where it alone is too large.

    Returns:
        The folders that were removed.
    """
    return _make_room(Path(root).expanduser(), max_cache_gb, _dataset_entries, needed_bytes, keep)


@contextlib.contextmanager
def raw_text_cache(config: DatasetConfig, store: StoreConfig) -> Iterator[str | None]:
    """The folder below `store.hf_cache_dir` for the raw text of a hub data set, marked as in use
    while the block runs; before and after it, what was used longest ago goes where the limit asks
    for it. None: the libraries' own folder, which is left alone.

    Only folders made here go: what else lies in `hf_cache_dir` neither counts nor goes.
    """
    if store.hf_cache_dir is None or not isinstance(config.source, HubSourceConfig):
        yield None
        return
    root = Path(store.hf_cache_dir).expanduser()
    folder = root / (re.sub(r"[^\w.-]+", "--", config.source.name).strip("-.") or "data")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"store.hf_cache_dir: {folder}: {error.strerror}") from None
    mark = mark_used(folder)
    try:
        if store.max_cache_gb is not None:
            _make_room(root, store.max_cache_gb, _raw_text_entries)
        yield str(folder)
    finally:
        if mark is not None:
            mark.release()
        if store.max_cache_gb is not None:
            _make_room(root, store.max_cache_gb, _raw_text_entries)


def read_record(folder: Path) -> StoredRecord | None:
    """The record of the data set `folder`, if there is one that can be read."""
    with contextlib.suppress(FileNotFoundError, DataError):
        return read_json(_beside(folder, "stored.json"), DataError, StoredRecord)
    return None


def write_record(folder: Path, permanent_root: str, name: str, content: str) -> None:
    """Note that the data set `folder` has a verified permanent copy."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = StoredRecord(
        permanent_root=permanent_root, name=name, content=content, verified_at=now
    )
    with contextlib.suppress(OSError):  # without it, the copy is verified again and never removed
        write_json_atomic(_beside(folder, "stored.json"), record)


def download_folder(folder: Path) -> Path:
    """Where a copy of the data set `folder` grows."""
    return _beside(folder, "download")


def build_lock(folder: Path) -> Path:
    """Lock file of the one process that makes the data set `folder`."""
    return _beside(folder, "lock")


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(f".{folder.name}.{ending}")


def _make_room(
    root: Path,
    max_cache_gb: float,
    entries_in: Callable[[Path], Iterator[Entry]],
    needed_bytes: int = 0,
    keep: Path | None = None,
) -> list[Path]:
    """See `ensure_local_dataset_cache_cap`; one process at a time does it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".cache.lock"):
            entries = list(entries_in(root))
            return _remove_oldest(root, max_cache_gb, entries, needed_bytes, keep)
    except OSError as error:
        log.warning("%s: store.max_cache_gb has no effect: %s", root, error)
        return []


def _remove_oldest(
    root: Path, max_cache_gb: float, entries: list[Entry], needed_bytes: int, keep: Path | None
) -> list[Path]:
    limit = int(max_cache_gb * 1e9)
    own_bytes = max((entry.num_bytes for entry in entries if entry.folder == keep), default=0)
    own_bytes = needed_bytes or own_bytes
    if own_bytes > limit:
        raise DataError(
            f"store.max_cache_gb is {max_cache_gb:g}, but {keep or 'what is needed'} alone takes "
            f"{own_bytes / 1e9:.3g} GB; set store.max_cache_gb to more than that"
        )
    others = [entry for entry in entries if entry.folder != keep and entry.num_bytes]
    total = own_bytes + sum(entry.num_bytes for entry in others)
    removed, staying = [], []
    for entry in sorted(others, key=lambda entry: last_used(entry.folder)):
        if total <= limit:
            break
        reason = entry.remove()
        if reason is None:
            log.info("%s: removed, to keep %s under %g GB", entry.folder, root, max_cache_gb)
            removed.append(entry.folder)
            total -= entry.num_bytes
        else:
            staying.append(f"{entry.folder} ({reason})")
    if total > limit:
        log.warning(
            "%s takes %.3g GB, more than store.max_cache_gb %g; not removed: %s",
            root,
            total / 1e9,
            max_cache_gb,
            ", ".join(staying),
        )
    return removed


def _dataset_entries(root: Path) -> Iterator[Entry]:
    for parent, names, _ in os.walk(root):
        below = []
        for name in names:
            path = Path(parent, name)
            owner, _, kind = name.removeprefix(".").rpartition(".")
            folder = Path(parent, owner)  # of something hidden beside it
            if _REMOVED.match(name):
                shutil.rmtree(path, ignore_errors=True)
            elif name.startswith("."):
                if kind == "download":
                    yield _entry(folder, path, partial(_remove_unfinished, folder, path))
                # Once the folder is whole, nobody goes on with it.
                elif kind == "building" and _remove_unfinished(folder, path, only_beside=True):
                    yield _entry(folder, path, lambda: "being built, or to be continued")
            elif path.is_symlink():
                continue
            elif (path / MANIFEST_NAME).exists():
                yield _entry(path, path, partial(_remove_dataset, path))
            else:
                below.append(name)
        names[:] = below


def _raw_text_entries(root: Path) -> Iterator[Entry]:
    for path in sorted(root.iterdir()):
        if _REMOVED.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir() and not path.is_symlink() and has_mark(path):
            yield _entry(path, path, partial(_remove_unused, path))


def _entry(folder: Path, path: Path, remove: Callable[[], str | None]) -> Entry:
    num_bytes = 0
    for parent, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                num_bytes += os.stat(os.path.join(parent, name), follow_symlinks=False).st_size
    with contextlib.suppress(OSError, ValueError):
        num_bytes = max(num_bytes, int((path / RESERVED_NAME).read_bytes()))
    return Entry(folder, num_bytes, remove)


def _remove_dataset(folder: Path) -> str | None:
    """Remove it if that loses nothing and disturbs nobody; else say why not."""
    with unused(folder) as is_unused:
        if not is_unused:
            return "in use"
    record = read_record(folder)
    try:
        manifest = read_json(folder / MANIFEST_NAME, DataError, Manifest)
    except (FileNotFoundError, DataError):
        return f"its {MANIFEST_NAME} cannot be read"
    if record is None or record.content != content_fingerprint(manifest):
        return "no verified permanent copy"
    try:
        there = find_permanent(record.permanent_root, record.name)
        if there is None or there.content != record.content or there.wrong_file(sampled=True):
            return "its permanent copy is gone or damaged"
    except (StorageError, ConfigError):
        return "its permanent copy is out of reach"
    except (DataError, FileNotFoundError):
        return "its permanent copy is gone or damaged"
    return _remove_unused(folder)


def _remove_unused(folder: Path) -> str | None:
    with unused(folder) as is_unused:
        if not is_unused:
            return "in use"
        doomed = _beside(folder, f"removed-{secrets.token_hex(4)}")
        try:
            os.rename(folder, doomed)
        except OSError as error:
            return f"cannot be removed: {error.strerror}"
    _beside(folder, "stored.json").unlink(missing_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    return None


def _remove_unfinished(folder: Path, path: Path, *, only_beside: bool = False) -> str | None:
    """Remove what making `folder` left at `path`; with `only_beside`, where `folder` is there."""
    with contextlib.suppress(OSError), locked(build_lock(folder), wait=False) as is_locked:
        if is_locked and (not only_beside or (folder / MANIFEST_NAME).exists()):
            shutil.rmtree(path, ignore_errors=True)
            return None
    return "being copied"
