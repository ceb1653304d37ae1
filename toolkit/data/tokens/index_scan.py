"""Does an index belong to its tokens?"""

import numpy as np
import xxhash


class IndexScan:
    """The starts of documents, block after block: the first is 0, none falls back, none lies beyond
    the tokens.

    Attributes:
        wrong: the first that does not, in words; None: all do so far.
    """

    def __init__(self, num_tokens: int) -> None:
        self.wrong: str | None = None
        self._num_tokens = num_tokens
        self._last = np.uint64(0)
        self._digest = xxhash.xxh3_128()

    @property
    def content_hash(self) -> str:
        """xxh3_128 of all blocks."""
        return self._digest.hexdigest()

    def look(self, position: int, block: np.ndarray) -> np.ndarray:
        """The next block, which begins with the start of document `position`.

        Returns:
            The tokens from each start to the one before it, uint64 as `block`; only of use while
            nothing is wrong.
        """
        self._digest.update(block.data)
        before = np.concatenate([[self._last], block[:-1]])
        self._last = block[-1]
        if self.wrong is None:
            self.wrong = self._find(position, block, before)
        return block - before

    def _find(self, position: int, block: np.ndarray, before: np.ndarray) -> str | None:
        falls = np.flatnonzero(block < before)
        if position == 0 and block[0] != 0:
            return f"document 0 starts at {block[0]:,}, not at 0"
        if len(falls):
            place = int(falls[0])
            number = position + place
            return (
                f"document {number:,} starts at {block[place]:,}, before document {number - 1:,} "
                f"at {before[place]:,}"
            )
        if int(block[-1]) > self._num_tokens:
            place = int(np.searchsorted(block, np.uint64(self._num_tokens), "right"))
            return (
                f"document {position + place:,} starts at {block[place]:,}, after the "
                f"{self._num_tokens:,} tokens"
            )
        return None
