"""The mean of several checkpoints' weights, as a checkpoint of its own.

Each weight is read from all of them, added up in float64, and written before the next is read.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.checkpoint.commit import Save, write_checkpoint
from toolkit.checkpoint.folder import (
    MODEL_PREFIX,
    TENSORS_FOLDER,
    CheckpointMetadata,
    check_files,
    read_metadata,
)
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.tensors import iterate_tensors, stored_types
from toolkit.errors import CheckpointError


def merge_checkpoints(checkpoints: Sequence[Path], root: Path) -> Path:
    """Write `root/step{N}`, N the last step: the mean of the weights in `checkpoints`, without an
    optimizer. Its metadata name the steps (`extra["merged"]`). One process calls it.

    Raises CheckpointError where one is damaged or of another model, TrainingError where it cannot
    be written.
    """
    if not checkpoints:
        raise CheckpointError("no checkpoint is given to be merged")
    found = [read_metadata(checkpoint) for checkpoint in checkpoints]
    for checkpoint, metadata in zip(checkpoints, found, strict=True):
        check_files(checkpoint, metadata)
        if metadata.extra.get("model") != found[0].extra.get("model"):
            raise CheckpointError(f"{checkpoint}: is of another model than {checkpoints[0]}")
        if metadata.extra.get("base") != found[0].extra.get("base"):
            raise CheckpointError(f"{checkpoint}: its adapter has another base")
    folders = [checkpoint / TENSORS_FOLDER for checkpoint in checkpoints]
    types = [_weight_types(folder) for folder in folders]
    for checkpoint, own in zip(checkpoints, types, strict=True):
        if own != types[0]:
            name = min(own.items() ^ types[0].items())[0]
            raise CheckpointError(f"{checkpoint}: {name} is not what it is in {checkpoints[0]}")
    last = max(found, key=lambda metadata: metadata.step)
    shapes = {name: tensor for name, tensor in _meta(folders[0])}
    shards = ShardWriter(None)
    save = Save(
        root=root,
        step=last.step,
        tokens=last.tokens,
        engine=last.engine,
        rank_state=dict,
        extra={**_kept(last), "merged": [metadata.step for metadata in found]},
    )
    root.mkdir(parents=True, exist_ok=True)
    resolve = shards.stream(shapes, _means(folders))
    return write_checkpoint(save, shards, resolve, rank=0, group=None)


def _kept(metadata: CheckpointMetadata) -> dict[str, Any]:
    """What is true of the mean too."""
    return {key: value for key, value in metadata.extra.items() if key not in ("optim", "data")}


def _weight_types(folder: Path) -> Mapping[str, Any]:
    return stored_types(folder, MODEL_PREFIX)


def _means(folders: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    names = sorted(stored_types(folders[0], MODEL_PREFIX))
    with contextlib.ExitStack() as stack:
        streams = [iterate_tensors(folder, MODEL_PREFIX, names) for folder in folders]
        for stream in streams:
            stack.callback(stream.close)  # type: ignore[attr-defined]
        for parts in zip(*streams, strict=True):
            name, first = parts[0]
            total = first.double() if first.is_floating_point() else first
            for _, tensor in parts[1:] if first.is_floating_point() else ():
                total += tensor
            mean = total / len(parts) if first.is_floating_point() else total
            yield MODEL_PREFIX + name, mean.to(first.dtype)
