"""Words that an option takes."""

from enum import StrEnum


class ComputeType(StrEnum):
    """Precisions of a computation."""

    fp32 = "fp32"
    bf16 = "bf16"
