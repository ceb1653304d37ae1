"""From pieces of documents to token ids, and which of them the loss asks for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from toolkit.data.text.piece import Piece

if TYPE_CHECKING:
    import numpy as np

    from toolkit.data.tokenizers.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """The tokens of one piece."""

    ids: "np.ndarray"
    """Unsigned integers, shape `(num_tokens,)`, without the tokens that start and end documents."""
    is_target: "np.ndarray | None" = None
    """Which of them the loss asks for: bool of the same shape; None: all."""
    eos_is_target: bool = True
    """Whether the loss asks for the end-of-document token that follows."""
    starts_with_bos: bool = False
    """Whether `ids` begin with the start-of-document token: none is put before them."""
    ends_with_eos: bool = False
    """Whether `ids` end with the end-of-document token: none is put after them."""
    left_out: str | None = None
    """Why the whole document is left out, as counted in `Manifest.filtered_documents`."""


class Encoder(Protocol):
    """Encodes pieces of one kind of source."""

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The tokens of each piece, in order.

        Raises:
            DataError: a piece cannot be encoded; names it.
        """


class TextEncoder:
    """Ordinary text: what looks like a control token in it does not become one."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The tokens of each piece's text."""
        return [Encoded(ids) for ids in self._tokenizer.encode_batch([p.text for p in pieces])]


class TokenEncoder:
    """Pieces that are tokens already."""

    def __init__(self, *, bos_id: int | None, eos_id: int | None) -> None:
        """The ids that start and end documents, where the pieces may hold them."""
        self._bos_id, self._eos_id = bos_id, eos_id

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The ids of each piece as they are."""
        found = []
        for piece in pieces:
            ids = piece.ids
            assert ids is not None
            assert len(ids)
            found.append(
                Encoded(
                    ids,
                    starts_with_bos=bool(ids[0] == self._bos_id),
                    ends_with_eos=bool(ids[-1] == self._eos_id),
                )
            )
        return found
