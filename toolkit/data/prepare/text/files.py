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
    FilesSourceConfig,
    PythonStdlibSourceConfig,
)
from toolkit.errors import DataError
from toolkit.storage.foreign import guard
from toolkit.wording import count

SAMPLE_BYTES = 4096
MAX_ENDINGS = 8
"""Endings named in a message."""


class SourceFile(NamedTuple):
    """A local file with its stable name, its size in bytes and the time of its last change."""

    name: str
    path: str
    num_bytes: int
    modified_ns: int = 0


class Listing(NamedTuple):
    """The files of a source that hold anything, in their order."""

    files: list[SourceFile]
    num_empty: int
    """Files without a single byte; they are left out."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Files of folders that are left out because of their ending, by it."""
    unused_suffixes: tuple[str, ...] = ()
    """Endings that were asked for and that no file has."""


def left_out_line(left_out: Mapping[str, int]) -> str:
    """What is left out of folders, in a line; empty where nothing is."""
    if not left_out:
        return ""
    total, shown = sum(left_out.values()), sorted(left_out, key=lambda e: (-left_out[e], e))
    endings = ", ".join(f"{left_out[ending]:,} {ending}" for ending in shown[:MAX_ENDINGS])
    more = f", {len(shown) - MAX_ENDINGS} more endings" if len(shown) > MAX_ENDINGS else ""
    return (
        f"{count(total, 'file')} of folders left out for their endings: {endings}{more} "
        "(a pattern like 'folder/*.md', or dataset.source.suffixes, takes them)"
    )


def list_files(source: FilesSourceConfig | PythonStdlibSourceConfig) -> Listing:
    """The files of a local source.

    Raises:
        DataError: for a path that does not exist, matches nothing, or is an empty file.
    """
    if isinstance(source, PythonStdlibSourceConfig):
        return Listing(_stdlib_files(source.max_bytes), 0)
    listing = find_files(source.paths, source.suffixes)
    if source.suffixes == FilesSourceConfig(paths=[]).suffixes:
        return listing._replace(unused_suffixes=())
    return listing


def find_files(
    paths: Sequence[str], suffixes: tuple[str, ...], *, holding: str = "text"
) -> Listing:
    """Files, the files of folders with one of `suffixes`, and what globs match; each once.

    Raises:
        DataError: a path does not exist, matches nothing, or is a folder without such a file.
    """
    found: dict[str, SourceFile] = {}
    empty: set[str] = set()
    others: dict[str, str] = {}
    for text in paths:
        is_folder, num_here = Path(text).expanduser().is_dir(), 0
        there: dict[str, str] = {}
        for name, path in _expand(text, suffixes, there):
            num_here += 1
            with guard(f"dataset.source.paths: {path}", DataError):
                status = path.stat()
            if status.st_size:
                file = SourceFile(name, str(path), status.st_size, status.st_mtime_ns)
                found.setdefault(os.path.realpath(path), file)
            elif text == str(path):
                raise DataError(f"dataset.source.paths: {path}: the file is empty")
            else:
                empty.add(os.path.realpath(path))
        others |= there
        if is_folder and not num_here:
            raise _nothing(text, suffixes, holding, _count(there))
    if not found:
        raise _nothing(", ".join(paths) or "empty list", suffixes, holding, {})
    names = [file.path.lower() for file in found.values()]
    unused = tuple(end for end in suffixes if not any(n.endswith(end.lower()) for n in names))
    left_out = {real: ending for real, ending in others.items() if real not in found}
    return Listing(sorted(found.values()), len(empty), _count(left_out), unused)


def _count(endings: dict[str, str]) -> dict[str, int]:
    return dict(Counter(endings.values()))


def _nothing(
    where: str, suffixes: tuple[str, ...], holding: str, others: dict[str, int]
) -> DataError:
    line = left_out_line(others)
    return DataError(
        f"dataset.source.paths: {where}: no file with {holding} (looked for {', '.join(suffixes)} "
        f"in folders){f'; {line}' if line else ''}"
    )


def fingerprint_files(files: Sequence[SourceFile]) -> str:
    """Names, sizes and the content of three blocks of each file."""
    import xxhash

    digest = xxhash.xxh3_64()
    for name, path, num_bytes, _ in files:
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


def _expand(
    text: str, suffixes: tuple[str, ...], others: dict[str, str]
) -> Iterator[tuple[str, Path]]:
    """Names and paths of files; `others` is filled with the real paths of those that are left out
    of a folder, and their endings."""
    path = Path(text).expanduser()
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
    elif glob.has_magic(text):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(f"dataset.source.paths: {text}: matches no file")
        # Not their common folder: names would change when documents are added.
        parts = path.parts
        plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), 0)
        base = Path(*parts[:plain])
        for file in sorted(files):
            yield str(file.relative_to(base)), file
    else:
        raise DataError(f"dataset.source.paths: {text}: no such file or folder")


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
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                status = os.stat(path)
                if status.st_size:
                    relative = os.path.relpath(path, root)
                    files.append(SourceFile(relative, path, status.st_size, status.st_mtime_ns))
    files.sort(key=lambda file: (xxhash.xxh3_64_intdigest(file.name.encode()), file.name))
    if not files:
        raise DataError(
            f"dataset.source: {root} holds no Python source; use a source of type files"
        )
    if max_bytes is None:
        return files
    total, kept = 0, []
    for file in files:
        if total >= max_bytes:
            break
        kept.append(file)
        total += file.num_bytes
    return kept
