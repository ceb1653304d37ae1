"""Saving and loading one checkpoint: temp name, fsync, manifest, rename, `.metadata.json` last.

1. Every rank writes into `step{N}.tmp`: its tensors (DCP) and its `train/rank{R}.pt`, fsynced, and
   hashes them.
2. When all have succeeded, rank 0 adds exports, completes the manifest, renames the folder to
   `step{N}` and writes `.metadata.json`: from then on the checkpoint exists.
3. When that has succeeded, older ones may be pruned.

A crash leaves either no `step{N}` with metadata, or a whole one. What fails on one rank fails
on all, and leaves the checkpoints before it as they are.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from toolkit.checkpoint.layout import (
    FORMAT_VERSION,
    HF_FOLDER,
    INVALID_SUFFIX,
    METADATA_FILE,
    RANK_FOLDER,
    TENSORS_FOLDER,
    CheckpointMetadata,
    FileEntry,
    rank_file,
    read_metadata,
    saved_steps,
    step_folder,
    step_folders,
)
from toolkit.checkpoint.ranks import run_together
from toolkit.checkpoint.tensors import load_tensors, save_tensors
from toolkit.errors import CheckpointError, TrainingError
from toolkit.storage.atomic import fsync_folder, hash_file, remove_tree, write_atomic

log = logging.getLogger(__name__)


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
        export: called on rank 0 with the unfinished folder, to add `hf/` to it; its failure is a
            warning, and the checkpoint has no `hf/`.

    Raises:
        TrainingError: on every rank when one failed; nothing is committed.
    """
    final = step_folder(root, step)
    temporary = final.with_name(final.name + ".tmp")

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / RANK_FOLDER).mkdir(parents=True)

    def write() -> dict[str, FileEntry]:
        save_tensors(temporary / TENSORS_FOLDER, tensors, group)
        _save_rank_state(temporary / rank_file(rank), rank_state)
        own = (temporary / TENSORS_FOLDER).glob(f"__{rank}_*.distcp")
        return _entries(temporary, [*own, temporary / rank_file(rank)])

    def commit() -> None:
        if rank != 0:
            return
        if export is not None:
            _try_export(export, temporary)
        files = {name: entry for entries in written for name, entry in entries.items()}
        everything = (path for path in temporary.rglob("*") if path.is_file())
        files |= _entries(
            temporary, [p for p in everything if p.relative_to(temporary).as_posix() not in files]
        )
        metadata = CheckpointMetadata(
            version=FORMAT_VERSION,
            step=step,
            tokens=tokens,
            engine=engine,
            world_size=len(written),
            files=dict(sorted(files.items())),
            extra=extra or {},
        )
        _commit(temporary, final, metadata)

    failing = f"{final}: not saved, earlier checkpoints are as they were"
    try:
        run_together(begin, group, failing=failing)
        written = run_together(write, group, failing=failing)
        run_together(commit, group, failing=failing)
    except TrainingError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
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
    path = checkpoint / rank_file(rank)
    if not path.is_file():
        path = checkpoint / rank_file(0)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def prune_checkpoints(root: Path, *, keep_last: int, newest: int) -> None:
    """Remove what is older than the last `keep_last` checkpoints up to step `newest`, which was
    just committed, and unfinished leftovers. What cannot be removed is a warning.

    Folders of later steps are not touched: nobody knows here whether they are whole.
    """
    try:
        for folder in _superseded(root, keep_last, newest):
            remove_tree(folder)
        for leftover in (*root.glob("step*.tmp"), *root.glob(".step*.tmp")):
            shutil.rmtree(leftover)
    except OSError as error:
        log.warning("%s: old checkpoints cannot be removed: %s", root, error)


def _superseded(root: Path, keep_last: int, newest: int) -> list[Path]:
    kept = [step for step in saved_steps(root) if step <= newest][-keep_last:]
    return [
        folder
        for folder, step in step_folders(root).items()
        if step < kept[0] or (step < newest and _is_uncommitted(folder))
    ]


def _is_uncommitted(folder: Path) -> bool:
    """Left by a crash between the rename and the metadata."""
    return not (folder / METADATA_FILE).is_file() and not folder.name.endswith(INVALID_SUFFIX)


def _save_rank_state(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _try_export(export: Callable[[Path], None], temporary: Path) -> None:
    try:
        export(temporary)
    except Exception as error:
        # The state that continues the run is worth more than a copy of its weights.
        log.warning("the checkpoint has no %s/: %s: %s", HF_FOLDER, type(error).__name__, error)
        shutil.rmtree(temporary / HF_FOLDER, ignore_errors=True)


def _entries(folder: Path, files: Iterable[Path]) -> dict[str, FileEntry]:
    return {
        p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, hash_file(p)) for p in files
    }


def _commit(temporary: Path, final: Path, metadata: CheckpointMetadata) -> None:
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        fsync_folder(folder)
    if final.exists():
        # Without metadata: the leftover of a crash. With it: from a stretch of training that is
        # being repeated, and equal, or damaged.
        remove_tree(final)
    temporary.rename(final)
    fsync_folder(final.parent)
    write_atomic(final / METADATA_FILE, msgspec.json.format(msgspec.json.encode(metadata)))
