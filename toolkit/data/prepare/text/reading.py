"""What all readers are given, and share: how to read, what to count, and decoding."""

from collections.abc import Callable, Iterator

import msgspec

from toolkit.data.config import FiltersConfig, SourceConfig
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.shards import Range
from toolkit.errors import DataError

PIECE_CHARACTERS = 1 << 18
"""Longer documents are encoded in pieces of about this size."""


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
    """What reading had to repair or leave out."""

    def __init__(self) -> None:
        self.replaced_bytes = 0
        self.skipped_documents = 0
        self.filtered_documents: dict[str, int] = {}

    def leave_out(self, reason: str) -> None:
        """Count one document that is left out on purpose."""
        self.filtered_documents[reason] = self.filtered_documents.get(reason, 0) + 1


def decode(data: bytes, where: str, offset: int, errors: str, counts: Counts) -> str:
    """UTF-8 to text; `offset` is the position of `data` in the file `where`.

    Raises:
        DataError: for other bytes, unless `errors` is "replace" (then they are counted).
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if errors == "strict":
            position = offset + error.start
            raise DataError(
                f"{where}: not UTF-8 at byte {position} (0x{data[error.start]:02x}); convert the "
                "file, or set dataset.source.encoding_errors=replace"
            ) from None
    text = data.decode(errors="replace")
    # A replacement character that stood in the file is no error; elsewhere in UTF-8 its three bytes
    # cannot occur.
    num_errors = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    counts.replaced_bytes += len(data) - (_utf8_bytes(text) - 3 * num_errors)
    return text


def _utf8_bytes(text: str) -> int:
    size = PIECE_CHARACTERS
    return sum(len(text[start : start + size].encode()) for start in range(0, len(text), size))


Reader = Callable[[Range, Reading, Counts], Iterator[Piece]]
