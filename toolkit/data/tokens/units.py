"""Units: documents of preference and binary data that belong together.

A unit is two documents that follow each other in the token files. They are never cut, separated or
shuffled apart.

    pair     prompt + chosen answer, then the same prompt + rejected answer
    binary   prompt + completion, then the same prompt + the completion of the next unit of the
             split (that of the first after the last), for the KL estimate of KTO (Ethayarajh et
             al. 2024, section 4.1)

The mask says of each token what kind of target it is; 0 is none.
"""

from collections.abc import Collection
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
COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "binary": ("prompt", "completion", "label"),
}
"""The columns that rows of a kind need."""
TRAINED_BY: dict[UnitKind | None, str] = {
    "pair": "train_module.objective.type to dpo, orpo, simpo or reward",
    "binary": "train_module.objective.type to kto",
    None: "train_module.objective to null (a language model)",
}
"""What is set to train on each kind of data, for messages."""


def fitting_kind(columns: Collection[str]) -> str | None:
    """The kind of `dataset.instructions` whose columns are among `columns`; None: conversations, or
    plain text."""
    return next((kind for kind, names in COLUMNS.items() if {*names} <= {*columns}), None)


def fitting_settings(kind: str) -> str:
    """What is set to train on rows of a kind, for messages."""
    return f"dataset.instructions.kind to {kind}, and {TRAINED_BY[UNIT_OF[kind]]}"


def name_of(unit: UnitKind | None) -> str:
    """What documents hold, for messages."""
    names = {
        "pair": "pairs of a chosen and a rejected answer",
        "binary": "completions with a label",
        None: "text or conversations",
    }
    return names[unit]


def documents_per_unit(unit: UnitKind | None) -> int:
    """Documents that stay together."""
    return 1 if unit is None else DOCUMENTS


def side_name(unit: UnitKind, target: int) -> str:
    """What a document with targets of this kind is in its unit."""
    if unit == "pair":
        return "chosen" if target == CHOSEN else "rejected"
    names = {CHOSEN: "desirable", REJECTED: "undesirable", MISMATCHED: "with the next completion"}
    return names[target]
