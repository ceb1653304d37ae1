"""Loading a committed checkpoint: from its folder, or read in place from its URL.

Reading in place moves just what each rank holds, and needs no disk; of tensor files it checks the
sizes, of everything else the hashes.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.checkpoint.folder import (
    TENSORS_FOLDER,
    TENSORS_METADATA,
    CheckpointMetadata,
    check_files,
    decode_metadata,
    rank_file,
    read_metadata,
    read_raw_metadata,
    read_small,
)
from toolkit.checkpoint.tensors import SafeReader, load_tensors, stored_shapes
from toolkit.checkpoint.together import ask_rank_0, run_together
from toolkit.checkpoint.untrusted import Archive
from toolkit.errors import CheckpointError
from toolkit.storage.foreign import check_regular, guard
from toolkit.storage.remote import RemoteFolder
from toolkit.storage.remote_file import RemoteFile


def load_checkpoint(
    checkpoint: Path | str,
    *,
    tensors: dict[str, torch.Tensor],
    rank: int,
    group: dist.ProcessGroup | None,
) -> tuple[CheckpointMetadata, dict[str, Any]]:
    """Fill `tensors` in place; returns the metadata and this rank's state. All ranks call it.

    Raises:
        CheckpointError: damaged, of another model, or refused.
        TrainingError: on every rank when the store cannot be reached.
    """
    if isinstance(checkpoint, Path):
        metadata = read_metadata(checkpoint)
        load_tensors(checkpoint / TENSORS_FOLDER, tensors, group)
        return metadata, load_rank_state(checkpoint, rank)
    metadata = _load_in_place(checkpoint, tensors, group)
    state: dict[str, Any] = {}
    run_together(
        lambda: state.update(load_rank_state(checkpoint, rank, metadata)),
        group,
        failing=f"{checkpoint}: cannot be read",
        finds_damage=True,
    )
    return metadata, state


def load_weights(
    checkpoint: Path | str, weights: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill `weights` (`model.*`) in place and leave the rest. All ranks call it."""
    if isinstance(checkpoint, Path):
        load_tensors(checkpoint / TENSORS_FOLDER, weights, group)
    else:
        _load_in_place(checkpoint, weights, group)


def load_rank_state(
    checkpoint: Path | str, rank: int, metadata: CheckpointMetadata | None = None
) -> dict[str, Any]:
    """`train/rank{rank}.pt`, or rank 0's where that rank did not exist (data order and counters are
    the same on all ranks); tensors and plain values only, no code is run. Raises CheckpointError.
    """
    own, first = rank_file(rank), rank_file(0)
    if isinstance(checkpoint, Path):
        path = checkpoint / (own if (checkpoint / own).is_file() else first)
        with guard(path, CheckpointError):
            size = check_regular(path, CheckpointError)
            with path.open("rb") as file:
                return Archive(file, size).load()
    metadata = metadata or read_metadata(checkpoint)
    name = own if own in metadata.files else first
    raw = read_small(checkpoint, metadata, name)
    with guard(f"{checkpoint}/{name}", CheckpointError):
        return Archive(io.BytesIO(raw), len(raw)).load()


def shapes_of(checkpoint: Path | str) -> dict[str, torch.Size]:
    """The shape of every tensor in it, all of which are whole as far as their description tells;
    raises CheckpointError."""
    if isinstance(checkpoint, Path):
        return stored_shapes(checkpoint / TENSORS_FOLDER)
    metadata = read_metadata(checkpoint)
    description = read_small(checkpoint, metadata, TENSORS_METADATA)
    return _reader(checkpoint, metadata, description).shapes()


def _load_in_place(
    url: str, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> CheckpointMetadata:
    """Fill `tensors` from the step folder `url`. Rank 0 reads what describes them, for all."""

    def read_descriptions() -> tuple[bytes, bytes]:
        raw = read_raw_metadata(url)
        metadata = decode_metadata(raw, url)
        check_files(url, metadata)
        return raw, read_small(url, metadata, TENSORS_METADATA)

    raw, description = ask_rank_0(read_descriptions, group, failing=f"{url}: cannot be read")
    metadata = decode_metadata(raw, url)
    reader = _reader(url, metadata, description)
    load_tensors(f"{url.rstrip('/')}/{TENSORS_FOLDER}", tensors, group, reader=reader)
    return metadata


def _reader(url: str, metadata: CheckpointMetadata, description: bytes) -> SafeReader:
    prefix = f"{TENSORS_FOLDER}/"
    files = metadata.files.items()
    sizes = {k.removeprefix(prefix): e.size for k, e in files if k.startswith(prefix)}
    folder = RemoteFolder(url) / TENSORS_FOLDER
    return SafeReader(folder.url, sizes=sizes, files=_RemoteFiles(folder, description))


class _RemoteFiles:
    """As much of DCP's file system as reading takes."""

    def __init__(self, folder: RemoteFolder, description: bytes) -> None:
        self._folder = folder
        self._description = description

    def concat_path(self, path: str, suffix: str) -> str:
        return f"{path}/{suffix}"

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[io.IOBase]:
        name = path.rpartition("/")[2]
        if name == ".metadata":
            yield io.BytesIO(self._description)
        else:
            yield RemoteFile(self._folder, name)
