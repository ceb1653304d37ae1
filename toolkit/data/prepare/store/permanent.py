"""The permanent copy of a data set: token files in a folder of a store.

    <permanent_root>/<dataset_name>/<dataset_config>/
      train.bin ... tokenizer/   as on disk (`prepared.py`)
      files.json                 `FileList`: size and hash of every file; all were read back
      dataset.json               comes last: a copy without it does not exist yet
      uploading.json             only while a copy is being made (`upload.py`)

A copy that somebody made by other means (no files.json) is taken too; its token files are checked
against dataset.json.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import msgspec

from toolkit.data.tokens.prepared import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    NUM_BLOCKS,
    NUM_BLOCKS_CHECKED_AT_OPEN,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    Split,
)
from toolkit.errors import DataError, StorageError
from toolkit.storage.atomic import fsync_file, hash_file
from toolkit.storage.foreign import decode_json
from toolkit.storage.remote import ContentError, RemoteFolder, Retries, is_url
from toolkit.threads import Thread

log = logging.getLogger(__name__)

FILES_NAME = "files.json"
PROBE_SECONDS = 30.0
"""A store that does not answer the first questions by then counts as out of reach."""

Note = Callable[[str], None]
Result = TypeVar("Result")


class StoredFile(msgspec.Struct, frozen=True):
    """One file of a copy."""

    size: int
    """Bytes."""
    xxh3: str | None
    """xxh3_128; None where it is not known."""


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """Content of files.json."""

    format_version: int = 1
    content: str
    """`content_fingerprint` of the data set."""
    files: dict[str, StoredFile]


class PermanentCopy:
    """A complete copy that was found.

    Attributes:
        raw: bytes of its dataset.json.
        manifest: the same, decoded.
        content: `content_fingerprint` of it.
        files: all its files but dataset.json, by their names.
        was_read_back: whoever made it has read it back.
    """

    def __init__(
        self, folder: RemoteFolder, raw: bytes, listed: bytes | None, sizes: dict[str, int]
    ) -> None:
        self.folder = folder
        self.url = folder.url
        self.raw = raw
        try:
            self.manifest = decode_json(raw, MANIFEST_NAME, DataError, Manifest)
            stored = None
            if listed is not None:
                stored = decode_json(listed, FILES_NAME, DataError, FileList)
        except DataError as error:
            raise DataError(
                f"{self.url}: {MANIFEST_NAME} or {FILES_NAME} is damaged ({error}); restore it, or "
                "delete that folder to have it stored anew"
            ) from None
        if self.manifest.format_version != FORMAT_VERSION:
            raise DataError(
                f"{self.url}/{MANIFEST_NAME}: format version {self.manifest.format_version}, this "
                f"toolkit reads {FORMAT_VERSION}; delete that folder and prepare the data again"
            )
        self.content = content_fingerprint(self.manifest)
        # One of another content is the leftover of an upload that something else replaced.
        self.was_read_back = stored is not None and stored.content == self.content
        self._sizes = sizes
        self.files = token_files(self.manifest)
        known = stored.files if stored is not None and self.was_read_back else {}
        for name in sorted({*known, *sizes}):
            if _is_tokenizer_file(name):
                self.files[name] = known.get(name) or StoredFile(sizes[name], None)
        for name, file in self.files.items():
            if file.xxh3 is None and name in known:
                self.files[name] = known[name]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values()) + len(self.raw)

    def wrong_file(self) -> str | None:
        """The first file that is missing or has another size, in words."""
        for name, file in self.files.items():
            size = self._sizes.get(name)
            if size != file.size:
                found = "is missing" if size is None else f"has {size} bytes, expected {file.size}"
                return f"{self.url}/{name} {found}"
        return None

    def wrong_block(self) -> str | None:
        """The first token file of which a sampled block has changed, in words; reads a little."""
        import xxhash

        for split, info in self.manifest.splits.items():
            name = f"{split}.bin"
            size = self.files[name].size
            for number in range(0, NUM_BLOCKS, NUM_BLOCKS // (NUM_BLOCKS_CHECKED_AT_OPEN - 1)):
                start = max(0, size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1)
                block = self.folder.read(name, start, min(size, start + BLOCK_BYTES))
                if xxhash.xxh3_64_hexdigest(block) != info.block_hashes[number]:
                    return f"{self.url}/{name} has changed since it was stored"
        return None

    def download(self, into: Path, *, reuse: Path, note: Note) -> None:
        """Copy all files but dataset.json to `into`; those that it holds were checked before.

        Files of the folder `reuse` that are what is wanted are taken from there.

        Raises:
            DataError: a file of the copy is missing or not what was stored; names it.
            StorageError: the store cannot be reached.
        """
        for name, file in self.files.items():
            target = into / name
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            part.unlink(missing_ok=True)
            if _is_file(reuse / name, file):
                _link(reuse / name, part)
            else:
                if file.size >= 1 << 30:
                    note(f"copying {self.url}/{name}, {file.size / 1e9:.1f} GB")
                try:
                    self.folder.download(name, part, size=file.size, xxh3=file.xxh3)
                except ContentError as error:
                    part.unlink(missing_ok=True)
                    raise self.damaged(str(error)) from None
            # The name says that the content was checked.
            os.rename(part, target)

    def damaged(self, what: str) -> DataError:
        """The error for a copy of which a file is wrong."""
        return DataError(
            f"{what}: the permanent copy is damaged; restore the file, or delete {self.url} to "
            "have the data set built and stored anew"
        )


def content_fingerprint(manifest: Manifest) -> str:
    """Identifies the content of all splits; see `PreparedDataset.fingerprint`."""
    import xxhash

    prepared = PreparedDataset("", manifest)
    names: tuple[Split, ...] = ("train", "val")
    splits = [(name, prepared.fingerprint(name)) for name in names if prepared.has_split(name)]
    return xxhash.xxh3_64_hexdigest(repr(splits).encode())


def permanent_folder(root: str, name: str, *, patient: bool = True) -> RemoteFolder:
    """The folder `name` of the store; nothing is contacted but a plain path.

    Args:
        patient: keep trying for minutes when the store does not answer, as is right in the middle
            of a long copy; else give up soon.

    Raises:
        ConfigError: the store needs a library that is not installed.
        StorageError: `root` is a plain path without a folder there (perhaps not mounted).
    """
    if not is_url(root):
        path = Path(root).expanduser().absolute()
        if not path.is_dir():
            raise StorageError(f"{path}: no such folder; mount it, or create it")
        root = f"file://{path}"
    return RemoteFolder(f"{root.rstrip('/')}/{name}", retries=Retries() if patient else Retries(2))


def find_permanent(root: str, name: str) -> PermanentCopy | None:
    """The complete copy under `root`, if there is one.

    Raises:
        ConfigError: see `permanent_folder`.
        DataError: its dataset.json cannot be understood.
        StorageError: the store is out of reach, or has not answered in `PROBE_SECONDS`.
    """

    def probe() -> PermanentCopy | None:
        return look(permanent_folder(root, name, patient=False), permanent_folder(root, name))

    return _within(PROBE_SECONDS, probe, f"{root}: no answer in {PROBE_SECONDS:.0f} s")


def look(folder: RemoteFolder, later: RemoteFolder) -> PermanentCopy | None:
    """The complete copy in `folder`, if there is one, which is read through `later` from then on.

    Raises:
        DataError: its dataset.json cannot be understood.
        StorageError: the store is out of reach.
    """
    try:
        raw = folder.read(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    sizes = folder.sizes()
    listed = folder.read(FILES_NAME) if FILES_NAME in sizes else None
    return PermanentCopy(later, raw, listed, sizes)


def token_files(manifest: Manifest) -> dict[str, StoredFile]:
    """The files that `manifest` tells of, by their names."""
    itemsize = 2 if manifest.dtype == "uint16" else 4
    files = {}
    for split, info in manifest.splits.items():
        files[f"{split}.bin"] = StoredFile(info.num_tokens * itemsize, info.content_hash)
        files[f"{split}.idx"] = StoredFile(info.num_documents * 8, info.index_hash)
        if info.mask_hash is not None:
            files[f"{split}.mask"] = StoredFile(info.num_tokens, info.mask_hash)
    return files


def _is_tokenizer_file(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 1 and parts[0] == TOKENIZER_FOLDER and ".." not in parts


def _is_file(path: Path, file: StoredFile) -> bool:
    try:
        return (
            file.xxh3 is not None
            and path.stat().st_size == file.size
            and hash_file(path, bits=128) == file.xxh3
        )
    except OSError:
        return False


def _link(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except OSError:  # a file system without links
        shutil.copyfile(path, new)
        fsync_file(new)


def _within(seconds: float, action: Callable[[], Result], failing: str) -> Result:
    """`action()`, or StorageError when it takes longer; it is left running then."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    # Mounts of servers that are gone, and connections to nowhere, hang for many minutes.
    thread = Thread(target=act, name="store-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise StorageError(failing)
    return results[0]
