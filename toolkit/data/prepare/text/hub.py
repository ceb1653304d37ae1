"""Rows of the `datasets` library: from the Hugging Face hub, or anything else that
`datasets.load_dataset` takes."""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from toolkit.data.config import HubSourceConfig
from toolkit.data.prepare.text.columns import TextColumns, text_columns
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, row_piece
from toolkit.data.prepare.text.sources import Plan, Range, row_shards
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
        whole = Range(
            kind="hub_stream", path=source.name, name=name, start=0, end=number,
            num_bytes=size_hint // number,
        )  # fmt: skip
        shards = [[msgspec.structs.replace(whole, start=index)] for index in range(number)]
    else:
        size_hint = dataset.info.dataset_size or len(dataset) * ASSUMED_ROW_BYTES
        shards = row_shards("hub_rows", source.name, name, len(dataset), size_hint)
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


def read_hub(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of one shard of the data set."""
    source = reading.source
    assert isinstance(source, HubSourceConfig)
    columns = text_columns(source, rows=reading.rows)
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


def _load_hub(source: HubSourceConfig, columns: TextColumns | None, cache_dir: str | None) -> Any:
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
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
    if columns is None or not dataset.column_names:
        return dataset
    columns.check(dataset.column_names, source.name)
    return dataset.select_columns(columns.names)


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
