"""Single documents and units of token files: shown as samples, and checked."""

import numpy as np

from toolkit.data.prepare.build.split_files import bounds_of
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.prepare.tools.report import Sample
from toolkit.data.tokens.units import (
    CHOSEN,
    DOCUMENTS,
    MISMATCHED,
    REJECTED,
    UnitKind,
    documents_per_unit,
    side_name,
)

SAMPLE_TOKENS = 120
"""Tokens shown of a sampled document."""


def wrong_units(ids: np.ndarray, starts: np.ndarray, mask: np.ndarray, unit: UnitKind) -> list[int]:
    """Units whose documents begin with different prompts, or whose masks hold other kinds of
    targets than their places in the unit say."""
    wrong = []
    wanted = ({CHOSEN}, {REJECTED}) if unit == "pair" else ({CHOSEN, REJECTED}, {MISMATCHED})
    for number in range(len(starts) // DOCUMENTS):
        first, middle, end = bounds_of(starts, len(ids), DOCUMENTS * number, 3)
        one, two = np.asarray(mask[first:middle]), np.asarray(mask[middle:end])
        prompt = min(int((one != 0).argmax()), int((two != 0).argmax()))
        kinds = [set(np.unique(side).tolist()) - {0} for side in (one, two)]
        is_good = all(found and found <= may for found, may in zip(kinds, wanted, strict=True))
        same = np.array_equal(ids[first : first + prompt], ids[middle : middle + prompt])
        if not is_good or len(kinds[0]) > 1 or not same:
            wrong.append(number)
    return wrong


def samples_of(
    ids: np.ndarray,
    starts: np.ndarray,
    tokenizer: Tokenizer | None,
    count: int,
    units: tuple[UnitKind | None, np.ndarray | None] = (None, None),
) -> list[Sample]:
    """The beginnings of documents at equal distances from the first on; of units, both documents,
    where their answers begin."""
    (unit, mask), samples = units, []
    step = documents_per_unit(unit)
    numbers = sorted({turn * (len(starts) // step) // count for turn in range(count)})
    for number in (step * first + turn for first in numbers for turn in range(step)):
        start, end = (int(n) for n in bounds_of(starts, len(ids), number, 2))
        first, side = start, None
        if unit is not None and mask is not None:
            targets = np.asarray(mask[start:end])
            side = f"unit {number // step:,}, {side_name(unit, int(targets.max(initial=CHOSEN)))}"
            first += max(0, int((targets != 0).argmax()) - SAMPLE_TOKENS // 2)
        part = ids[first : min(end, first + SAMPLE_TOKENS)].tolist()
        text = tokenizer.decode(part) if tokenizer is not None else None
        samples.append(
            Sample(document=number, num_tokens=end - start, ids=part, text=text, side=side)
        )
    return samples
