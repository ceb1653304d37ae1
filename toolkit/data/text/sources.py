"""Where text comes from: every kind of source as an ordered list of independent shards.

A shard is a piece of work for one process: a few files, or a part of a large one. Shards are cut by
size, never by the number of processes, and a document is identified by its file's relative name and
place in it. What is prepared therefore depends on the source alone.
"""

import glob
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from toolkit.data.config import (
    FilesSourceConfig,
    HubSourceConfig,
    PythonStdlibSourceConfig,
    SourceConfig,
)
from toolkit.errors import DataError

PIECE_BYTES = 1 << 20
"""Plain text is tokenized in pieces of this size, cut at line ends."""
MIN_SHARD_BYTES = 1 << 20
MAX_SHARD_BYTES = 32 << 20
TARGET_NUM_SHARDS = 64
SAMPLE_BYTES = 4096

RangeKind = Literal["text", "jsonl", "jsonl_gz", "parquet", "hub_stream", "hub_rows"]
_JSONL_GZ = (".jsonl.gz", ".json.gz", ".ndjson.gz")
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar")


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """A part of one file (or of a hub data set) that one shard reads."""

    kind: RangeKind
    path: str
    """File to open; for the hub, the name of the data set."""
    name: str
    """Relative name: the stable part of each document's identity."""
    start: int
    """First byte (text, jsonl), row group (parquet), shard (hub_stream) or row (hub_rows)."""
    end: int
    """One past the last; for hub_stream the number of shards."""
    num_bytes: int
    """Rough size of the text, for progress."""
    split: Literal["train", "val"] | None = None
    """Set where the split is decided by place instead of by a hash of the identity."""
    document_start: int = 0
    """Text: where the document begins in the file..."""
    document_end: int = 0
    """...and ends; a document may span several ranges."""


Shard = list[Range]


class Plan(NamedTuple):
    """All shards of a source, in order."""

    shards: list[Shard]
    fingerprint: str
    num_bytes: int


class SourceFile(NamedTuple):
    """A local file with its stable name and its size in bytes."""

    name: str
    path: str
    num_bytes: int


def plan_source(source: SourceConfig, validation_fraction: float) -> Plan:
    """Cut the source into shards.

    Raises:
        DataError: when there is nothing to read.
    """
    if isinstance(source, HubSourceConfig):
        from toolkit.data.text.hub import plan_hub

        return plan_hub(source)
    files = list_files(source)
    num_bytes = sum(file.num_bytes for file in files)
    size = num_bytes // TARGET_NUM_SHARDS // PIECE_BYTES * PIECE_BYTES
    size = min(max(size, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    tails = _holds_out_tails(files, validation_fraction)
    ranges = (
        piece
        for file in files
        for piece in _cut(file, source, size, validation_fraction if tails else 0.0)
    )
    return Plan(_group(ranges, size), fingerprint_files(files), num_bytes)


def list_files(source: FilesSourceConfig | PythonStdlibSourceConfig) -> list[SourceFile]:
    """The files of a local source that hold anything, in their order.

    Raises:
        DataError: for a path that does not exist, matches nothing, or is an empty file.
    """
    if isinstance(source, PythonStdlibSourceConfig):
        return _stdlib_files(source.max_bytes)
    found: dict[str, SourceFile] = {}
    for text in source.paths:
        for name, path in _expand(text, source.suffixes):
            num_bytes = path.stat().st_size
            if num_bytes:
                found.setdefault(os.path.realpath(path), SourceFile(name, str(path), num_bytes))
            elif text == str(path):
                raise DataError(f"dataset.source.paths: {path}: the file is empty")
    if not found:
        raise DataError(
            f"dataset.source.paths: {', '.join(source.paths) or 'empty list'}: "
            f"no file with text (looked for {', '.join(source.suffixes)} in folders)"
        )
    return sorted(found.values())


def fingerprint_files(files: list[SourceFile]) -> str:
    """Names, sizes and the content of three blocks of each file."""
    import xxhash

    digest = xxhash.xxh3_64()
    for name, path, num_bytes in files:
        digest.update(f"{name}\0{num_bytes}\0".encode())
        with open(path, "rb", buffering=0) as file:
            for start in (0, num_bytes // 2, num_bytes - SAMPLE_BYTES):
                file.seek(max(0, start))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def range_kind(name: str) -> RangeKind:
    """How a file is read, by the ending of its name.

    Raises:
        DataError: for compressed formats that are not read.
    """
    lowered = name.lower()
    if lowered.endswith(".jsonl"):
        return "jsonl"
    if lowered.endswith(_JSONL_GZ):
        return "jsonl_gz"
    if lowered.endswith(".parquet"):
        return "parquet"
    if lowered.endswith(_COMPRESSED):
        raise DataError(f"{name}: of compressed files only .jsonl.gz is read; unpack it first")
    return "text"


def align(path: str, position: int, size: int) -> int:
    """The place at or after `position` where plain text may be cut: after a line end if one is
    near, else between two UTF-8 characters."""
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    with open(path, "rb", buffering=0) as file:
        file.seek(position - 1)
        window = file.read(1 << 16)
    line_end = window.find(b"\n")
    if line_end >= 0:
        return position + line_end
    offset = 1
    while offset < min(len(window), 4) and window[offset] & 0xC0 == 0x80:
        offset += 1
    return position - 1 + offset


def _holds_out_tails(files: list[SourceFile], validation_fraction: float) -> bool:
    """Few plain-text files cannot be split by file: less than one would be held out on average.
    Then the last part of each is held out."""
    return (
        0 < validation_fraction * len(files) < 1
        and all(range_kind(file.name) == "text" for file in files)
    )  # fmt: skip


def _cut(
    file: SourceFile,
    source: FilesSourceConfig | PythonStdlibSourceConfig,
    size: int,
    tail_fraction: float,
) -> Iterator[Range]:
    kind, whole = range_kind(file.name), file.num_bytes
    if kind == "parquet":
        from toolkit.data.text.readers import parquet_row_groups

        assert isinstance(source, FilesSourceConfig)
        for first, last, num_bytes in parquet_row_groups(file.path, source.text_field, size):
            yield Range(
                kind=kind, path=file.path, name=file.name, start=first, end=last,
                num_bytes=num_bytes,
            )  # fmt: skip
        return
    if kind == "jsonl_gz":
        # No place inside a gzip stream can be reached without reading all before it.
        documents: list[tuple[int, int, Literal["train", "val"] | None]] = [(0, whole, None)]
        size = max(size, whole)
    elif tail_fraction:
        cut = align(file.path, int(whole * (1 - tail_fraction)), whole)
        documents = [(0, cut, "train"), (cut, whole, "val")]
    else:
        documents = [(0, whole, None)]
    for document_start, document_end, split in documents:
        start = document_start
        while start < document_end:
            end = min((start // size + 1) * size, document_end)
            yield Range(
                kind=kind, path=file.path, name=file.name, start=start, end=end,
                num_bytes=end - start, split=split, document_start=document_start,
                document_end=document_end,
            )  # fmt: skip
            start = end


def _group(ranges: Iterator[Range], size: int) -> list[Shard]:
    shards: list[Shard] = []
    room = 0
    for part in ranges:
        if not shards or part.num_bytes > room:
            shards.append([])
            room = size
        shards[-1].append(part)
        room -= part.num_bytes
    return shards


def _expand(text: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    path = Path(text).expanduser()
    if path.is_dir():
        for folder, subfolders, names in os.walk(path):
            subfolders.sort()
            for name in sorted(names):
                if name.lower().endswith(tuple(s.lower() for s in suffixes)):
                    file = Path(folder, name)
                    yield str(file.relative_to(path)), file
    elif path.is_file():
        yield path.name, path
    elif glob.has_magic(text):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise DataError(f"dataset.source.paths: {text}: matches no file")
        common = os.path.commonpath([file.parent for file in files])
        for file in sorted(files):
            yield str(file.relative_to(common)), file
    else:
        raise DataError(f"dataset.source.paths: {text}: no such file or folder")


def _stdlib_files(max_bytes: int | None) -> list[SourceFile]:
    import xxhash

    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.endswith("-packages") and s[:2] != "__"]
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                num_bytes = os.path.getsize(path)
                if num_bytes:
                    files.append(SourceFile(os.path.relpath(path, root), path, num_bytes))
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
