"""Reads sources as `prepare` does, in this process."""

from pathlib import Path

from toolkit.data.config import FilesSourceConfig, FiltersConfig, SourceConfig
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source


def read_all(
    source: SourceConfig,
    counts: Counts | None = None,
    fraction: float = 0.0,
    *,
    rows: bool = False,
    filters: FiltersConfig | None = None,
    with_digests: bool = False,
    vocab_size: int = 0,
    eos_id: int | None = None,
) -> list[Piece]:
    """Every piece of a source, in order."""
    plan = plan_source(source, fraction, rows=rows)
    reading = Reading(
        source=source, rows=rows, filters=filters, with_digests=with_digests,
        vocab_size=vocab_size, eos_id=eos_id,
    )  # fmt: skip
    counts = counts or Counts()
    return [piece for shard in plan.shards for piece in read_shard(shard, reading, counts)]


def texts_of(*paths: Path, **options) -> list[str]:
    """The text of every piece of local files."""
    source = FilesSourceConfig(paths=[str(path) for path in paths], **options)
    return [piece.text for piece in read_all(source)]
