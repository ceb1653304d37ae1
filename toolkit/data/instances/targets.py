"""What rows do to the targets of instruction data, counted and said.

A conversation longer than a row is cut. Its later rows may hold answers without the prompts before
them, and some rows hold no target at all: they cost time and teach nothing.
"""

import contextlib
import logging
from collections.abc import Iterator

import msgspec
import numpy as np

from toolkit.data.instances.base import target_mask
from toolkit.data.instances.planned import PlannedInstances
from toolkit.data.instances.plans import Bucket, find_note, keep_note
from toolkit.data.instances.rows import TokenRows
from toolkit.data.tokens.prepared import PreparedDataset, Split
from toolkit.data.tokens.units import DOCUMENTS
from toolkit.errors import DataError
from toolkit.storage.foreign import decode_json
from toolkit.wording import count

logger = logging.getLogger(__name__)

BLOCK_TOKENS = 1 << 22

_said: set[tuple[str, str]] = set()
"""What this process has said already, and of which folder: training opens its data several times.
"""


class TargetCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Of one split's rows."""

    num_rows: int
    rows_without_targets: int
    num_documents: int
    cut_answers: int
    """Documents with targets in rows that do not hold their beginning."""


def check_row_targets(prepared: PreparedDataset, split: Split, instances: TokenRows) -> None:
    """Say in one line how many rows have no target and how many answers are cut off their prompts.
    DataError: no row of training has a target."""
    counts = _counts(prepared, split, instances)
    if not counts.num_rows:
        return
    length = instances.sequence_length
    if split == "train" and counts.rows_without_targets == counts.num_rows:
        raise DataError(
            f"{prepared.folder}: none of its {count(counts.num_rows, 'row')} of {length} tokens "
            "has a target, so the loss would count nothing; raise dataset.sequence_length"
        )
    if counts.rows_without_targets or counts.cut_answers:
        line = (
            f"{split} of {prepared.folder}: {counts.rows_without_targets:,} of "
            f"{count(counts.num_rows, 'row')} of {length} tokens "
            f"{'has' if counts.rows_without_targets == 1 else 'have'} no target, and "
            f"{counts.cut_answers:,} of {count(counts.num_documents, 'document')} "
            f"{'has' if counts.cut_answers == 1 else 'have'} answers in rows without their "
            "beginning, cut from their prompt; raise dataset.sequence_length, or leave them out"
        )
        _say_once(prepared, line)


def check_units(prepared: PreparedDataset, split: Split, instances: PlannedInstances) -> None:
    """Say in one line how many units are longer than a row, and left out. DataError: none of
    training is not."""
    length, header = instances.sequence_length, instances.header
    left_out = header.dropped_documents // DOCUMENTS
    if not left_out:
        return
    units = count(prepared.num_units(split), "unit")
    if split == "train" and not header.num_instances:
        shortest = min(int(lengths.min()) for _, lengths in instances.index.blocks())
        raise DataError(
            f"{prepared.folder}: none of its {units} fits into a row of {length} tokens (the "
            f"shortest has {shortest:,}, prompt and answer twice); raise dataset.sequence_length"
        )
    _say_once(
        prepared,
        f"{split} of {prepared.folder}: {left_out:,} of {units} "
        f"{'is' if left_out == 1 else 'are'} longer than a row of {length} tokens (both documents "
        "together) and left out; raise dataset.sequence_length to keep them",
    )


def _say_once(prepared: PreparedDataset, line: str) -> None:
    key = str(prepared.folder.absolute()), line
    if key not in _said:
        _said.add(key)
        logger.warning("%s", line)


def _counts(prepared: PreparedDataset, split: Split, instances: TokenRows) -> TargetCounts:
    # The fingerprint of some kinds is that of the tokens alone.
    name = f"{split}-{instances.sequence_length}-{instances.fingerprint}.targets"
    note = find_note(prepared, name)
    if note is not None:
        with contextlib.suppress(DataError):  # it is counted and written again
            return decode_json(note, name, DataError, TargetCounts)
    without, cut = 0, set[int]()
    for block in _blocks(instances):
        without += int(np.count_nonzero(~target_mask(instances.read(block)).any(axis=1)))
        cut |= _cut_answers(prepared, split, instances, block)
    counts = TargetCounts(
        num_rows=instances.num_instances,
        rows_without_targets=without,
        num_documents=prepared.num_documents(split),
        cut_answers=len(cut),
    )
    keep_note(prepared, name, msgspec.json.encode(counts))
    return counts


def _blocks(instances: TokenRows) -> Iterator[np.ndarray]:
    """Numbers of instances that can be read together."""
    whole = Bucket(instances.sequence_length, 0, instances.num_instances)
    for bucket in getattr(instances, "buckets", (whole,)):
        step, end = max(1, BLOCK_TOKENS // bucket.length), bucket.first + bucket.num_instances
        for start in range(bucket.first, end, step):
            yield np.arange(start, min(start + step, end))


def _cut_answers(
    prepared: PreparedDataset, split: Split, instances: TokenRows, block: np.ndarray
) -> set[int]:
    """Documents of which a row of `block` holds a target, but not the beginning."""
    mask, index = prepared.target_mask(split), instances.index
    assert mask is not None
    starts, lengths, _ = instances.pieces(block)
    documents = np.searchsorted(index.starts, starts.astype(np.uint64), side="right") - 1
    goes_on = np.flatnonzero(index.starts[documents] < starts.astype(np.uint64))
    found = set()
    for start, length in zip(starts[goes_on].tolist(), lengths[goes_on].tolist(), strict=True):
        part = index.parts(start, length)[0]
        if mask[start : start + part.end - part.start].any():
            found.add(part.document)
    return found
