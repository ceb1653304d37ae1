"""A committed checkpoint wherever it lies: a folder (`Path`), or a URL (`str`) read in place."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.checkpoint.commit import load_checkpoint, load_rank_state
from toolkit.checkpoint.folder import TENSORS_FOLDER, CheckpointMetadata, read_metadata
from toolkit.checkpoint.remote import read_remote_metadata
from toolkit.checkpoint.remote_load import (
    load_remote_checkpoint,
    load_remote_rank_state,
    load_remote_weights,
    remote_shapes,
)
from toolkit.checkpoint.tensors import load_tensors, stored_shapes


def metadata_of(checkpoint: Path | str) -> CheckpointMetadata:
    """Its metadata; raises CheckpointError."""
    if isinstance(checkpoint, Path):
        return read_metadata(checkpoint)
    return read_remote_metadata(checkpoint)


def rank_state_of(checkpoint: Path | str, rank: int) -> dict[str, Any]:
    """State of `rank`, or rank 0's where that rank did not exist; raises CheckpointError."""
    if isinstance(checkpoint, Path):
        return load_rank_state(checkpoint, rank)
    return load_remote_rank_state(checkpoint, metadata_of(checkpoint), rank)


def shapes_of(checkpoint: Path | str) -> dict[str, torch.Size]:
    """The shape of every tensor in it; raises CheckpointError."""
    if isinstance(checkpoint, Path):
        return stored_shapes(checkpoint / TENSORS_FOLDER)
    return remote_shapes(checkpoint)


def load_everything(
    checkpoint: Path | str,
    *,
    tensors: dict[str, torch.Tensor],
    rank: int,
    group: dist.ProcessGroup | None,
) -> tuple[CheckpointMetadata, dict[str, Any]]:
    """Fill `tensors` in place; returns the metadata and this rank's state. All ranks call it."""
    if isinstance(checkpoint, Path):
        return load_checkpoint(checkpoint, tensors=tensors, rank=rank, group=group)
    return load_remote_checkpoint(checkpoint, tensors=tensors, rank=rank, group=group)


def load_weights(
    checkpoint: Path | str, weights: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill `weights` (`model.*`) in place and leave the rest. All ranks call it."""
    if isinstance(checkpoint, Path):
        load_tensors(checkpoint / TENSORS_FOLDER, weights, group)
    else:
        load_remote_weights(checkpoint, weights, group)
