"""What rows do to the targets of instruction data, counted and said.

A conversation longer than a row is cut. Its later rows may hold answers without the prompts before
them, and some rows hold no target at all: they cost time and teach nothing.
"""

import contextlib
import logging
from collections.abc import Iterator

import msgspec
import numpy as np

from toolkit.data.config import (
    FixedInstancesConfig,
    InstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.instances.base import InstanceDataset, target_mask
from toolkit.data.instances.index import DocumentIndex
from toolkit.data.instances.plans import Bucket, find_note, keep_note
from toolkit.data.tokens.prepared import PreparedDataset, Split
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


def check_row_targets(
    prepared: PreparedDataset, split: Split, instances: InstanceDataset, kind: InstancesConfig
) -> None:
    """Say in one line how many rows have no target and how many answers are cut off their prompts.
    DataError: no row of training has a target."""
    counts = _counts(prepared, split, instances, kind)
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
        key = str(prepared.folder.absolute()), line
        if key not in _said:
            _said.add(key)
            logger.warning("%s", line)


def _counts(
    prepared: PreparedDataset, split: Split, instances: InstanceDataset, kind: InstancesConfig
) -> TargetCounts:
    length = instances.sequence_length
    # The fingerprint of some kinds is that of the tokens alone.
    name = f"{split}-{length}-{instances.fingerprint}.targets"
    note = find_note(prepared, name)
    if note is not None:
        with contextlib.suppress(DataError):  # it is counted and written again
            return decode_json(note, name, DataError, TargetCounts)
    without = sum(
        int(np.count_nonzero(~target_mask(instances.read(block)).any(axis=1)))
        for block in _blocks(instances)
    )
    counts = TargetCounts(
        num_rows=instances.num_instances,
        rows_without_targets=without,
        num_documents=prepared.num_documents(split),
        cut_answers=_cut_answers(prepared, split, length, kind),
    )
    keep_note(prepared, name, msgspec.json.encode(counts))
    return counts


def _blocks(instances: InstanceDataset) -> Iterator[np.ndarray]:
    """Numbers of instances that can be read together."""
    whole = Bucket(instances.sequence_length, 0, instances.num_instances)
    for bucket in getattr(instances, "buckets", (whole,)):
        step, end = max(1, BLOCK_TOKENS // bucket.length), bucket.first + bucket.num_instances
        for start in range(bucket.first, end, step):
            yield np.arange(start, min(start + step, end))


def _cut_answers(prepared: PreparedDataset, split: Split, length: int, kind: object) -> int:
    """Documents with a target behind the first row that holds them."""
    mask = prepared.target_mask(split)
    assert mask is not None
    total = 0
    for starts, lengths in DocumentIndex(prepared, split).blocks():
        if isinstance(kind, FixedInstancesConfig):
            first = length - starts % length
        elif isinstance(kind, VariableInstancesConfig):
            first = np.minimum(length, 1 << np.log2(np.maximum(lengths, 1)).astype(np.int64))
        else:
            first = np.full_like(lengths, length)
        cut = np.flatnonzero(lengths > first)
        ends = (starts + lengths)[cut].tolist()
        for begin, end in zip((starts + first)[cut].tolist(), ends, strict=True):
            total += bool(mask[begin:end].any())
    return total
