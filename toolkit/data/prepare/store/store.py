"""How a data set comes to this machine and is kept for good: `StoreConfig` at work.

1. A whole local copy is used. Once a start it is compared with the permanent one: another content
   is an error; no permanent copy, or a damaged one: it is stored; no answer: one warning.
2. Else the permanent copy is copied here. Its files arrive in a hidden folder, where each gets its
   name when its hash was checked, so that a copy that was killed continues with the next file; the
   whole folder gets its name in one rename.
3. Else the data set is built (`prepare.py`), stored, and read back.

Training reads local memory maps in all cases.
"""

import contextlib
import logging
import shutil
import time
from pathlib import Path

import xxhash

from toolkit.data.config import DatasetConfig, StoreConfig
from toolkit.data.prepare.build.settings import check_settings, not_a_dataset
from toolkit.data.prepare.store.cache import (
    RESERVED_NAME,
    StoredRecord,
    download_folder,
    ensure_local_dataset_cache_cap,
    read_record,
    write_record,
)
from toolkit.data.prepare.store.permanent import (
    Note,
    PermanentCopy,
    content_fingerprint,
    find_permanent,
    upload,
)
from toolkit.data.tokens.in_use import mark_used
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    dataset_folder,
    open_prepared,
)
from toolkit.errors import DataError, StorageError
from toolkit.storage.atomic import publish_folder, remove_tree, write_atomic
from toolkit.storage.foreign import read_json
from toolkit.storage.locks import locked
from toolkit.storage.remote import is_url

log = logging.getLogger(__name__)


class DatasetStore:
    """The places of one data set: its local folder, and its permanent copy where there is one."""

    def __init__(self, config: DatasetConfig, store: StoreConfig, note: Note) -> None:
        """`config` is a localized one."""
        self._config, self._store, self._note = config, store, note
        self._folder = dataset_folder(config)
        self._name = f"{config.dataset_name}/{config.dataset_config}"
        root = store.permanent_root
        # The same place from every working folder, for the record.
        is_path = root is not None and not is_url(root)
        self._root = str(Path(str(root)).expanduser().absolute()) if is_path else root

    def obtain(self, *, check_text: bool) -> PreparedDataset | None:
        """The local copy, or one made now of the permanent copy; None: there is neither. The caller
        holds the build lock. StorageError: no whole local copy, and the store is out of reach."""
        prepared, damaged = None, None
        try:
            prepared = open_prepared(self._config)
        except DataError as error:
            damaged = error
        if prepared is not None:
            check_settings(prepared, self._config, check_text=check_text)
        elif self._root is not None:
            prepared = self._fetch(self._root, damaged, check_text=check_text)
        if prepared is None and damaged is not None:
            raise damaged
        return prepared

    def make_room(self, num_bytes: int = 0) -> None:
        """Make room in the cache for this data set, which will have `num_bytes` (0: which it has).
        DataError: it alone is larger than the cache's limit."""
        if self._store.max_cache_gb is not None:
            ensure_local_dataset_cache_cap(
                Path(self._config.root).expanduser(),
                self._store.max_cache_gb,
                needed_bytes=num_bytes,
                keep=self._folder,
            )

    def settle(self, prepared: PreparedDataset) -> None:
        """Keep a whole local data set stored, and the cache under its limit; once a start on a
        machine.

        A store that is out of reach, or refuses, is one warning: training goes on. DataError: the
        permanent copy has another content, or the cache's limit is below this data set.
        """
        self.make_room()  # first: what cannot be kept here is not stored either
        if self._root is None:
            return
        folder, content = self._folder, content_fingerprint(prepared.manifest)
        record = stored_at(prepared)
        known = record is not None and (record.permanent_root, record.name) == (
            self._root,
            self._name,
        )
        try:
            found = find_permanent(self._root, self._name)
        except StorageError as error:
            log.warning(
                "%s: its permanent copy is out of reach, the local copy is used: %s", folder, error
            )
            return
        if found is not None:
            if found.content != content:
                raise found.differs_from(folder, content)
            try:
                wrong = found.wrong_file(sampled=not known)
            except (StorageError, FileNotFoundError) as error:
                log.warning("%s: its permanent copy cannot be checked: %s", folder, error)
                return
            if wrong is not None:
                log.warning("%s; it is stored anew from %s", wrong, folder)
            elif known or found.was_read_back:
                if not known:
                    write_record(folder, self._root, self._name, content)
                return
        elif known:
            log.warning(
                "%s: its permanent copy in %s is gone (is it mounted?); it is stored anew",
                folder,
                self._root,
            )
        self._upload(prepared, self._root, content)

    def _fetch(
        self, root: str, damaged: DataError | None, *, check_text: bool
    ) -> PreparedDataset | None:
        """Copy the permanent copy to this machine, if there is one. `damaged`: what is wrong with
        the local copy, if one is there; its good files stay."""
        folder = self._folder
        try:
            found = find_permanent(root, self._name)
            if found is None:
                return None
            self._check_found(found, damaged, check_text=check_text)
            started = time.monotonic()
            self._note(f"copying {found.url} to {folder}: {found.num_bytes / 1e6:.1f} MB")
            mark = mark_used(folder)
            self._copy_here(found)
        except StorageError as error:
            if damaged is not None:
                raise damaged from error
            raise StorageError(
                f"{folder}: not on this machine, and its permanent copy is out of reach: {error}; "
                "or set store.permanent_root=null to build it here"
            ) from error
        write_record(folder, root, self._name, found.content)
        self._note(f"copied {found.url} to {folder}; {time.monotonic() - started:.1f} s")
        prepared = PreparedDataset(folder, found.manifest)
        prepared.in_use = mark
        return prepared

    def _check_found(
        self, found: PermanentCopy, damaged: DataError | None, *, check_text: bool
    ) -> None:
        """Everything that can be said against the copy before it is made."""
        folder = self._folder
        if not folder.is_dir() and folder.exists():
            raise DataError(f"{folder}: is a file; give another dataset.dataset_config")
        if damaged is None and folder.is_dir():
            expected = {MANIFEST_NAME, TOKENIZER_FOLDER, *found.files}
            if {path.name for path in folder.iterdir()} - expected:
                raise not_a_dataset(folder)
        if damaged is not None:
            own = found.content
            with contextlib.suppress(FileNotFoundError, DataError):  # a damaged one is replaced
                own = content_fingerprint(read_json(folder / MANIFEST_NAME, DataError, Manifest))
            if own != found.content:
                raise found.differs_from(folder, own)
        try:
            prepared = PreparedDataset(folder, found.manifest)
            check_settings(prepared, self._config, check_text=check_text)
        except DataError as error:
            raise DataError(str(error).replace(str(folder), found.url)) from None
        if wrong := found.wrong_file():
            raise found.damaged(wrong)

    def _copy_here(self, found: PermanentCopy) -> None:
        folder, place = self._folder, download_folder(self._folder)
        # A copy of something else, which was replaced in the store meanwhile, is of no use.
        growing = place / xxhash.xxh3_64_hexdigest(found.raw)
        growing.mkdir(parents=True, exist_ok=True)
        for path in place.iterdir():
            if path.is_dir() and path != growing:
                shutil.rmtree(path)
        # Seen by others that make room at the same time.
        write_atomic(place / RESERVED_NAME, str(found.num_bytes).encode(), sync=False)
        try:
            self.make_room(found.num_bytes)
        except DataError:
            shutil.rmtree(place)
            raise
        there = sum(file.size for name, file in found.files.items() if (growing / name).exists())
        missing, free = found.num_bytes - there, shutil.disk_usage(growing).free
        if missing > free:
            raise DataError(
                f"{folder}: copying {found.url} takes {missing:,} bytes, its disk has {free:,} "
                "free; make room, or set store.tokenized_cache_dir to another disk"
            )
        found.download(growing, reuse=folder, note=self._note)
        write_atomic(growing / MANIFEST_NAME, found.raw)
        if folder.exists() and any(folder.iterdir()):
            remove_tree(folder)  # damaged; its good files are linked from the copy
        publish_folder(growing, folder)
        shutil.rmtree(place)

    def _upload(self, prepared: PreparedDataset, root: str, content: str) -> None:
        folder = self._folder
        lock = folder.with_name(f".{folder.name}.upload.lock")
        try:
            with locked(lock, wait=False) as is_locked:
                if not is_locked:
                    self._note(f"another process is storing {folder}")
                    return
                started = time.monotonic()
                self._note(f"storing {folder} in {root}")
                url = upload(prepared, root, self._name, note=self._note)
                write_record(folder, root, self._name, content)
                seconds = time.monotonic() - started
                self._note(f"stored {folder} at {url} and read it back; {seconds:.1f} s")
        except StorageError as error:
            log.warning("%s: not stored permanently, training goes on: %s", folder, error)
        except OSError as error:
            log.warning("%s: not stored permanently: %s", folder, error)


def stored_at(prepared: PreparedDataset) -> StoredRecord | None:
    """Where the verified permanent copy of a local data set is; None: none is known."""
    record = read_record(prepared.folder)
    if record is None or record.content != content_fingerprint(prepared.manifest):
        return None
    return record


def describe_stored(prepared: PreparedDataset) -> str:
    """`stored_at` in words."""
    record = stored_at(prepared)
    if record is None:
        return "not stored permanently (see store.permanent_root)"
    place = f"{record.permanent_root.rstrip('/')}/{record.name}"
    return f"stored at {place}, verified {record.verified_at}"
