"""Loading a checkpoint of an object store: downloaded first, or read in place.

Downloading shares the bytes between ranks, checks every hash and leaves an ordinary local
checkpoint. Reading in place moves just what each rank holds, and needs no disk; of tensor files it
checks the sizes, of everything else the hashes.
"""

import io
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from toolkit.checkpoint.archives import load_archive
from toolkit.checkpoint.commit import check_free_space, commit_folder
from toolkit.checkpoint.folder import (
    METADATA_FILE,
    TENSORS_FOLDER,
    CheckpointMetadata,
    check_files,
    rank_file,
    read_metadata,
    step_folder,
)
from toolkit.checkpoint.remote import (
    decode_remote_metadata,
    find_remote_checkpoint,
    read_raw_metadata,
    share_of,
    wrong_files,
)
from toolkit.checkpoint.tensors import SafeReader, load_tensors
from toolkit.checkpoint.together import run_together
from toolkit.errors import CheckpointError, TrainingError
from toolkit.storage.foreign import reason_of
from toolkit.storage.remote import ContentError, RemoteFolder
from toolkit.storage.remote_file import RemoteFile

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_TENSORS_METADATA = f"{TENSORS_FOLDER}/.metadata"


def download_newest(
    url: str, local_root: Path, *, rank: int = 0, group: dist.ProcessGroup | None = None
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
    url: str, local_root: Path, *, rank: int = 0, group: dist.ProcessGroup | None = None
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
    raw = _run_checked(
        lambda: read_raw_metadata(url) if rank == 0 else b"", group, failing=failing
    )[0]
    metadata = decode_remote_metadata(raw, url)
    final = step_folder(local_root, metadata.step)
    temporary = final.with_name(final.name + ".tmp")
    share = share_of(metadata, rank, 1 if group is None else group.size())
    source = RemoteFolder(url)

    def begin() -> None:
        if rank == 0:
            check_free_space(local_root, sum(entry.size for entry in metadata.files.values()))
            shutil.rmtree(temporary, ignore_errors=True)
            for name in (METADATA_FILE, *metadata.files):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)

    def download() -> None:
        for name in share:
            entry = metadata.files[name]
            source.download(name, temporary / name, size=entry.size, xxh3=entry.xxh3)

    def commit() -> None:
        if rank == 0:
            commit_folder(temporary, final, raw)

    copies = _run_checked(lambda: _is_copy(final, raw, metadata, share), group, failing=failing)
    if all(copies):
        return final
    try:
        run_together(begin, group, failing=failing)
        _run_checked(download, group, failing=failing)
        run_together(commit, group, failing=failing)
    except (CheckpointError, TrainingError):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load_remote_checkpoint(
    url: str,
    *,
    tensors: dict[str, torch.Tensor],
    rank: int,
    group: dist.ProcessGroup | None,
) -> tuple[CheckpointMetadata, dict[str, Any]]:
    """`load_checkpoint` of the step folder `url`, read in place; every rank of `group` calls it.

    Raises:
        CheckpointError: on every rank: damaged, of another model, or refused.
        TrainingError: on every rank when the store cannot be reached.
    """
    failing = f"{url}: cannot be read"
    folder = RemoteFolder(url)

    def read_raw() -> bytes:
        if rank != 0:
            return b""
        raw = read_raw_metadata(url)
        if wrong := wrong_files(folder, decode_remote_metadata(raw, url)):
            raise CheckpointError(f"{url}: {wrong}")
        return raw

    def read_state() -> None:
        state.update(load_remote_rank_state(url, metadata, rank))

    metadata = decode_remote_metadata(_run_checked(read_raw, group, failing=failing)[0], url)
    load_remote_tensors(url, metadata, tensors, group)
    state: dict[str, Any] = {}
    _run_checked(read_state, group, failing=failing)
    return metadata, state


def load_remote_tensors(
    url: str,
    metadata: CheckpointMetadata,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
) -> None:
    """Fill `tensors` in place from the step folder `url`; each rank reads what it holds.

    Raises:
        CheckpointError: as `load_tensors`.
        TrainingError: on every rank when the store cannot be reached.
    """
    is_first = group is None or dist.get_rank(group) == 0
    folder = RemoteFolder(url)
    raw = _run_checked(
        lambda: _read_small(folder, metadata, _TENSORS_METADATA) if is_first else b"",
        group,
        failing=f"{url}: cannot be read",
    )[0]
    reader = RemoteReader(folder / TENSORS_FOLDER, raw, metadata)
    load_tensors(f"{folder.url}/{TENSORS_FOLDER}", tensors, group, reader=reader)


def load_remote_weights(
    url: str, weights: dict[str, torch.Tensor], group: dist.ProcessGroup | None
) -> None:
    """Fill `weights` (`model.*`) in place and leave the rest; see `load_remote_tensors`."""
    is_first = group is None or dist.get_rank(group) == 0
    raw = _run_checked(
        lambda: read_raw_metadata(url) if is_first else b"", group, failing=f"{url}: cannot be read"
    )[0]
    load_remote_tensors(url, decode_remote_metadata(raw, url), weights, group)


def load_remote_rank_state(url: str, metadata: CheckpointMetadata, rank: int) -> dict[str, Any]:
    """State of `rank`, or rank 0's where that rank did not exist; no code is run."""
    name = rank_file(rank) if rank_file(rank) in metadata.files else rank_file(0)
    raw = _read_small(RemoteFolder(url), metadata, name)
    try:
        return load_archive(io.BytesIO(raw), len(raw))
    except Exception as error:
        raise CheckpointError(f"{url}/{name}: cannot be read: {reason_of(error)}") from error


class RemoteReader(SafeReader):
    """`SafeReader` of a stored folder of tensors; `raw` is the content of its `.metadata`,
    `metadata` of the checkpoint's."""

    def __init__(self, folder: RemoteFolder, raw: bytes, metadata: CheckpointMetadata) -> None:
        prefix = f"{TENSORS_FOLDER}/"
        files = metadata.files.items()
        sizes = {k.removeprefix(prefix): e.size for k, e in files if k.startswith(prefix)}
        super().__init__(folder.url, sizes=sizes)
        self.fs: Any = _RemoteFiles(folder, raw)
        self.path = folder.url


def remote_reader(folder: RemoteFolder, metadata: CheckpointMetadata) -> RemoteReader:
    """The reader of the step folder `folder`'s tensors; raises CheckpointError."""
    raw = _read_small(folder, metadata, _TENSORS_METADATA)
    return RemoteReader(folder / TENSORS_FOLDER, raw, metadata)


def remote_shapes(url: str) -> dict[str, torch.Size]:
    """The shape of every tensor in the step folder `url`; raises CheckpointError."""
    metadata = decode_remote_metadata(read_raw_metadata(url), url)
    return remote_reader(RemoteFolder(url), metadata).shapes()


class _RemoteFiles:
    """As much of DCP's file system as reading takes."""

    def __init__(self, folder: RemoteFolder, raw: bytes) -> None:
        self._folder = folder
        self._raw = raw

    def concat_path(self, path: str, suffix: str) -> str:
        return f"{path}/{suffix}"

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[io.IOBase]:
        name = path.rpartition("/")[2]
        with io.BytesIO(self._raw) if name == ".metadata" else RemoteFile(self._folder, name) as s:
            yield s


def _read_small(folder: RemoteFolder, metadata: CheckpointMetadata, name: str) -> bytes:
    """A whole file, checked."""
    import xxhash

    entry = metadata.files.get(name)
    if entry is None:
        raise CheckpointError(f"{folder}: {name} is missing in its manifest")
    try:
        raw = folder.read(name)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: {name} is missing") from None
    if len(raw) != entry.size or xxhash.xxh3_64_hexdigest(raw) != entry.xxh3:
        raise CheckpointError(f"{folder}: {name} has changed since it was saved")
    return raw


def _is_copy(final: Path, raw: bytes, metadata: CheckpointMetadata, share: list[str]) -> bool:
    """Whether `final` is the checkpoint of `raw`; this rank looks at its share of the files."""
    try:
        own = (final / METADATA_FILE).read_bytes()
    except OSError:
        return False
    try:
        if own == raw:
            check_files(final, metadata, hashes=True, only=share)
            return True
        check_files(final, read_metadata(final))
    except (CheckpointError, OSError):
        return False
    raise CheckpointError(
        f"{final}: there is another checkpoint of this step; remove it, or name another folder"
    )


def _run_checked(
    action: Callable[[], Result], group: dist.ProcessGroup | None, *, failing: str
) -> list[Result]:
    """`run_together`, and what is wrong with the checkpoint is a CheckpointError on every rank."""

    def attempt() -> tuple[Result | None, str | None]:
        try:
            return action(), None
        except (CheckpointError, ContentError) as error:
            return None, str(error)

    results = run_together(attempt, group, failing=failing)
    for _, problem in results:
        if problem is not None:
            raise CheckpointError(problem)
    return [result for result, _ in results]  # type: ignore[misc]
