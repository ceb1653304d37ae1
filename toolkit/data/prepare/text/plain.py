"""Plain text files: one document each, or several of a long one, which the plan has cut."""

from collections.abc import Iterator

from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.reading import Counts, Piece, Reading, decode
from toolkit.data.prepare.text.sources import Range
from toolkit.errors import DataError


def read_text(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The document that `part` is."""
    source, begin = reading.source, part.start
    errors = source.encoding_errors if isinstance(source, FilesSourceConfig) else "strict"
    with open(part.path, "rb") as file:
        file.seek(begin)
        data = file.read(part.end - begin)
    counts.cut_documents += part.is_rest
    try:
        text = decode(data, part.path, begin, errors, counts)
    except DataError:
        if isinstance(source, FilesSourceConfig):
            raise
        # A few files of the standard library's tests are in other encodings on purpose.
        counts.skipped_documents += 1
        return
    identity = f"{part.name}:{begin}" if part.is_rest else part.name
    yield Piece(identity, text if begin else text.removeprefix("\ufeff"), split=part.split)
