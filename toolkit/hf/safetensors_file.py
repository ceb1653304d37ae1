"""A safetensors file written tensor by tensor, in any order.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length of the header,
the header (JSON: name -> dtype, shape, byte range), the bytes. The library's own `save_file` wants
all tensors of a file in memory at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of types in headers."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """Context manager; every tensor announced in `layout` is to be given to `write` once.

    Args:
        layout: name -> a tensor of that shape and type (on the meta device, say).
    """

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        self._places: dict[str, tuple[int, torch.dtype]] = {}
        for name, tensor in layout.items():
            end = position + tensor.nbytes
            header[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            self._places[name] = (position, tensor.dtype)
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data_start + position)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` (any device, converted to the announced type) in its place."""
        offset, dtype = self._places[name]
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
        self._file.seek(self._data_start + offset)
        self._file.write(flat.numpy().data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
