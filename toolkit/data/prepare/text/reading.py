"""What all readers are given and give: how to read, what to count, and pieces of documents."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from toolkit.data.config import FiltersConfig, SourceConfig
from toolkit.data.prepare.text.shards import Range
from toolkit.errors import DataError

if TYPE_CHECKING:
    import numpy as np


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
