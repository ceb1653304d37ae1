"""Names inside a checkpoint, its metadata, and whether its files are whole.

checkpoints/step{N}.tmp/            while it is written
checkpoints/step{N}/                after the rename
    .metadata.json                  written last: the checkpoint exists from here on
    train/rank{R}.pt                state of one rank, weights_only-loadable
    model_and_optim/                torch DCP, canonical names and global shapes
    hf/                             safetensors for transformers (on request)
checkpoints/step{N}.invalid/        set aside: found damaged, or of a stretch that was started anew
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from toolkit.errors import CheckpointError
from toolkit.storage.atomic import hash_file, unused_name
from toolkit.storage.foreign import decode_json, read_bytes

METADATA_FILE = ".metadata.json"
TENSORS_FOLDER = "model_and_optim"
MODEL_PREFIX = "model."
"""Of names of weights there; what follows is the parameter's own name."""
RANK_FOLDER = "train"
HF_FOLDER = "hf"
INVALID_SUFFIX = ".invalid"
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 1 << 30
"""A checkpoint of thousands of ranks has as many files."""

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


def saved_steps(root: Path) -> list[int]:
    """Steps with a committed folder under `root`, ascending; not checked for validity."""
    if not root.is_dir():
        return []
    steps = ((step_of(p.name), p) for p in root.iterdir())
    return sorted(n for n, p in steps if n is not None and (p / METADATA_FILE).is_file())


def step_folders(root: Path) -> dict[Path, int]:
    """Every folder called `step{N}`, the uncommitted too, and its step."""
    if not root.is_dir():
        return {}
    steps = ((p, step_of(p.name)) for p in root.iterdir())
    return {path: step for path, step in steps if step is not None}


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
    return raw.replace(_NO_HASH.encode(), _hash(raw).encode(), 1)


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """The committed metadata.

    Raises:
        CheckpointError: not a checkpoint, changed since it was saved, or of a newer format.
    """
    try:
        raw = read_bytes(checkpoint / METADATA_FILE, CheckpointError, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint}: not a committed checkpoint (no {METADATA_FILE})"
        ) from None
    return decode_metadata(raw, checkpoint)


def decode_metadata(raw: bytes, checkpoint: Path | str) -> CheckpointMetadata:
    """The content of `.metadata.json`; `checkpoint` is for messages.

    Raises:
        CheckpointError: changed since it was saved, or of a newer format.
    """
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
        if not metadata.xxh3 or _hash(blank) != metadata.xxh3:
            raise CheckpointError(f"{checkpoint}: {METADATA_FILE} has changed since it was saved")
    return metadata


def check_files(
    checkpoint: Path,
    metadata: CheckpointMetadata,
    *,
    hashes: bool = False,
    only: Iterable[str] | None = None,
) -> None:
    """Compare the files (`only` these) with the manifest: sizes always, contents with `hashes`.

    Raises:
        CheckpointError: naming the first file that is missing, cut or changed.
    """
    for name in metadata.files if only is None else only:
        entry = metadata.files.get(name)
        if entry is None:
            raise CheckpointError(f"{checkpoint}: {name} is missing in its manifest")
        path = (checkpoint / name).resolve()
        if not path.is_relative_to(checkpoint.resolve()):
            raise CheckpointError(f"{checkpoint}: manifest names a path outside it: {name!r}")
        if not path.is_file():
            raise CheckpointError(f"{checkpoint}: {name} is missing")
        if path.stat().st_size != entry.size:
            raise CheckpointError(
                f"{checkpoint}: {name} has {path.stat().st_size} bytes, expected {entry.size}"
            )
        if hashes and hash_file(path) != entry.xxh3:
            raise CheckpointError(f"{checkpoint}: {name} has changed since it was saved")
    if missing := missing_entry(metadata):
        raise CheckpointError(f"{checkpoint}: {missing}")


def missing_entry(metadata: CheckpointMetadata) -> str | None:
    """What a manifest lacks that every checkpoint has: an empty one is not valid."""
    for name in (f"{TENSORS_FOLDER}/.metadata", rank_file(0)):
        if name not in metadata.files:
            return f"{name} is missing in its manifest"
    return None


def _hash(data: bytes) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(data)
