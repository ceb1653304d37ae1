"""From a shard to its documents, with every defect of the input named by file and place.

Each format has one reader: `plain.py`, `jsonl.py` (lines and lists), `tables.py` (parquet, Arrow,
saved data sets), `hub.py` and `token_files.py`. A reader gives the documents of a range, one at a
time. What they have in common stands here: a text of more than 8 MB becomes several documents,
documents without text are counted and left out, filters see whole documents, and long ones are cut
into pieces for the encoder. So a process holds one document, or one line or row of a file, in
memory.
"""

from collections.abc import Iterator

from toolkit.config.named import named
from toolkit.data.prepare.text.cuts import (
    MAX_DOCUMENT_BYTES,
    PIECE_CHARACTERS,
    documents_in,
    pieces_of,
)
from toolkit.data.prepare.text.files import check_unchanged
from toolkit.data.prepare.text.filters import DocumentGate
from toolkit.data.prepare.text.reading import Counts, Piece, Reader, Reading
from toolkit.data.prepare.text.shards import RangeKind, Shard
from toolkit.errors import DataError

_READERS: dict[RangeKind, str] = {
    "text": "plain:read_text",
    "jsonl": "jsonl:read_jsonl",
    "jsonl_gz": "jsonl:read_jsonl",
    "jsonl_zst": "jsonl:read_jsonl",
    "json_array": "jsonl:read_json_array",
    "parquet": "tables:read_parquet",
    "arrow": "tables:read_arrow",
    "disk_rows": "tables:read_disk",
    "hub_stream": "hub:read_hub",
    "hub_rows": "hub:read_hub",
    "tokens": "token_files:read_tokens",
    "remote_tokens": "token_files:read_tokens",
}
"""Found by name: each brings the libraries of its format."""


def read_shard(shard: Shard, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of a shard in order; DataError for input that cannot be used as the source's
    options say."""
    gate = DocumentGate(reading, counts)
    for part in shard:
        try:
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
            reader: Reader = named(f"toolkit.data.prepare.text.{_READERS[part.kind]}")
            for piece in reader(part, reading, counts):
                if piece.ids is not None:
                    yield piece
                    continue
                for document in [piece] if part.kind == "text" else _cut_up(piece, counts):
                    yield from _pieces(gate.admit(document))
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{part.path}: cannot be read: {reason}") from None


def _cut_up(whole: Piece, counts: Counts) -> Iterator[Piece]:
    """The document, or those that a long one becomes."""
    data = whole.text.encode() if 4 * len(whole.text) > MAX_DOCUMENT_BYTES else b""
    if len(data) <= MAX_DOCUMENT_BYTES:
        yield whole
        return
    for start, end in documents_in(lambda place, size: data[place : place + size], 0, len(data)):
        counts.cut_documents += start > 0
        identity = f"{whole.identity}:{start}" if start else whole.identity
        yield whole._replace(identity=identity, text=data[start:end].decode())


def _pieces(document: Piece | None) -> Iterator[Piece]:
    """What the encoder gets of a document that is not left out."""
    if document is None:
        return
    text = document.text
    if len(text) <= PIECE_CHARACTERS:
        yield document
    else:
        for start, end in pieces_of(text):
            yield document._replace(text=text[start:end], starts=start == 0, ends=end == len(text))
