"""New data sets made of the documents of others: what merging and splitting have in common.

1. The new folder is written under a hidden name beside its place, by one process at a time; there
   is room for it, or nothing is begun.
2. Every source file is read once, in blocks; its hash is checked at its end, so that damage is not
   handed on.
3. The new files are counted and hashed as they are written; everything is synced, and the folder
   gets its name in one rename. What a killed process leaves under the hidden name, the
   next one removes.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import xxhash

from toolkit.data.instances.index import IndexScan
from toolkit.data.prepare.build.split_files import SplitFiles
from toolkit.data.prepare.store.cache import build_lock
from toolkit.data.prepare.tools.scanning import Advance, memory_map, token_blocks
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    PreparedDataset,
    Split,
    read_folder,
)
from toolkit.errors import DataError
from toolkit.storage.atomic import fsync_folder, fsync_tree, write_json_atomic

RESERVE_BYTES = 16 << 20
"""Kept free beside the token files: for the manifest, the tokenizer, and others."""

Chooser = Callable[[int, int], np.ndarray]
"""`(first, end)` -> for each of these documents, the number of the output it goes to."""


def open_source(folder: str | os.PathLike[str]) -> PreparedDataset:
    """The prepared data set in `folder`.

    Raises:
        DataError: when there is none, or it is damaged.
    """
    found = read_folder(Path(folder).expanduser())
    if found is None:
        raise DataError(
            f"{folder}: no prepared data set there ({MANIFEST_NAME} is missing); give a folder "
            "that `toolkit prepare` or `toolkit data tokenize` made"
        )
    return found


def has_mask(source: PreparedDataset) -> bool:
    """Whether any split has a mask of targets."""
    return any(info.mask_hash is not None for info in source.manifest.splits.values())


def token_bytes(source: PreparedDataset) -> int:
    """Size of its .bin files."""
    tokens = sum(source.num_tokens(split) for split in SPLITS)
    return tokens * np.dtype(source.manifest.dtype).itemsize


@contextlib.contextmanager
def new_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """A hidden folder that becomes `output` when the block ends without an error.

    Args:
        num_bytes: what will be written into it.

    Raises:
        DataError: `output` exists, another process is making it, there is too little room, or it
            cannot be written.
    """
    building = output.with_name(f".{output.name}.building")
    unfinished = building / "output"
    lock = build_lock(output)
    try:
        _check_is_new(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        _check_is_new(output)
        if unfinished.exists():
            shutil.rmtree(unfinished)
        free = shutil.disk_usage(output.parent).free
        if num_bytes + RESERVE_BYTES > free:
            raise DataError(
                f"{output}: needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there; "
                "make room, or choose another --out"
            )
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            fsync_tree(unfinished)
            os.rename(unfinished, output)
            fsync_folder(output.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            # What a preparation of the same name left there to go on with is of use only without
            # the folder.
            with contextlib.suppress(OSError):
                shutil.rmtree(building) if output.exists() else building.rmdir()
    except filelock.Timeout:
        raise DataError(
            f"{output}: another process is making it; wait until it is done, or choose another "
            "--out"
        ) from None
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: cannot be read or written: {error.strerror or error}"
        ) from error
    finally:
        lock.release()


def _check_is_new(output: Path) -> None:
    if os.path.lexists(output):
        raise DataError(f"{output}: exists already; remove it, or choose another --out")


def write_dataset(folder: Path, manifest: Manifest, tokenizer_folder: Path | None) -> None:
    """dataset.json and the tokenizer beside token files that are written."""
    if tokenizer_folder is not None:
        shutil.copytree(tokenizer_folder, folder / TOKENIZER_FOLDER)
    write_json_atomic(folder / MANIFEST_NAME, manifest, sync=False)


def copy_documents(
    source: PreparedDataset,
    split: Split,
    outputs: Sequence[SplitFiles],
    choose: Chooser,
    advance: Advance,
) -> None:
    """Append every document of a split to one of `outputs`, in order.

    Raises:
        DataError: the source's files do not hold what its dataset.json says.
    """
    info, itemsize = source.manifest.splits[split], np.dtype(source.manifest.dtype).itemsize
    tokens_path = source.folder / f"{split}.bin"
    starts = memory_map(source.folder / f"{split}.idx", "uint64")
    mask = source.target_mask(split)
    _check_index(source, split, starts)
    tokens_hash, mask_hash = xxhash.xxh3_128(), xxhash.xxh3_128()
    document = 0
    for position, block in token_blocks(tokens_path, source.manifest.dtype):
        tokens_hash.update(block.data)
        end = position + len(block)
        # Documents that start in this block; the one before goes on in it.
        side: Literal["left", "right"] = "right" if end == info.num_tokens else "left"
        following = document + int(np.searchsorted(starts[document:], np.uint64(end), side))
        first = max(0, document - 1)
        bounds = np.concatenate([starts[first:following].astype(np.int64), [end]])
        lengths = np.diff(np.maximum(bounds, position))
        chosen = choose(first, following)
        targets = None if mask is None else np.asarray(mask[position:end])
        if targets is not None:
            mask_hash.update(targets.data)
        owners = np.repeat(chosen, lengths) if len(outputs) > 1 else None
        begins_here = bounds[:-1] >= position
        for number, output in enumerate(outputs):
            starting = begins_here & (chosen == number)
            if owners is None:
                output.append(block, targets, lengths, starting)
                continue
            is_mine = owners == number
            output.append(
                block[is_mine],
                targets[is_mine] if targets is not None else None,
                lengths * (chosen == number),
                starting,
            )
        document = following
        advance(len(block) * itemsize)
    expected = [("bin", tokens_hash, info.content_hash), ("mask", mask_hash, info.mask_hash)]
    for ending, found, wanted in expected:
        if wanted is not None and found.hexdigest() != wanted:
            raise DataError(
                f"{source.folder / f'{split}.{ending}'}: content differs from {MANIFEST_NAME} "
                "beside it; restore it, or prepare the data again"
            )


def _check_index(source: PreparedDataset, split: Split, starts: np.ndarray) -> None:
    scan = IndexScan(source.num_tokens(split))
    for position, block in token_blocks(source.folder / f"{split}.idx", "uint64"):
        scan.look(position, block)
    wanted = source.manifest.splits[split].index_hash
    if len(starts) == 0 or scan.wrong is not None or wanted not in (None, scan.content_hash):
        raise DataError(
            f"{source.folder / f'{split}.idx'}: does not agree with {MANIFEST_NAME} and the tokens "
            "beside it; restore it, or prepare the data again"
        )
