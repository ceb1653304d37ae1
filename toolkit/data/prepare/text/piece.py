"""`Piece`: what readers give and encoders take."""

from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np


class Piece(NamedTuple):
    """A document, or a part of a long one: parts follow each other, `starts` and `ends` tell.

    It holds one of: text, a row of instruction data, or token ids.
    """

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
    """UTF-8 bytes of the whole document where they are known before all of it is read: of rows,
    and where documents are compared with each other."""
    digest: int = 0
    """Where documents are compared: xxh3_128 of the whole document's text, set on its first
    piece."""
    place: str = ""
    """Of rows, where they stand, in words for messages."""
    find_place: "Callable[[], str] | None" = None
    """What errors say in place of `place`, where that takes time to find: a line's number."""


def at_found_place(
    error: DataError, place: str, find_place: "Callable[[], str] | None"
) -> DataError:
    """`error`, which names `place`, with the better words that are looked for only now."""
    if find_place is None:
        return error
    return DataError(str(error).replace(place, find_place(), 1))
