"""Tensors from torch DCP, into whatever engine holds them.

Keys are canonical names ("model.blocks.0.attention.query.weight", "optim.<name>.exp_avg"), shapes
are global. Values may be plain tensors (replicated), DTensors, or `LocalShard`s.

DCP itself reads a stored chunk whole into new memory and copies the wanted part from there. Here
only the chunk's description is unpickled (restricted, on the meta device), which tells where in the
file its numbers lie, and each byte that a rank needs goes once, straight to its place. So a rank
that holds a tenth of a tensor reads a tenth of it, and memory beyond the tensors stays small.
"""

import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from toolkit.checkpoint.coverage import check_coverage
from toolkit.checkpoint.shard_file import bytes_of, frame_of, framed_bytes
from toolkit.checkpoint.together import run_together
from toolkit.checkpoint.untrusted import STORED_DTYPES, Archive, unpickle
from toolkit.errors import CheckpointError
from toolkit.storage.atomic import hash_file
from toolkit.storage.foreign import guard, reason_of
from toolkit.threads import ThreadPool

METADATA_NAME = ".metadata"
_READERS = 4
_PART_BYTES = 16 << 20
"""Read by one thread at a time, and held where it cannot go straight to its place."""
_NAMES: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata, TensorProperties,
            ChunkStorageMetadata, _MEM_FORMAT_ENCODING, _StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{
        ("torch", name): value
        for name, value in vars(torch).items()
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
    },
    # Of no use here, and a name that the other system does not have.
    **{
        (module, name): PurePath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}  # fmt: skip
"""What `.metadata` consists of. Not `BytesStorageMetadata`: DCP reads such entries by an ordinary
unpickler, and we write none."""


class SafeReader(FileSystemReader):
    """DCP's reader with an unpickler that builds DCP's own records and nothing else, of checkpoints
    whose chunks make up every tensor.

    Args:
        sizes: bytes of each file in `folder`; default: as the disk tells.
        files: DCP's view of a `folder` that is not on a disk.
    """

    def __init__(
        self, folder: Path | str, *, sizes: Mapping[str, int] | None = None, files: Any = None
    ) -> None:
        super().__init__(folder)
        if files is not None:
            self.fs, self.path = files, folder
        self._sizes = sizes
        self._metadata: Metadata | None = None

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor; raises CheckpointError."""
        return {name: entry.size for name, entry in _entries(self.read_metadata(), "")}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def _read_metadata(self) -> Metadata:
        path = self._get_metadata_path()
        with guard(path, CheckpointError):
            sizes = file_sizes(Path(self.path)) if self._sizes is None else self._sizes
            try:
                if METADATA_NAME not in sizes:
                    raise ValueError("is missing")
                with self.fs.create_stream(path, "rb") as file:
                    metadata = unpickle(file.read(sizes[METADATA_NAME]), _NAMES)
                if not isinstance(metadata, Metadata):
                    raise ValueError("holds no checkpoint metadata")
                for info in (metadata.storage_data or {}).values():
                    if Path(info.relative_path).name != info.relative_path:
                        raise ValueError(f"names a file outside its folder: {info.relative_path!r}")
                check_coverage(metadata, sizes)
            except ValueError as error:
                raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._place(item).relative_path, []).append(item)
        parts = [(name, part) for name, items in by_file.items() for part in self._parts(items)]
        with ThreadPool(_READERS) as readers:
            list(readers.map(lambda part: self._read_part(part[0], part[1], planner), parts))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> _StorageInfo:
        return self.storage_data[item.storage_index]

    def _parts(self, items: list[ReadItem]) -> list[list[ReadItem]]:
        """The items of one file in stored order, cut where a part has enough bytes for a thread."""
        parts: list[list[ReadItem]] = [[]]
        size = 0
        for item in sorted(items, key=lambda item: self._place(item).offset):
            if size >= _PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(item)
            size += self._place(item).length
        return parts

    def _read_part(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
            for item in items:
                self._fill(stream, item, planner)

    def _fill(self, stream: Any, item: ReadItem, planner: LoadPlanner) -> None:
        place, name = self._place(item), item.storage_index.fqn
        if item.type != LoadItemType.TENSOR:
            raise CheckpointError(f"{name}: is no tensor")
        stored, begin = self._describe(stream, item.storage_index)
        wanted = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.shape != wanted.shape:
            raise CheckpointError(
                f"{name}: its part has shape {tuple(wanted.shape)}, not {tuple(target.shape)}"
            )
        if not stored.is_contiguous():
            whole = Archive(stream, place.length, offset=place.offset).load()
            target.copy_(narrow_tensor_by_index(whole, item.storage_offsets, item.lengths))
        else:
            file = _Numbers(stream, place, begin, name)
            file.copy(stored, item.storage_offsets, item.lengths, target)
        planner.commit_tensor(item, target)

    def _describe(self, stream: Any, index: MetadataIndex) -> tuple[torch.Tensor, int]:
        """The stored chunk, on the meta device, and the offset of its numbers from where it begins.

        One that has the frame that we write, which is the rule, need not be parsed.
        """
        place = self.storage_data[index]
        entry = self.read_metadata().state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata), "`check_coverage` has seen to it"
        dtype = entry.properties.dtype
        if index.index is not None and dtype in STORED_DTYPES:
            shape = entry.chunks[index.index].sizes
            frame = frame_of(dtype, shape)
            stream.seek(place.offset)
            is_known = place.length == framed_bytes(dtype, shape)
            if is_known and stream.read(len(frame.head)) == frame.head:
                return torch.empty(shape, dtype=dtype, device="meta"), len(frame.head)
        return Archive(stream, place.length, offset=place.offset).describe_tensor()


class _Numbers:
    """The numbers of one stored tensor: in its file from `begin` on, counted from its `place`."""

    def __init__(self, stream: BinaryIO, place: _StorageInfo, begin: int, name: str) -> None:
        self._stream, self._place, self._begin, self._name = stream, place, begin, name

    def copy(
        self,
        stored: torch.Tensor,
        offsets: Sequence[int],
        lengths: Sequence[int],
        target: torch.Tensor,
    ) -> None:
        """Fill `target` with a rectangle of `stored`, which is a description on the meta device.

        It goes straight to its place where it is one stretch of the file and of memory, else by as
        many rows as `_PART_BYTES` hold: whole ones where columns are wanted.
        """
        if not stored.dim():
            return self.copy(stored[None], (0,), (1,), target[None])
        wanted = narrow_tensor_by_index(stored, offsets, lengths)
        is_stretch = wanted.is_contiguous()
        is_alike = target.dtype == wanted.dtype and target.is_contiguous()
        if is_stretch and is_alike and target.device.type == "cpu":
            self._read(wanted, target)
        elif stored.dim() > 2 and not is_stretch:
            for index in range(lengths[0]):
                self.copy(stored[offsets[0] + index], offsets[1:], lengths[1:], target[index])
        else:
            rows = wanted if is_stretch else stored.narrow(0, offsets[0], lengths[0])
            step = max(1, _PART_BYTES // max(1, rows[:1].nbytes))
            for some, into in zip(rows.split(step), target.split(step), strict=True):
                buffer = torch.empty(some.shape, dtype=some.dtype)
                self._read(some, buffer)
                if not is_stretch:
                    buffer = narrow_tensor_by_index(buffer, (0, *offsets[1:]), into.shape)
                into.copy_(buffer)
        return None

    def _read(self, wanted: torch.Tensor, into: torch.Tensor) -> None:
        begin = self._begin + int(wanted.storage_offset()) * wanted.element_size()
        if begin + wanted.nbytes > self._place.length:
            raise CheckpointError(f"{self._name}: its file is damaged")
        self._stream.seek(self._place.offset + begin)
        read_into(self._stream, into, self._name)


def read_into(stream: BinaryIO, tensor: torch.Tensor, name: str) -> None:
    """Fill a contiguous CPU `tensor` with the next bytes of `stream`.

    Raises:
        CheckpointError: `name`'s file ends before.
    """
    view = bytes_of(tensor)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{name}: its file is cut short")
        done += count


def load_tensors(
    folder: Path | str,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    *,
    reader: SafeReader | None = None,
) -> None:
    """Fill `tensors` in place, each rank reading just what it holds. Ranks may ask for different
    tensors, as the stages of a pipeline do.

    Args:
        reader: of a `folder` that is not on a disk; default: `SafeReader`.

    Raises:
        CheckpointError: on every rank, for a missing tensor or one of another shape on any.
    """
    reader = reader or SafeReader(folder)
    run_together(
        lambda: check_shapes(folder, reader.shapes(), tensors),
        group,
        failing=f"{folder}: cannot be loaded",
        finds_damage=True,
    )
    try:
        with warnings.catch_warnings():
            # "torch.distributed is disabled": which is what `no_dist` asks for.
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder}: cannot be loaded: {reason_of(cause)}") from error


def iterate_tensors(
    folder: Path, prefix: str, names: Iterable[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """`(name, whole CPU tensor)` of every entry under `prefix`, one at a time, in stored order; or
    of those called `names`, in this order.

    Raises:
        CheckpointError: naming the tensor, when it cannot be read.
    """
    reader = SafeReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    entries = dict(_entries(metadata, prefix))
    for key in entries if names is None else map(prefix.__add__, names):
        entry = entries[key]
        whole = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        # `dcp.load` would go through the metadata of all tensors for each of them.
        planner = DefaultLoadPlanner()
        planner.set_up_planner(whole, Metadata({key: entry}), is_coordinator=True)
        with guard(f"{folder}: {key}", CheckpointError):
            reader.read_data(planner.create_local_plan(), planner).wait()
        yield key.removeprefix(prefix), whole[key]


def stored_types(folder: Path, prefix: str) -> dict[str, torch.dtype]:
    """Type of every tensor under `prefix` by its name."""
    metadata = SafeReader(folder).read_metadata()
    return {k.removeprefix(prefix): e.properties.dtype for k, e in _entries(metadata, prefix)}


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shape of every tensor in `folder`, all of which are whole as far as their description
    tells. What was read before and has not changed is not read again.

    Raises:
        CheckpointError: one is not.
    """
    with guard(folder, CheckpointError):
        sizes = tuple(sorted(file_sizes(folder).items()))
        content = hash_file(folder / METADATA_NAME) if METADATA_NAME in dict(sizes) else ""
    return _shapes(folder, sizes, content)


@functools.lru_cache(maxsize=64)
def _shapes(
    folder: Path, sizes: tuple[tuple[str, int], ...], content: str
) -> dict[str, torch.Size]:
    return SafeReader(folder).shapes()


def _entries(metadata: Metadata, prefix: str) -> list[tuple[str, TensorStorageMetadata]]:
    return [
        (key, entry)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    ]


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each ordinary file in `folder`."""
    with os.scandir(folder) as entries:
        return {e.name: e.stat().st_size for e in entries if e.is_file()}


def check_shapes(
    where: Path | str, stored: Mapping[str, torch.Size], wanted: Mapping[str, Any]
) -> None:
    """Check that a checkpoint with tensors of the shapes `stored` has every one of `wanted`.

    Raises:
        CheckpointError: naming the first one that is missing, or has another shape.
    """
    for key, tensor in wanted.items():
        shape = stored.get(key)
        if shape is None:
            raise CheckpointError(
                f"{where}: has no tensor {key}; it was saved from another model or optimizer "
                "(trainer.load_weights_only=true takes the weights alone)"
            )
        if tuple(shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(shape)}, the model wants {tuple(tensor.shape)}"
            )
