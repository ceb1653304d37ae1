"""From a shard to its documents, with every defect of the input named by file and place.

Each format has one reader: `plain.py`, `jsonl.py` (lines and lists), `tables.py` (parquet, Arrow,
saved data sets), `hub.py` and `token_files.py`. A reader gives the documents of a range, one at a
time. What they have in common stands here: a text of more than 8 MB becomes several documents,
documents without text are counted and left out, filters see whole documents, and long ones are cut
into pieces for the encoder. So a process holds one document, or one line or row of a file, in
memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from toolkit.config.named import named
from toolkit.data.config import FiltersConfig, SourceConfig
from toolkit.data.prepare.text.columns import TextColumns, row_texts
from toolkit.data.prepare.text.cuts import (
    MAX_DOCUMENT_BYTES,
    PIECE_CHARACTERS,
    documents_in,
    pieces_of,
)
from toolkit.data.prepare.text.files import check_unchanged, check_version
from toolkit.data.prepare.text.filters import reason_to_leave_out
from toolkit.data.prepare.text.sources import Range, RangeKind, Shard
from toolkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_NO_FILTERS = FiltersConfig()
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


class Piece(NamedTuple):
    """A document, or a part of a long one: parts follow each other, `starts` and `ends` tell. It
    holds one of: text, a row of instruction data, or token ids."""

    identity: str
    """Relative file name and place in it, as numbers that only a program reads."""
    text: str = ""
    split: str | None = None
    """Where the piece must go; None: decided by a hash of the identity."""
    starts: bool = True
    ends: bool = True
    row: dict[str, Any] | None = None
    """A conversation, or a prompt with its answer, as it stands in the file."""
    ids: "np.ndarray | None" = None
    """Token ids that came without text, end-of-document id included."""
    num_bytes: int = 0
    """UTF-8 bytes of the whole document: of rows, and where documents are compared."""
    digest: int = 0
    """Where documents are compared: xxh3_128 of the whole text, set on the first piece."""
    place: object = ""
    """Of rows, where they stand. `str` gives the words for messages; it may take time to find
    them."""


@contextlib.contextmanager
def at(place: object) -> Iterator[None]:
    """Begin the message of a DataError inside with `place`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How documents are read out of a source."""

    source: SourceConfig
    rows: bool = False
    """Whole rows (of instruction data) instead of text."""
    cache_dir: str | None = None
    """Folder for raw texts of a hub data set; None: the libraries' own."""
    filters: FiltersConfig | None = None
    """Which documents are left out."""
    with_digests: bool = False
    """Set `Piece.digest` and `Piece.num_bytes`, so that documents can be compared."""
    vocab_size: int = 0
    """Token files: every id must be below this..."""
    eos_id: int | None = None
    """...and this one ends a document."""


class Counts:
    """What reading had to repair, cut or leave out."""

    def __init__(self) -> None:
        self.replaced_bytes = 0
        self.skipped_documents = 0
        self.cut_documents = 0
        """Documents that begin where a longer one was cut, see `cuts.MAX_DOCUMENT_BYTES`."""
        self.filtered_documents: dict[str, int] = {}

    def leave_out(self, reason: str) -> None:
        """Count one document that is left out on purpose."""
        self.filtered_documents[reason] = self.filtered_documents.get(reason, 0) + 1


Reader = Callable[[Range, Reading, Counts], Iterator[Piece]]
"""Gives the documents of a range; those of text and rows whole."""


def read_shard(shard: Shard, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents of a shard in order; DataError for input that cannot be used as the source's
    options say."""
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
                    admitted = _admit(document, reading, counts)
                    if admitted is not None:
                        yield from _pieces(admitted)
            if part.modified_ns:
                check_unchanged(part.path, part.file_bytes, part.modified_ns)
            if part.version:
                check_version(part.path, part.file_bytes, part.version)
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


def _pieces(document: Piece) -> Iterator[Piece]:
    """What the encoder gets of a document."""
    text = document.text
    if len(text) <= PIECE_CHARACTERS:
        yield document
    else:
        for start, end in pieces_of(text):
            yield document._replace(text=text[start:end], starts=start == 0, ends=end == len(text))


def _admit(document: Piece, reading: Reading, counts: Counts) -> Piece | None:
    """A whole document with what is known of it, hashed where documents are compared; None: it is
    left out, and counted."""
    text, row = document.text, document.row
    rules = None if reading.filters == _NO_FILTERS else reading.filters
    if row is not None and (rules is not None or not document.num_bytes):
        text = "\n".join(row_texts(row))
        document = document._replace(num_bytes=len(text.encode("utf-8", "replace")))
    if not text and row is None:
        counts.skipped_documents += 1
        return None
    reason = None if rules is None else reason_to_leave_out(text, rules)
    if reason is not None:
        counts.leave_out(reason)
        return None
    if not reading.with_digests:
        return document
    import xxhash

    if row is None:
        data = text.encode()
    else:
        data = msgspec.json.encode(row, order="deterministic", enc_hook=str)
    return document._replace(digest=xxhash.xxh3_128_intdigest(data), num_bytes=len(data))


def row_piece(
    row: dict[str, Any], identity: str, place: object, columns: TextColumns | None
) -> Piece:
    """What a reader gives for a row: its text, or the row itself where there are no `columns`."""
    if columns is None:
        return Piece(identity, row=row, place=place)
    return Piece(identity, columns.text(row, place))


def decode(data: bytes, where: str, offset: int, errors: str, counts: Counts) -> str:
    """UTF-8 to text; `offset` is the position of `data` in the file `where`. Other bytes raise
    DataError, unless `errors` is "replace" (then they are counted)."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
                "convert the file, or set dataset.source.encoding_errors=replace"
            ) from None
    text = data.decode(errors="replace")
    # A replacement character that stood in the file is no error; elsewhere in UTF-8 its three bytes
    # cannot occur.
    num_errors = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    counts.replaced_bytes += len(data) - (len(text.encode()) - 3 * num_errors)
    return text
