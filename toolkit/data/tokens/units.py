"""Units: documents of preference and binary data that belong together.

A unit is two documents that follow each other in the token files. They are never cut, separated or
shuffled apart.

    pair     prompt + chosen answer, then the same prompt + rejected answer
    binary   prompt + completion, then the same prompt + the completion of the next unit of the
             split (that of the first after the last), for the KL estimate of KTO (Ethayarajh et
             al. 2024, section 4.1)

The mask says of each token what kind of target it is; 0 is none.
"""

from typing import Literal

UnitKind = Literal["pair", "binary"]

CHOSEN = 1
"""A target of the chosen answer, or of a desirable completion."""
REJECTED = 2
"""...of the rejected answer, or of an undesirable completion."""
MISMATCHED = 3
"""...of the completion of another unit."""
DOCUMENTS = 2
"""Documents of a unit."""

UNIT_OF: dict[str, UnitKind] = {"preference": "pair", "binary": "binary"}
"""The unit that rows of a kind of `dataset.instructions` become; conversations: none."""

UNIT_NAMES: dict[UnitKind, str] = {
    "pair": "pairs of a chosen and a rejected answer",
    "binary": "completions with a label",
}
"""What units are, for messages."""
