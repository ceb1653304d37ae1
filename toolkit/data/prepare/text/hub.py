"""Rows of the `datasets` library: from the Hugging Face hub (or anything else that
`datasets.load_dataset` takes), and from folders that `save_to_disk` wrote."""

import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from toolkit.data.config import DiskSourceConfig, HubSourceConfig
from toolkit.data.prepare.text.columns import TextColumns, row_piece, text_columns
from toolkit.data.prepare.text.files import fingerprint_files, list_files
from toolkit.data.prepare.text.reading import Counts, Piece, Reading
from toolkit.data.prepare.text.shards import (
    MAX_SHARD_BYTES,
    MIN_SHARD_BYTES,
    TARGET_NUM_SHARDS,
    Plan,
    Range,
    RangeKind,
    Shard,
)
from toolkit.data.prepare.text.tables import check_arrow_file, checked_batch
from toolkit.errors import DataError
from toolkit.storage.foreign import guard

NUM_SAMPLED_DOCUMENTS = 8
ASSUMED_ROW_BYTES = 2_000


def plan_hub(
    source: HubSourceConfig, columns: TextColumns | None, cache_dir: str | None = None
) -> Plan:
    """One shard per file of a streamed data set; ranges of rows of a downloaded one. DataError when
    it cannot be loaded or has no such column."""
    import xxhash

    dataset = _load_hub(source, columns, cache_dir)
    name = f"{source.name}/{source.config or ''}/{source.split}"
    if source.streaming:
        size_hint, number = dataset.info.dataset_size or 0, dataset.num_shards
        shards = [
            [_range("hub_stream", source.name, name, index, number, size_hint // number)]
            for index in range(number)
        ]
    else:
        size_hint = dataset.info.dataset_size or len(dataset) * ASSUMED_ROW_BYTES
        shards = _row_shards("hub_rows", source.name, name, len(dataset), size_hint)
    digest = xxhash.xxh3_64(repr((size_hint, len(shards))).encode())
    sample = list(itertools.islice(iter(dataset), NUM_SAMPLED_DOCUMENTS))
    if not sample:
        raise DataError(f"dataset.source: {source.name}: split {source.split!r} has no rows")
    for number, row in enumerate(sample):
        if columns is None:
            data = msgspec.json.encode(row, enc_hook=str)
        else:
            text = columns.text(row, f"{source.name}: row {number}")
            data = text.encode("utf-8", "surrogatepass")
        digest.update(data + b"\0")
    return Plan(shards, digest.hexdigest(), size_hint, cache_dir=cache_dir)


def plan_disk(source: DiskSourceConfig, columns: TextColumns | None) -> Plan:
    """Ranges of rows; DataError when the folder holds no such data set, split or column."""
    dataset = _load_disk(source, columns)
    listing = list_files(source)
    num_bytes = sum(file.num_bytes for file in listing.files)
    name = f"{Path(source.path).name}/{source.split}"
    shards = _row_shards("disk_rows", source.path, name, len(dataset), num_bytes)
    return Plan(shards, fingerprint_files(listing.files), num_bytes, listing)


def read_hub(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of one shard of the data set."""
    source = reading.source
    assert isinstance(source, HubSourceConfig | DiskSourceConfig)
    columns = text_columns(source, rows=reading.rows)
    if isinstance(source, DiskSourceConfig):
        dataset = _load_disk(source, columns)
        _check_rows(dataset, part, source)
    else:
        dataset = _load_hub(source, columns, reading.cache_dir)
    if part.kind == "hub_stream":
        rows, first = dataset.shard(num_shards=part.end, index=part.start), 0
        prefix = f"{part.name}:{part.start}"
    else:
        rows, first, prefix = dataset.select(range(part.start, part.end)), part.start, part.name
    with guard(part.path, DataError):
        for number, row in enumerate(rows, start=first):
            piece = row_piece(row, f"{prefix}:{number}", f"{part.path}: row {number}", columns)
            text = piece.text
            halves = 0 if text.isascii() else sum("\ud800" <= c <= "\udfff" for c in text)
            if halves:
                counts.replaced_bytes += halves
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                piece = piece._replace(text=text)
            yield piece


def _check_rows(dataset: Any, part: Range, source: DiskSourceConfig) -> None:
    """Check the part of the table that the rows of `part` are in; raises DataError, which names
    the file and the batch."""
    table = dataset.data.table
    if dataset._indices is None:
        table = table.slice(part.start, part.end - part.start)
    try:
        for batch in table.to_batches():
            checked_batch(batch, f"{part.path}: rows {part.start} to {part.end - 1}")
    except DataError:
        for file in list_files(source).files:
            if file.name.endswith(".arrow"):
                check_arrow_file(file.path)
        raise


def _row_shards(kind: RangeKind, path: str, name: str, num_rows: int, size: int) -> list[Shard]:
    shard_bytes = min(max(size // TARGET_NUM_SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
    rows = max(1, num_rows * shard_bytes // max(1, size))
    return [
        [_range(kind, path, name, first, min(first + rows, num_rows), min(shard_bytes, size))]
        for first in range(0, num_rows, rows)
    ]


def _range(kind: RangeKind, path: str, name: str, start: int, end: int, num_bytes: int) -> Range:
    return Range(kind=kind, path=path, name=name, start=start, end=end, num_bytes=num_bytes)


def _load_hub(source: HubSourceConfig, columns: TextColumns | None, cache_dir: str | None) -> Any:
    datasets = _library()
    with (
        guard(f"dataset.source: {source.name}", DataError, problem="cannot be loaded"),
        _hub_files_below(cache_dir),
    ):
        dataset = datasets.load_dataset(
            source.name,
            source.config,
            split=source.split,
            streaming=source.streaming,
            cache_dir=cache_dir,
        )
    return _select(dataset, columns, source.name)


@contextlib.contextmanager
def _hub_files_below(cache_dir: str | None) -> Iterator[None]:
    """Files as they come from the hub go to `cache_dir` too: the argument of `load_dataset` moves
    only what is made of them."""
    if cache_dir is None:
        yield
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE
    constants.HF_HUB_CACHE = os.path.join(cache_dir, "hub")
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


def _load_disk(source: DiskSourceConfig, columns: TextColumns | None) -> Any:
    # Every range of rows asks anew; the file's size and time stand for its content.
    state = tuple(
        (file.path, file.num_bytes, file.modified_ns) for file in list_files(source).files
    )
    dataset = _open_disk(str(Path(source.path).expanduser()), source.split, state)
    return _select(dataset, columns, source.path)


@functools.lru_cache(maxsize=1)
def _open_disk(path: str, split: str, _state: tuple[Any, ...]) -> Any:
    datasets = _library()
    with guard(f"dataset.source.path: {path}", DataError, problem="cannot be loaded"):
        dataset = datasets.load_from_disk(path)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(
                f"dataset.source.split: {path} has no split {split!r}; it has: {', '.join(dataset)}"
            )
        dataset = dataset[split]
    elif split not in ("train", str(dataset.split)):
        raise DataError(
            f"dataset.source.split: {path} is one data set, without splits"
            + (f" (it was {dataset.split})" if dataset.split is not None else "")
            + f", and {split!r} was asked for; leave dataset.source.split out"
        )
    return dataset.with_format(None)


def _select(dataset: Any, columns: TextColumns | None, name: str) -> Any:
    if columns is None or not dataset.column_names:
        return dataset
    columns.check(dataset.column_names, name)
    return dataset.select_columns(columns.names)


def _library() -> Any:
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    return datasets
