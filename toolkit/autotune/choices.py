"""What follows from timings: pure functions, without torch."""

from collections.abc import Mapping
from typing import Literal, TypeVar

import msgspec

MARGINS = {"precision": 1.1, "threads": 1.15, "attention": 1.1}
"""How many times faster than the default another choice has to be. Less is noise, and two runs on
one machine should agree."""

COMPILE_GAIN = {
    ("cpu", "fp32"): 1.2, ("cpu", "bf16"): 1.2, ("cuda", "fp32"): 1.2, ("cuda", "bf16"): 1.3,
}  # fmt: skip
"""How many times faster a compiled step is, by device and precision: the least that was seen for
models of 7M to 1B parameters (docs/benchmarks.md; of CUDA torchtitan's published figures)."""
COMPILE_SECONDS = 90.0
"""Of all compilations of a run with one length, on two cores without a warm cache; doubled, since
nobody knows how busy the machine will be."""
PRODUCTS_SHARE = 0.7
"""Of an eager step's time, what its products and attention take."""

Key = TypeVar("Key", str, int)


class Choices(msgspec.Struct, frozen=True, kw_only=True):
    """What `auto` became, as a run keeps it. None: somebody asked for a value, or it is as it would
    be without a choice."""

    precision: Literal["fp32", "bf16", "fp16"] | None = None
    threads: int | None = None
    """Of each process's CPU operations; None: its whole share of the cores."""
    attention: Literal["flash", "cudnn"] | None = None
    """SDPA's kernel of attention without a mask, on CUDA."""
    compile_model: bool | None = None


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one microbatch's products and attention, forward and backward, by candidate. An
    empty table was not measured."""

    precision: dict[str, float] = {}
    threads: dict[int, float] = {}
    attention: dict[str, float] = {}
    """Of attention alone."""
    lasts: bool = True
    """Whether they are kept: not what was measured beside other programs."""


def fastest(seconds: Mapping[Key, float], default: Key, margin: float) -> Key:
    """The fastest candidate if it beats `default` by `margin`, else `default`."""
    if default not in seconds:
        return default
    best = min(seconds, key=lambda key: seconds[key])
    return best if seconds[default] >= margin * seconds[best] else default


def pays_to_compile(step_seconds: float, steps: int | None, *, device: str, precision: str) -> bool:
    """Whether `steps` eager steps of `step_seconds` take longer than compiling and as many compiled
    ones. `steps` None: not known; False then."""
    gain = COMPILE_GAIN.get((device, precision))
    if steps is None or gain is None:
        return False
    return steps * step_seconds * (1 - 1 / gain) > COMPILE_SECONDS


def ratio(timings: Timings) -> float | None:
    """How many times faster than fp32 bf16 was; None: not measured."""
    seconds = timings.precision
    return seconds["fp32"] / seconds["bf16"] if {"fp32", "bf16"} <= seconds.keys() else None
