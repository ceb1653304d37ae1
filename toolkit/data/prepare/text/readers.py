"""From a shard to its documents, with every defect of the input named by file and place.

Each format has one reader: `plain.py`, `jsonl.py` (lines and lists), `tables.py` (parquet, Arrow),
`hub.py` and `token_files.py`. A reader gives the documents of a range, one at a time. What they
have in common stands here: a text of more than 8 MB becomes several documents, documents without
text are counted and left out, filters see whole documents, and long ones are cut into pieces for
the encoder. So a process holds one document, or one line or row of a file, in memory.
"""

import functools
from collections.abc import Iterator

from toolkit.data.prepare.text.cuts import (
    MAX_DOCUMENT_BYTES,
    PIECE_CHARACTERS,
    documents_in,
    pieces_of,
)
from toolkit.data.prepare.text.files import check_unchanged
from toolkit.data.prepare.text.filters import DocumentGate
from toolkit.data.prepare.text.reading import Counts, Piece, Reader, Reading
from toolkit.data.prepare.text.shards import Shard
from toolkit.errors import DataError


def read_shard(shard: Shard, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of a shard in order; DataError for input that cannot be used as the source's
    options say."""
    gate = DocumentGate(reading, counts)
    for part in shard:
        try:
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
            for piece in _reader(part.kind)(part, reading, counts):
                if piece.ids is None and piece.starts and piece.ends:
                    yield from _finish(piece, gate, counts)
                else:
                    yield piece
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{part.path}: cannot be read: {reason}") from None


def _finish(whole: Piece, gate: DocumentGate, counts: Counts) -> Iterator[Piece]:
    """What becomes of a text or a row that a reader gave as a whole."""
    is_short = 4 * len(whole.text) <= MAX_DOCUMENT_BYTES
    for document in [whole] if is_short else _cut_up(whole, counts):
        admitted = gate.admit(document)
        if admitted is None:
            continue
        text = admitted.text
        if len(text) <= PIECE_CHARACTERS:
            yield admitted
            continue
        for start, end in pieces_of(text):
            yield admitted._replace(text=text[start:end], starts=start == 0, ends=end == len(text))


def _cut_up(whole: Piece, counts: Counts) -> Iterator[Piece]:
    """The documents that a long one becomes."""
    data = whole.text.encode()
    if len(data) <= MAX_DOCUMENT_BYTES:
        yield whole
        return
    for start, end in documents_in(lambda place, size: data[place : place + size], 0, len(data)):
        counts.cut_documents += start > 0
        identity = f"{whole.identity}:{start}" if start else whole.identity
        yield whole._replace(identity=identity, text=data[start:end].decode())


@functools.cache
def _reader(kind: str) -> Reader:
    if kind == "text":
        from toolkit.data.prepare.text.plain import read_text

        return read_text
    if kind.startswith("json"):
        from toolkit.data.prepare.text import jsonl

        return jsonl.read_json_array if kind == "json_array" else jsonl.read_jsonl
    if kind in ("parquet", "arrow"):
        from toolkit.data.prepare.text import tables

        return tables.read_parquet if kind == "parquet" else tables.read_arrow
    if kind in ("tokens", "remote_tokens"):
        from toolkit.data.prepare.text.token_files import read_tokens

        return read_tokens
    from toolkit.data.prepare.text.hub import read_hub

    return read_hub
