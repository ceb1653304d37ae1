"""From documents, or pieces of them, to token ids, and which of them the loss asks for."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.bulk import BulkEncoder
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """The tokens of one piece."""

    ids: np.ndarray
    """Unsigned integers, shape `(num_tokens,)`, without the tokens that start and end documents."""
    is_target: np.ndarray | None = None
    """Which of them the loss asks for: bool of the same shape; None: all."""
    eos_is_target: bool = True
    """Whether the loss asks for the end-of-document token that follows."""
    starts_with_bos: bool = False
    """Whether `ids` begin with the start-of-document token: none is put before them."""
    ends_with_eos: bool = False
    """Whether `ids` end with the end-of-document token: none is put after them."""
    left_out: str | None = None
    """Why the whole document is left out, as counted in `Manifest.filtered_documents`."""
    target: int = 1
    """What a target is called in the mask; see `toolkit.data.tokens.units`."""
    second: "Encoded | None" = None
    """Of preference and binary rows: the document that follows this one."""


class Encoder(Protocol):
    """Encodes pieces of one kind of source."""

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The tokens of each piece, in order. Raises DataError, which names the piece."""


class TextEncoder:
    """Ordinary text: what looks like a control token in it does not become one.

    Some tokenizers (SentencePiece's with a dummy prefix) put a space before every text. The later
    pieces of a document are therefore encoded after a line feed, or a full stop where line feeds
    are spaces, whose tokens are taken out again; where a tokenizer joins that with what follows,
    the piece is encoded as it is.
    """

    def __init__(self, tokenizer: Tokenizer, bulk: BulkEncoder | None = None) -> None:
        """`bulk`: encodes in the place of `tokenizer`, with the same ids."""
        self._encode = bulk or tokenizer.encode_batch
        self._lead, self._lead_ids = "", list[int]()
        for lead in ("\n", "."):
            lead_ids, after, alone = (
                ids.tolist() for ids in tokenizer.plain_ids([lead, f"{lead}a", "a"])
            )
            if lead_ids:
                if after != lead_ids + alone and after[: len(lead_ids)] == lead_ids:
                    self._lead, self._lead_ids = lead, lead_ids
                break

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The tokens of each piece's text."""
        lead, lead_ids = self._lead, self._lead_ids
        found = self._encode([p.text if p.starts else lead + p.text for p in pieces])
        for number, piece in enumerate(pieces if lead_ids else ()):
            if not piece.starts:
                ids = found[number]
                if ids[: len(lead_ids)].tolist() == lead_ids:
                    found[number] = ids[len(lead_ids) :]
                else:
                    (found[number],) = self._encode([piece.text])
        return [Encoded(ids) for ids in found]


class TokenEncoder:
    """Documents that are tokens already. `bos_id` and `eos_id` start and end documents, where the
    documents may hold them."""

    def __init__(self, *, bos_id: int | None, eos_id: int | None) -> None:
        self._bos_id, self._eos_id = bos_id, eos_id

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The ids of each piece as they are."""
        found = []
        for piece in pieces:
            ids = piece.ids
            assert ids is not None
            found.append(
                Encoded(
                    ids,
                    starts_with_bos=bool(ids[0] == self._bos_id),
                    ends_with_eos=bool(ids[-1] == self._eos_id),
                )
            )
        return found
