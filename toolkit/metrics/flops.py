"""Peak FLOP/s of accelerators: what model FLOP utilisation is measured against."""

import functools
import re

_TERA = 1e12

_PEAKS: tuple[tuple[str, float], ...] = (
    # NVIDIA, data center. The first pattern that matches counts, so special ones come first.
    (r"GB300", 2500), (r"GB200", 2500), (r"B300", 2250), (r"B200", 2250), (r"H200\b.*\bNVL", 835),
    (r"H200", 989), (r"GH200", 989), (r"H100\b.*\bNVL", 835), (r"H100\b.*\bPCIe", 756),
    (r"H100", 989), (r"H800\b.*\bPCIe", 756), (r"H800", 989), (r"H20", 148), (r"A100X?", 312),
    (r"A800", 312), (r"A40", 149.7), (r"A30", 165), (r"A10G", 70), (r"A10", 125), (r"L40S", 362),
    (r"L40", 181), (r"L20", 119.5), (r"L4", 121),
    # NVIDIA, workstations and desktops; tensor cores with fp32 accumulation.
    (r"RTX PRO 6000 Blackwell Workstation Edition", 503.8), (r"RTX 6000 Ada", 364.2),
    (r"(?:RTX )?A6000", 154.8), (r"RTX A5000", 111.1), (r"RTX A4000", 76.7), (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2), (r"RTX 4080", 97.5), (r"RTX 3090 Ti", 80), (r"RTX 3090", 71),
    (r"RTX 3080 Ti", 68.2), (r"RTX 3080", 59.5),
    # AMD Instinct.
    (r"MI355X", 2516.6), (r"MI350X", 2306.9), (r"MI325X", 1307.4), (r"MI300X", 1307.4),
    (r"MI300A", 980.6), (r"MI250X", 383), (r"MI250", 362.1), (r"MI210", 181),
)  # fmt: skip
_COMPILED = tuple(
    # A suffix makes it another product: RTX 4080 SUPER, RTX 5090 D.
    (re.compile(rf"\b{name}\b(?! (?:Ti|SUPER|D)\b)", re.IGNORECASE), peak)
    for name, peak in _PEAKS
)
_SMALLER_THAN_ITS_NAME = re.compile(
    r"\b(?:laptop|mobile|max-q|MIG)\b"
    r"|-\d+[ABCQ]$",  # a share of a card for a virtual machine: GRID A100-10C
    re.IGNORECASE,
)
_TWO_DEVICES = re.compile(r"\bMI250X?\b", re.IGNORECASE)


@functools.cache
def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one card by the name its driver gives; None for unknown ones.

    Source: the vendors' data sheets and architecture white papers, with NVIDIA's figures "with
    sparsity" halved. None also for CPUs, for GPUs without bf16 tensor cores (V100 with its 125
    TFLOP/s in fp16, T4), and for parts of a card (MIG, virtual GPUs) or mobile variants, whose peak
    the name does not tell.
    """
    if _SMALLER_THAN_ITS_NAME.search(device_name):
        return None
    peaks = (peak * _TERA for pattern, peak in _COMPILED if pattern.search(device_name))
    return next(peaks, None)


def device_peak_flops(device_name: str) -> float | None:
    """The same of one device as torch counts them: AMD's MI250 and MI250X are two on one card."""
    peak = peak_flops(device_name)
    return peak / 2 if peak and _TWO_DEVICES.search(device_name) else peak
