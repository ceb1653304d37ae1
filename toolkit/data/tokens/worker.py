"""The work of one process of `prepare`: a shard of text becomes a part of the token files.

A part is complete when its .json file exists and the hashes in it agree with its other files, so a
part that a crash left half-written is recognised and made again.

Workers are processes of their own (`python -m toolkit.data.tokens.worker`) that read one JSON
message a line and answer with one. Unlike multiprocessing's, they never import the caller's main
module: preparing works from any script, with or without a `__main__` guard, and costs no import of
torch.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import numpy as np
import xxhash

from toolkit.data.config import SourceConfig
from toolkit.data.text.piece import Piece
from toolkit.data.text.readers import Counts, read_shard
from toolkit.data.text.sources import Shard
from toolkit.data.tokens.prepared import token_dtype
from toolkit.errors import DataError
from toolkit.storage.atomic import write_json_atomic

if TYPE_CHECKING:
    from toolkit.data.tokens.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 2048
SPLITS = ("train", "val")


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What every shard of one preparation has in common."""

    source: SourceConfig
    tokenizer_folder: str
    parts_folder: str
    validation_fraction: float
    append_eos: bool


class Job(msgspec.Struct, frozen=True):
    """A shard and its place in the order of shards."""

    index: int
    shard: Shard


class PartSplit(msgspec.Struct, kw_only=True):
    """What a part adds to one split."""

    num_tokens: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    tokens_hash: str = ""
    starts_hash: str = ""


class Part(msgspec.Struct, kw_only=True):
    """Content of a part's .json file."""

    splits: dict[str, PartSplit]
    replaced_bytes: int
    skipped_documents: int


class Reply(msgspec.Struct, kw_only=True):
    """Answer of a worker process to one job."""

    index: int = -1
    error: str | None = None
    is_bad_input: bool = False


def part_path(folder: str | os.PathLike[str], index: int, ending: str) -> Path:
    """`000012.train.bin` and its like."""
    return Path(folder) / f"{index:06d}.{ending}"


def is_validation(identity: str, fraction: float) -> bool:
    """Whether a document is held out: its hash, as a number in [0, 1), is below `fraction`."""
    # A seed of its own: the hash must tell nothing about any order of the same names.
    position = xxhash.xxh3_64_intdigest(identity.encode("utf-8", "surrogateescape"), seed=1)
    return position < fraction * 2**64


def encode_shard(job: Job, setup: WorkerSetup, tokenizer: "Tokenizer") -> Part:
    """Write the part of one shard.

    Raises:
        DataError: for text that cannot be read, or a tokenizer that gives ids it does not have.
    """
    counts = Counts()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(_SplitWriter(setup, job.index, split, tokenizer))
            for split in SPLITS
        }
        for batch in _batches(read_shard(job.shard, setup.source, counts)):
            ids = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, piece_ids in zip(batch, ids, strict=True):
                split = piece.split
                if split is None:
                    held_out = is_validation(piece.identity, setup.validation_fraction)
                    split = "val" if held_out else "train"
                writers[split].add(piece, piece_ids)
            for writer in writers.values():
                writer.flush()
    part = Part(
        splits={split: writer.finish() for split, writer in writers.items()},
        replaced_bytes=counts.replaced_bytes,
        skipped_documents=counts.skipped_documents,
    )
    # Not synced: the hashes tell a part that a power cut has harmed.
    write_json_atomic(part_path(setup.parts_folder, job.index, "json"), part, sync=False)
    return part


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the two files of one split of a part."""

    def __init__(self, setup: WorkerSetup, index: int, split: str, tokenizer: "Tokenizer") -> None:
        self._paths = [part_path(setup.parts_folder, index, f"{split}.{x}") for x in ("bin", "idx")]
        self._hashers = [xxhash.xxh3_64(), xxhash.xxh3_64()]
        self._vocab_size = tokenizer.vocab_size
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        eos = np.array([tokenizer.eos_id or 0], dtype=self._dtype)
        self._eos = eos if setup.append_eos else None
        self._pending: list[np.ndarray] = []
        self._starts: list[int] = []
        self._stats = PartSplit()

    def __enter__(self) -> "_SplitWriter":
        # Another name while unfinished: a worker of a killed job may still be at the same part.
        self._temporary = [path.with_name(f"{path.name}.{os.getpid()}") for path in self._paths]
        self._files: list[BinaryIO] = [path.open("wb") for path in self._temporary]
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        for file, temporary, path in zip(self._files, self._temporary, self._paths, strict=True):
            file.close()
            if error_type is None:
                os.replace(temporary, path)
            else:
                temporary.unlink(missing_ok=True)

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        if piece.starts:
            self._starts.append(self._stats.num_tokens)
            self._stats.num_documents += 1
        text = piece.text
        self._stats.text_bytes += len(text) if text.isascii() else len(text.encode())
        self._pending.append(ids)
        self._stats.num_tokens += len(ids)
        if piece.ends and self._eos is not None:
            self._pending.append(self._eos)
            self._stats.num_tokens += 1

    def flush(self) -> None:
        if not self._pending:
            return
        ids = np.concatenate(self._pending)
        largest = int(ids.max(initial=0))
        if largest >= self._vocab_size:
            raise DataError(
                f"dataset.tokenizer: gave id {largest}, but has a vocabulary of {self._vocab_size}"
            )
        arrays = [ids.astype(self._dtype, copy=False), np.array(self._starts, dtype=np.uint64)]
        for array, file, hasher in zip(arrays, self._files, self._hashers, strict=True):
            data = array.tobytes()
            hasher.update(data)
            file.write(data)
        self._pending, self._starts = [], []

    def finish(self) -> PartSplit:
        self._stats.tokens_hash, self._stats.starts_hash = (h.hexdigest() for h in self._hashers)
        return self._stats


def main() -> None:
    """Answer jobs from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from toolkit.data.tokens.tokenizer import load_tokenizer

    messages = sys.stdin.buffer
    setup = msgspec.json.decode(messages.readline(), type=WorkerSetup)
    tokenizer = load_tokenizer(setup.tokenizer_folder)
    jobs: list[Job | None] = []
    arrived = threading.Semaphore(0)

    def listen() -> None:
        for line in messages:
            jobs.append(msgspec.json.decode(line, type=Job))
            arrived.release()
        # The other side is done, or dead: what this process is doing is of no use any more.
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        arrived.acquire()
        job: Any = jobs.pop(0)
        try:
            encode_shard(job, setup, tokenizer)
            reply = Reply(index=job.index)
        except DataError as error:
            reply = Reply(index=job.index, error=str(error), is_bad_input=True)
        except OSError as error:
            where = error.filename or setup.parts_folder
            message = f"{where}: cannot be written: {error.strerror}; run again to continue"
            reply = Reply(index=job.index, error=message, is_bad_input=True)
        except Exception:
            reply = Reply(index=job.index, error=traceback.format_exc())
        sys.stdout.buffer.write(msgspec.json.encode(reply) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
