"""Peak FLOP/s of accelerators: what model FLOP utilisation is measured against."""

import re

_TERA = 1e12

_PEAKS: tuple[tuple[str, float], ...] = (
    # NVIDIA, data center. The first pattern that matches counts, so special ones come first.
    (r"GB200", 2500),
    (r"B200", 2250),
    (r"H200 NVL", 835),
    (r"H200", 989),
    (r"GH200", 989),
    (r"H100 NVL", 835),
    (r"H100 PCIe", 756),
    (r"H100", 989),
    (r"H800 PCIe", 756),
    (r"H800", 989),
    (r"H20", 148),
    (r"A100", 312),
    (r"A800", 312),
    (r"A40", 149.7),
    (r"A30", 165),
    (r"A10G", 70),
    (r"A10", 125),
    (r"L40S", 362),
    (r"L40", 181),
    (r"L4", 121),
    # NVIDIA, workstations and desktops; tensor cores with fp32 accumulation.
    (r"RTX 6000 Ada", 364.2),
    (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 4080", 97.5),
    (r"RTX 3090 Ti", 80),
    (r"RTX 3090", 71),
    (r"RTX 3080 Ti", 68.2),
    (r"RTX 3080", 59.5),
    # AMD Instinct.
    (r"MI355X", 2516.6),
    (r"MI350X", 2306.9),
    (r"MI325X", 1307.4),
    (r"MI300X", 1307.4),
    (r"MI300A", 980.6),
    (r"MI250X", 383),
    (r"MI250", 362.1),
    (r"MI210", 181),
)
_COMPILED = tuple((re.compile(rf"\b{name}\b", re.IGNORECASE), peak) for name, peak in _PEAKS)
_SMALLER_THAN_ITS_NAME = re.compile(r"\b(laptop|mobile|max-q|MIG|4090 D)\b", re.IGNORECASE)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by the name its driver gives; None for unknown ones.

    Source: the vendors' data sheets and architecture white papers, with NVIDIA's figures "with
    sparsity" halved. None also for CPUs, for GPUs without bf16 tensor cores (V100, T4), and for
    parts of a device (MIG) or mobile variants, whose peak the name does not tell.
    """
    if _SMALLER_THAN_ITS_NAME.search(device_name):
        return None
    for pattern, peak in _COMPILED:
        if pattern.search(device_name):
            return peak * _TERA
    return None
