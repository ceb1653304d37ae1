"""The work of one process of `prepare`: a shard of the source becomes a part of the token files.

Workers are processes of their own (`python -m toolkit.data.prepare.build.worker`) that read a JSON
message a line and answer with one. Unlike multiprocessing's, they never import the caller's main
module: preparing works from any script, with or without a `__main__` guard, and costs no import of
torch.
"""

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np
import xxhash

from toolkit import signals
from toolkit.data.config import InstructionsConfig, TokenFilesSourceConfig
from toolkit.data.prepare.build.encoding import Encoder, TextEncoder, TokenEncoder
from toolkit.data.prepare.build.parts import (
    DOCUMENT,
    Part,
    PartFile,
    SplitWriter,
    TokenRules,
    part_path,
)
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.readers import read_shard
from toolkit.data.prepare.text.reading import Counts, Reading
from toolkit.data.prepare.text.shards import Shard
from toolkit.data.tokens.prepared import SPLITS, Split
from toolkit.errors import DataError, ToolkitError
from toolkit.storage.atomic import write_json_atomic
from toolkit.threads import Thread

if TYPE_CHECKING:
    from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 2048


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What every shard of one preparation has in common."""

    reading: Reading
    instructions: InstructionsConfig | None = None
    rules: TokenRules
    tokenizer_folder: str | None
    """None: the source holds tokens, and nothing is known of their tokenizer."""
    parts_folder: str
    validation_fraction: float


class Job(msgspec.Struct, frozen=True):
    """A shard and its place in the order of shards."""

    index: int
    shard: Shard
    key: str = ""
    """See `Part.key`."""


class Reply(msgspec.Struct, kw_only=True):
    """Answer of a worker process to one job."""

    index: int = -1
    error: str | None = None
    kind: str | None = None
    """Name of its class in `toolkit.errors`; None: a failure of the program."""


def is_validation(identity: str, fraction: float) -> bool:
    """Whether a document is held out: its hash, as a number in [0, 1), is below `fraction`."""
    # A seed of its own: the hash must tell nothing about any order of the same names.
    position = xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogateescape"), seed=1)
    return position < fraction * 2**64


def make_encoder(setup: WorkerSetup, tokenizer: "Tokenizer | None") -> Encoder:
    """The encoder for the kind of pieces that the source gives."""
    if isinstance(setup.reading.source, TokenFilesSourceConfig):
        rules = setup.rules
        return TokenEncoder(bos_id=rules.bos_id, eos_id=rules.eos_id)
    assert tokenizer is not None
    if setup.instructions is not None:
        from toolkit.data.prepare.build.instructions import InstructionEncoder

        append_eos = setup.rules.eos_id is not None
        return InstructionEncoder(tokenizer, setup.instructions, append_eos=append_eos)
    return TextEncoder(tokenizer)


def encode_shard(job: Job, setup: WorkerSetup, encoder: Encoder) -> Part:
    """Write the part of one shard.

    Raises:
        DataError: for input that cannot be read or encoded, or ids outside the vocabulary.
    """
    counts = Counts()
    folder = setup.parts_folder
    writers: dict[Split, SplitWriter] = {}
    documents: PartFile | None = None
    part = Part(key=job.key, splits={}, replaced_bytes=0, skipped_documents=0)
    try:
        for split in SPLITS:
            writers[split] = SplitWriter(folder, job.index, split, setup.rules)
        if setup.reading.with_digests:
            documents = PartFile(part_path(folder, job.index, "docs"))
        for batch in batch_pieces(read_shard(job.shard, setup.reading, counts)):
            splits = [_split_of(piece, setup.validation_fraction) for piece in batch]
            taken = []
            for piece, split, encoded in zip(batch, splits, encoder.encode(batch), strict=True):
                if encoded.left_out is not None:
                    counts.leave_out(encoded.left_out)
                    continue
                writers[split].add(piece, encoded)
                taken.append((piece, split))
            for writer in writers.values():
                writer.flush()
            if documents is not None:
                documents.write(_document_records(taken))
    except BaseException:
        for writer in writers.values():
            writer.close(keep=False)
        if documents is not None:
            documents.finish(keep=False)
        raise
    for split, writer in writers.items():
        writer.close(keep=True)
        part.splits[split] = writer.stats
    if documents is not None:
        part.documents_hash = documents.finish(keep=True)
    part.replaced_bytes = counts.replaced_bytes
    part.skipped_documents = counts.skipped_documents
    part.cut_documents = counts.cut_documents
    part.filtered_documents = counts.filtered_documents
    # Not synced: the hashes tell a part that a power cut has harmed.
    write_json_atomic(part_path(folder, job.index, "json"), part, sync=False)
    return part


def _split_of(piece: Piece, validation_fraction: float) -> Split:
    if piece.split is not None:
        return "val" if piece.split == "val" else "train"
    return "val" if is_validation(piece.identity, validation_fraction) else "train"


def _document_records(pieces: list[tuple[Piece, Split]]) -> bytes:
    records = [
        (
            piece.digest >> 64,
            piece.digest & 0xFFFF_FFFF_FFFF_FFFF,
            piece.num_bytes if piece.row is None else 0,
            split == "val",
        )
        for piece, split in pieces
        if piece.starts
    ]
    return np.array(records, dtype=DOCUMENT).tobytes()


def batch_pieces(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
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


def _whole_lines(pipe: IO[bytes]) -> Iterator[bytes]:
    """The lines of `pipe`; what a writer that was stopped left unfinished is none."""
    for line in pipe:
        if line.endswith(b"\n"):
            yield line


def main() -> None:
    """Answer jobs from standard input until it closes."""
    signals.ignore_in_worker()
    from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer

    messages = _whole_lines(sys.stdin.buffer)
    first = next(messages, None)
    if first is None:
        return  # the other side was stopped before it had said what to do
    setup = msgspec.json.decode(first, type=WorkerSetup)
    folder = setup.tokenizer_folder
    encoder = make_encoder(setup, load_tokenizer(folder) if folder is not None else None)
    jobs: list[Job | None] = []
    arrived = threading.Semaphore(0)

    def listen() -> None:
        for line in messages:
            jobs.append(msgspec.json.decode(line, type=Job))
            arrived.release()
        # The other side is done, or dead: what this process is doing is of no use any more.
        os._exit(0)

    Thread(target=listen, daemon=True).start()
    while True:
        arrived.acquire()
        job: Any = jobs.pop(0)
        try:
            encode_shard(job, setup, encoder)
            reply = Reply(index=job.index)
        except ToolkitError as error:
            reply = Reply(index=job.index, error=str(error), kind=type(error).__name__)
        except OSError as error:
            where = error.filename or setup.parts_folder
            message = f"{where}: cannot be written: {error.strerror}; run again to continue"
            reply = Reply(index=job.index, error=message, kind=DataError.__name__)
        except Exception:
            reply = Reply(index=job.index, error=traceback.format_exc())
        try:
            sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(0)  # as above


if __name__ == "__main__":
    main()
