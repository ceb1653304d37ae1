"""Makes the permanent copy of a data set (`permanent.py`).

An upload that was cut short is continued: what is there already and reads back right stays. The
name belongs to who began first: before each file, uploading.json and dataset.json are asked whether
another data set has it.
"""

import socket
from pathlib import Path
from typing import TypeVar

import msgspec

from toolkit.data.prepare.store.permanent import (
    FILES_NAME,
    FileList,
    Note,
    PermanentCopy,
    StoredFile,
    content_fingerprint,
    look,
    permanent_folder,
    token_files,
)
from toolkit.data.tokens.prepared import MANIFEST_NAME, PreparedDataset
from toolkit.errors import DataError, StorageError
from toolkit.storage.atomic import hash_file
from toolkit.storage.foreign import decode_json
from toolkit.storage.remote import RemoteFolder

UPLOADING_NAME = "uploading.json"

Result = TypeVar("Result")


class Uploading(msgspec.Struct, frozen=True, kw_only=True):
    """Content of uploading.json: what files.json may not say yet."""

    host: str = "another machine"
    content: str | None = None
    """`content_fingerprint` of the data set."""


def upload(prepared: PreparedDataset, root: str, name: str, *, note: Note) -> str:
    """Make the permanent copy of `prepared` complete; returns its URL.

    Every file is read back and compared with what is here, so that a data set crosses the network
    twice, up and down; what an earlier try has stored crosses it once.

    Raises:
        DataError: the files here are not what dataset.json says, or another data set has that name
            in the store, or is about to have it; no file of it was touched.
        StorageError: the store is out of reach, refuses, or gives back something else.
    """
    folder = permanent_folder(root, name)
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
        if file.size >= 1 << 30:
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


def different_content(folder: Path, content: str, there: PermanentCopy) -> DataError:
    """The error for two data sets of one name."""
    return DataError(
        f"{folder} has content {content}, its permanent copy {there.url} has {there.content}: "
        "delete the local folder to take the permanent one, delete the permanent one to store the "
        "local one, or give another dataset.dataset_config"
    )


def _check_name_is_free(folder: RemoteFolder, local: Path, content: str) -> PermanentCopy | None:
    """The complete copy of the same content in `folder`, if there is one; raises DataError where a
    copy of other content is, or is being made."""
    there = look(folder, folder)
    if there is not None:
        if there.content != content:
            raise different_content(local, content, there)
        return there
    uploading = _decode(folder, UPLOADING_NAME, Uploading)
    listed = _decode(folder, FILES_NAME, FileList)
    for name, other, who in (
        (UPLOADING_NAME, uploading and uploading.content, uploading and uploading.host),
        (FILES_NAME, listed and listed.content, "an upload"),
    ):
        if other not in (None, content):
            raise DataError(
                f"{local} has content {content}, {folder.url}/{name} says that {who} began to "
                f"store {other} there: give another dataset.dataset_config, or delete {folder.url} "
                "if nobody is storing it any more"
            )
    return None


def _decode(folder: RemoteFolder, name: str, kind: type[Result]) -> Result | None:
    """A small file of a copy; None where there is none that can be read."""
    try:
        return decode_json(folder.read(name), name, DataError, kind)
    except (FileNotFoundError, DataError):
        return None


def _hash_local(prepared: PreparedDataset) -> dict[str, StoredFile]:
    """Every file of `prepared` but dataset.json; what is derived from them is left out."""
    files = token_files(prepared.manifest)
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
