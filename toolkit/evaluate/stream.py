"""Text files as the stream of tokens that preparation would make of them, and a stream as rows.

Every token is scored once, with the left context there is. Windows of `sequence_length` tokens
begin every `stride` tokens. A window scores the tokens that the one before did not reach; those
before them are context. With a stride as long as the window nothing overlaps: rows whose first
token nothing predicts. The last window ends with the stream, however short it is.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from toolkit.data.config import FilesSourceConfig
from toolkit.data.instances.base import Rows
from toolkit.data.prepare.build.encoding import TextEncoder
from toolkit.data.prepare.build.parts import batches
from toolkit.data.prepare.text.reading import Counts, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import DataError


class Chunk(NamedTuple):
    ids: np.ndarray
    """Unsigned integers, `(num_tokens,)`."""
    is_start: np.ndarray
    """Which of them are the first of a document: bool, `(num_tokens,)`."""
    num_bytes: int
    """UTF-8 bytes of their text."""


class Window(NamedTuple):
    ids: np.ndarray
    """`(num_tokens,)`."""
    documents: np.ndarray
    """Number of each token's document, ascending, `(num_tokens,)`."""
    num_context: int
    """Tokens from the first that are not scored; 0: all are, but the first has no context."""


def read_documents(
    source: FilesSourceConfig, tokenizer: Tokenizer, *, prepend_bos: bool, append_eos: bool
) -> Iterator[Chunk]:
    """All documents of `source` in file order, in chunks of about a million characters, between the
    tokens that start and end documents, where asked for and where the tokenizer has them. Raises
    DataError: a file is missing, empty or cannot be read as the source says."""
    reading, encoder = Reading(source=source), TextEncoder(tokenizer)
    bos = [] if not prepend_bos or tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if not append_eos or tokenizer.eos_id is None else [tokenizer.eos_id]
    for shard in plan_source(source, 0.0).shards:
        for pieces in batches(read_shard(shard, reading, Counts())):
            parts: list[np.ndarray] = []
            starts, position = [], 0
            for piece, encoded in zip(pieces, encoder.encode(pieces), strict=True):
                around = [bos if piece.starts else [], encoded.ids, eos if piece.ends else []]
                ids = np.concatenate([np.asarray(part, dtype=np.uint32) for part in around])
                if piece.starts and len(ids):
                    starts.append(position)
                parts.append(ids)
                position += len(ids)
            is_start = np.zeros(position, dtype=bool)
            is_start[starts] = True
            num_bytes = sum(len(piece.text.encode()) for piece in pieces)
            yield Chunk(np.concatenate(parts), is_start, num_bytes)


def check_vocabulary(chunks: Iterator[Chunk], vocab_size: int, where: str) -> Iterator[Chunk]:
    """`chunks`; raises DataError for an id that is not below `vocab_size`, the model's: a model
    would fail without a word about the reason."""
    for chunk in chunks:
        largest = int(chunk.ids.max(initial=0))
        if largest >= vocab_size:
            raise DataError(
                f"{where}: its tokens go up to id {largest}, but the model knows ids below "
                f"{vocab_size}; give the tokenizer that the model was trained with (--tokenizer)"
            )
        yield chunk


def windows(chunks: Iterable[Chunk], *, sequence_length: int, stride: int) -> Iterator[Window]:
    """The windows of a stream; memory holds one chunk and one window. `stride` is from 1 to
    `sequence_length`."""
    ids, documents = np.zeros(0, np.int64), np.zeros(0, np.int64)
    num_documents = context = 0
    for chunk in chunks:
        numbers = num_documents + np.cumsum(chunk.is_start)
        num_documents = int(numbers[-1]) if len(numbers) else num_documents
        ids = np.concatenate([ids, chunk.ids])
        documents = np.concatenate([documents, numbers])
        begin = 0
        # Not the last window: more tokens follow it.
        while len(ids) - begin > sequence_length:
            end = begin + sequence_length
            yield Window(ids[begin:end], documents[begin:end], context)
            begin, context = begin + stride, sequence_length - stride
        ids, documents = ids[begin:], documents[begin:]
    if len(ids):
        yield Window(ids, documents, context)


def stack_windows(group: list[Window], *, mask_documents: bool) -> Rows:
    """Windows as the rows of one batch, filled up on the right, where causal attention makes that
    nobody's context. `mask_documents` keeps documents from seeing each other."""
    shape = (len(group), max(len(window.ids) for window in group))
    ids, is_target = np.zeros(shape, np.int64), np.zeros(shape, bool)
    documents = np.zeros(shape, np.int32)
    for row, window in enumerate(group):
        length = len(window.ids)
        ids[row, :length] = window.ids
        is_target[row, window.num_context : length] = True
        numbers = window.documents - window.documents[0]
        documents[row, :length] = numbers
        documents[row, length:] = numbers[-1] + 1
    rows: Rows = {"input_ids": ids, "label_mask": is_target}
    return {**rows, "document_ids": documents} if mask_documents else rows
