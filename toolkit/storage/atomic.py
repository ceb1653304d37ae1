"""Atomic and durable writes on local and network file systems.

A file or folder written here appears under its name complete or not at all: temporary name beside
it, fsync, rename, fsync of the parent (POSIX rename is atomic inside one file system).
"""

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from toolkit.errors import CheckpointError, TrainingError

PathLike = str | os.PathLike[str]

_FALLOC_FL_KEEP_SIZE, _SYNC_FILE_RANGE_WRITE = 1, 2
_ARGUMENTS = {
    "fallocate": (ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "sync_file_range": (ctypes.c_int64, ctypes.c_int64, ctypes.c_uint),
}
"""After the descriptor; without them a number is passed as 32 bits."""

TEMPORARY_SUFFIX = ".tmp"
"""Ending of unfinished files; whoever lists a folder may skip names with it."""


def temporary_path(path: PathLike) -> Path:
    """A hidden, unused name beside `path`."""
    path = Path(path)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{unique}{TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def open_atomic(path: PathLike, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write into; it gets the name `path` when the block ends without an error.

    `sync=False` skips fsync: still never half a file after a crash of the process, but perhaps
    one after a crash of the machine.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        _name_file(error, path)
        raise
    if sync:
        fsync_folder(Path(path).parent)


def write_atomic(path: PathLike, data: bytes, *, sync: bool = True) -> None:
    """Write `data` to `path`, replacing what was there in one instant."""
    with open_atomic(path, sync=sync) as file:
        file.write(data)


def encode_json(obj: Any) -> bytes:
    """Indented JSON of anything msgspec encodes, with a newline at its end."""
    return msgspec.json.format(msgspec.json.encode(obj), indent=2) + b"\n"


def create_json(path: PathLike, obj: Any) -> bool:
    """`create_atomic` of `obj` as indented JSON (anything msgspec encodes)."""
    return create_atomic(path, encode_json(obj))


def create_atomic(path: PathLike, data: bytes) -> bool:
    """`write_atomic` that never replaces: False when `path` exists, whoever came first.

    Atomic on network file systems too (a hard link); where there are no links, a file opened
    exclusively, whose content comes a moment later.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:
            try:
                with Path(path).open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        return True
    except OSError as error:
        _name_file(error, path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def why_not_creatable(path: PathLike) -> str | None:
    """Why `create_atomic` would not make `path`; None: it would. One is made beside it and
    removed: permissions alone do not tell."""
    if os.path.lexists(path):
        return "exists"
    if not Path(path).absolute().parent.is_dir():
        return "its folder does not exist"
    try:
        probe = temporary_path(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def _name_file(error: BaseException, path: PathLike) -> None:
    """Writing to an open file that does not fit tells no name."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = os.fspath(path)


def write_json_atomic(path: PathLike, obj: Any, *, sync: bool = True) -> None:
    """`write_atomic` of `obj` as indented JSON (anything msgspec encodes)."""
    write_atomic(path, encode_json(obj), sync=sync)


def fsync_folder(folder: PathLike) -> None:
    """Make names created, renamed or removed in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems refuse fsync on a folder; their server orders renames itself.
        pass
    finally:
        os.close(descriptor)


def fsync_file(path: PathLike) -> None:
    """Make the content of `path` durable, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve_space(descriptor: int, size: int) -> None:
    """Have the file system set `size` bytes aside for an open file, where it can do so without
    writing them (`os.posix_fallocate` would write). Raises OSError where it has not as many."""
    _call("fallocate", descriptor, _FALLOC_FL_KEEP_SIZE, 0, size)


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Have the system write this part of an open file to the disk now, and not wait for it: an
    fsync later has less left to do. Nothing is durable by it."""
    _call("sync_file_range", descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


def _call(name: str, descriptor: int, *arguments: int) -> None:
    """A function of Linux's C library that Python does not have; nothing where there is none, or
    the file system does not know it."""
    function = getattr(_libc(), name, None)
    if function is None:
        return
    function.argtypes = [ctypes.c_int, *_ARGUMENTS[name]]
    if function(descriptor, *arguments) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(code, os.strerror(code))


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def fsync_tree(folder: PathLike) -> None:
    """Make every file and folder below `folder`, and `folder` itself, durable."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_file(os.path.join(parent, name))
        fsync_folder(parent)


@contextlib.contextmanager
def new_folder(folder: PathLike, *, unfinished: PathLike | None = None) -> Iterator[Path]:
    """An empty folder to fill. When the block ends without an error it is synced and renamed to
    `folder`, which may exist only as an empty folder; after an error nothing of it is left.

    `unfinished` is where it grows, on the same file system; what a killed process left there goes.
    Default: an unused hidden name beside `folder`.
    """
    place = temporary_path(folder) if unfinished is None else Path(unfinished)
    if os.path.lexists(place):
        remove_tree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir()
    try:
        yield place
        publish_folder(place, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            remove_tree(place)
        raise


@contextlib.contextmanager
def new_output(folder: PathLike) -> Iterator[Path]:
    """`new_folder` for what a user asked to be written to `folder`, which may be a link.

    Raises:
        CheckpointError: `folder` is in use, or cannot be made.
        TrainingError: a file in it cannot be written (the disk is full).
    """
    check_unused(folder)
    is_made = False
    try:
        with new_folder(Path(folder).resolve()) as unfinished:
            is_made = True
            yield unfinished
    except OSError as error:
        if not is_made:
            raise CheckpointError(f"{folder}: cannot be made: {error.strerror}") from None
        raise TrainingError(
            f"{folder}: cannot be written, nothing is left of it: {error.strerror or error}"
        ) from error


def check_unused(folder: PathLike) -> None:
    """Raise CheckpointError when `folder` exists and is not an empty folder."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: already exists; remove it or choose another folder")


def publish_folder(unfinished: PathLike, folder: PathLike) -> None:
    """Sync `unfinished` and all in it, rename it to `folder`, and make the name durable."""
    fsync_tree(unfinished)
    os.rename(unfinished, folder)
    fsync_folder(Path(folder).parent)


def unused_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """The first of `name`, `name.2`, `name.3` and so on that is not taken."""
    number, found = 1, name
    while is_taken(found):
        number += 1
        found = f"{name}.{number}"
    return found


def remove_tree(folder: PathLike) -> None:
    """Remove `folder` and all below it; nothing happens when it does not exist.

    It is renamed first, so that a removal cut short never leaves a folder that looks whole. Of a
    link to a folder the link alone goes.
    """
    doomed = temporary_path(folder)
    try:
        os.replace(folder, doomed)
    except FileNotFoundError:
        return
    if doomed.is_symlink():
        doomed.unlink()
    else:
        shutil.rmtree(doomed)


def hash_file(path: PathLike, *, chunk_size: int = 4 << 20, bits: Literal[64, 128] = 64) -> str:
    """xxh3_64 (or xxh3_128) of the file's bytes as hex digits; reads `chunk_size` bytes at a
    time."""
    import xxhash

    digest = xxhash.xxh3_64() if bits == 64 else xxhash.xxh3_128()
    buffer = memoryview(bytearray(chunk_size))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
