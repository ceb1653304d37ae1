"""Instances of whatever a config names, to be looked at: `find_instances`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from toolkit.data.config import DataConfig
from toolkit.data.instances.base import DocumentPart, InstanceDataset, Rows, target_mask
from toolkit.data.instances.custom import UNKNOWN_LENGTH, open_custom
from toolkit.data.instances.open import instances_config, open_instances
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.tokens.prepared import Split
from toolkit.data.tokens.units import UnitKind, side_name
from toolkit.errors import ConfigError, DataError


class DecodedPiece(msgspec.Struct, frozen=True):
    """Consecutive tokens of one document that are all targets, or none of them."""

    document: int | None
    """Its number in the split; None: padding."""
    is_target: bool
    num_tokens: int
    text: str
    side: str | msgspec.UnsetType = msgspec.UNSET
    """Of preference and binary data: which document of which unit it belongs to."""


class ShownInstance(NamedTuple):
    """One row as text."""

    instance: int
    """Its number in the split, from 0."""
    num_tokens: int
    """Length of the row, padding included."""
    num_targets: int
    """Tokens whose prediction the loss counts."""
    num_padding: int
    documents: list[DocumentPart]
    text: list[DecodedPiece]


class FoundInstances(NamedTuple):
    """Instances of one split, and what is to be told of them."""

    where: str
    """The folder of the token files, or the class of a custom data set."""
    kind: str
    """fixed, packed, padded, variable or custom."""
    instances: InstanceDataset

    @property
    def num_instances(self) -> int | None:
        """How many there are; None where a custom data set does not say."""
        count = self.instances.num_instances
        return count if count < UNKNOWN_LENGTH else None

    def decoded(self, start: int, number: int) -> Iterator[ShownInstance]:
        """Up to `number` instances from `start` on; ConfigError where there are none."""
        count = self.instances.num_instances
        if number < 1:
            raise ConfigError(f"-n {number}: give a number of instances, 1 or more")
        if not 0 <= start < count:
            raise ConfigError(
                f"--start {start}: {self.where} has instances 0 to {count - 1}"
                if count
                else f"{self.where}: has fewer tokens than one instance; set "
                "dataset.sequence_length to less"
            )
        folder = self.instances.tokenizer_folder
        tokenizer = load_tokenizer(folder) if folder is not None else None
        for instance in range(start, min(start + number, count)):
            rows = self.instances.read(np.array([instance]))
            ids, targets = rows["input_ids"][0], target_mask(rows)[0]
            parts = self.instances.documents(instance)
            yield ShownInstance(
                instance,
                num_tokens=len(ids),
                num_targets=int(targets.sum()),
                num_padding=len(ids) - sum(part.end - part.start for part in parts),
                documents=parts,
                text=decode_pieces(
                    tokenizer, ids, targets, parts, sides_of(self.instances, rows, parts)
                ),
            )


def find_instances(
    config: DataConfig,
    split: Split,
    *,
    source: str | None = None,
    work_dir: str | Path | None = None,
) -> FoundInstances:
    """The instances of one split, of one `source` of a mixture; token files that do not exist yet
    are prepared first.

    Raises:
        ConfigError: no such source.
        DataError: the data cannot be used, or has no such split.
    """
    custom = config.dataset.custom
    if custom is not None:
        found = open_custom(custom, split, config.dataset.sequence_length)
        if found is None:
            raise DataError(f"dataset.custom.target {custom.target}: has no {split} split")
        return FoundInstances(custom.target, "custom", found)
    if source is not None and config.dataset.mix is None:
        raise ConfigError(f"--source {source}: dataset.mix is null, there is one corpus; leave out")
    parts = prepare_corpus(config, work_dir=None if work_dir is None else str(work_dir)).parts
    if source not in parts and config.dataset.mix is not None:
        given = "is needed for a mixture" if source is None else f"{source}: no such source"
        raise ConfigError(f"--source {given}; there are {', '.join(parts)}")
    dataset, prepared = parts[source or ""]
    if not prepared.has_split(split):
        raise DataError(
            f"{prepared.folder}: has no {split} split; it has {', '.join(prepared.manifest.splits)}"
        )
    is_val = split == "val"
    kind = instances_config(dataset, evaluation=is_val).__struct_config__.tag
    instances = open_instances(prepared, split, dataset, evaluation=is_val)
    return FoundInstances(str(prepared.folder), str(kind), instances)


def sides_of(
    instances: InstanceDataset, rows: Rows, parts: Sequence[DocumentPart], row: int = 0
) -> dict[int, str]:
    """What each document of a row is, as "pair 7, chosen"; empty where documents form no units."""
    unit: UnitKind | None = getattr(instances, "unit", None)
    if unit is None:
        return {}
    found, position = {}, 0
    for part in parts:
        end = position + part.end - part.start
        target = int(rows["label_mask"][row, position:end].max())
        name = "pair" if unit == "pair" else "row"
        found[part.document] = f"{name} {part.document // 2:,}, {side_name(unit, target)}"
        position = end
    return found


def decode_pieces(
    tokenizer: Tokenizer | None,
    ids: np.ndarray,
    is_target: np.ndarray,
    parts: list[DocumentPart],
    sides: Mapping[int, str] | None = None,
) -> list[DecodedPiece]:
    """The text of one row, whose documents may be `sides` of units; without a tokenizer, its ids.
    `ids` and `is_target` (of `target_mask`) are `(seq,)`; tokens after `parts`, its documents, are
    padding. A character whose bytes lie on both sides of a cut shows as U+FFFD."""
    pieces, position = [], 0
    lengths = [(part.document, part.end - part.start) for part in parts]
    for document, length in [*lengths, (None, len(ids) - sum(n for _, n in lengths))]:
        if not length:
            continue
        stop = position + length
        changes = np.flatnonzero(np.diff(is_target[position:stop])) + 1
        bounds = [position, *(position + changes).tolist(), stop]
        for begin, end in itertools.pairwise(bounds):
            if tokenizer is None:
                text = " ".join(str(number) for number in ids[begin:end].tolist()) + " "
            else:
                text = tokenizer.decode(ids[begin:end])
            side = msgspec.UNSET if document is None else (sides or {}).get(document, msgspec.UNSET)
            pieces.append(DecodedPiece(document, bool(is_target[begin]), end - begin, text, side))
        position = stop
    return pieces
