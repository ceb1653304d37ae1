"""Saving and loading one checkpoint: temp name, fsync, manifest, rename, `.metadata.json` last.

1. Every rank writes into `step{N}.tmp`: its tensors (DCP) and its `train/rank{R}.pt`, fsynced.
2. After a barrier rank 0 adds exports, hashes every file into the manifest, renames the folder to
   `step{N}` and writes `.metadata.json`: from then on the checkpoint exists.
3. After a second barrier older ones may be pruned.

A crash leaves either no `step{N}` with metadata, or a whole one.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from toolkit.checkpoint.layout import (
    FORMAT_VERSION,
    METADATA_FILE,
    RANK_FOLDER,
    TENSORS_FOLDER,
    CheckpointMetadata,
    FileEntry,
    read_metadata,
    saved_steps,
    step_folder,
)
from toolkit.checkpoint.tensors import load_tensors, save_tensors
from toolkit.errors import CheckpointError
from toolkit.storage.atomic import fsync_folder, hash_file, remove_tree, write_atomic


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tokens: int,
    tensors: dict[str, torch.Tensor],
    rank_state: dict[str, Any],
    engine: str,
    rank: int,
    group: dist.ProcessGroup | None,
    extra: dict[str, Any] | None = None,
    export: Callable[[Path], None] | None = None,
) -> Path:
    """Commit a checkpoint of all ranks of `group` (None: one process) and return its folder.

    Args:
        root: folder of all checkpoints of the run.
        tensors: `model.*` and `optim.*`, see `EngineRuntime.state_tensors`.
        rank_state: this rank's plain values (numbers, strings, lists, dicts, tensors).
        export: called on rank 0 with the unfinished folder, to add files to it.
    """
    final = step_folder(root, step)
    temporary = final.with_name(final.name + ".tmp")
    if rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / RANK_FOLDER).mkdir(parents=True)
    _barrier(group)
    save_tensors(temporary / TENSORS_FOLDER, tensors, group)
    _save_rank_state(temporary / RANK_FOLDER / f"rank{rank}.pt", rank_state)
    _barrier(group)
    if rank == 0:
        if export is not None:
            export(temporary)
        _commit(
            temporary,
            final,
            CheckpointMetadata(
                version=FORMAT_VERSION,
                step=step,
                tokens=tokens,
                engine=engine,
                world_size=1 if group is None else dist.get_world_size(group),
                files=_manifest(temporary),
                extra=extra or {},
            ),
        )
    _barrier(group)
    return final


def load_checkpoint(
    checkpoint: Path,
    *,
    tensors: dict[str, torch.Tensor],
    rank: int,
    group: dist.ProcessGroup | None,
) -> tuple[CheckpointMetadata, dict[str, Any]]:
    """Fill `tensors` in place; returns the metadata and this rank's state.

    A rank that did not exist at saving gets rank 0's state (data order and counters are the same on
    all ranks).
    """
    metadata = read_metadata(checkpoint)
    load_tensors(checkpoint / TENSORS_FOLDER, tensors, group)
    return metadata, load_rank_state(checkpoint, rank)


def load_rank_state(checkpoint: Path, rank: int) -> dict[str, Any]:
    """`train/rank{rank}.pt`, or rank 0's where that rank did not exist; tensors and plain values
    only, no code is run."""
    path = checkpoint / RANK_FOLDER / f"rank{rank}.pt"
    if not path.is_file():
        path = checkpoint / RANK_FOLDER / "rank0.pt"
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def prune_checkpoints(root: Path, *, keep_last: int) -> None:
    """Remove all but the newest `keep_last` committed checkpoints, and unfinished leftovers."""
    for step in saved_steps(root)[:-keep_last]:
        remove_tree(step_folder(root, step))
    for leftover in (*root.glob("step*.tmp"), *root.glob(".step*.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)


def _save_rank_state(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _manifest(folder: Path) -> dict[str, FileEntry]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, hash_file(p)) for p in files
    }


def _commit(temporary: Path, final: Path, metadata: CheckpointMetadata) -> None:
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        fsync_folder(folder)
    if final.exists():
        # A folder of this step without metadata is the leftover of a crash; with metadata it is
        # from a stretch of training that is being repeated, and equal.
        remove_tree(final)
    temporary.rename(final)
    fsync_folder(final.parent)
    write_atomic(final / METADATA_FILE, msgspec.json.format(msgspec.json.encode(metadata)))


def _barrier(group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.barrier(group=group)
