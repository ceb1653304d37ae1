"""The local files of a source: found, ordered, identified by content, watched for changes."""

import glob
import os
import sysconfig
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from toolkit.data.config import (
    DiskSourceConfig,
    FilesSourceConfig,
    HubSourceConfig,
    PythonStdlibSourceConfig,
    SourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.errors import DataError, ErrorList
from toolkit.storage.foreign import check_regular, guard
from toolkit.storage.remote import RemoteFolder, is_url
from toolkit.wording import count

SAMPLE_BYTES = 4096
MAX_ENDINGS = 8
"""Endings named in a message."""
_PATHS = "dataset.source.paths"


class SourceFile(NamedTuple):
    """A local file with its stable name, its size in bytes and the time of its last change."""

    name: str
    path: str
    num_bytes: int
    modified_ns: int = 0
    version: str = ""
    """Of one on another machine; see `RemoteFolder.version`."""


class Listing(NamedTuple):
    """The files of a source that hold anything, in their order."""

    files: Sequence[SourceFile] = ()
    num_empty: int = 0
    """Files without a single byte; they are left out."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Files of folders that are left out because of their ending, by it."""
    unused_suffixes: tuple[str, ...] = ()
    """Endings that were asked for and that no file has."""

    def notes(self) -> list[str]:
        """What is left out before anything is read, one line each."""
        lines = [left_out_line(self.left_out)] if self.left_out else []
        if self.unused_suffixes:
            lines.append(
                f"dataset.source.suffixes: no file ends in {', '.join(self.unused_suffixes)}"
            )
        return lines

    def check_unchanged(self) -> None:
        """Raise DataError when a file is not the one that was found at the start."""
        for file in self.files:
            check_unchanged(file.path, file.num_bytes, file.modified_ns)


def left_out_line(left_out: Mapping[str, int]) -> str:
    """What is left out of folders, in a line."""
    total, shown = sum(left_out.values()), sorted(left_out, key=lambda e: (-left_out[e], e))
    endings = ", ".join(f"{left_out[ending]:,} {ending}" for ending in shown[:MAX_ENDINGS])
    more = f", {len(shown) - MAX_ENDINGS} more endings" if len(shown) > MAX_ENDINGS else ""
    return (
        f"{count(total, 'file')} of folders left out for their endings: {endings}{more} "
        "(a pattern like 'folder/*.md', or dataset.source.suffixes, takes them)"
    )


def why_missing(text: str) -> str | None:
    """Why a path or glob leads nowhere; None: something is there. The one answer to that question
    for preparing, for dry runs, and for runs whose sources have moved."""
    path = Path(text).expanduser()
    if path.exists():
        return None
    if not glob.has_magic(text):
        return "no such file or folder"
    found = any(os.path.isfile(match) for match in glob.iglob(str(path), recursive=True))
    return None if found else "matches no file"


def list_files(source: SourceConfig, *, holding: str | None = None) -> Listing:
    """The files of a source that are on this machine; DataError for what is not there, and for
    places without a file (`holding` says in messages what was looked for)."""
    match source:
        case FilesSourceConfig():
            listing = find_files(source.paths, source.suffixes, holding=holding or "with text")
            is_default = source.suffixes == FilesSourceConfig(paths=[]).suffixes
            return listing._replace(unused_suffixes=()) if is_default else listing
        case TokenFilesSourceConfig():
            local = [path for path in source.paths if not is_url(path)]
            if source.paths and not local:
                return Listing()
            listing = find_files(local, source.suffixes, holding=holding or "with tokens")
            return listing._replace(unused_suffixes=())
        case DiskSourceConfig():
            return Listing(_disk_files(source))
        case PythonStdlibSourceConfig():
            return Listing(_stdlib_files(source.max_bytes))
        case HubSourceConfig():
            return Listing()


def find_files(
    paths: Sequence[str], suffixes: tuple[str, ...], *, holding: str = "with text"
) -> Listing:
    """Files, the files of folders with one of `suffixes`, and what globs match; each once.
    DataError for every path that does not exist, matches nothing, or is an empty file or a folder
    without such a file."""
    found: dict[str, SourceFile] = {}
    empty: set[str] = set()
    others: dict[str, str] = {}
    errors = ErrorList()
    for text in paths:
        with errors.collecting():
            if (reason := why_missing(text)) is not None:
                raise DataError(f"{_PATHS}: {text}: {reason}")
            root, there = Path(text).expanduser(), dict[str, str]()
            here = list(_expand(root, suffixes, there))
            for name, path in here:
                with guard(f"{_PATHS}: {path}", DataError):
                    status = path.stat()
                real = os.path.realpath(path)
                if status.st_size:
                    file = SourceFile(name, str(path), status.st_size, status.st_mtime_ns)
                    found.setdefault(real, file)
                elif path == root:
                    raise DataError(f"{_PATHS}: {path}: the file is empty")
                else:
                    empty.add(real)
            others |= there
            if not here and root.is_dir():
                raise _nothing(text, suffixes, holding, there)
    errors.raise_any()
    if not found:
        raise _nothing(", ".join(paths) or "empty list", suffixes, holding, {})
    names = [file.path.lower() for file in found.values()]
    unused = tuple(end for end in suffixes if not any(n.endswith(end.lower()) for n in names))
    left_out = Counter(ending for real, ending in others.items() if real not in found)
    return Listing(sorted(found.values()), len(empty), dict(left_out), unused)


def _nothing(
    where: str, suffixes: tuple[str, ...], holding: str, others: dict[str, str]
) -> DataError:
    line = f"; {left_out_line(Counter(others.values()))}" if others else ""
    return DataError(
        f"{_PATHS}: {where}: no file {holding} (looked for {', '.join(suffixes)} in folders){line}"
    )


def disk_folder(source: DiskSourceConfig) -> Path:
    """Where the files of the split lie, in a folder that `save_to_disk` wrote."""
    folder = Path(source.path).expanduser()
    is_split = (folder / source.split / "state.json").is_file()
    return folder / source.split if is_split else folder


def _disk_files(source: DiskSourceConfig) -> list[SourceFile]:
    folder, files = disk_folder(source), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.endswith((".arrow", ".json")):
            with guard(path, DataError):
                check_regular(path, DataError)
            status = path.stat()
            files.append(SourceFile(path.name, str(path), status.st_size, status.st_mtime_ns))
    if not any(file.name.endswith(".arrow") for file in files):
        raise DataError(
            f"dataset.source.path: {source.path}: no data set that `save_to_disk` wrote, or none "
            f"with a split {source.split!r}"
        )
    return files


def fingerprint_files(files: Sequence[SourceFile]) -> str:
    """Names, sizes and the content of three blocks of each file."""
    import xxhash

    digest = xxhash.xxh3_64()
    for name, path, num_bytes, *_ in files:
        digest.update(f"{name}\0{num_bytes}\0".encode("utf-8", "surrogateescape"))
        with open(path, "rb", buffering=0) as file:
            if num_bytes <= SAMPLE_BYTES:
                digest.update(file.read(SAMPLE_BYTES) * 3)
                continue
            for start in (0, num_bytes // 2, num_bytes - SAMPLE_BYTES):
                file.seek(max(0, start))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_unchanged(path: str, num_bytes: int, modified_ns: int) -> None:
    """Raise DataError when a file is not the one that was found at the start."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: gone while it was being read; put it back and run again to continue"
        ) from None
    if (status.st_size, status.st_mtime_ns) != (num_bytes, modified_ns):
        raise DataError(
            f"{path}: changed while it was being read ({num_bytes} bytes before, "
            f"{status.st_size} now); run again when nothing writes to it: finished parts of other "
            "files are kept"
        )


def check_version(url: str, num_bytes: int, version: str) -> None:
    """`check_unchanged` of a file on another machine."""
    folder, _, name = url.rpartition("/")
    try:
        found = RemoteFolder(folder).version(name)
    except FileNotFoundError:
        found = None
    if found != (num_bytes, version):
        raise DataError(
            f"{url}: {'changed' if found else 'gone'} while it was being read; run again when "
            "nothing writes to it"
        )


def _expand(
    path: Path, suffixes: Sequence[str], others: dict[str, str]
) -> Iterator[tuple[str, Path]]:
    """Names and paths of files; `others` is filled with the real paths of those that are left out
    of a folder, and their endings."""
    if path.is_dir():
        endings = tuple(suffix.lower() for suffix in suffixes)
        for folder, names in _folders(path):
            for name in sorted(names):
                file = Path(folder, name)
                if name.lower().endswith(endings):
                    yield str(file.relative_to(path)), file
                else:
                    others[os.path.realpath(file)] = file.suffix.lower() or "without ending"
    elif path.is_file():
        yield path.name, path
    else:
        # Not their common folder: names would change when documents are added.
        parts = path.parts
        plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), 0)
        for match in sorted(map(Path, glob.iglob(str(path), recursive=True))):
            if match.is_file():
                yield str(match.relative_to(Path(*parts[:plain]))), match


def _folders(path: Path) -> Iterator[tuple[str, list[str]]]:
    """`path`, the folders below it and those that links in them lead to, each once, with the names
    of their files. What is reached without links comes first: a link to a folder that is there
    anyway changes no name."""
    seen: set[str] = set()
    waiting = deque([str(path)])
    while waiting:
        for folder, subfolders, names in os.walk(waiting.popleft()):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders.sort()
            below = (os.path.join(folder, name) for name in subfolders)
            waiting.extend(inner for inner in below if os.path.islink(inner))
            yield folder, names


def _stdlib_files(max_bytes: int | None) -> list[SourceFile]:
    import xxhash

    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.endswith("-packages") and s[:2] != "__"]
        for path in (os.path.join(folder, name) for name in names if name.endswith(".py")):
            status = os.stat(path)
            if status.st_size:
                name = os.path.relpath(path, root)
                files.append(SourceFile(name, path, status.st_size, status.st_mtime_ns))
    files.sort(key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode()), file.name))
    if not files:
        raise DataError(
            f"dataset.source: {root} holds no Python source; use a source of type files"
        )
    total, kept = 0, []
    for file in files:
        if max_bytes is not None and total >= max_bytes:
            break
        kept.append(file)
        total += file.num_bytes
    return kept
