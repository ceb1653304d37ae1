"""Pickles and archives of `torch.save` that may come from elsewhere, read in bounded memory.

An unpickler believes what a pickle says of its own size: nine bytes can ask for gigabytes (an index
of its memo, a length of text). So the instructions are looked at first. Only the few that our files
consist of are taken, lengths must fit into the file, and empty lists and dicts, which cost memory
but no bytes, must be as rare as they are. Reading then takes about twelve times the file's size.

An archive is a zip file without compression: `data.pkl`, and one record for the numbers of each
tensor. torch's own reader unpacks compressed records, however large they get, and believes the
pickle about the sizes of tensors. Here records are stored as they are or refused, no more is read
than the file has, and every tensor lies inside its record.
"""

import gc
import io
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

_ONE_BYTE = rb"()\]}N\x88\x89\x81Rbsuaet\x85\x86\x87\x93\x94Q"
_RUN = re.compile(rb"(?:[%s]++|[Khq].|M..|[Jj].{4}|G.{8}|\x80[\x02-\x05])*+" % _ONE_BYTE, re.DOTALL)
"""Instructions whose length is known, as many as follow one another. (Written by protocols 2 to 5;
without those that no file of ours has, such as sets, extensions and byte arrays.)"""
_LENGTHS = {0x8C: 1, 0x8A: 1, ord("U"): 1, ord("C"): 1, ord("X"): 4, 0x95: 8}
"""Instruction (text, long integer, bytes, frame) -> bytes that its length takes."""
_FRAME = 0x95
_GLOBAL, _LONG_PUT, _STOP = ord("c"), ord("r"), ord(".")
_BYTES_PER_CONTAINER = 16
_FREE_CONTAINERS = 1024

_READ_WHOLE_BYTES = 64 << 10

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_NOTHING = torch.empty(0, dtype=torch.uint8)


class ArchiveError(Exception):
    """Why an archive is refused."""


def check_pickle(raw: bytes) -> None:
    """Look through the instructions of a pickle, which is nothing but them.

    Raises:
        pickle.UnpicklingError: it would take more memory than a small multiple of its size, or is
            no pickle as we write them.
    """
    at, containers = 0, 0
    while True:
        run = _RUN.match(raw, at)
        assert run is not None, "it matches nothing too"
        # Also counts the arguments that look like them, one in a hundred.
        containers += raw.count(b"]", at, run.end()) + raw.count(b"}", at, run.end())
        at = run.end()
        if containers > _FREE_CONTAINERS + len(raw) // _BYTES_PER_CONTAINER:
            raise pickle.UnpicklingError("refused: it builds far more than its size says")
        if at >= len(raw):
            raise pickle.UnpicklingError("it is cut short")
        code, at = raw[at], at + 1
        if code == _STOP:
            return
        if code == _LONG_PUT:
            # Every entry of the memo has been an instruction before.
            if int.from_bytes(raw[at : at + 4], "little") > at:
                raise pickle.UnpicklingError("refused: it asks for more memory than its size says")
            at += 4
        elif code == _GLOBAL:
            for _ in range(2):
                at = raw.find(b"\n", at) + 1 or len(raw) + 1
        elif code in _LENGTHS:
            size = _LENGTHS[code]
            length = int.from_bytes(raw[at : at + size], "little")
            at += size
            if at + length > len(raw):
                raise pickle.UnpicklingError("refused: a length in it is larger than the file")
            if code != _FRAME:
                at += length
        else:
            raise pickle.UnpicklingError(f"refused: instruction {code:#04x} has no place in it")


def unpickle(
    raw: bytes,
    names: Mapping[tuple[str, str], Any],
    *,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of a pickle, in memory that its size bounds; nothing but `names` is called.

    Args:
        names: (module, name) -> what stands for it. Exact names: whole modules would let a file
            call functions of theirs that unpickle others.
        persistent: what a persistent id stands for.

    Raises:
        pickle.UnpicklingError: refused or damaged, or any other exception.
    """
    check_pickle(raw)
    unpickler = _Unpickler(io.BytesIO(raw))
    unpickler.names, unpickler.persistent = names, persistent
    was_collecting = gc.isenabled()
    gc.disable()  # it would go through all that is there again and again: eight times the time
    try:
        return unpickler.load()
    finally:
        if was_collecting:
            gc.enable()


class _Unpickler(pickle.Unpickler):
    names: Mapping[tuple[str, str], Any]
    persistent: Callable[[Any], Any] | None

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.names:
            raise pickle.UnpicklingError(
                f"refused: it names {module}.{name}, which no checkpoint needs"
            )
        return self.names[module, name]

    def persistent_load(self, saved: Any) -> Any:
        if self.persistent is None:
            raise pickle.UnpicklingError("refused: it names things outside it")
        return self.persistent(saved)


class Archive:
    """What `torch.save` wrote to `stream`, in the `length` bytes from `offset` on.

    Raises:
        ArchiveError, pickle.UnpicklingError: refused; a damaged file raises nearly anything.
    """

    def __init__(self, stream: BinaryIO, length: int, *, offset: int = 0) -> None:
        self._stream: Any = _Window(stream, offset, length)
        if length <= _READ_WHOLE_BYTES:  # a description takes a dozen small reads
            self._stream = io.BytesIO(self._stream.read(length))
        self._left = length
        self._places: dict[str, zipfile.ZipInfo] = {}
        for info in zipfile.ZipFile(self._stream).infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ArchiveError(f"refused: its record {info.filename!r} is compressed")
            self._places[info.filename.partition("/")[2]] = info
        if "byteorder" in self._places and self._read("byteorder").decode() != sys.byteorder:
            raise ArchiveError("it was written on a machine with the other byte order")

    def load(self) -> Any:
        """The value: plain values and tensors of the CPU."""
        memories: dict[str, torch.Tensor] = {}

        def memory_of(record: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
            if record not in memories:
                content = bytearray(self._read(record))
                memories[record] = (
                    torch.frombuffer(content, dtype=torch.uint8) if content else _NOTHING
                )
            if memories[record].numel() != numel * dtype.itemsize:
                raise ArchiveError(f"refused: its record {record!r} is no {numel} numbers")
            return memories[record].view(dtype)

        return self._unpickle(memory_of)

    def describe_tensor(self) -> tuple[torch.Tensor, int]:
        """The one tensor that was saved, on the meta device, and the offset of its numbers from
        the beginning of the archive."""
        records = []

        def memory_of(record: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
            records.append(record)
            return torch.empty(numel, dtype=dtype, device="meta")

        tensor = self._unpickle(memory_of)
        if not isinstance(tensor, torch.Tensor):
            raise ArchiveError("refused: it holds no tensor")
        return tensor, self._begin(records[-1])

    def _unpickle(self, memory_of: Callable[[str, torch.dtype, int], torch.Tensor]) -> Any:
        def storage(saved: Any) -> torch.Tensor:
            kind, dtype, key, _, numel = saved
            is_known = kind == "storage" and isinstance(dtype, torch.dtype)
            if not is_known or not isinstance(numel, int):
                raise ArchiveError("refused: it describes a tensor as torch.save does not")
            return memory_of(f"data/{key}", dtype, numel)

        return unpickle(self._read("data.pkl"), _NAMES, persistent=storage)

    def _begin(self, name: str) -> int:
        """Offset of the record's content. (Its checksum may be left out, so `ZipFile.read`
        refuses it.)"""
        if name not in self._places:
            raise ArchiveError(f"it has no record {name!r}")
        offset = self._places[name].header_offset
        self._stream.seek(offset)
        header = self._stream.read(_LOCAL_HEADER.size)
        signature, name_size, extra_size = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise ArchiveError(f"its record {name!r} is not where it should be")
        return offset + _LOCAL_HEADER.size + name_size + extra_size

    def _read(self, name: str) -> bytes:
        """The whole record; all that is read together is at most the file."""
        begin, size = self._begin(name), self._places[name].file_size
        if size > self._left:
            raise ArchiveError(f"refused: its record {name!r} is larger than the file")
        self._left -= size
        self._stream.seek(begin)
        content = self._stream.read(size)
        if len(content) != size:
            raise ArchiveError(f"its record {name!r} is cut short")
        return content


class _Window(io.RawIOBase):
    """A part of `inner`, as a file of its own."""

    def __init__(self, inner: BinaryIO, offset: int, length: int) -> None:
        self._inner, self._offset, self._length, self._at = inner, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._inner.seek(self._offset + self._at)
        data = self._inner.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _rebuild_tensor(
    memory: torch.Tensor, offset: int, size: Any, stride: Any, *_: Any
) -> torch.Tensor:
    """As `as_strided`, which grows the memory of some devices where it is too small."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    negative = offset < 0 or min([*size, *stride], default=0) < 0
    if negative or (0 not in size and last >= memory.numel()):
        raise ArchiveError("refused: a tensor in it is larger than its numbers")
    return memory.as_strided(size, stride, offset)


_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}
STORED_DTYPES = frozenset(kind for kind in _NAMES.values() if isinstance(kind, torch.dtype))
"""Types of tensors that can be read."""
