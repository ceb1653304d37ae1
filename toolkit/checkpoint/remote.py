"""Checkpoints on object stores, which have no rename: `.metadata.json` last is the commit.

    URL/step{N}/train/..., model_and_optim/..., hf/...     each rank uploads a share
    URL/step{N}/.metadata.json                             rank 0, when all shares are there

Removing goes the other way round: `.metadata.json` first. So whatever is cut short, a step with
metadata is whole. Downloading shares the bytes between ranks, checks every hash and leaves an
ordinary local checkpoint.
"""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.checkpoint.find import find_remote_checkpoint, share_of
from toolkit.checkpoint.folder import (
    INVALID_SUFFIX,
    METADATA_FILE,
    CheckpointMetadata,
    check_files,
    check_free_space,
    commit_folder,
    decode_metadata,
    is_committed,
    read_metadata,
    read_raw_metadata,
    step_folder,
)
from toolkit.checkpoint.together import ask_rank_0, place_in, run_together
from toolkit.errors import CheckpointError, StorageError, TrainingError
from toolkit.storage.atomic import unused_name
from toolkit.storage.remote import RemoteFolder

if TYPE_CHECKING:
    import torch.distributed as dist

log = logging.getLogger(__name__)


def upload_checkpoint(
    local: Path, url: str, *, rank: int = 0, group: "dist.ProcessGroup | None" = None
) -> str:
    """Copy the committed checkpoint `local` to `url/step{N}`, whose URL is returned.

    Every rank of `group` (a gloo group; None: one process) calls it, from any thread; `local` must
    stay until it returns. Each file is compared with the manifest before it leaves. One that is
    there already, whole, is left alone.

    Raises:
        TrainingError: on every rank when one failed; then there is no such checkpoint at `url`.
    """
    root = RemoteFolder(url)

    def read() -> bytes:
        if rank == 0:
            read_metadata(local)  # says what is wrong with it
        return read_raw_metadata(local) if rank == 0 else b""

    raw = run_together(read, group, failing=f"{local}: not uploaded to {url}")[0]
    metadata = decode_metadata(raw, local)
    target = root / f"step{metadata.step}"
    failing = f"{target}: not uploaded, {local} is as it was"

    def begin() -> bool:
        if rank != 0:
            return False
        if is_committed(target.url):
            try:
                check_files(target.url, read_metadata(target.url))
            except CheckpointError as error:
                log.warning("%s; it is kept as %s", error, _move_aside(root, target))
            else:
                if read_raw_metadata(target.url) == raw:
                    return True
        target.delete([METADATA_FILE])
        return False

    def upload() -> None:
        for name in share_of(metadata, *place_in(group)):
            check_files(local, metadata, hashes=True, only=[name])
            target.upload(local / name, name)

    def commit() -> None:
        if rank == 0:
            try:
                check_files(target.url, metadata)
            except CheckpointError as error:
                raise StorageError(f"{error}; another run may be using this folder") from None
            target.write(METADATA_FILE, raw)

    if not run_together(begin, group, failing=failing)[0]:
        run_together(upload, group, failing=failing)
        run_together(commit, group, failing=failing)
    return target.url


def download_newest(
    url: str, local_root: Path, *, rank: int = 0, group: "dist.ProcessGroup | None" = None
) -> Path | None:
    """The newest checkpoint of `url` that is whole once it is here, in `local_root/step{N}`; None
    where there is none. Every rank of `group` calls it; damaged ones are reported and skipped.

    Raises:
        CheckpointError: `url` is itself a step folder, and damaged.
        TrainingError: on every rank when the store cannot be reached or the disk written.
    """
    damaged: list[str] = []
    while True:
        found = find_remote_checkpoint(url, rank=rank, group=group, skip=damaged)
        if found.checkpoint is None:
            return None
        try:
            return download_checkpoint(found.checkpoint, local_root, rank=rank, group=group)
        except CheckpointError as error:
            if found.checkpoint == url.rstrip("/"):
                raise
            if rank == 0:
                log.warning("checkpoint skipped: %s", error)
            damaged.append(found.checkpoint)


def download_checkpoint(
    url: str, local_root: Path, *, rank: int = 0, group: "dist.ProcessGroup | None" = None
) -> Path:
    """Copy the step folder `url` to `local_root/step{N}`, committed like a saved one.

    `local_root` is one folder, shared by all ranks of `group`; each downloads a share. An equal,
    whole local copy is used as it is; a damaged one of the same step is replaced.

    Raises:
        CheckpointError: on every rank: damaged at `url`, or `local_root` has another, whole
            checkpoint of that step.
        TrainingError: on every rank when the store cannot be reached or the disk written.
    """
    failing = f"{url}: not downloaded"
    raw = ask_rank_0(lambda: read_raw_metadata(url), group, failing=failing)
    metadata = decode_metadata(raw, url)
    final = step_folder(local_root, metadata.step)
    temporary = final.with_name(final.name + ".tmp")
    share = share_of(metadata, *place_in(group))

    def begin() -> None:
        if rank == 0:
            check_free_space(local_root, sum(entry.size for entry in metadata.files.values()))
            shutil.rmtree(temporary, ignore_errors=True)
            for name in (METADATA_FILE, *metadata.files):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)

    def download() -> None:
        for name in share:
            entry = metadata.files[name]
            RemoteFolder(url).download(name, temporary / name, size=entry.size, xxh3=entry.xxh3)

    def commit() -> None:
        if rank == 0:
            commit_folder(temporary, final, raw)

    copies = run_together(
        lambda: _is_copy(final, raw, metadata, share), group, failing=failing, finds_damage=True
    )
    if all(copies):
        return final
    try:
        run_together(begin, group, failing=failing)
        run_together(download, group, failing=failing, finds_damage=True)
        run_together(commit, group, failing=failing)
    except (CheckpointError, TrainingError):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def set_aside_at(url: str, step: int) -> str:
    """Rename `url/step{step}` so that it counts no more; says so in a line."""
    root = RemoteFolder(url)
    folder = root / f"step{step}"
    return f"{folder}: no step of this run (any more); it is kept as {_move_aside(root, folder)}"


def _move_aside(root: RemoteFolder, folder: RemoteFolder) -> RemoteFolder:
    name = unused_name(f"{folder.name}{INVALID_SUFFIX}", set(root.folders()).__contains__)
    folder.move_to(root / name, first=METADATA_FILE)
    return root / name


def _is_copy(final: Path, raw: bytes, metadata: CheckpointMetadata, share: list[str]) -> bool:
    """Whether `final` is the checkpoint of `raw`; this rank looks at its share of the files."""
    try:
        own = read_raw_metadata(final)
        if own == raw:
            check_files(final, metadata, hashes=True, only=share)
            return True
        check_files(final, read_metadata(final))
    except (CheckpointError, OSError):
        return False
    raise CheckpointError(
        f"{final}: there is another checkpoint of this step; remove it, or name another folder"
    )
