"""Tensors from torch DCP, into whatever engine holds them.

Keys are canonical names ("model.blocks.0.attention.query.weight", "optim.<name>.exp_avg"), shapes
are global. Values may be plain tensors (replicated), DTensors, or `LocalShard`s.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
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

from toolkit.checkpoint.coverage import check_coverage
from toolkit.checkpoint.pickles import unpickle
from toolkit.checkpoint.ranges import RangeReader
from toolkit.errors import CheckpointError
from toolkit.storage.atomic import hash_file
from toolkit.storage.foreign import reason_of

METADATA_NAME = ".metadata"
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


def load_tensors(
    folder: Path | str,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    *,
    reader: "SafeReader | None" = None,
) -> None:
    """Fill `tensors` in place, each rank reading just what it holds.

    Args:
        reader: of a `folder` that is not on a disk; default: `SafeReader`.

    Raises:
        CheckpointError: for a missing tensor or one of another shape.
    """
    reader = reader or SafeReader(folder)
    check_shapes(folder, reader.shapes(), tensors)
    try:
        _dcp_load(tensors, reader, group)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder}: cannot be loaded: {reason_of(cause)}") from error


def iterate_tensors(folder: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """`(name, whole CPU tensor)` of every entry under `prefix`, one at a time, in stored order.

    Raises:
        CheckpointError: naming the tensor, when it cannot be read.
    """
    reader = SafeReader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    for key, entry in _entries(metadata, prefix):
        whole = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        # `dcp.load` would go through the metadata of all tensors for each of them.
        planner = DefaultLoadPlanner()
        planner.set_up_planner(whole, Metadata({key: entry}), is_coordinator=True)
        try:
            reader.read_data(planner.create_local_plan(), planner).wait()
        except CheckpointError:
            raise
        except Exception as error:  # damaged files raise nearly anything
            raise CheckpointError(f"{folder}: {key}: cannot be read: {reason_of(error)}") from error
        yield key.removeprefix(prefix), whole[key]


def stored_types(folder: Path, prefix: str) -> dict[str, torch.dtype]:
    """Type of every tensor under `prefix` by its name."""
    metadata = SafeReader(folder).read_metadata()
    return {k.removeprefix(prefix): e.properties.dtype for k, e in _entries(metadata, prefix)}


def _entries(metadata: Metadata, prefix: str) -> list[tuple[str, TensorStorageMetadata]]:
    return [
        (key, entry)
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # "torch.distributed is disabled": which is what `no_dist` asks for.
        warnings.simplefilter("ignore", UserWarning)
        yield


def _dcp_load(
    tensors: dict[str, torch.Tensor], reader: "SafeReader", group: dist.ProcessGroup | None
) -> None:
    with _quiet():
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


class SafeReader(RangeReader):
    """DCP's reader with an unpickler that builds DCP's own records and nothing else, of checkpoints
    whose chunks make up every tensor.

    Args:
        sizes: bytes of each file in `folder`; default: as the disk tells.
    """

    def __init__(self, folder: Path | str, *, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__(folder)
        self._sizes = sizes
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor; raises CheckpointError."""
        return {name: entry.size for name, entry in _entries(self.read_metadata(), "")}

    def _read_metadata(self) -> Metadata:
        path = self._get_metadata_path()
        try:
            sizes = file_sizes(Path(self.path)) if self._sizes is None else self._sizes
            if METADATA_NAME not in sizes:
                raise ValueError("is missing")
            with self.fs.create_stream(path, "rb") as file:
                raw = file.read(sizes[METADATA_NAME])
            metadata = unpickle(raw, _NAMES)
            if not isinstance(metadata, Metadata):
                raise ValueError("holds no checkpoint metadata")
            for info in (metadata.storage_data or {}).values():
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"names a file outside its folder: {info.relative_path!r}")
            check_coverage(metadata, sizes)
        except (ValueError, CheckpointError) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {error}") from None
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(f"{path}: cannot be read: {reason_of(error)}") from None
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each ordinary file in `folder`."""
    with os.scandir(folder) as entries:
        return {e.name: e.stat().st_size for e in entries if e.is_file()}


def stored_shapes(folder: Path) -> dict[str, torch.Size]:
    """The shape of every tensor in `folder`, all of which are whole as far as their description
    tells. What was read before and has not changed is not read again.

    Raises:
        CheckpointError: one is not.
    """
    try:
        sizes = tuple(sorted(file_sizes(folder).items()))
        content = hash_file(folder / METADATA_NAME) if METADATA_NAME in dict(sizes) else ""
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None
    return _shapes(folder, sizes, content)


@functools.lru_cache(maxsize=64)
def _shapes(
    folder: Path, sizes: tuple[tuple[str, int], ...], content: str
) -> dict[str, torch.Size]:
    return SafeReader(folder).shapes()


def check_shapes(
    where: Path | str, stored: Mapping[str, torch.Size], wanted: Mapping[str, Any]
) -> None:
    """Check that a checkpoint that has tensors of these shapes has every one of `wanted`, which
    have shapes.

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
