"""Shards: pieces of a source that one process reads at a time, and how large they are."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import msgspec

from toolkit.data.prepare.text.files import Listing

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
