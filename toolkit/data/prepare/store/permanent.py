"""The permanent copy of a data set: token files in a folder of a store.

    <permanent_root>/<dataset_name>/<dataset_config>/
      train.bin ... tokenizer/   as on disk (`prepared.py`)
      files.json                 `FileList`: size and hash of every file; all were read back
      dataset.json               comes last: a copy without it does not exist yet
      uploading.json             `Uploading`, only while a copy is being made

A copy that somebody made by other means (no files.json) is taken too; its token files are checked
against dataset.json.

An upload that was cut short is continued: what is there already and reads back right stays. The
name belongs to who began first: before each file, uploading.json and dataset.json are asked whether
another data set has it.
"""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import msgspec
import xxhash

from toolkit.data.tokens.prepared import (
    BLOCK_BYTES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    NUM_BLOCKS,
    NUM_BLOCKS_CHECKED_AT_OPEN,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    StoredFile,
    token_files,
)
from toolkit.errors import DataError, StorageError
from toolkit.storage.atomic import fsync_file, hash_file
from toolkit.storage.foreign import decode_json
from toolkit.storage.remote import ContentError, RemoteFolder, Retries, is_url
from toolkit.threads import Worker

FILES_NAME = "files.json"
UPLOADING_NAME = "uploading.json"
PROBE_SECONDS = 30.0
"""A store that does not answer the first questions by then counts as out of reach."""
LARGE_BYTES = 1 << 30

Note = Callable[[str], None]


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """Content of files.json."""

    format_version: int = 1
    content: str
    """`content_fingerprint` of the data set."""
    files: dict[str, StoredFile]


class Uploading(msgspec.Struct, frozen=True, kw_only=True):
    """Content of uploading.json: what files.json may not say yet."""

    host: str = "another machine"
    content: str | None = None


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
        self.folder, self.url, self.raw, self._sizes = folder, folder.url, raw, sizes
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
        known = stored.files if stored is not None and self.was_read_back else {}
        self.files = {
            name: file if file.xxh3 is not None else known.get(name, file)
            for name, file in token_files(self.manifest.dtype, self.manifest.splits).items()
        }
        for name in sorted({*known, *sizes}):
            parts = PurePosixPath(name).parts
            if len(parts) > 1 and parts[0] == TOKENIZER_FOLDER and ".." not in parts:
                self.files[name] = known.get(name) or StoredFile(sizes[name], None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values()) + len(self.raw)

    def wrong_file(self, *, sampled: bool = False) -> str | None:
        """The first file that is missing or has another size, in words; with `sampled`, also a
        token file of which a sampled block has changed."""
        for name, file in self.files.items():
            size = self._sizes.get(name)
            if size != file.size:
                found = "is missing" if size is None else f"has {size} bytes, expected {file.size}"
                return f"{self.url}/{name} {found}"
        for split, info in self.manifest.splits.items() if sampled else ():
            name = f"{split}.bin"
            size = self.files[name].size
            for number in range(0, NUM_BLOCKS, NUM_BLOCKS // (NUM_BLOCKS_CHECKED_AT_OPEN - 1)):
                start = max(0, size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1)
                block = self.folder.read(name, start, min(size, start + BLOCK_BYTES))
                if xxhash.xxh3_64_hexdigest(block) != info.block_hashes[number]:
                    return f"{self.url}/{name} has changed since it was stored"
        return None

    def download(self, into: Path, *, reuse: Path, note: Note) -> None:
        """Copy all files but dataset.json to `into`, from `reuse` where it has what is wanted;
        those that `into` holds were checked before. DataError names a file that is not what was
        stored."""
        for name, file in self.files.items():
            target = into / name
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            part.unlink(missing_ok=True)
            is_here = False
            with contextlib.suppress(OSError):
                is_here = file.xxh3 is not None and file.xxh3 == hash_file(reuse / name, bits=128)
            if is_here:
                try:
                    os.link(reuse / name, part)
                except OSError:  # a file system without links
                    shutil.copyfile(reuse / name, part)
                    fsync_file(part)
            else:
                if file.size >= LARGE_BYTES:
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

    def differs_from(self, folder: Path, content: str) -> DataError:
        """The error for a local data set of the same name and another content."""
        return DataError(
            f"{folder} has content {content}, its permanent copy {self.url} has {self.content}: "
            "delete the local folder to take the permanent one, delete the permanent one to store "
            "the local one, or give another dataset.dataset_config"
        )


def content_fingerprint(manifest: Manifest) -> str:
    """Identifies the content of all splits; see `PreparedDataset.fingerprint`."""
    prepared = PreparedDataset("", manifest)
    splits = [(name, prepared.fingerprint(name)) for name in SPLITS if prepared.has_split(name)]
    return xxhash.xxh3_64_hexdigest(repr(splits).encode())


def find_permanent(root: str, name: str) -> PermanentCopy | None:
    """The complete copy under `root`, if there is one. StorageError: the store is out of reach, or
    has not answered in `PROBE_SECONDS`."""

    def look() -> PermanentCopy | None:
        # Asked with little patience; the middle of a long copy deserves minutes of retries.
        return _look(_folder(root, name, Retries(2)), _folder(root, name, Retries()))

    # Mounts of servers that are gone, and connections to nowhere, hang for many minutes.
    probe = Worker("store-probe")
    try:
        return probe.submit(look).result(PROBE_SECONDS)
    except TimeoutError:
        raise StorageError(f"{root}: no answer in {PROBE_SECONDS:.0f} s") from None
    finally:
        probe.stop()


def upload(prepared: PreparedDataset, root: str, name: str, *, note: Note) -> str:
    """Make the permanent copy of `prepared` complete; returns its URL.

    Every file is read back and compared with what is here: a data set crosses the network twice.

    Raises:
        DataError: the files here are not what dataset.json says, or another data set has that name
            in the store, or is about to have it; no file of it was touched.
        StorageError: the store is out of reach, refuses, or gives back something else.
    """
    folder = _folder(root, name, Retries())
    content = content_fingerprint(prepared.manifest)
    _check_name_is_free(folder, prepared.folder, content)
    # Also the quick way to learn that nothing can be written there, before all files are read.
    uploading = Uploading(host=socket.gethostname(), content=content)
    folder.write(UPLOADING_NAME, msgspec.json.encode(uploading))
    files = _hash_local(prepared)
    sizes = folder.sizes()
    for file_name, file in files.items():
        if sizes.get(file_name) == file.size and _reads_back(folder, file_name, file):
            continue
        if file.size >= LARGE_BYTES:
            note(f"storing {folder.url}/{file_name}, {file.size / 1e9:.1f} GB")
        # Two that began in the same moment: the one whose uploading.json was replaced stops here.
        _check_name_is_free(folder, prepared.folder, content)
        folder.upload(prepared.folder / file_name, file_name)
        if not _reads_back(folder, file_name, file):
            raise StorageError(
                f"{folder.url}/{file_name}: what was stored reads back differently; run again, and "
                "check the store if it happens again"
            )
    there = _check_name_is_free(folder, prepared.folder, content)
    raw = (prepared.folder / MANIFEST_NAME).read_bytes() if there is None else there.raw
    folder.write(FILES_NAME, msgspec.json.encode(FileList(content=content, files=files)))
    if there is None:
        folder.write(MANIFEST_NAME, raw)
    if folder.read(MANIFEST_NAME) != raw:
        raise StorageError(f"{folder.url}/{MANIFEST_NAME} reads back differently; run again")
    folder.delete([UPLOADING_NAME])
    return folder.url


def _folder(root: str, name: str, retries: Retries) -> RemoteFolder:
    """The folder `name` of the store; nothing is contacted but a plain path."""
    if not is_url(root):
        path = Path(root).expanduser().absolute()
        if not path.is_dir():
            raise StorageError(f"{path}: no such folder; mount it, or create it")
        root = f"file://{path}"
    return RemoteFolder(f"{root.rstrip('/')}/{name}", retries=retries)


def _look(folder: RemoteFolder, later: RemoteFolder) -> PermanentCopy | None:
    """The complete copy in `folder`, if there is one; from then on it is read through `later`."""
    try:
        raw = folder.read(MANIFEST_NAME)
    except FileNotFoundError:
        return None
    sizes = folder.sizes()
    listed = folder.read(FILES_NAME) if FILES_NAME in sizes else None
    return PermanentCopy(later, raw, listed, sizes)


def _check_name_is_free(folder: RemoteFolder, local: Path, content: str) -> PermanentCopy | None:
    """The complete copy of the same content in `folder`, if there is one; raises DataError where a
    copy of other content is, or is being made."""
    there = _look(folder, folder)
    if there is not None:
        if there.content != content:
            raise there.differs_from(local, content)
        return there
    for name, kind in ((UPLOADING_NAME, Uploading), (FILES_NAME, FileList)):
        try:
            found = decode_json(folder.read(name), name, DataError, kind)
        except (FileNotFoundError, DataError):
            continue
        if found.content not in (None, content):
            raise DataError(
                f"{local} has content {content}, {folder.url}/{name} says that "
                f"{getattr(found, 'host', 'an upload')} began to store {found.content} there: give "
                f"another dataset.dataset_config, or delete {folder.url} if nobody is storing it "
                "any more"
            )
    return None


def _hash_local(prepared: PreparedDataset) -> dict[str, StoredFile]:
    """Every file of `prepared` but dataset.json; what is derived from them is left out."""
    files = token_files(prepared.manifest.dtype, prepared.manifest.splits)
    for name, file in files.items():
        found = hash_file(prepared.folder / name, bits=128)
        if file.xxh3 not in (None, found):
            raise DataError(
                f"{prepared.folder / name}: content differs from {MANIFEST_NAME} beside it; delete "
                f"{prepared.folder} and prepare the data again"
            )
        files[name] = StoredFile(file.size, found)
    tokenizer = prepared.tokenizer_folder
    for path in sorted(tokenizer.rglob("*")) if tokenizer is not None else []:
        if path.is_file():
            name = path.relative_to(prepared.folder).as_posix()
            files[name] = StoredFile(path.stat().st_size, hash_file(path, bits=128))
    return files


def _reads_back(folder: RemoteFolder, name: str, file: StoredFile) -> bool:
    try:
        return folder.hash(name, file.size, bits=128) == file.xxh3
    except FileNotFoundError:
        return False
