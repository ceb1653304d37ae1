"""Text files as the stream of tokens that preparation would make of them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.build.encoding import TextEncoder
from toolkit.data.prepare.build.parts import batches
from toolkit.data.prepare.text.readers import read_shard
from toolkit.data.prepare.text.reading import Counts, Reading
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import DataError


class Chunk(NamedTuple):
    """Consecutive tokens of a stream."""

    ids: np.ndarray
    """Unsigned integers, `(num_tokens,)`."""
    is_start: np.ndarray
    """Which of them are the first of a document: bool, `(num_tokens,)`."""
    num_bytes: int
    """UTF-8 bytes of their text."""


def read_documents(
    source: FilesSourceConfig, tokenizer: Tokenizer, *, prepend_bos: bool, append_eos: bool
) -> Iterator[Chunk]:
    """All documents of `source` in file order, in chunks of about a million characters.

    Args:
        prepend_bos, append_eos: put the tokens that start and end documents around each, where the
            tokenizer has them.

    Raises:
        DataError: a file is missing, empty or cannot be read as the source says.
    """
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
    """`chunks`, each checked.

    Raises:
        DataError: an id is not below `vocab_size`, the model's; a model would fail without a word
            about the reason.
    """
    for chunk in chunks:
        largest = int(chunk.ids.max(initial=0))
        if largest >= vocab_size:
            raise DataError(
                f"{where}: its tokens go up to id {largest}, but the model knows ids below "
                f"{vocab_size}; give the tokenizer that the model was trained with (--tokenizer)"
            )
        yield chunk
