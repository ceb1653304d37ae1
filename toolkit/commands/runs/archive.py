"""`toolkit runs archive` and `restore`: a run as one file.

The archive is a tar of one folder. Its last member, metadata/archive.json, lists every other with
its size and hash, and what was left out. It is read back before it gets its name.
"""

import contextlib
import io
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import msgspec
import xxhash

from toolkit.commands.runs.places import LOCK_FILES, follow_names, held, register
from toolkit.config.paths import local_path
from toolkit.errors import ConfigError, RunError, TrainingError
from toolkit.runs.facts import saved_checkpoints
from toolkit.runs.files import RUN_FILES
from toolkit.runs.listing import list_runs
from toolkit.runs.registry import absolute
from toolkit.runs.status import id_of, read_status
from toolkit.storage.atomic import (
    TEMPORARY_SUFFIX,
    encode_json,
    fsync_file,
    fsync_folder,
    publish_folder,
    remove_tree,
    temporary_path,
    write_json_atomic,
)
from toolkit.storage.foreign import MAX_BYTES, decode_json, guard
from toolkit.wording import count

Kept = Literal["all", "last", "none"]
"""Checkpoints in an archive; "none" leaves out every folder of weights."""

MANIFEST = RUN_FILES.archive
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_WEIGHTS = (RUN_FILES.checkpoints, RUN_FILES.merged, RUN_FILES.exports, RUN_FILES.downloads)
_BLOCK = 1 << 20


class ArchivedFile(msgspec.Struct, frozen=True):
    """One file of an archive."""

    size: int
    xxh3: str


class Manifest(msgspec.Struct, kw_only=True):
    """Content of metadata/archive.json."""

    version: int = 1
    run: str
    """`experiment/name`."""
    left_out: list[str] = []
    files: dict[str, ArchivedFile] = {}
    """Path inside the run folder -> size and hash."""


class Archived(msgspec.Struct, frozen=True):
    """What was written or restored."""

    place: str
    files: int
    bytes: int
    """Of the files, before compression."""
    left_out: list[str]


def kept(*, without: bool, last: bool) -> Kept:
    """Which checkpoints options ask for."""
    return "none" if without else "last" if last else "all"


def archive(folder: Path, out: str, *, checkpoints: Kept = "all") -> Archived:
    """Write the run in `folder` to the file `out`, which must not exist; the run stays.

    Raises:
        ConfigError: `out` has another ending than .tar, .tar.gz, .tgz or .tar.zst.
        RunError: no run, one that is being trained, or `out` exists.
        TrainingError: `out` cannot be written, or reads back differently.
    """
    target = absolute(local_path(out, "OUT"))
    _check_ending(target, "OUT")
    if os.path.lexists(target):
        raise RunError(f"{target}: exists; give a name that is free")
    if not target.parent.is_dir():
        raise RunError(f"{target.parent}: no such folder; make it, or give another one")
    if target.resolve().is_relative_to(folder.resolve()):
        raise RunError(f"{target}: is inside the run itself; give another place")
    with held(folder, doing="archived"):
        status = read_status(folder)
        assert status is not None  # `held` has looked
        left_out = _left_out(folder, checkpoints)
        manifest = Manifest(run=f"{status.experiment}/{status.name}", left_out=sorted(left_out))
        temporary = temporary_path(target)
        try:
            with guard(target, TrainingError, problem="cannot be written"):
                _write(folder, temporary, target.name, manifest)
                if _read(temporary, target.name, None) != manifest:
                    raise TrainingError(f"{target}: reads back differently; look at the disk")
                os.rename(temporary, target)
                fsync_folder(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return _report(target, manifest)


def restore(file: str, dest: str | None, *, root: str) -> Archived:
    """Make a run folder of the archive `file`: `dest`, or by default `root/EXPERIMENT/NAME`.

    Where the run that was archived is still there, this is another one: it gets an id of its own,
    and is called as its folder.

    Raises:
        ConfigError: `file` has an ending that is none of an archive.
        RunError: it is no archive of a run, is damaged, or the folder exists.
        TrainingError: it cannot be written.
    """
    source = absolute(local_path(file, "ARCHIVE"))
    _check_ending(source, "ARCHIVE")
    if not source.is_file():
        raise RunError(f"{file}: no such file")
    given = absolute(local_path(dest, "DEST")) if dest is not None else None
    if given is not None and os.path.lexists(given):
        raise RunError(f"{given}: exists; give a name that is free")
    place = absolute(root) if given is None else given.parent
    unfinished = temporary_path(place / source.name)
    try:
        with guard(place, TrainingError, problem="cannot be written"):
            unfinished.mkdir(parents=True)
        manifest = _read(source, source.name, unfinished)
        status = read_status(unfinished)
        if status is None:
            raise RunError(f"{file}: holds no run (no {RUN_FILES.status})")
        target = given or absolute(root) / status.experiment / status.name
        if os.path.lexists(target):
            raise RunError(
                f"{target}: exists; give another folder: toolkit runs restore {file} DEST"
            )
        own_id = status.id or id_of(status.created, status.experiment, status.name)
        others = [run for run in list_runs(root, check=False) if run.id == own_id]
        is_copy = any(read_status(Path(run.folder)) is not None for run in others)
        with guard(target, TrainingError, problem="cannot be written"):
            if manifest.left_out:
                left_out = {"left_out": manifest.left_out}
                write_json_atomic(unfinished / MANIFEST, left_out)
            if is_copy:
                copy = msgspec.structs.replace(status, id=secrets.token_hex(4))
                write_json_atomic(unfinished / RUN_FILES.status, copy)
            target.parent.mkdir(parents=True, exist_ok=True)
            publish_folder(unfinished, target)
            if is_copy:
                follow_names(absolute(root) / status.experiment / status.name, target)
    finally:
        with contextlib.suppress(OSError):
            remove_tree(unfinished)
    register(target, root=root)
    return _report(target, manifest)


def _report(place: Path, manifest: Manifest) -> Archived:
    sizes = [file.size for file in manifest.files.values()]
    return Archived(str(place), len(sizes), sum(sizes), manifest.left_out)


def _check_ending(path: Path, what: str) -> None:
    if not path.name.endswith(ENDINGS):
        raise ConfigError(f"{what} {path.name}: give a name that ends in {', '.join(ENDINGS)}")


def _left_out(folder: Path, checkpoints: Kept) -> set[str]:
    """Folders of the run that stay out."""
    if checkpoints == "none":
        return {name for name in _WEIGHTS if (folder / name).is_dir()}
    saved = {Path(checkpoint.folder).name for checkpoint in saved_checkpoints(folder)[-1:]}
    out: set[str] = set()
    if checkpoints == "last":
        with contextlib.suppress(OSError):
            steps = (folder / RUN_FILES.checkpoints).iterdir()
            out |= {f"{RUN_FILES.checkpoints}/{p.name}" for p in steps if p.name not in saved}
    return out


def _files(folder: Path, left_out: set[str]) -> Iterator[tuple[str, Path]]:
    """Path inside the run -> file, links followed once; in order."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        about = os.stat(parent)
        inside = Path(parent).relative_to(folder)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(
            name
            for name in folders
            if (inside / name).as_posix() not in left_out and not name.endswith(TEMPORARY_SUFFIX)
        )
        for name in sorted(names):
            path = (inside / name).as_posix()
            is_own = path not in (*LOCK_FILES, MANIFEST) and not name.endswith(TEMPORARY_SUFFIX)
            if is_own and (folder / path).is_file():
                yield path, folder / path


def _write(folder: Path, temporary: Path, name: str, manifest: Manifest) -> None:
    with (
        temporary.open("xb") as raw,
        _compressor(raw, name) as file,
        tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for inside, path in _files(folder, set(manifest.left_out)):
            with path.open("rb") as content:
                entry = tarfile.TarInfo(f"{folder.name}/{inside}")
                about = os.fstat(content.fileno())
                entry.size, entry.mtime = about.st_size, about.st_mtime
                hashing = _Hashing(content)
                tar.addfile(entry, hashing)
                manifest.files[inside] = ArchivedFile(about.st_size, hashing.hexdigest())
        data = encode_json(manifest)
        entry = tarfile.TarInfo(f"{folder.name}/{MANIFEST}")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    fsync_file(temporary)


def _read(archive_file: Path, name: str, into: Path | None) -> Manifest:
    """Check an archive against its own list, and unpack it where `into` is given."""
    found: dict[str, ArchivedFile] = {}
    manifest: Manifest | None = None
    problem = "cannot be read as an archive of a run"
    with (
        guard(archive_file, RunError, problem=problem),
        archive_file.open("rb") as raw,
        _decompressor(raw, name) as file,
        tarfile.open(fileobj=file, mode="r|") as tar,
    ):
        for entry in tar:
            parts = PurePosixPath(entry.name).parts[1:]
            if entry.isdir():
                continue
            if not entry.isreg() or not parts or {"..", ".", "/"} & {*parts}:
                raise RunError(f"{archive_file}: {entry.name!r} is no file of a run")
            inside, content = "/".join(parts), tar.extractfile(entry)
            assert content is not None  # it is a regular file
            if inside == MANIFEST:
                data = content.read(min(entry.size, MAX_BYTES))
                manifest = decode_json(data, f"{archive_file}: {MANIFEST}", RunError, Manifest)
                continue
            hashing = _Hashing(content)
            if into is None:
                while hashing.read(_BLOCK):
                    pass
            else:
                path = into / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("xb") as out:
                    shutil.copyfileobj(hashing, out, _BLOCK)
                os.utime(path, (entry.mtime, entry.mtime))
            found[inside] = ArchivedFile(entry.size, hashing.hexdigest())
    if manifest is None:
        raise RunError(f"{archive_file}: is cut short, or no archive of `toolkit runs archive`")
    if found != manifest.files:
        odd = [n for n in {**found, **manifest.files} if found.get(n) != manifest.files.get(n)]
        raise RunError(
            f"{archive_file}: is damaged: {count(len(odd), 'file')} differ from its list, "
            f"the first is {odd[0]}"
        )
    return manifest


class _Hashing:
    """A file that is read through, and hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@contextlib.contextmanager
def _compressor(raw: IO[bytes], name: str) -> Iterator[Any]:
    if name.endswith(".zst"):
        import zstandard

        with zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) as file:
            yield file
    elif name.endswith("gz"):
        import gzip

        with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6) as file:
            yield file
    else:
        yield raw


@contextlib.contextmanager
def _decompressor(raw: IO[bytes], name: str) -> Iterator[Any]:
    if name.endswith(".zst"):
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(raw, closefd=False) as file:
            yield file
    elif name.endswith("gz"):
        import gzip

        with gzip.GzipFile(fileobj=raw, mode="rb") as file:
            yield file
    else:
        yield raw
