"""Configs of instances: how token files become rows of one length."""

from typing import Literal

from toolkit.config import Config
from toolkit.config.base import check_positive


class FixedInstancesConfig(Config, kw_only=True, tag_field="type", tag="fixed"):
    """All documents one after the other, cut every `sequence_length` tokens."""

    intra_document_masking: bool = False
    """Attention inside documents only, and no loss on the first token of a document."""


class PackedInstancesConfig(Config, kw_only=True, tag_field="type", tag="packed"):
    """Whole documents, as many as fit into `sequence_length` (best fit, decreasing; Ding et al.
    2024). Longer documents are cut into full rows, and only their rest is packed. Attention stays
    inside documents."""


class PaddedInstancesConfig(Config, kw_only=True, tag_field="type", tag="padded"):
    """One document each, padded to `sequence_length`; longer ones are cut into several rows."""


class VariableInstancesConfig(Config, kw_only=True, tag_field="type", tag="variable"):
    """Documents cut into powers of two; each batch has rows of one length (dataset decomposition,
    Pouransari et al. 2024)."""

    min_sequence_length: int = 256
    """Shortest row, a power of two; shorter rests of documents are dropped and counted."""
    curriculum: Literal["natural", "grow", "shrink"] = "grow"
    """Order of lengths: at random, or from short to long (or back) in each of `num_cycles`."""
    num_cycles: int = 8
    """Times that lengths run from one end to the other in one epoch."""

    def __post_init__(self) -> None:
        check_positive(self, "min_sequence_length", "num_cycles")
        if self.min_sequence_length < 2 or self.min_sequence_length.bit_count() != 1:
            raise ValueError(
                f"min_sequence_length must be a power of two, 2 or more: {self.min_sequence_length}"
            )


InstancesConfig = (
    FixedInstancesConfig | PackedInstancesConfig | PaddedInstancesConfig | VariableInstancesConfig
)
