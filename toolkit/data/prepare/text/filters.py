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


def reason_to_leave_out(text: str, rules: FiltersConfig) -> str | None:
    """The rule, by its name in the config, that leaves `text` out; None: it stays."""
    if rules.min_characters is not None and len(text) < rules.min_characters:
        return "min_characters"
    if rules.max_characters is not None and len(text) > rules.max_characters:
        return "max_characters"
    limit = rules.max_repetition
    if limit is not None and repetition(text_windows(text)) > limit:
        return "max_repetition"
    return None


def repetition(windows: Iterable[bytes]) -> float:
    """Share of n-grams that stood before, in [0, 1]; 0 for text shorter than one. `windows` are the
    text, or parts spread evenly over it."""
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
    starts = [(len(text) - size) * number // (NUM_WINDOWS - 1) for number in range(NUM_WINDOWS)]
    return [text[start : start + size].encode() for start in starts]


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
