"""Which documents are left out: by length, and by how much they repeat themselves.

Repetition is measured on bytes of UTF-8, without words or lines, so it means the same in any
language and in code:

    repetition = 1 - (distinct n-grams) / (n-grams),   n = 32 bytes

the share of n-grams of 32 bytes that stood in the document before. It is the idea of MassiveText's
rules on duplicate n-grams of words (Rae et al. 2021, appendix A1.1; five to ten words of English
are about 32 bytes) carried to bytes. A page that says one sentence over and over is near 1, prose
near 0; tables and licence headers stand in between. (The ratio of a compressor was the other
choice: it depends much more on the language and on the length.)

Time is linear. Of long documents only the n-grams whose hash falls into a fixed share of all hashes
are compared, which leaves the ratio as it is on average, and of documents above `MAX_SCORED_BYTES`
only windows spread evenly over them are read: memory does not grow with the document.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from toolkit.data.config import FiltersConfig

if TYPE_CHECKING:
    import numpy as np

NGRAM_BYTES = 32
MAX_NGRAMS = 1 << 16
"""N-grams compared, about; of more, a share is taken."""
MAX_SCORED_BYTES = 4 << 20
NUM_WINDOWS = 64
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93,
                0xFF51AFD7ED558CCD)  # fmt: skip


class DocumentFilter:
    """Applies a `FiltersConfig`; without one, nothing is left out."""

    def __init__(self, config: FiltersConfig | None) -> None:
        self._config = config or FiltersConfig()
        self.measures_repetition = self._config.max_repetition is not None

    @property
    def is_active(self) -> bool:
        """Whether any document can be left out."""
        return self._config != FiltersConfig()

    def reason(self, text: str) -> str | None:
        """The rule, by its name in the config, that leaves `text` out; None: it stays."""
        by_length = self.length_reason(len(text))
        if by_length is not None or not self.measures_repetition:
            return by_length
        return self.repetition_reason(repetition(text_windows(text)))

    def length_reason(self, num_characters: int) -> str | None:
        """Like `reason`, for a length."""
        low, high = self._config.min_characters, self._config.max_characters
        if low is not None and num_characters < low:
            return "min_characters"
        if high is not None and num_characters > high:
            return "max_characters"
        return None

    def bytes_settle_length(self, num_bytes: int) -> bool:
        """Whether the length rules give one answer for all texts of that many UTF-8 bytes."""
        shortest, longest = -(-num_bytes // 4), num_bytes
        limits = (self._config.min_characters, self._config.max_characters)
        return self.length_reason(shortest) == self.length_reason(longest) and not any(
            limit is not None and shortest < limit <= longest for limit in limits
        )

    def repetition_reason(self, score: float) -> str | None:
        """Like `reason`, for a score of `repetition`."""
        limit = self._config.max_repetition
        return "max_repetition" if limit is not None and score > limit else None


def repetition(windows: Iterable[bytes]) -> float:
    """Share of n-grams that stood before, in [0, 1]; 0 for text shorter than one.

    Args:
        windows: the text, or parts spread evenly over it; `MAX_SCORED_BYTES` together, at most.
    """
    import numpy as np

    windows = list(windows)
    expected = sum(max(0, len(window) - NGRAM_BYTES + 1) for window in windows)
    if expected == 0:
        return 0.0
    step = 1
    while expected > step * MAX_NGRAMS:
        step *= 2
    found = [
        hashes[hashes & np.uint64(step - 1) == 0]
        for hashes in map(_ngram_hashes, windows)
        if len(hashes)
    ]
    hashes = np.concatenate(found)
    if not len(hashes):
        # The text has so few different n-grams that none falls into the share.
        return 1.0
    return 1.0 - len(np.unique(hashes)) / len(hashes)


def text_windows(text: str) -> list[bytes]:
    """The UTF-8 bytes of `text`, or of windows spread over a long one."""
    if len(text) <= MAX_SCORED_BYTES:
        data = text.encode()
        if len(data) <= MAX_SCORED_BYTES:
            return [data]
    size = MAX_SCORED_BYTES // NUM_WINDOWS // 4
    return [text[start : start + size].encode() for start in window_starts(len(text), size)]


def window_starts(total: int, size: int) -> list[int]:
    """Where `NUM_WINDOWS` windows of `size` begin, from the first place to the last."""
    return [(total - size) * number // (NUM_WINDOWS - 1) for number in range(NUM_WINDOWS)]


def _ngram_hashes(data: bytes) -> "np.ndarray":
    """A hash of every n-gram of the bytes, built by doubling: 1, 2, 4, ... 32 bytes."""
    import numpy as np

    hashes = np.frombuffer(data, dtype=np.uint8).astype(np.uint64)
    width = 1
    for multiplier in _MULTIPLIERS:
        if len(hashes) <= width:
            return hashes[:0]
        hashes = hashes[:-width] * np.uint64(multiplier) + hashes[width:]
        hashes ^= hashes >> np.uint64(29)
        width *= 2
    # The last mixing makes the low bits depend on all others; they choose the share.
    hashes *= np.uint64(_MULTIPLIERS[0])
    hashes ^= hashes >> np.uint64(32)
    return hashes
