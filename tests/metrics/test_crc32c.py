"""CRC-32C against published values and TensorBoard's own byte loop."""

import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from toolkit.metrics.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0x00000000),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 255, 256, 257, 259, 600, 1024])
def test_masked_value_equals_tensorboards(size):
    data = bytes(i * 37 % 256 for i in range(size))
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)
