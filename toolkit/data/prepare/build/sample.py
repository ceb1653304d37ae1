"""Text to train a tokenizer on."""

from collections.abc import Iterator

from toolkit.data.config import DatasetConfig
from toolkit.data.prepare.build.worker import is_validation
from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.readers import read_shard
from toolkit.data.prepare.text.reading import Counts, Reading
from toolkit.data.prepare.text.shards import Plan

SAMPLE_SHARDS = 256


def sample_texts(config: DatasetConfig, plan: Plan, sample_bytes: int) -> Iterator[str]:
    """Training text from shards spread over the whole source, `sample_bytes` of UTF-8 at most; from
    each shard an equal share of what is left, the last document cut."""
    assert config.source is not None
    reading = Reading(
        source=config.source,
        rows=config.instructions is not None,
        cache_dir=plan.cache_dir,
        filters=config.filters,
    )
    number = min(len(plan.shards), SAMPLE_SHARDS)
    left = sample_bytes
    for turn in range(number):
        quota = left // (number - turn)
        if quota == 0:
            continue
        shard = plan.shards[turn * len(plan.shards) // number]
        for piece in read_shard(shard, reading, Counts()):
            if piece.split == "val" or (
                piece.split is None and is_validation(piece.identity, config.validation_fraction)
            ):
                continue
            text = piece.text if piece.row is None else "\n".join(row_texts(piece.row))
            text, num_bytes = _beginning(text, quota)
            yield text
            quota -= num_bytes
            left -= num_bytes
            if quota <= 0:
                break


def _beginning(text: str, max_bytes: int) -> tuple[str, int]:
    """What of `text` fits into `max_bytes` of UTF-8, and the bytes that it takes of them."""
    data = text[:max_bytes].encode("utf-8", "surrogatepass")
    if len(data) <= max_bytes and len(text) <= max_bytes:
        return text, len(data)
    # A character that is cut takes the rest of the room.
    return data[:max_bytes].decode("utf-8", "ignore"), max_bytes
