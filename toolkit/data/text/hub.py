"""Text from the Hugging Face hub, or from anything else `datasets.load_dataset` takes."""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from toolkit.data.config import HubSourceConfig
from toolkit.data.text.piece import Piece
from toolkit.data.text.readers import Counts
from toolkit.data.text.sources import (
    MAX_SHARD_BYTES,
    MIN_SHARD_BYTES,
    TARGET_NUM_SHARDS,
    Plan,
    Range,
)
from toolkit.errors import DataError

NUM_SAMPLED_DOCUMENTS = 8
ASSUMED_ROW_BYTES = 2_000


def plan_hub(source: HubSourceConfig) -> Plan:
    """One shard per file of a streamed data set; ranges of rows of a downloaded one.

    Raises:
        DataError: when the data set cannot be loaded or has no such column.
    """
    import xxhash

    dataset = _load(source)
    if source.streaming:
        size_hint = dataset.info.dataset_size or 0
        number = dataset.num_shards
        shards = [
            [_range(source, "hub_stream", index, number, size_hint // number)]
            for index in range(number)
        ]
    else:
        num_rows = len(dataset)
        size_hint = dataset.info.dataset_size or num_rows * ASSUMED_ROW_BYTES
        shard_bytes = min(max(size_hint // TARGET_NUM_SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)
        rows = max(1, num_rows * shard_bytes // max(1, size_hint))
        shards = [
            [_range(source, "hub_rows", first, min(first + rows, num_rows), shard_bytes)]
            for first in range(0, num_rows, rows)
        ]
    digest = xxhash.xxh3_64(repr((size_hint, len(shards))).encode())
    sample = itertools.islice(iter(dataset), NUM_SAMPLED_DOCUMENTS)
    texts = [_text(row, source, number) for number, row in enumerate(sample)]
    if not texts:
        raise DataError(f"dataset.source: {source.name}: split {source.split!r} has no rows")
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return Plan(shards, digest.hexdigest(), size_hint)


def read_hub(part: Range, source: HubSourceConfig, counts: Counts) -> Iterator[Piece]:
    """The documents of one shard of the data set."""
    dataset = _load(source)
    if part.kind == "hub_stream":
        rows, first = dataset.shard(num_shards=part.end, index=part.start), 0
        prefix = f"{part.name}:{part.start}:"
    else:
        rows, first = dataset.select(range(part.start, part.end)), part.start
        prefix = f"{part.name}:"
    for number, row in enumerate(rows, start=first):
        text = _text(row, source, number)
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            counts.replaced_bytes += sum("\ud800" <= c <= "\udfff" for c in text)
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Piece(f"{prefix}{number}", text)


def _range(source: HubSourceConfig, kind: Any, start: int, end: int, num_bytes: int) -> Range:
    name = f"{source.name}/{source.config or ''}/{source.split}"
    return Range(kind=kind, path=source.name, name=name, start=start, end=end, num_bytes=num_bytes)


def _text(row: dict[str, Any], source: HubSourceConfig, number: int) -> str:
    if source.text_field not in row:
        raise DataError(
            f"dataset.source.text_field: {source.name} has no column {source.text_field!r}; "
            f"give one of: {', '.join(row)}"
        )
    value = row[source.text_field]
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"dataset.source.text_field: {source.name}: row {number}: {source.text_field!r} holds "
            f"{type(value).__name__}, not text"
        )
    return value or ""


def _load(source: HubSourceConfig) -> Any:
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(
            source.name, source.config, split=source.split, streaming=source.streaming
        )
    except Exception as error:  # every builder raises its own types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"dataset.source: {source.name}: cannot be loaded: {reason}") from None
    columns = dataset.column_names
    return (
        dataset.select_columns([source.text_field])
        if (columns and source.text_field in columns)
        else dataset
    )
