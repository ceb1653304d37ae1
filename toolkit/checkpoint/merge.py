"""The mean of several checkpoints' weights, as a checkpoint of its own.

Each weight is read from all of them, added up in float64, and written before the next is read.
"""

from collections.abc import Iterator, Sequence
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
from toolkit.checkpoint.tensors import iterate_tensors, stored_shapes, stored_types
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
    weights = [_meta_weights(folder) for folder in folders]
    first = {name: (w.shape, w.dtype) for name, w in weights[0].items()}
    for checkpoint, own in zip(checkpoints, weights, strict=True):
        if {name: (w.shape, w.dtype) for name, w in own.items()} != first:
            raise CheckpointError(f"{checkpoint}: has other weights than {checkpoints[0]}")
    last = max(found, key=lambda metadata: metadata.step)
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
    resolve = shards.stream(weights[0], _means(folders, list(weights[0])))
    return write_checkpoint(save, shards, resolve, rank=0, group=None)


def _kept(metadata: CheckpointMetadata) -> dict[str, Any]:
    """What is true of the mean too."""
    return {key: value for key, value in metadata.extra.items() if key not in ("optim", "data")}


def _meta_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Stored name -> a weight's shape and type, sorted."""
    shapes, types = stored_shapes(folder), stored_types(folder, "")
    names = sorted(name for name in types if name.startswith(MODEL_PREFIX))
    return {n: torch.empty(shapes[n], dtype=types[n], device="meta") for n in names}


def _means(folders: Sequence[Path], names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    streams = [iterate_tensors(folder, "", names) for folder in folders]
    for parts in zip(*streams, strict=True):
        (name, first), *others = parts
        if not first.is_floating_point():
            yield name, first
            continue
        total = first.double()
        for _, tensor in others:
            total += tensor
        yield name, (total / len(parts)).to(first.dtype)
