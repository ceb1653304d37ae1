"""From a shard to its documents, with every defect of the input named by file and place.

Each format has its reader (`plain.py`, `jsonl.py`, `tables.py`, `hub.py`, `token_files.py`); what
they have in common stands here: documents without text are counted and left out, filters are
applied to whole documents, and long documents are cut into pieces for the encoder.
"""

import functools
from collections.abc import Iterator

import msgspec

from toolkit.data.prepare.text.columns import row_texts
from toolkit.data.prepare.text.cuts import last_cut
from toolkit.data.prepare.text.files import check_unchanged
from toolkit.data.prepare.text.filters import DocumentFilter
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.reading import PIECE_CHARACTERS, Counts, Reader, Reading
from toolkit.data.prepare.text.shards import Shard
from toolkit.errors import DataError


def read_shard(shard: Shard, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of a shard in order.

    Raises:
        DataError: for input that cannot be used as the source's options say.
    """
    rules = DocumentFilter(reading.filters)
    for part in shard:
        try:
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
            for piece in _reader(part.kind)(part, reading, counts):
                if piece.ids is None and piece.starts and piece.ends:
                    yield from _finish(piece, reading, rules, counts)
                else:
                    yield piece
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{part.path}: cannot be read: {reason}") from None


def _finish(
    piece: Piece, reading: Reading, rules: DocumentFilter, counts: Counts
) -> Iterator[Piece]:
    """A whole document: left out, or given on in pieces."""
    text = piece.text
    if piece.row is not None and (rules.is_active or not piece.num_bytes):
        text = "\n".join(row_texts(piece.row))
        piece = piece._replace(num_bytes=len(text.encode("utf-8", "replace")))
    if not text and piece.row is None:
        counts.skipped_documents += 1
        return
    if rules.is_active:
        reason = rules.reason(text)
        if reason is not None:
            counts.leave_out(reason)
            return
    if reading.with_digests:
        piece = _with_digest(piece)
    if piece.row is not None or len(text) <= PIECE_CHARACTERS:
        yield piece
        return
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        end = (last_cut(text, start, end) or end) if end < len(text) else len(text)
        yield piece._replace(text=text[start:end], starts=start == 0, ends=end == len(text))
        start = end


def _with_digest(piece: Piece) -> Piece:
    import xxhash

    if piece.row is not None:
        data = msgspec.json.encode(piece.row, order="deterministic", enc_hook=str)
        return piece._replace(digest=xxhash.xxh3_128_intdigest(data), num_bytes=len(data))
    digest, num_bytes = xxhash.xxh3_128(), 0
    for start in range(0, len(piece.text), PIECE_CHARACTERS):
        data = piece.text[start : start + PIECE_CHARACTERS].encode()
        digest.update(data)
        num_bytes += len(data)
    return piece._replace(digest=digest.intdigest(), num_bytes=num_bytes)


@functools.cache
def _reader(kind: str) -> Reader:
    if kind == "text":
        from toolkit.data.prepare.text.plain import read_text

        return read_text
    if kind.startswith("jsonl"):
        from toolkit.data.prepare.text.jsonl import read_jsonl

        return read_jsonl
    if kind == "json_array":
        from toolkit.data.prepare.text.json_array import read_json_array

        return read_json_array
    if kind in ("parquet", "arrow"):
        from toolkit.data.prepare.text import tables

        return tables.read_parquet if kind == "parquet" else tables.read_arrow
    if kind in ("tokens", "remote_tokens"):
        from toolkit.data.prepare.text.token_files import read_tokens

        return read_tokens
    from toolkit.data.prepare.text.hub import read_hub

    return read_hub
