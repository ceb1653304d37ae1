"""Saving one checkpoint: temporary name, fsync, manifest, rename, `.metadata.json` last.

1. Every rank writes into `step{N}.tmp`: its tensors (DCP) and its `train/rank{R}.pt`, hashed and
   fsynced.
2. When all have succeeded, rank 0 adds exports, completes the manifest, renames the folder to
   `step{N}` and writes `.metadata.json`: from then on the checkpoint exists.
3. When that has succeeded, older ones may be pruned (retention.py).

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

from toolkit.checkpoint.folder import (
    FORMAT_VERSION,
    HF_FOLDER,
    RANK_FOLDER,
    TENSORS_FOLDER,
    CheckpointMetadata,
    FileEntry,
    Kind,
    check_free_space,
    commit_folder,
    encode_metadata,
    rank_file,
    step_folder,
)
from toolkit.checkpoint.save_plan import Resolve, ShardWriter, WrittenShards
from toolkit.checkpoint.together import gather, run_together
from toolkit.errors import TrainingError
from toolkit.storage.atomic import hash_file

log = logging.getLogger(__name__)

SPARE_BYTES = 64 << 20
"""Room left for what is not tensors: exports, metadata, the run's other files."""


class Save(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint to be written: what it is, and what this rank adds to it."""

    root: Path
    """Folder of all checkpoints of the run."""
    step: int
    tokens: int
    engine: str
    kind: Kind = "permanent"
    scores: dict[str, float] = {}
    """Results of the evaluation at this step, for `keep_best`."""
    extra: dict[str, Any] = {}
    """Goes into the metadata."""
    rank_state: Callable[[], dict[str, Any]]
    """This rank's plain values (numbers, strings, lists, dicts, tensors); asked when writing."""
    export: Callable[[Path], None] | None = None
    """Called on rank 0 with the unfinished folder, to add `hf/` to it; its failure is a warning,
    and the checkpoint has no `hf/`."""


def save_checkpoint(
    root: Path,
    *,
    tensors: dict[str, torch.Tensor],
    rank_state: dict[str, Any],
    rank: int,
    group: dist.ProcessGroup | None,
    **fields: Any,
) -> Path:
    """Commit one checkpoint at once: `tensors` are `model.*` and `optim.*` (see
    `Engine.state_tensors`), `fields` the others of `Save`; see `write_checkpoint`."""
    if rank == 0:
        root.mkdir(parents=True, exist_ok=True)
    shards = ShardWriter(group)
    save = Save(root=root, rank_state=lambda: rank_state, **fields)
    return write_checkpoint(save, shards, shards.live(tensors), rank=rank, group=group)


def write_checkpoint(
    save: Save,
    shards: ShardWriter,
    resolve: Resolve,
    *,
    rank: int,
    group: dist.ProcessGroup | None,
) -> Path:
    """Commit a checkpoint of all ranks of `group` (None: one process) and return its folder.

    `shards` and `resolve` are the tensors, from `shards.live`, `copy` or `stream`.

    Raises:
        TrainingError: on every rank when one failed; nothing is committed.
    """
    final = step_folder(save.root, save.step)
    temporary = final.with_name(final.name + ".tmp")

    def begin() -> None:
        if rank == 0:
            save.root.parent.stat()  # FileNotFoundError for a run folder that was removed
            check_free_space(save.root, sum(sizes) + SPARE_BYTES)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()  # not its parents: a run folder that was removed stays so
            (temporary / RANK_FOLDER).mkdir()

    def write() -> WrittenShards:
        written = shards.write(temporary / TENSORS_FOLDER, resolve)
        _save_rank_state(temporary / rank_file(rank), save.rank_state())
        files = {f"{TENSORS_FOLDER}/{name}": entry for name, entry in written.files.items()}
        return WrittenShards(written.results, files | _entries(temporary, [rank_file(rank)]))

    def commit() -> None:
        if rank != 0:
            return
        shards.write_metadata(temporary / TENSORS_FOLDER, [part.results for part in written])
        if save.export is not None:
            _try_export(save.export, temporary)
        files = {name: entry for part in written for name, entry in part.files.items()}
        present = {p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file()}
        files |= _entries(temporary, present - files.keys())
        metadata = CheckpointMetadata(
            version=FORMAT_VERSION,
            step=save.step,
            tokens=save.tokens,
            engine=save.engine,
            world_size=len(written),
            kind=save.kind,
            scores=save.scores,
            files=dict(sorted(files.items())),
            extra=save.extra,
        )
        commit_folder(temporary, final, encode_metadata(metadata))

    failing = f"{final}: not saved, earlier checkpoints are as they were"
    try:
        sizes = gather(shards.nbytes, group)
        run_together(begin, group, failing=failing)
        written = run_together(write, group, failing=failing)
        run_together(commit, group, failing=failing)
    except TrainingError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


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


def _entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    paths = {name: folder / name for name in names}
    return {name: FileEntry(p.stat().st_size, hash_file(p)) for name, p in paths.items()}
