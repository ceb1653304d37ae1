"""What looking into token files finds."""

import msgspec
import numpy as np

from toolkit.data.instances.index import documents_of
from toolkit.data.tokens.audit import TargetAudit
from toolkit.data.tokens.units import UnitKind


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of one document."""

    document: int
    num_tokens: int | None
    """None: not known, the end was not looked for."""
    ids: list[int]
    """The first of them; of units, those around the end of the prompt."""
    side: str | None = None
    """Of units: which document of which it is."""
    text: str | None
    """None: there is no tokenizer to decode with."""


class SplitReport(msgspec.Struct, kw_only=True):
    """What one token file holds."""

    name: str
    num_bytes: int
    num_tokens: int = 0
    num_documents: int | None = None
    """None: not known, the file has no index and no end-of-document id was given."""
    num_targets: int | None = None
    """Tokens the loss asks for; None: all."""
    bytes_per_token: float | None = None
    """UTF-8 bytes of text; None where that is not known."""
    largest_id: int | None = None
    """None: the file was not read."""
    shortest: int = 0
    longest: int = 0
    histogram: list[int] = []
    """Entry k counts documents of 2**k to 2**(k+1)-1 tokens."""
    empty_documents: int = 0
    samples: list[Sample] = []

    def count_documents(self, starts: np.ndarray, num_tokens: int) -> None:
        """Count the lengths of the documents that begin at `starts`."""
        histogram = np.zeros(64, dtype=np.int64)
        for _, lengths in documents_of(starts, num_tokens):
            least, is_first = int(lengths.min()), not histogram.any() and not self.empty_documents
            self.shortest = least if is_first else min(self.shortest, least)
            self.longest = max(self.longest, int(lengths.max()))
            self.empty_documents += int((lengths == 0).sum())
            # The exponent of a float64 is exact for every length below 2**53.
            exponents = np.frexp(lengths[lengths > 0].astype(np.float64))[1] - 1
            histogram += np.bincount(exponents, minlength=64)
        self.histogram = np.trim_zeros(histogram, "b").tolist()


class Inspection(msgspec.Struct, kw_only=True):
    """What was found at one path."""

    path: str
    dtype: str
    vocab_size: int | None
    eos_id: int | None
    append_eos: bool | None = None
    bos_id: int | None = None
    prepend_bos: bool = False
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None for a bare file."""
    splits: list[SplitReport]
    unit: UnitKind | None = None
    """Of preference and binary data: what two documents that follow each other are."""
    audit: TargetAudit | None = None
    """Of instruction data: what the loss counts."""
    problems: list[str]
    """All that is wrong, in the order it was found; empty: the files are whole."""
    is_quick: bool = False
