"""The two documents of each binary row: its prompt with its own completion, and with the next.

The second is what KTO's estimate of the KL term is made of (Ethayarajh et al. 2024, section 4.1):
a completion that belongs to another prompt. It can be chosen only where all rows of a split are
known, in their order and without those that are left out, so it is put there when parts are joined.
"""

from pathlib import Path

import numpy as np

from toolkit.data.prepare.build.split_files import SplitFiles, SplitWriter, bounds_of, memory_map
from toolkit.data.tokens.prepared import SplitInfo
from toolkit.data.tokens.units import MISMATCHED

BLOCK_TOKENS = 1 << 20
NO_OTHER = "no other completion"
"""Reason in `Manifest.filtered_documents`: the only row of its split."""


def write_completions(source: SplitFiles, output: Path) -> dict[str, SplitInfo]:
    """Write the units of a split into `output`. The documents of `source` are a prompt and its
    completion, in turn. Returns nothing where there is one row alone."""
    tokens = memory_map(source.path("bin"), source.dtype)
    mask = memory_map(source.path("mask"), "uint8")
    starts = memory_map(source.path("idx"), "uint64")
    num_units = len(starts) // 2
    if num_units < 2:
        return {}
    writer = SplitWriter(output, source.split, source.dtype, has_mask=True)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    begins: list[int] = []
    position = 0
    for unit in range(num_units):
        other = (unit + 1) % num_units
        prompt, answer, end = bounds_of(starts, len(tokens), 2 * unit, 3)
        first, last = bounds_of(starts, len(tokens), 2 * other + 1, 2)
        begins += [position, position + end - prompt]
        position += end - prompt + answer - prompt + last - first
        ids += [tokens[prompt:end], tokens[prompt:answer], tokens[first:last]]
        mismatched = (mask[first:last] != 0) * np.uint8(MISMATCHED)
        masks += [mask[prompt:end], mask[prompt:answer], mismatched]
        if position >= BLOCK_TOKENS or unit == num_units - 1:
            writer.append(np.concatenate(ids), np.array(begins), np.concatenate(masks))
            ids, masks, begins, position = [], [], [], 0
    writer.text_bytes = source.info.text_bytes
    return writer.finish()
