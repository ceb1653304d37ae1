"""Where documents come from: every kind of source as an ordered list of independent shards.

A shard is a piece of work for one process: a few files, or a part of a large one. Shards are cut by
size, never by the number of processes, and a document is identified by its file's relative name and
place in it. What is prepared therefore depends on the source alone.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from toolkit.config.named import named
from toolkit.data.config import (
    DiskSourceConfig,
    FilesSourceConfig,
    HubSourceConfig,
    SourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.prepare.text.columns import TextColumns, text_columns
from toolkit.data.prepare.text.cuts import align, documents_in
from toolkit.data.prepare.text.files import (
    Listing,
    SourceFile,
    fingerprint_files,
    list_files,
    why_missing,
)
from toolkit.errors import DataError
from toolkit.storage.remote import is_url

MIN_SHARD_BYTES = 1 << 20
MAX_SHARD_BYTES = 32 << 20
TARGET_NUM_SHARDS = 64

RangeKind = Literal[
    "text", "jsonl", "jsonl_gz", "jsonl_zst", "json_array", "parquet", "arrow", "disk_rows",
    "hub_stream", "hub_rows", "tokens", "remote_tokens",
]  # fmt: skip


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """A part of one file (or of a data set of the `datasets` library) that one shard reads."""

    kind: RangeKind
    path: str
    """File to open; for the hub, the name of the data set."""
    name: str
    """Relative name: the stable part of each document's identity."""
    start: int
    """First byte (text, jsonl), row group (parquet), batch (arrow), shard (hub_stream), row
    (hub_rows, disk_rows) or token (tokens)."""
    end: int
    """One past the last; for hub_stream the number of shards."""
    num_bytes: int
    """Rough size of what is read, for progress."""
    split: Literal["train", "val"] | None = None
    """Set where the split is decided by place instead of by a hash of the identity."""
    first_byte: int = 0
    """Tokens: where they begin in the file..."""
    num_tokens: int = 0
    """...and how many it holds."""
    is_rest: bool = False
    """Text: whether the document begins where a longer one was cut."""
    file_bytes: int = 0
    """Size of a local file when it was found..."""
    modified_ns: int = 0
    """...and the time of its last change: it may not change while it is read."""
    version: str = ""
    """The same of one on another machine, where its server tells."""


Shard = list[Range]


class Plan(NamedTuple):
    """All shards of a source, in order."""

    shards: list[Shard]
    fingerprint: str
    num_bytes: int
    listing: Listing = Listing()
    """The local files that it was made from."""
    cache_dir: str | None = None
    """See `Reading`."""


REMOTE_MARK = "-remote"
"""Ends the fingerprint of files on other machines: earlier releases had another one for them."""
_ROOM = "toolkit.data.prepare.text"
"""Modules that bring libraries of their own are found by name."""
_ENDINGS: dict[RangeKind, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson"),
    "jsonl_gz": (".jsonl.gz", ".json.gz", ".ndjson.gz"),
    "jsonl_zst": (".jsonl.zst", ".jsonl.zstd", ".json.zst", ".json.zstd", ".ndjson.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
MAX_JSON_BYTES = 256 << 20
"""A list in a .json file is read whole."""
JSON_HEAD_BYTES = 1 << 20
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".tar")


def plan_source(
    source: SourceConfig,
    validation_fraction: float,
    *,
    rows: bool = False,
    cache_dir: str | None = None,
) -> Plan:
    """Cut the source into shards; DataError when there is nothing to read. `rows` and `cache_dir`
    are those of `Reading`."""
    columns = text_columns(source, rows=rows)
    match source:
        case HubSourceConfig():
            return named(f"{_ROOM}.hub:plan_hub")(source, columns, cache_dir)
        case DiskSourceConfig():
            return named(f"{_ROOM}.tables:plan_disk")(source, columns)
        case TokenFilesSourceConfig():
            return named(f"{_ROOM}.token_files:plan_token_files")(source)
    listing = list_files(source)
    files = listing.files
    num_bytes = sum(file.num_bytes for file in files)
    size = shard_bytes(num_bytes)
    json_files = source.json_files if isinstance(source, FilesSourceConfig) else "text"
    kinds = {file.path: file_kind(file, json_files) for file in files}
    all_text = all(kind == "text" for kind in kinds.values())
    if columns is not None and all_text and isinstance(source, FilesSourceConfig):
        columns.check_used(", ".join(source.paths))
    # Few plain-text files cannot be split by file: less than one would be held out on average. Then
    # the last part of each is held out.
    tails = all_text and not rows and 0 < validation_fraction * len(files) < 1
    fraction = validation_fraction if tails else 0.0
    ranges = (
        part
        for file in files
        for part in _cut(file, kinds[file.path], columns, size, fraction, rows)
    )
    return Plan(group_ranges(ranges, size), fingerprint_files(files), num_bytes, listing)


def source_fingerprint(source: SourceConfig) -> str | None:
    """`Plan.fingerprint` of a source; None for the hub, and for files on other machines that do not
    answer at once: no start may depend on the network."""
    if not is_compared(source):
        return None
    if any(map(is_url, getattr(source, "paths", []))):
        return named(f"{_ROOM}.token_files:fingerprint_if_reached")(source)
    return fingerprint_files(list_files(source).files)


def is_compared(source: SourceConfig) -> bool:
    """Whether a start asks if the text has changed since its token files were made."""
    is_far = any(map(is_url, getattr(source, "paths", [])))
    return not isinstance(source, HubSourceConfig) and (
        not is_far or isinstance(source, TokenFilesSourceConfig)
    )


def is_gone(source: SourceConfig | None) -> bool:
    """Whether something that a local source names is not on this machine (any more)."""
    if isinstance(source, DiskSourceConfig):
        return not Path(source.path).expanduser().exists()
    paths = getattr(source, "paths", [])
    return any(why_missing(path) is not None for path in paths if not is_url(path))


def file_kind(file: SourceFile, json_files: Literal["rows", "text"]) -> RangeKind:
    """How a file is read: by the ending of its name, and of .json files by their beginning.
    DataError for compressed formats that are not read, and .json files without rows."""
    lowered = file.name.lower()
    for kind, endings in _ENDINGS.items():
        if lowered.endswith(endings):
            return kind
    if lowered.endswith(_COMPRESSED):
        raise DataError(
            f"{file.name}: of compressed files only .jsonl.gz and .jsonl.zst are read; unpack it "
            "first"
        )
    if json_files == "text" or not lowered.endswith(".json"):
        return "text"
    with open(file.path, "rb") as opened:
        head = opened.read(JSON_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        if file.num_bytes > MAX_JSON_BYTES:
            raise DataError(
                f"{file.path}: a list of {file.num_bytes / 1e6:,.0f} MB, and lists in JSON are "
                f"read whole, up to {MAX_JSON_BYTES >> 20} MB; write one object a line: "
                "jq -c '.[]' LIST.json > ROWS.jsonl"
            )
        return "json_array"
    first, separator, _ = head.partition(b"\n")
    if head.startswith(b"{") and (first.rstrip().endswith(b"}") or not separator):
        return "jsonl"
    raise DataError(
        f"{file.path}: neither a list of objects nor an object a line, so it has no rows; give "
        "such a file, or set dataset.source.json_files=text to read .json files as documents"
    )


def _cut(
    file: SourceFile,
    kind: RangeKind,
    columns: TextColumns | None,
    size: int,
    tail_fraction: float,
    rows: bool,
) -> Iterator[Range]:
    whole = file.num_bytes
    if rows and kind == "text":
        raise DataError(
            f"{file.path}: plain text has no rows for dataset.instructions; give .jsonl, .parquet "
            "or .arrow files"
        )
    part = functools.partial(
        Range, kind=kind, path=file.path, name=file.name, file_bytes=whole,
        modified_ns=file.modified_ns,
    )  # fmt: skip
    if kind in ("parquet", "arrow"):
        cut = named(f"{_ROOM}.tables:{kind}_ranges")
        for first, last, num_bytes in cut(file.path, columns, size):
            yield part(start=first, end=last, num_bytes=num_bytes)
    elif kind == "text":
        with open(file.path, "rb", buffering=0) as opened:

            def read(start: int, size: int) -> bytes:
                return os.pread(opened.fileno(), size, start)

            sides: list[tuple[int, int, Literal["train", "val"] | None]] = [(0, whole, None)]
            if tail_fraction:
                place = align(read, int(whole * (1 - tail_fraction)), whole)
                sides = [(0, place, "train"), (place, whole, "val")]
            # A range for each document: none goes on in another shard.
            for first, last, split in sides:
                for start, end in documents_in(read, first, last):
                    yield part(
                        start=start, end=end, num_bytes=end - start, split=split,
                        is_rest=start > first,
                    )  # fmt: skip
    else:
        # No place in a packed file can be reached without reading all before it.
        step = size if kind == "jsonl" else whole
        for start in range(0, whole, step):
            end = min(start + step, whole)
            yield part(start=start, end=end, num_bytes=end - start)


def shard_bytes(num_bytes: int) -> int:
    """Bytes of one shard of a source of `num_bytes`."""
    size = num_bytes // TARGET_NUM_SHARDS // MIN_SHARD_BYTES * MIN_SHARD_BYTES
    return min(max(size, MIN_SHARD_BYTES), MAX_SHARD_BYTES)


def group_ranges(ranges: Iterator[Range], size: int) -> list[Shard]:
    """Neighbours together, up to `size` bytes."""
    shards: list[Shard] = []
    room = 0
    for part in ranges:
        if not shards or part.num_bytes > room:
            shards.append([])
            room = size
        shards[-1].append(part)
        room -= part.num_bytes
    return shards


def row_shards(kind: RangeKind, path: str, name: str, num_rows: int, size: int) -> list[Shard]:
    """Ranges of rows of a data set of `size` bytes, of which nobody knows where they lie."""
    num_bytes = min(max(size // TARGET_NUM_SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    rows = max(1, num_rows * num_bytes // max(1, size))
    whole = Range(
        kind=kind, path=path, name=name, start=0, end=num_rows, num_bytes=min(num_bytes, size)
    )
    return [
        [msgspec.structs.replace(whole, start=first, end=min(first + rows, num_rows))]
        for first in range(0, num_rows, rows)
    ]
