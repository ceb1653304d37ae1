"""What `torch.save` wrote, read from a file that may come from elsewhere.

Such a file is a zip archive without compression: `data.pkl`, and one record for the numbers of each
tensor. torch's own reader unpacks compressed records, however large they get, and believes the
pickle about the sizes of tensors. Here records are stored as they are or refused, no more is read
than the file has, and every tensor lies inside its record.
"""

import io
import struct
import sys
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import torch

from toolkit.checkpoint.pickles import unpickle

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class ArchiveError(Exception):
    """Why it is refused."""


class Archive:
    """The records of an archive in `stream`, which has `length` bytes.

    Raises:
        ArchiveError: a record is compressed, or larger than the file.
        zipfile.BadZipFile: it is no archive.
    """

    def __init__(self, stream: BinaryIO, length: int) -> None:
        self._stream: Any = _Window(stream, length)
        self._left = length
        self._places: dict[str, zipfile.ZipInfo] = {}
        for info in zipfile.ZipFile(self._stream).infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ArchiveError(f"refused: its record {info.filename!r} is compressed")
            self._places[info.filename.partition("/")[2]] = info
        if "byteorder" in self._places and self.read("byteorder").decode() != sys.byteorder:
            raise ArchiveError("it was written on a machine with the other byte order")

    def begin(self, name: str) -> int:
        """Offset of the record's content."""
        if name not in self._places:
            raise ArchiveError(f"it has no record {name!r}")
        offset = self._places[name].header_offset
        self._stream.seek(offset)
        signature, name_size, extra_size = _LOCAL_HEADER.unpack(
            self._stream.read(_LOCAL_HEADER.size)
        )
        if signature != b"PK\3\4":
            raise ArchiveError(f"its record {name!r} is not where it should be")
        return offset + _LOCAL_HEADER.size + name_size + extra_size

    def size(self, name: str) -> int:
        """Bytes of the record."""
        return self._places[name].file_size

    def read(self, name: str) -> bytes:
        """The whole record; all that is read together is at most the file."""
        begin, size = self.begin(name), self.size(name)
        if size > self._left:
            raise ArchiveError(f"refused: its record {name!r} is larger than the file")
        self._left -= size
        self._stream.seek(begin)
        content = self._stream.read(size)
        if len(content) != size:
            raise ArchiveError(f"its record {name!r} is cut short")
        return content


class _Window(io.RawIOBase):
    """The first `length` bytes of `inner`, which only knows to seek forth and read so many bytes:
    DCP's view of a chunk."""

    def __init__(self, inner: BinaryIO, length: int) -> None:
        self._inner, self._length, self._at = inner, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._inner.seek(self._at)
        data = self._inner.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def describe_tensor(raw: bytes) -> tuple[torch.Tensor, str]:
    """The one tensor of `data.pkl`, on the meta device, and the record with its numbers."""

    def rebuild(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
        memory, key = storage
        return _strided(memory, offset, size, stride), key

    def storage(saved: Any) -> Any:
        dtype, key, numel = _storage_id(saved)
        return torch.empty(numel, dtype=dtype, device="meta"), key

    tensor, key = unpickle(raw, _names(rebuild), persistent=storage)
    return tensor, f"data/{key}"


def load_archive(stream: BinaryIO, length: int) -> Any:
    """The value that `torch.save` wrote: plain values and tensors of the CPU.

    Raises:
        ArchiveError, pickle.UnpicklingError: refused; a damaged file raises nearly anything.
    """
    archive = Archive(stream, length)
    memories: dict[str, torch.Tensor] = {}

    def storage(saved: Any) -> torch.Tensor:
        dtype, key, numel = _storage_id(saved)
        if key not in memories:
            content = bytearray(archive.read(f"data/{key}"))
            memories[key] = torch.frombuffer(content, dtype=torch.uint8) if content else _NOTHING
        memory = memories[key]
        if memory.numel() != numel * dtype.itemsize:
            raise ArchiveError(f"refused: its record 'data/{key}' is no {numel} numbers")
        return memory.view(dtype)

    def rebuild(memory: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Any:
        return _strided(memory, offset, size, stride)

    return unpickle(archive.read("data.pkl"), _names(rebuild), persistent=storage)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _storage_id(saved: Any) -> tuple[torch.dtype, str, int]:
    kind, dtype, key, _, numel = saved
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int):
        raise ArchiveError("refused: it describes a tensor as torch.save does not")
    return dtype, str(key), numel


def _strided(memory: torch.Tensor, offset: int, size: Any, stride: Any) -> torch.Tensor:
    """As `as_strided`, which grows the memory of some devices where it is too small."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    negative = offset < 0 or min([*size, *stride], default=0) < 0
    if negative or (0 not in size and last >= memory.numel()):
        raise ArchiveError("refused: a tensor in it is larger than its numbers")
    return memory.as_strided(size, stride, offset)


def _names(rebuild: Any) -> dict[tuple[str, str], Any]:
    return {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("collections", "OrderedDict"): OrderedDict,
        **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
    }
