"""Checkpoints on object stores, which have no rename: `.metadata.json` last is the commit.

    URL/step{N}/train/..., model_and_optim/..., hf/...     each rank uploads a share
    URL/step{N}/.metadata.json                             rank 0, when all shares are there

Removing goes the other way round: `.metadata.json` first. So whatever is cut short, a step with
metadata is whole.
"""

import logging
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch.distributed as dist

from toolkit.checkpoint.folder import (
    INVALID_SUFFIX,
    METADATA_FILE,
    CheckpointMetadata,
    check_files,
    decode_metadata,
    missing_entry,
    read_metadata,
    step_of,
)
from toolkit.checkpoint.retention import Retention, Saved
from toolkit.checkpoint.together import run_together
from toolkit.errors import CheckpointError, StorageError
from toolkit.storage.atomic import unused_name
from toolkit.storage.remote import RemoteFolder

log = logging.getLogger(__name__)


class RemoteFound(NamedTuple):
    """What `find_remote_checkpoint` saw."""

    checkpoint: str | None
    """URL of the newest whole one."""
    rejected: tuple[str, ...] = ()
    """Newer ones that are not."""


def upload_checkpoint(
    local: Path, url: str, *, rank: int = 0, group: dist.ProcessGroup | None = None
) -> str:
    """Copy the committed checkpoint `local` to `url/step{N}`, whose URL is returned.

    Every rank of `group` (a gloo group; None: one process) calls it, from any thread; `local` must
    stay until it returns. Each file is compared with the manifest before it leaves. One that is
    there already, whole, is left alone.

    Raises:
        TrainingError: on every rank when one failed; then there is no such checkpoint at `url`.
    """
    root = RemoteFolder(url)

    def read_raw() -> bytes:
        if rank != 0:
            return b""
        read_metadata(local)  # says what is wrong with it
        return (local / METADATA_FILE).read_bytes()

    raw = run_together(read_raw, group, failing=f"{local}: not uploaded to {url}")[0]
    metadata = decode_remote_metadata(raw, str(local))
    target = root / f"step{metadata.step}"
    failing = f"{target}: not uploaded, {local} is as it was"

    def begin() -> bool:
        if rank != 0:
            return False
        stored = _stored_metadata(target)
        if stored is not None and (wrong := _wrong(target, stored)):
            log.warning("%s; it is kept as %s", wrong, _move_aside(root, target))
        elif stored == raw:
            return True
        target.delete([METADATA_FILE])
        return False

    def upload() -> None:
        for name in share_of(metadata, rank, world_size):
            check_files(local, metadata, hashes=True, only=[name])
            target.upload(local / name, name)

    def commit() -> None:
        if rank == 0:
            if wrong := wrong_files(target, metadata):
                raise StorageError(f"{target}: {wrong}; another run may be using this folder")
            target.write(METADATA_FILE, raw)

    world_size = 1 if group is None else group.size()
    if not run_together(begin, group, failing=failing)[0]:
        run_together(upload, group, failing=failing)
        run_together(commit, group, failing=failing)
    return target.url


def saved_remote_steps(url: str) -> list[int]:
    """Steps with committed checkpoints under `url`, ascending; not checked for validity."""
    root = RemoteFolder(url)
    return sorted(step for step in _steps(root) if (root / f"step{step}").exists(METADATA_FILE))


def find_remote_checkpoint(
    url: str,
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    hashes: bool = False,
    skip: Iterable[str] = (),
) -> RemoteFound:
    """The newest whole checkpoint meant by `url`; every rank of `group` calls it.

    Whole: the metadata is readable, every file is there with its size, and the description of the
    tensors fits. An invalid one is
    reported with the reason and the one before is tried. Being out of reach is not being invalid.

    Args:
        url: a step folder, a folder of them, or a run folder.
        hashes: also read all contents, a share on each rank, and compare their hashes.
        skip: known to be damaged.

    Raises:
        CheckpointError: `url` is itself a step folder, and not whole.
        TrainingError: the store cannot be asked.
    """
    failing = f"{url}: cannot look for checkpoints"
    world_size = 1 if group is None else group.size()

    def check(folder: RemoteFolder) -> str | None:
        try:
            metadata = read_remote_metadata(folder.url)
            wrong = wrong_files(folder, metadata) if rank == 0 else None
            if wrong is None and rank == 0:
                check_remote_tensors(folder, metadata)
            if wrong is None and hashes:
                wrong = _changed_file(folder, metadata, share_of(metadata, rank, world_size))
        except CheckpointError as error:
            return str(error)
        return f"{folder}: {wrong}" if wrong else None

    candidates = run_together(
        lambda: _candidates(RemoteFolder(url)) if rank == 0 else [], group, failing=failing
    )[0]
    rejected: list[str] = []
    for candidate in candidates:
        folder = RemoteFolder(candidate)
        if candidate not in skip:
            results = run_together(lambda: check(folder), group, failing=failing)  # noqa: B023
            problems = [problem for problem in results if problem]
            if not problems:
                return RemoteFound(candidate, tuple(rejected))
            if candidate == url.rstrip("/"):
                raise CheckpointError(problems[0])
            if rank == 0:
                log.warning("checkpoint skipped: %s", problems[0])
        rejected.append(candidate)
    return RemoteFound(None, tuple(rejected))


def prune_remote(url: str, rule: Retention, *, newest: int) -> None:
    """Remove what `rule` does not keep of the checkpoints under `url` up to step `newest`, which
    was just committed there, and the leftovers of unfinished uploads. Damaged ones neither count
    nor go. One rank calls it. What cannot be removed is a warning.
    """
    root = RemoteFolder(url)
    try:
        whole: list[Saved] = []
        damaged: set[int] = set()
        for step in saved_remote_steps(url):
            folder = root / f"step{step}"
            raw = _stored_metadata(folder) if step <= newest else None
            if raw is not None and (wrong := _wrong(folder, raw)):
                log.warning("%s; it is left as it is", wrong)
                damaged.add(step)
            elif raw is not None:
                whole.append(rule.saved(decode_remote_metadata(raw, folder.url)))
        kept = rule.kept(whole) | damaged
        for step in _steps(root):
            if step < newest and step not in kept:
                (root / f"step{step}").remove(first=METADATA_FILE)
    except StorageError as error:
        log.warning("%s: old checkpoints cannot be removed: %s", root, error)


def read_remote_metadata(url: str) -> CheckpointMetadata:
    """Metadata of the step folder `url`, its paths checked.

    Raises:
        CheckpointError: not a checkpoint, changed, of a newer format, or pointing outside.
        StorageError: the store cannot be asked.
    """
    return decode_remote_metadata(read_raw_metadata(url), url)


def read_raw_metadata(url: str) -> bytes:
    """`.metadata.json` of the step folder `url` as it is stored."""
    raw = _stored_metadata(RemoteFolder(url))
    if raw is None:
        raise CheckpointError(f"{url}: not a committed checkpoint (no {METADATA_FILE})")
    return raw


def decode_remote_metadata(raw: bytes, url: str) -> CheckpointMetadata:
    """`raw` decoded, its paths checked; raises CheckpointError."""
    metadata = decode_metadata(raw, url)
    for name in metadata.files:
        path = PurePosixPath(name)
        plain = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts
        if not plain or "\\" in name or "\0" in name or name in (".", METADATA_FILE):
            raise CheckpointError(f"{url}: manifest names a path outside it: {name!r}")
    return metadata


def wrong_files(folder: RemoteFolder, metadata: CheckpointMetadata) -> str | None:
    """Which file of the manifest is missing or has another size."""
    sizes = folder.sizes()
    for name, entry in metadata.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != entry.size:
            return f"{name} has {sizes[name]} bytes, expected {entry.size}"
    return missing_entry(metadata)


def check_remote_tensors(folder: RemoteFolder, metadata: CheckpointMetadata) -> None:
    """Check that the tensors of a step folder are whole, as far as their description tells.

    Raises:
        CheckpointError: they are not.
    """
    from toolkit.checkpoint.remote_load import remote_reader

    remote_reader(folder, metadata).read_metadata()


def _wrong(folder: RemoteFolder, raw: bytes) -> str | None:
    """What is wrong with a committed step folder, by names and sizes."""
    try:
        wrong = wrong_files(folder, decode_remote_metadata(raw, folder.url))
    except CheckpointError as error:
        return str(error)
    return f"{folder}: {wrong}" if wrong else None


def _move_aside(root: RemoteFolder, folder: RemoteFolder) -> RemoteFolder:
    name = unused_name(f"{folder.name}{INVALID_SUFFIX}", set(root.folders()).__contains__)
    folder.move_to(root / name, first=METADATA_FILE)
    return root / name


def share_of(metadata: CheckpointMetadata, rank: int, world_size: int) -> list[str]:
    """The files that `rank` of `world_size` moves: about as many bytes as every other."""
    loads = [0] * world_size
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for name, entry in sorted(metadata.files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        loads[least] += entry.size
        shares[least].append(name)
    return shares[rank]


def _stored_metadata(folder: RemoteFolder) -> bytes | None:
    try:
        return folder.read(METADATA_FILE)
    except FileNotFoundError:
        return None


def _changed_file(
    folder: RemoteFolder, metadata: CheckpointMetadata, names: Iterable[str]
) -> str | None:
    for name in names:
        entry = metadata.files[name]
        try:
            if folder.size(name) != entry.size:
                return f"{name} has {folder.size(name)} bytes, expected {entry.size}"
            if folder.hash(name, entry.size) != entry.xxh3:
                return f"{name} has changed since it was saved"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def _candidates(url: RemoteFolder) -> list[str]:
    if url.exists(METADATA_FILE):
        return [url.url]
    for root in (url, url / "checkpoints"):
        if steps := saved_remote_steps(root.url):
            return [f"{root}/step{step}" for step in reversed(steps)]
    return []


def _steps(root: RemoteFolder) -> list[int]:
    """Of every folder that looks like a checkpoint, committed or not."""
    return [step for name in root.folders() if (step := step_of(name)) is not None]
