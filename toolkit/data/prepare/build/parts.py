"""Parts: what one shard of the source becomes, a folder of token files of its own.

    000012/part.json           `Part`
    000012/train.bin, ...      as in a data set (`split_files.py`)
    000012/documents           one `DOCUMENT` each, where duplicates are looked for

The folder gets its name when all is written. It is not synced: a part that a power cut has harmed
is known by the hashes in its part.json, and made again.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from toolkit.data.config import InstructionsConfig, TokenFilesSourceConfig
from toolkit.data.prepare.build.encoding import Encoded, Encoder, TextEncoder, TokenEncoder
from toolkit.data.prepare.build.instructions import InstructionEncoder
from toolkit.data.prepare.build.split_files import HashedFile, SplitWriter, finish_all
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, read_shard
from toolkit.data.prepare.text.sources import Shard
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.tokens.prepared import SPLITS, Split, SplitInfo, TokenDType, token_files
from toolkit.errors import DataError
from toolkit.storage.atomic import hash_file, remove_tree, write_json_atomic
from toolkit.storage.foreign import read_json

DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("num_bytes", "<u8"), ("is_val", "u1")])
"""A document of a part: hash and bytes of its text, and where it went; in the shard's order."""
DOCUMENTS_NAME = "documents"
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 2048

_PART_NAME = "part.json"
_UNFINISHED = re.compile(r"\d+\.\d+|\.\d+\..+\.tmp")
"""Parts while they are written, and while they are removed."""


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


class PartsSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What all parts of one preparation have in common."""

    folder: str
    reading: Reading
    instructions: InstructionsConfig | None
    tokenizer_folder: str | None
    """None: the source holds tokens, and nothing is known of their tokenizer."""
    validation_fraction: float
    dtype: TokenDType
    vocab_size: int
    bos_id: int | None
    """Put before each document; None: nothing is."""
    eos_id: int | None
    """Put after each document; None: nothing is."""

    @property
    def has_mask(self) -> bool:
        """Whether the loss leaves out tokens."""
        return self.instructions is not None


def part_folder(parts_folder: str | Path, index: int) -> Path:
    """Where part `index` is."""
    return Path(parts_folder) / f"{index:06d}"


def read_part(parts_folder: str | Path, index: int) -> Part | None:
    """The description of a part; None when there is no readable one."""
    try:
        return read_json(part_folder(parts_folder, index) / _PART_NAME, DataError, Part)
    except (FileNotFoundError, DataError):
        return None


def is_complete(job: Job, setup: PartsSetup) -> bool:
    """Whether the part is there, was made for the same shard, and is whole."""
    part = read_part(setup.folder, job.index)
    if part is None or part.key != job.key:
        return False
    files = token_files(setup.dtype, part.splits)
    wanted = {name: file.xxh3 for name, file in files.items()}
    if part.documents_hash is not None:
        wanted[DOCUMENTS_NAME] = part.documents_hash
    folder = part_folder(setup.folder, job.index)
    try:
        return all(hash_file(folder / name, bits=128) == xxh3 for name, xxh3 in wanted.items())
    except FileNotFoundError:
        return False


def remove_unfinished_parts(parts_folder: Path) -> None:
    """Remove what killed processes were writing."""
    for path in parts_folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def is_validation(identity: str, fraction: float) -> bool:
    """Whether a document is held out: its hash, as a number in [0, 1), is below `fraction`."""
    # A seed of its own: the hash must tell nothing about any order of the same names.
    position = xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogateescape"), seed=1)
    return position < fraction * 2**64


def split_of(piece: Piece, validation_fraction: float) -> Split:
    """Where a document goes."""
    is_val = piece.split == "val" if piece.split is not None else None
    if is_val is None:
        is_val = is_validation(piece.identity, validation_fraction)
    return "val" if is_val else "train"


def make_encoder(setup: PartsSetup, tokenizer: Tokenizer | None) -> Encoder:
    """The encoder for the kind of documents that the source gives."""
    if isinstance(setup.reading.source, TokenFilesSourceConfig):
        return TokenEncoder(bos_id=setup.bos_id, eos_id=setup.eos_id)
    assert tokenizer is not None
    if setup.instructions is not None:
        append_eos = setup.eos_id is not None
        return InstructionEncoder(tokenizer, setup.instructions, append_eos=append_eos)
    return TextEncoder(tokenizer)


def encode_shard(job: Job, setup: PartsSetup, encoder: Encoder) -> None:
    """Make the part of one shard. DataError: input that cannot be read or encoded."""
    counts = Counts()
    folder = part_folder(setup.folder, job.index)
    # A worker of a killed job may still be writing the same part.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    writers: dict[Split, SplitWriter] = {
        split: SplitWriter(unfinished, split, setup.dtype, has_mask=setup.has_mask)
        for split in SPLITS
    }
    documents = HashedFile(unfinished / DOCUMENTS_NAME) if setup.reading.with_digests else None
    try:
        for batch in batches(read_shard(job.shard, setup.reading, counts)):
            taken: dict[Split, list[tuple[Piece, Encoded]]] = {split: [] for split in SPLITS}
            records = []
            for piece, encoded in zip(batch, encoder.encode(batch), strict=True):
                if encoded.left_out is not None:
                    counts.leave_out(encoded.left_out)
                    continue
                split = split_of(piece, setup.validation_fraction)
                taken[split].append((piece, encoded))
                if piece.starts:
                    digest = divmod(piece.digest, 1 << 64)
                    num_bytes = piece.num_bytes if piece.row is None else 0
                    records.append((*digest, num_bytes, split == "val"))
            for split, encoded_pieces in taken.items():
                if encoded_pieces:
                    _append(writers[split], encoded_pieces, setup)
            if documents is not None:
                documents.write(np.array(records, dtype=DOCUMENT))
        splits = finish_all(list(writers.values()))
        part = Part(
            key=job.key,
            splits=splits,
            documents_hash=documents.close() if documents is not None else None,
            replaced_bytes=counts.replaced_bytes,
            skipped_documents=counts.skipped_documents,
            cut_documents=counts.cut_documents,
            filtered_documents=counts.filtered_documents,
        )
        write_json_atomic(unfinished / _PART_NAME, part, sync=False)
        if folder.exists():
            remove_tree(folder)
        os.rename(unfinished, folder)
    except BaseException:
        for writer in writers.values():
            writer.close()
        remove_tree(unfinished)
        raise


def _append(
    writer: SplitWriter, pieces: Sequence[tuple[Piece, Encoded]], setup: PartsSetup
) -> None:
    """Write pieces of documents, with the tokens that start and end documents around them."""
    ids: list[np.ndarray] = []
    masks: list[np.ndarray | bool] = []
    starts, position = [], 0
    for piece, encoded in pieces:
        around: list[tuple[np.ndarray, np.ndarray | bool]] = [
            (encoded.ids, True if encoded.is_target is None else encoded.is_target)
        ]
        if piece.starts:
            starts.append(position)
            if setup.bos_id is not None and not encoded.starts_with_bos:
                around.insert(0, (np.array([setup.bos_id], np.uint32), encoded.is_target is None))
        if piece.ends and setup.eos_id is not None and not encoded.ends_with_eos:
            around.append((np.array([setup.eos_id], np.uint32), encoded.eos_is_target))
        for some, is_target in around:
            ids.append(some)
            masks.append(is_target)
            position += len(some)
        text = piece.text
        writer.text_bytes += len(text) if text.isascii() else len(text.encode())
    all_ids = np.concatenate(ids)
    largest = int(all_ids.max(initial=0))
    if largest >= setup.vocab_size:
        raise DataError(
            f"dataset.tokenizer: gave id {largest}, but has a vocabulary of {setup.vocab_size}"
        )
    targets = None
    if writer.has_mask:
        targets = np.concatenate(
            [np.broadcast_to(mask, len(some)) for some, mask in zip(ids, masks, strict=True)]
        ).astype(np.uint8)
    writer.append(all_ids, np.array(starts, dtype=np.int64), targets)


def batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Lists of pieces that are worth encoding together."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) if piece.ids is None else len(piece.ids)
        size += piece.num_bytes if piece.row is not None else 0
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
