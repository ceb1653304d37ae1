"""Where the tensors of a weight file lie, from its header alone; nothing else is read.

Two formats: safetensors (8 bytes little-endian length, a JSON header, the bytes;
https://huggingface.co/docs/safetensors) and what `torch.save` writes (a zip file without
compression; before torch 1.6 a sequence of pickles, which tells no offsets).
"""

import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import torch

from toolkit.errors import CheckpointError
from toolkit.hf.safetensors_file import DTYPES
from toolkit.storage.foreign import check_regular, guard, reason_of

_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _HeaderEntry(msgspec.Struct):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: list[_Count]
    data_offsets: tuple[_Count, _Count]


class StoredTensor(NamedTuple):
    """One tensor of a weight file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype | None
    """None: a type that torch has no name for."""
    dtype_name: str
    """For messages."""
    offset: int | None
    """Of its first byte in the file; None: the file has to be loaded as a whole."""
    stride: tuple[int, ...] | None = None
    """None: row by row without gaps."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * (self.dtype.itemsize if self.dtype else 0)


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file, whose byte ranges are checked against its size.

    Raises:
        CheckpointError: the header is damaged, or the file is longer or shorter than it says.
    """
    damaged = f"{path}: damaged safetensors header"
    size = check_regular(path, CheckpointError)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path}: {size} bytes are too few for its header, or it is no safetensors file; "
                "get it again"
            )
        text = file.read(length)
    with guard(damaged, CheckpointError):
        header = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = [
            (name, msgspec.json.decode(entry, type=_HeaderEntry)) for name, entry in header.items()
        ]
    tensors = {}
    position = 0
    for name, entry in sorted(entries, key=lambda pair: pair[1].data_offsets):
        begin, end = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        expected = math.prod(entry.shape) * dtype.itemsize if dtype else end - begin
        if begin != position or end - begin != expected:
            raise CheckpointError(
                f"{damaged}: {name} {entry.dtype} {tuple(entry.shape)} at bytes {begin} to {end}, "
                f"where {position} to {position + expected} were expected"
            )
        with guard(damaged, CheckpointError):  # dimensions that torch cannot count
            shape = torch.Size(entry.shape)
        tensors[name] = StoredTensor(path, shape, dtype, entry.dtype, 8 + length + begin)
        position = end
    if 8 + length + position != size:
        state = "truncated" if size < 8 + length + position else "longer than its header says"
        raise CheckpointError(
            f"{path}: {state}: {size} bytes, where the header tells of {8 + length + position}; "
            "get it again"
        )
    return tensors


def read_torch_header(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a state dict by `torch.save`; no code of the file is run.

    Raises:
        CheckpointError: the file is damaged, or holds more than tensors.
    """
    tensors = {}
    for name, tensor in load_torch_file(path, device="meta").items():
        storage: Any = tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)
        if begin is not None:
            begin += tensor.storage_offset() * tensor.element_size()
        tensors[name] = StoredTensor(
            file=path,
            shape=tensor.shape,
            dtype=tensor.dtype,
            dtype_name=str(tensor.dtype).removeprefix("torch."),
            offset=begin,
            stride=None if tensor.is_contiguous() else tensor.stride(),
        )
    return tensors


def load_torch_file(path: Path, *, device: str) -> dict[str, torch.Tensor]:
    """A state dict by `torch.save`, as a whole; raises CheckpointError."""
    check_regular(path, CheckpointError)
    _check_not_compressed(path)
    try:
        with warnings.catch_warnings():
            # About the pickle protocol of what is refused right after.
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged files raise nearly anything
        reason = _why_refused(error).split(". ")[0]
        raise CheckpointError(f"{path}: cannot be read: {reason}; get it again") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(value).__name__}, not a tensor; a file of weights "
                "holds tensors by name and nothing else"
            )
        if value.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is a tensor of layout {str(value.layout).removeprefix('torch.')}; "
                "weights must be stored dense"
            )
    return loaded


def _check_not_compressed(path: Path) -> None:
    """Raise CheckpointError for a zip file that torch did not write: it never compresses, so what a
    record takes in memory is what it takes on disk."""
    with guard(path, CheckpointError, "get it again"):
        if not zipfile.is_zipfile(path):
            return
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
                raise CheckpointError(
                    f"{path}: its record {record.filename!r} is compressed, which torch.save never "
                    "does; it is refused, because it could fill the memory"
                )
        if sum(record.file_size for record in records) > size:
            raise CheckpointError(f"{path}: its records overlap; get it again")


def _why_refused(error: Exception) -> str:
    """In one line, without torch's advice to trust the file."""
    text = str(error).strip()
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused: it names {named[1]}, which no checkpoint needs"
    if text.startswith("Weights only load failed"):
        return "refused: it holds more than tensors and plain values, or is damaged"
    return reason_of(error)
