"""Parts: what one shard of the source becomes, a folder of token files of its own.

    000012/part.json           `Part`
    000012/train.bin, ...      as in a data set (`split_files.py`)
    000012/documents           one `DOCUMENT` each, where duplicates are looked for

The folder gets its name when all is written. It is not synced: a part that a power cut has harmed
is known by the hashes in its part.json, and made again.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from toolkit.data.config import DatasetConfig, TokenFilesSourceConfig
from toolkit.data.prepare.build.encoding import Encoded, Encoder, TextEncoder, TokenEncoder
from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.build.split_files import HashedFile, SplitWriter
from toolkit.data.prepare.build.unit_encoding import UnitEncoder
from toolkit.data.prepare.text.instructions.preference import shown
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, read_shard
from toolkit.data.prepare.text.sources import Shard
from toolkit.data.prepare.tokenizers.bulk import bulk_encoder
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.tokens.prepared import (
    SPLITS,
    TOKENIZER_FOLDER,
    Split,
    SplitInfo,
    TokenDType,
    token_dtype,
    token_files,
)
from toolkit.errors import DataError
from toolkit.storage.atomic import hash_file, remove_tree, write_json_atomic
from toolkit.storage.foreign import read_json

DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("num_bytes", "<u8"), ("is_val", "u1")])
"""A document of a part: hash and bytes of its text, and where it went; in the shard's order."""
DOCUMENTS_NAME = "documents"
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 2048

_PART_NAME = "part.json"


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Content of part.json."""

    key: str
    """Identifies the shard: places and content of its files."""
    splits: dict[str, SplitInfo]
    documents_hash: str | None = None
    replaced_bytes: int
    skipped_documents: int
    cut_documents: int = 0
    filtered_documents: dict[str, int] = {}
    left_out_rows: dict[str, str] = {}
    """Of preference and binary data: the first row left out for each reason, as messages show it.
    """
    has_context: bool = True
    """Whether some token of a row is not asked for by the loss; the tokens that start and end
    documents do not count."""


class Job(msgspec.Struct, frozen=True):
    """A shard and its place in the order of shards."""

    index: int
    shard: Shard
    key: str
    """See `Part.key`."""

    @property
    def num_bytes(self) -> int:
        """Rough size of what is read."""
        return sum(part.num_bytes for part in self.shard)


class Vocabulary(NamedTuple):
    """What is known about the ids of a data set."""

    size: int
    eos_id: int | None
    bos_id: int | None
    fingerprint: str


class PartsSetup(NamedTuple):
    """What all parts of one preparation have in common."""

    folder: str
    config: DatasetConfig
    vocabulary: Vocabulary
    cache_dir: str | None
    """See `Reading`."""
    in_bulk: bool = True
    """Whether a faster library encodes where one is known to give the same ids."""

    @property
    def reading(self) -> Reading:
        return reading_of(self.config, self.cache_dir, self.vocabulary)

    @property
    def dtype(self) -> TokenDType:
        return token_dtype(self.vocabulary.size)

    @property
    def tokenizer_folder(self) -> Path | None:
        """None: the source holds tokens, and nothing is known of their tokenizer."""
        return None if self.config.tokenizer is None else Path(self.folder) / TOKENIZER_FOLDER

    @property
    def has_mask(self) -> bool:
        """Whether the loss leaves out tokens."""
        return self.config.instructions is not None


def reading_of(
    config: DatasetConfig, cache_dir: str | None, vocabulary: Vocabulary | None = None
) -> Reading:
    """How the documents of `config` are read; token files need to know their vocabulary."""
    assert config.source is not None
    return Reading(
        source=config.source,
        rows=config.instructions is not None,
        cache_dir=cache_dir,
        filters=config.filters,
        with_digests=config.deduplicate,
        vocab_size=0 if vocabulary is None else vocabulary.size,
        eos_id=None if vocabulary is None else vocabulary.eos_id,
    )


def part_folder(parts_folder: str | Path, index: int) -> Path:
    """Where part `index` is."""
    return Path(parts_folder) / f"{index:06d}"


def complete_part(job: Job, setup: PartsSetup) -> Part | None:
    """The part, if it is there, was made for the same shard, and is whole."""
    folder = part_folder(setup.folder, job.index)
    with contextlib.suppress(FileNotFoundError, DataError):
        part = read_json(folder / _PART_NAME, DataError, Part)
        wanted = {name: f.xxh3 for name, f in token_files(setup.dtype, part.splits).items()}
        if part.documents_hash is not None:
            wanted[DOCUMENTS_NAME] = part.documents_hash
        if part.key == job.key and all(
            hash_file(folder / name, bits=128) == xxh3 for name, xxh3 in wanted.items()
        ):
            return part
    return None


def is_validation(identity: str, fraction: float) -> bool:
    """Whether a document is held out: its hash, as a number in [0, 1), is below `fraction`."""
    # A seed of its own: the hash must tell nothing about any order of the same names.
    position = xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogateescape"), seed=1)
    return position < fraction * 2**64


def split_of(piece: Piece, validation_fraction: float) -> Split:
    """Where a document goes."""
    if piece.split is None:
        return "val" if is_validation(piece.identity, validation_fraction) else "train"
    return "val" if piece.split == "val" else "train"


def make_encoder(setup: PartsSetup, tokenizer: Tokenizer | None) -> Encoder:
    """The encoder for the kind of documents that the source gives."""
    config, vocabulary = setup.config, setup.vocabulary
    if isinstance(config.source, TokenFilesSourceConfig):
        return TokenEncoder(
            bos_id=vocabulary.bos_id if config.prepend_bos else None,
            eos_id=vocabulary.eos_id if config.append_eos else None,
        )
    assert tokenizer is not None
    if config.instructions is not None:
        kind = InstructionEncoder if config.unit is None else UnitEncoder
        return kind(tokenizer, config.instructions, append_eos=config.append_eos)
    return TextEncoder(tokenizer, bulk_encoder(tokenizer) if setup.in_bulk else None)


def encode_shard(job: Job, setup: PartsSetup, encoder: Encoder, *, threads: int = 1) -> Part:
    """Make the part of one shard; `threads` encode at the same time. DataError: input that cannot
    be read or encoded."""
    counts, reading = Counts(), setup.reading
    folder = part_folder(setup.folder, job.index)
    # A worker of a killed job may still be writing the same part.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        writers = {
            split: SplitWriter(unfinished, split, setup.dtype, has_mask=setup.has_mask)
            for split in SPLITS
        }
        documents = HashedFile(unfinished / DOCUMENTS_NAME) if reading.with_digests else None
        has_context, left_out_rows = False, dict[str, str]()
        for batch in batches(read_shard(job.shard, reading, counts), threads):
            taken: dict[Split, list[tuple[Piece, Encoded]]] = {split: [] for split in SPLITS}
            records = []
            for piece, encoded in zip(batch, encoder.encode(batch), strict=True):
                if encoded.left_out is not None:
                    counts.leave_out(encoded.left_out)
                    if setup.config.unit is not None and piece.row is not None:
                        row = f"{piece.place or piece.identity}: {shown(piece.row)}"
                        left_out_rows.setdefault(encoded.left_out, row)
                    continue
                split = split_of(piece, setup.config.validation_fraction)
                taken[split].append((piece, encoded))
                has_context |= any(
                    one.is_target is not None and not one.is_target.all()
                    for one in _documents(encoded)
                )
                if piece.starts:
                    digest = divmod(piece.digest, 1 << 64)
                    num_bytes = piece.num_bytes if piece.row is None else 0
                    records.append((*digest, num_bytes, split == "val"))
            for split, encoded_pieces in taken.items():
                if encoded_pieces:
                    _append(writers[split], encoded_pieces, setup)
            if documents is not None:
                documents.write(np.array(records, dtype=DOCUMENT))
        part = Part(
            key=job.key,
            splits={**writers["train"].finish(), **writers["val"].finish()},
            documents_hash=documents.content_hash if documents is not None else None,
            replaced_bytes=counts.replaced_bytes,
            skipped_documents=counts.skipped_documents,
            cut_documents=counts.cut_documents,
            filtered_documents=counts.filtered_documents,
            left_out_rows=left_out_rows,
            has_context=bool(has_context),
        )
        write_json_atomic(unfinished / _PART_NAME, part, sync=False)
        if folder.exists():
            remove_tree(folder)
        os.rename(unfinished, folder)
        return part
    except BaseException:
        remove_tree(unfinished)
        raise


def _append(
    writer: SplitWriter, pieces: Sequence[tuple[Piece, Encoded]], setup: PartsSetup
) -> None:
    """Write pieces of documents, with the tokens that start and end documents around them."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray | int] = []
    starts, position = [], 0
    config, vocabulary = setup.config, setup.vocabulary
    bos = np.array([vocabulary.bos_id] if config.prepend_bos else [], np.uint32)
    eos = np.array([vocabulary.eos_id] if config.append_eos else [], np.uint32)
    for piece, whole in pieces:
        for encoded in _documents(whole):
            first, target = len(ids), encoded.target
            if piece.starts:
                starts.append(position)
                if not encoded.starts_with_bos:
                    ids.append(bos)
                    masks.append(target * (encoded.is_target is None))
            ids.append(encoded.ids)
            masks.append(target if encoded.is_target is None else target * encoded.is_target)
            if piece.ends and not encoded.ends_with_eos:
                ids.append(eos)
                masks.append(target * encoded.eos_is_target)
            position += sum(map(len, ids[first:]))
        text = piece.text
        writer.text_bytes += len(text) if text.isascii() else len(text.encode())
    all_ids = np.concatenate(ids)
    largest = int(all_ids.max(initial=0))
    if largest >= vocabulary.size:
        raise DataError(
            f"dataset.tokenizer: gave id {largest}, but has a vocabulary of {vocabulary.size}"
        )
    targets = None
    if writer.has_mask:
        targets = np.concatenate(
            [np.broadcast_to(mask, len(some)) for some, mask in zip(ids, masks, strict=True)]
        ).astype(np.uint8)
    writer.append(all_ids, np.array(starts, dtype=np.int64), targets)


def _documents(encoded: Encoded) -> list[Encoded]:
    """What a piece became: one document, or the two of a unit."""
    return [encoded] if encoded.second is None else [encoded, encoded.second]


def batches(pieces: Iterator[Piece], threads: int = 1) -> Iterator[list[Piece]]:
    """Lists of pieces that are worth encoding together, by so many threads."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) if piece.ids is None else len(piece.ids)
        size += piece.num_bytes if piece.row is not None else 0
        if size >= BATCH_CHARACTERS * threads or len(batch) >= BATCH_DOCUMENTS * threads:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
