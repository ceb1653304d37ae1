"""What `toolkit plan` knows of accelerators and of the links between them.

Peaks come from `toolkit.metrics.flops`, by the name that the driver gives. All other figures are
data-sheet figures of one device in the vendor's own 8-device server, one way where a sheet adds
both directions; what is reached of them stands in `step_time.py`. The shares of the peak that
products reach on A100 and H100 give the published throughput of torchtitan within a tenth
(docs/performance.md there: Llama 3 8B with selective checkpointing, 2,904 tokens/s on each of 64
A100 and 6,667 on each of 8 H100 held at 500 W); for the others they are assumed.
"""

import difflib
import os
from typing import NamedTuple

from toolkit.errors import ConfigError
from toolkit.metrics.flops import peak_flops
from toolkit.wording import shortened

GIB = 2**30


class Link(NamedTuple):
    """A device's way to others."""

    bandwidth: float
    """Bytes per second that a device sends while it receives as many."""
    latency: float
    """Seconds before the first byte of a collective arrives."""


class Device(NamedTuple):
    """One accelerator, as torch counts them."""

    name: str
    """What `--device` calls it."""
    title: str
    """The name that its driver gives."""
    memory: int
    """Bytes that a process can allocate."""
    bandwidth: float
    """Bytes per second of its memory."""
    inside: Link
    """To devices of the same machine."""
    between: Link
    """To devices of other machines: its share of the machine's network."""
    peak: float | None = None
    """Dense bf16 FLOP/s; None: of `title` in `toolkit.metrics.flops`."""
    reach: float = 0.54
    """Share of the peak that large matrix products of a training step reach."""
    fp32_ratio: float = 0.5
    """Peak of fp32 training as a share of bf16's: TF32 on NVIDIA's, half of bf16."""
    overhead: int = 2 * GIB
    """Bytes taken beside torch's allocator: the driver's context, NCCL's buffers, libraries."""

    def flops(self, precision: str) -> float:
        """FLOP/s of dense matrix products."""
        peak = self.peak or peak_flops(self.title) or 0.0
        return peak if precision != "fp32" else peak * self.fp32_ratio


def _inside(gigabytes: float, latency: float = 12e-6) -> Link:
    return Link(gigabytes * 1e9, latency)


def _between(gigabits: float, latency: float = 25e-6) -> Link:
    return Link(gigabits / 8 * 1e9, latency)


_DEVICES = (
    # NVIDIA H100 data sheet (SXM): 80 GB HBM3 at 3.35 TB/s, NVLink 900 GB/s both ways. DGX H100:
    # eight ConnectX-7 ports of 400 Gb/s. The driver shows 79.1 GiB.
    Device(
        "h100", "NVIDIA H100 80GB HBM3", int(79.1 * GIB), 3.35e12, _inside(450), _between(400)
    ),
    # NVIDIA H200 data sheet (SXM): 141 GB HBM3e at 4.8 TB/s; links as H100. The driver shows 139.8
    # GiB.
    Device("h200", "NVIDIA H200", int(139.8 * GIB), 4.8e12, _inside(450), _between(400)),
    # NVIDIA DGX B200 data sheet: 1,440 GB HBM3e at 64 TB/s over eight, NVLink 14.4 TB/s both ways,
    # eight ConnectX-7 ports of 400 Gb/s. The driver shows 178.4 GiB.
    Device("b200", "NVIDIA B200", int(178.4 * GIB), 8.0e12, _inside(900), _between(400)),
    # NVIDIA A100 data sheet (SXM): 40 GB at 1,555 GB/s and 80 GB at 2,039 GB/s, NVLink 600 GB/s
    # both ways. DGX A100: eight ConnectX-6 ports of 200 Gb/s.
    Device(
        "a100-40", "NVIDIA A100-SXM4-40GB", int(39.4 * GIB), 1.555e12, _inside(300), _between(200),
        reach=0.7,
    ),
    Device(
        "a100-80", "NVIDIA A100-SXM4-80GB", int(79.1 * GIB), 2.039e12, _inside(300), _between(200),
        reach=0.7,
    ),
    # NVIDIA L40S data sheet: 48 GB GDDR6 at 864 GB/s, PCIe 4.0 x16 with 64 GB/s both ways, no
    # NVLink. NVIDIA's OVX servers have 200 Gb/s for each two.
    Device("l40s", "NVIDIA L40S", int(44.4 * GIB), 0.864e12, _inside(32, 20e-6), _between(100)),
    # NVIDIA Ada architecture white paper: 24 GB at 1,008 GB/s, PCIe 4.0 x16. No access from card to
    # card: what goes over the host's memory takes the way twice. The network is an assumption: 25
    # Gb/s Ethernet for the machine, shared by eight.
    Device(
        "rtx4090", "NVIDIA GeForce RTX 4090", int(23.5 * GIB), 1.008e12, _inside(16, 30e-6),
        _between(25 / 8, 50e-6), reach=0.8, overhead=1 * GIB,
    ),
    # AMD Instinct MI300X data sheet: 192 GB HBM3 at 5.3 TB/s, seven Infinity Fabric links of 64
    # GB/s each way. Servers have eight ports of 400 Gb/s. fp32 products take no TF32: 163.4.
    Device(
        "mi300x", "AMD Instinct MI300X", int(191.5 * GIB), 5.3e12, _inside(448), _between(400),
        reach=0.45, fp32_ratio=0.125,
    ),
)  # fmt: skip
DEVICES = {device.name: device for device in _DEVICES}
CPU = "cpu"


def find_device(name: str, devices_per_machine: int) -> Device:
    """The device that `--device` names. Raises ConfigError: not in the table."""
    key = name.lower().replace("_", "-")
    if key == CPU:
        return _cpu(devices_per_machine)
    if key not in DEVICES:
        known = [*DEVICES, CPU]
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--device {shortened(name)}: {hint}known devices: {', '.join(known)}")
    return DEVICES[key]


def _cpu(processes: int) -> Device:
    """One of `processes` on this machine. Speeds differ too much between CPUs for a table: they
    are those of two cores of a server of 2023 with AMX (0.4 TFLOP/s measured in a product of bf16
    matrices, half of it in fp32), over shared memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    inside, between = Link(2e9, 100e-6), Link(1e9, 200e-6)
    return Device(
        CPU, "two cores", memory, 20e9, inside, between, peak=0.4e12, reach=0.8, overhead=GIB // 2,
    )  # fmt: skip
