"""Tensors from torch DCP, into whatever engine holds them.

Keys are canonical names ("model.blocks.0.attention.query.weight", "optim.<name>.exp_avg"), shapes
are global. Values may be plain tensors (replicated), DTensors, or `FlatShard`s.
"""

import contextlib
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from toolkit.checkpoint.ranges import RangeReader
from toolkit.errors import CheckpointError

_DCP = "torch.distributed.checkpoint"
_SAFE_NAMES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
}
"""Exact names: whole modules would let a file call functions of theirs that unpickle others.
Not `BytesStorageMetadata`: DCP reads such entries by an ordinary unpickler, and we write none."""


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
    _check_shapes(folder, reader.read_metadata(), tensors)
    try:
        _dcp_load(tensors, reader, group)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{folder}: cannot be loaded: {reason_of(cause)}") from error


def reason_of(error: BaseException) -> str:
    """Why a file cannot be loaded, in one line, without torch's advice to trust it."""
    text = str(error).strip()
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"refused: it names {named[1]}, which no checkpoint needs"
    if text.startswith("Weights only load failed"):
        return "refused: it holds more than tensors and plain values, or is damaged"
    return text.splitlines()[0] if text else type(error).__name__


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
    """DCP's reader with an unpickler that builds DCP's own records and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path()
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _RestrictedUnpickler(file).load()
        except Exception as error:  # damaged pickles raise nearly anything
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: holds no checkpoint metadata")
        for info in (metadata.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(
                    f"{path}: names a file outside its folder: {info.relative_path!r}"
                )
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_torch_value = module == "torch" and isinstance(
            getattr(torch, name, None), torch.dtype | torch.layout | torch.memory_format
        )
        if is_torch_value or (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"refused: it names {module}.{name}, which no checkpoint needs"
        )


def _check_shapes(folder: Path | str, metadata: Metadata, tensors: dict[str, torch.Tensor]) -> None:
    stored = metadata.state_dict_metadata
    for key, tensor in tensors.items():
        entry = stored.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{folder}: has no tensor {key}; it was saved from another model or optimizer "
                "(trainer.load_weights_only=true takes the weights alone)"
            )
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {key} has shape {tuple(entry.size)}, the model wants "
                f"{tuple(tensor.shape)}"
            )
