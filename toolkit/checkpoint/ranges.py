"""Reading of torch DCP's files: each byte that a rank needs goes once, straight to its place.

DCP itself reads a stored chunk whole into new memory and copies the wanted part from there. Here
only the chunk's description is unpickled (restricted, on the meta device), which tells where in the
file its numbers lie. So a rank that holds a tenth of a tensor reads a tenth of it, and memory
beyond the tensors themselves stays small.
"""

import struct
from typing import Any, BinaryIO

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from toolkit.checkpoint.archives import Archive, describe_tensor, load_archive
from toolkit.errors import CheckpointError
from toolkit.threads import ThreadPool

_READERS = 4
_PART_BYTES = 16 << 20


class RangeReader(FileSystemReader):
    """DCP's reader for files of tensors that no extension has transformed."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            by_file.setdefault(info.relative_path, []).append(item)
        parts = [(name, part) for name, items in by_file.items() for part in self._parts(items)]
        if len(parts) > 1:
            with ThreadPool(_READERS) as readers:
                list(readers.map(lambda part: self._read_part(part[0], part[1], planner), parts))
        elif parts:
            self._read_part(parts[0][0], parts[0][1], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _parts(self, items: list[ReadItem]) -> list[list[ReadItem]]:
        """The items of one file in stored order, cut where a part has enough bytes for a thread."""
        items = sorted(items, key=lambda item: self.storage_data[item.storage_index].offset)
        parts: list[list[ReadItem]] = [[]]
        size = 0
        for item in items:
            if size >= _PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(item)
            size += self.storage_data[item.storage_index].length
        return parts

    def _read_part(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
            for item in items:
                self._fill(stream, item, planner)

    def _fill(self, stream: Any, item: ReadItem, planner: LoadPlanner) -> None:
        info = self.storage_data[item.storage_index]
        name = item.storage_index.fqn
        if item.type != LoadItemType.TENSOR or info.transform_descriptors:
            raise CheckpointError(f"{name}: is no plain tensor")
        chunk: Any = self._slice_file(stream, info)
        stored, begin = _describe(chunk, info.length)
        wanted = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.shape != wanted.shape:
            raise CheckpointError(f"{name}: a piece has shape {tuple(wanted.shape)}, not "
                                  f"{tuple(target.shape)}")  # fmt: skip
        if wanted.is_contiguous():
            begin += int(wanted.storage_offset()) * wanted.element_size()
            if begin + wanted.nbytes > info.length:
                raise CheckpointError(f"{name}: its file is damaged")
            is_direct = (
                target.device.type == "cpu"
                and target.dtype == wanted.dtype
                and target.is_contiguous()
            )
            buffer = target if is_direct else torch.empty(wanted.shape, dtype=wanted.dtype)
            stream.seek(info.offset + begin)
            read_into(stream, buffer, name)
        else:  # columns of a chunk: no range of the file
            is_direct = False
            chunk.seek(0)
            whole = load_archive(chunk, info.length)
            buffer = narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
        if not is_direct:
            target.copy_(buffer)
        planner.commit_tensor(item, target)


def _describe(chunk: Any, length: int) -> tuple[torch.Tensor, int]:
    """What `torch.save` wrote, on the meta device, and where in `chunk` its storage begins."""
    try:
        records = _Records(chunk, length)
        stored, record = describe_tensor(records.read("data.pkl"))
        return stored, records.begin(record)
    except (ValueError, KeyError, struct.error, UnicodeDecodeError):
        # Larger than 4 GB, or otherwise than the usual.
        archive = Archive(chunk, length)
        stored, record = describe_tensor(archive.read("data.pkl"))
        return stored, archive.begin(record)


_LIMIT_32 = 0xFFFFFFFE
_ZIP64_END = 76
"""Bytes of the zip64 records at the end, which torch writes though they say nothing more."""


class _Records:
    """Where the records of an archive by `torch.save` lie, from its first and last bytes alone.

    An archive of one tensor is a zip file without compression: a few small records, the numbers, a
    directory. torch's own reader asks for a dozen pieces of it, a third of the time of loading.

    Raises:
        ValueError, KeyError, struct.error: it is otherwise than that, or larger than 4 GB.
    """

    _EDGE = 1024

    def __init__(self, chunk: Any, length: int) -> None:
        chunk.seek(0)
        self._head = chunk.read(min(length, self._EDGE))
        chunk.seek(max(0, length - self._EDGE))
        tail = chunk.read(min(length, self._EDGE))
        end = tail.rindex(b"PK\5\6")
        count, size, offset = struct.unpack_from("<HII", tail, end + 10)
        at = len(tail) - (length - offset)
        between = end - (at + size)
        if max(count, size, offset) > _LIMIT_32 or at < 0 or between not in (0, _ZIP64_END):
            raise ValueError("not a small archive")
        self._places: dict[str, tuple[int, int]] = {}
        for _ in range(count):
            signature, method, stored, sizes = struct.unpack_from("<4s6xH8xI4x6s", tail, at)
            name_size, extra_size, comment_size = struct.unpack("<HHH", sizes)
            if signature != b"PK\1\2" or method != 0:
                raise ValueError("not a plain record")
            (header,) = struct.unpack_from("<I", tail, at + 42)
            name = tail[at + 46 : at + 46 + name_size].decode()
            self._places[name.partition("/")[2]] = (header, stored)
            at += 46 + name_size + extra_size + comment_size

    def begin(self, name: str) -> int:
        """Offset of the record's content."""
        header, _ = self._places[name]
        signature, name_size, extra_size = struct.unpack_from("<4s22xHH", self._head, header)
        if signature != b"PK\3\4":
            raise ValueError("no record there")
        return header + 30 + name_size + extra_size

    def read(self, name: str) -> bytes:
        """A record near the beginning."""
        begin, size = self.begin(name), self._places[name][1]
        if begin + size > len(self._head):
            raise ValueError("it lies further on")
        return self._head[begin : begin + size]


def read_into(stream: BinaryIO, tensor: torch.Tensor, name: str) -> None:
    """Fill a contiguous CPU `tensor` with the next bytes of `stream`.

    Raises:
        CheckpointError: `name`'s file ends before.
    """
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{name}: its file is cut short")
        done += count
