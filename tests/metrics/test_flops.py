"""Peak FLOP/s by the names that drivers give."""

import pytest

from toolkit.metrics.flops import device_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB PCIe", 756),
        ("NVIDIA H800", 989),
        ("NVIDIA H800 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM-64GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A30", 165),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("AMD Instinct MI210", 181),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI250X / MI250", 383),
    ],
)
def test_known_devices(name, tera):
    assert peak_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "Intel(R) Xeon(R) Platinum 8488C",
        "Tesla V100-SXM2-32GB",
        "Tesla T4",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition",
        # Not the A100, A40, A10, L4, H100 or RTX 6000 Ada that they resemble.
        "NVIDIA RTX A1000",
        "NVIDIA RTX A400",
        "NVIDIA A10M",
        "NVIDIA L400",
        "NVIDIA H1000",
        "Quadro RTX 6000",
        "GRID A100-10C",
        "NVIDIA L40S-12Q",
        "",
    ],
)
def test_unknown_devices_have_no_figure(name):
    assert peak_flops(name) is None


def test_a_card_of_two_devices_counts_half_for_each():
    assert device_peak_flops("AMD Instinct MI250X") == pytest.approx(191.5e12)
    assert device_peak_flops("AMD Instinct MI300X") == pytest.approx(1307.4e12)
    assert device_peak_flops("NVIDIA H200") == pytest.approx(989e12)
    assert device_peak_flops("cpu") is None
