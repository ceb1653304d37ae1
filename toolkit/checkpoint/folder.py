"""Names inside a checkpoint, its metadata, and whether its files are whole.

checkpoints/step{N}.tmp/            while it is written
checkpoints/step{N}/                after the rename
    .metadata.json                  written last: the checkpoint exists from here on
    train/rank{R}.pt                state of one rank, weights_only-loadable
    model_and_optim/                torch DCP, canonical names and global shapes
    hf/                             safetensors for transformers (on request)
checkpoints/step{N}.invalid/        set aside: found damaged, or of a stretch that was started anew

A checkpoint is a folder (`Path`), or the URL (`str`) of one on an object store.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import msgspec

from toolkit.errors import CheckpointError, TrainingError
from toolkit.runs.files import CHECKPOINT_METADATA, RUN_FILES
from toolkit.runs.status import read_status
from toolkit.storage.atomic import fsync_folder, hash_file, remove_tree, unused_name, write_atomic
from toolkit.storage.foreign import decode_json, read_bytes
from toolkit.storage.remote import RemoteFolder, is_url

log = logging.getLogger(__name__)

METADATA_FILE = CHECKPOINT_METADATA
TENSORS_FOLDER = "model_and_optim"
TENSORS_METADATA = f"{TENSORS_FOLDER}/.metadata"
MODEL_PREFIX = "model."
"""Of names of weights there; what follows is the parameter's own name."""
CALLBACK_PREFIX = "callback."
"""Of names of callbacks' tensors there; the callback's name and the tensor's own follow."""
RANK_FOLDER = "train"
HF_FOLDER = "hf"
HF_CONFIG_FILE = "config.json"
INVALID_SUFFIX = ".invalid"
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 1 << 30
"""A checkpoint of thousands of ranks has as many files."""

Place = TypeVar("Place", Path, str)
PathKind = Literal["url", "missing", "file", "checkpoint", "hf", "run", "checkpoints", "folder"]
"""`hf`: a folder with the config.json of transformers; `checkpoints`: one with step folders in it,
or in its checkpoints/; `folder`: any other."""

Kind = Literal["permanent", "ephemeral", "fixed"]
"""Ordinary ones are kept by the rules of retention; of ephemeral ones just the newest, fixed ones
for ever."""

_MAPPINGS = {"model", "optim", "data", "versions", "source", "base", "adapter"}
"""Of `extra`, what is read again."""

_NO_HASH = "0" * 16

_STEP = re.compile(r"step(\d+)\Z")


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the manifest."""

    size: int
    """Bytes."""
    xxh3: str
    """Hash of the content."""


class CheckpointMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `.metadata.json`."""

    version: int
    xxh3: str = ""
    """Hash of this file, with zeros in the place of the hash; version 1 had none."""
    step: int
    tokens: int
    engine: str
    world_size: int
    files: dict[str, FileEntry]
    """Manifest: path inside the checkpoint -> size and hash."""
    kind: Kind = "permanent"
    scores: dict[str, float] = {}
    """Results of the evaluation at this step, as "val/loss"."""
    extra: dict[str, Any] = {}
    """What the caller adds: model config, data fingerprint, library versions."""


def step_folder(root: Path, step: int) -> Path:
    """`root/step{step}`."""
    return root / f"step{step}"


def step_of(name: str) -> int | None:
    """The step of a folder called `name`; None where that is not `step{N}`."""
    match = _STEP.match(name)
    return int(match[1]) if match else None


def rank_file(rank: int) -> str:
    """Where in a checkpoint the state of `rank` is."""
    return f"{RANK_FOLDER}/rank{rank}.pt"


def step_folders(root: Path) -> dict[Path, int]:
    """Every folder called `step{N}`, the uncommitted too, and its step."""
    paths = root.iterdir() if root.is_dir() else ()
    return {path: step for path in paths if (step := step_of(path.name)) is not None}


def kind_of(path: Path | str) -> PathKind:
    """What lies at a path that a user gave. Of several things, what is named first in `PathKind`.

    It is looked at, not checked: a "checkpoint" may be damaged, a "run" may hold no checkpoint.
    """
    if is_url(path):
        return "url"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return "file" if folder.exists() else "missing"
    if is_committed(folder):
        return "checkpoint"
    if (folder / HF_CONFIG_FILE).is_file():
        return "hf"
    if read_status(folder) is not None:
        return "run"
    has_steps = any(map(saved_steps, (folder, folder / RUN_FILES.checkpoints)))
    return "checkpoints" if has_steps else "folder"


def inside(folder: Place, name: str) -> Place:
    """What `folder` has under `name`."""
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def is_committed(checkpoint: Path | str) -> bool:
    """Whether it has its `.metadata.json`."""
    if isinstance(checkpoint, Path):
        return (checkpoint / METADATA_FILE).is_file()
    return RemoteFolder(checkpoint).exists(METADATA_FILE)


def saved_steps(root: Path | str) -> list[int]:
    """Steps with committed checkpoints in a folder or at a URL, ascending; not checked for
    validity."""
    if isinstance(root, Path):
        return sorted(step for path, step in step_folders(root).items() if is_committed(path))
    found = (step for step in map(step_of, RemoteFolder(root).folders()) if step is not None)
    return sorted(step for step in found if is_committed(inside(root, f"step{step}")))


def move_aside(folder: Path) -> Path:
    """Rename a step folder, or a link to one, to an unused `step{N}.invalid`, `step{N}.invalid.2`
    and so on, so that it counts no more; the new name."""
    name = unused_name(
        folder.name + INVALID_SUFFIX, lambda name: os.path.lexists(folder.with_name(name))
    )
    return folder.rename(folder.with_name(name))


def encode_metadata(metadata: CheckpointMetadata) -> bytes:
    """Content of `.metadata.json`: indented JSON that holds its own hash."""
    blank = msgspec.structs.replace(metadata, xxh3=_NO_HASH)
    raw = msgspec.json.format(msgspec.json.encode(blank))
    return raw.replace(_NO_HASH.encode(), hash_of(raw).encode(), 1)


def read_metadata(checkpoint: Path | str) -> CheckpointMetadata:
    """The committed metadata.

    Raises:
        CheckpointError: not a checkpoint, changed since it was saved, of a newer format, or naming
            files outside it.
        StorageError: the store cannot be asked.
    """
    return decode_metadata(read_raw_metadata(checkpoint), checkpoint)


def read_raw_metadata(checkpoint: Path | str) -> bytes:
    """`.metadata.json` as it is stored; raises CheckpointError where there is none."""
    try:
        if isinstance(checkpoint, str):
            return RemoteFolder(checkpoint).read(METADATA_FILE)
        path = checkpoint / METADATA_FILE
        return read_bytes(path, CheckpointError, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint}: not a committed checkpoint (no {METADATA_FILE})"
        ) from None


def decode_metadata(raw: bytes, checkpoint: Path | str) -> CheckpointMetadata:
    """The content of `.metadata.json`; `checkpoint` is for messages. Raises CheckpointError."""
    where = f"{str(checkpoint).rstrip('/')}/{METADATA_FILE}"
    metadata = decode_json(raw, where, CheckpointError, CheckpointMetadata)
    for name in _MAPPINGS & metadata.extra.keys():
        if not isinstance(metadata.extra[name] or {}, dict):
            raise CheckpointError(f"{where}: cannot be read: extra.{name} is no mapping")
    if metadata.version > FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: format {metadata.version} is newer than this toolkit's "
            f"{FORMAT_VERSION}; update the toolkit"
        )
    if metadata.version > 1 or metadata.xxh3:
        blank = raw.replace(metadata.xxh3.encode(), _NO_HASH.encode(), 1)
        if not metadata.xxh3 or hash_of(blank) != metadata.xxh3:
            raise CheckpointError(f"{checkpoint}: {METADATA_FILE} has changed since it was saved")
    for name in metadata.files:
        path = PurePosixPath(name)
        is_inside = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts
        if not is_inside or "\\" in name or "\0" in name or name in (".", METADATA_FILE):
            raise CheckpointError(f"{checkpoint}: manifest names a path outside it: {name!r}")
    return metadata


def check_files(
    checkpoint: Path | str,
    metadata: CheckpointMetadata,
    *,
    hashes: bool = False,
    only: Iterable[str] | None = None,
) -> None:
    """Compare the files (`only` these) with the manifest: sizes always, contents with `hashes`.

    Raises:
        CheckpointError: naming the first file that is missing, cut or changed.
        StorageError: the store cannot be asked.
    """
    remote = RemoteFolder(checkpoint) if isinstance(checkpoint, str) else None
    sizes = {} if remote is None else remote.sizes()
    for name in metadata.files if only is None else only:
        entry = _entry(checkpoint, metadata, name)
        if isinstance(checkpoint, Path):
            path = (checkpoint / name).resolve()
            if not path.is_relative_to(checkpoint.resolve()):
                raise CheckpointError(f"{checkpoint}: manifest names a path outside it: {name!r}")
            if path.is_file():
                sizes[name] = path.stat().st_size
        if name not in sizes:
            raise CheckpointError(f"{checkpoint}: {name} is missing")
        if sizes[name] != entry.size:
            raise CheckpointError(
                f"{checkpoint}: {name} has {sizes[name]} bytes, expected {entry.size}"
            )
        if hashes:
            found = hash_file(path) if remote is None else remote.hash(name, entry.size)
            if found != entry.xxh3:
                raise CheckpointError(f"{checkpoint}: {name} has changed since it was saved")
    for name in (TENSORS_METADATA, rank_file(0)):
        _entry(checkpoint, metadata, name)  # an empty manifest is not valid


def check_free_space(root: Path, needed: int) -> None:
    """Make the folder `root`; raise TrainingError when its disk has fewer than `needed` bytes."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise TrainingError(
            f"{needed / 1e9:.2f} GB are needed on the disk of {root}, {free / 1e9:.2f} GB are free"
        )


def commit_folder(temporary: Path, final: Path, metadata: bytes) -> None:
    """Give `temporary`, whose files are synced, the name `final`, and then its `.metadata.json`."""
    for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        fsync_folder(folder)
    if os.path.lexists(final):
        # Of a crash before the metadata, or of a stretch of training that is being repeated: then
        # it is equal, or damaged, which nobody but the user may throw away.
        if _is_damaged(final):
            log.warning("damaged checkpoint renamed: %s", move_aside(final))
        else:
            remove_tree(final)
    temporary.rename(final)
    fsync_folder(final.parent)
    write_atomic(final / METADATA_FILE, metadata)


def read_small(url: str, metadata: CheckpointMetadata, name: str) -> bytes:
    """A whole file of a stored checkpoint, compared with the manifest; raises CheckpointError."""
    entry = _entry(url, metadata, name)
    try:
        raw = RemoteFolder(url).read(name)
    except FileNotFoundError:
        raise CheckpointError(f"{url}: {name} is missing") from None
    if len(raw) != entry.size or hash_of(raw) != entry.xxh3:
        raise CheckpointError(f"{url}: {name} has changed since it was saved")
    return raw


def _entry(checkpoint: Path | str, metadata: CheckpointMetadata, name: str) -> FileEntry:
    if name not in metadata.files:
        raise CheckpointError(f"{checkpoint}: {name} is missing in its manifest")
    return metadata.files[name]


def hash_of(data: bytes) -> str:
    """xxh3_64 as hex digits, as in manifests."""
    import xxhash

    return xxhash.xxh3_64_hexdigest(data)


def _is_damaged(folder: Path) -> bool:
    try:
        if (folder / METADATA_FILE).is_file():
            check_files(folder, read_metadata(folder), hashes=True)
    except (CheckpointError, OSError):
        return True
    # Where a link leads may be out of reach for the moment.
    return folder.is_symlink()
