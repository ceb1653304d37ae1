"""One prepared data set cut anew: another validation share, or several parts."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolkit.data.prepare.build.split_files import SplitFiles
from toolkit.data.prepare.tools.rewrite import (
    Chooser,
    copy_documents,
    has_mask,
    new_folder,
    open_source,
    token_bytes,
    write_dataset,
)
from toolkit.data.prepare.tools.scanning import memory_map, scan_progress
from toolkit.data.tokens.prepared import SPLITS, Manifest, PreparedDataset, Split, SplitInfo
from toolkit.errors import ConfigError, DataError


def split_validation(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    validation_fraction: float,
    *,
    progress: bool = True,
) -> PreparedDataset:
    """All documents of `folder`, train's before val's, held out anew by a hash of their numbers.

    The same data and fraction give the same result, and a larger fraction holds out all that a
    smaller one does. The names of documents are not known any more, so the choice is not that of
    preparing the text with this fraction. `text_bytes` is shared out by tokens.

    Raises:
        ConfigError: the fraction is not in [0, 1).
        DataError: the data set is damaged, all documents would be held out, `output` exists, or
            there is no room for it.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise ConfigError(f"--validation-fraction must be in [0, 1): {validation_fraction}")
    source, output = open_source(folder), Path(output).expanduser()
    dtype, is_masked = source.manifest.dtype, has_mask(source)
    with (
        new_folder(output, _num_bytes(source)) as unfinished,
        scan_progress("splitting", token_bytes(source), enabled=progress) as advance,
    ):
        files = [SplitFiles(unfinished, name, dtype, has_mask=is_masked) for name in SPLITS]
        try:
            numbered = 0
            for split in _splits(source):
                choose = _hashed(validation_fraction, numbered)
                copy_documents(source, split, files, choose, advance)
                numbered += source.num_documents(split)
        finally:
            for file in files:
                file.close()
        _share_text(source.manifest.splits.values(), files)
        splits = _finish(files)
        if "train" not in splits:
            raise DataError(
                f"{source.folder}: all {numbered:,} documents would be held out; "
                "give a smaller --validation-fraction"
            )
        manifest = _manifest(source, splits, {"validation_fraction": validation_fraction})
        write_dataset(unfinished, manifest, source.tokenizer_folder)
    return PreparedDataset(output, manifest)


def split_parts(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    num_parts: int,
    *,
    progress: bool = True,
) -> list[PreparedDataset]:
    """`num_parts` data sets `part-0`, `part-1`, ... in `output`, of about equal numbers of tokens.

    Documents stay whole and in order; train and val are each cut so. Small validation splits may
    not reach every part. `text_bytes` is shared out by tokens; what reading the text repaired and
    left out is counted in the first part.

    Raises:
        ConfigError: fewer than two parts.
        DataError: the data set is damaged or has too few documents, `output` exists, or there is
            no room for it.
    """
    if num_parts < 2:
        raise ConfigError(f"--parts must be at least 2: {num_parts}")
    source, output = open_source(folder), Path(output).expanduser()
    width = len(str(num_parts - 1))
    names = [f"part-{number:0{width}d}" for number in range(num_parts)]
    parts: list[dict[str, SplitInfo]] = [{} for _ in names]
    with (
        new_folder(output, _num_bytes(source)) as unfinished,
        scan_progress("splitting", token_bytes(source), enabled=progress) as advance,
    ):
        for name in names:
            (unfinished / name).mkdir()
        for split in _splits(source):
            info = source.manifest.splits[split]
            is_masked = info.mask_hash is not None
            files = [
                SplitFiles(unfinished / name, split, source.manifest.dtype, has_mask=is_masked)
                for name in names
            ]
            try:
                copy_documents(source, split, files, _even(source, split, num_parts), advance)
            finally:
                for file in files:
                    file.close()
            _share_text([info], files)
            for part, file in zip(parts, files, strict=True):
                part.update(_finish([file]))
        if not all("train" in part for part in parts):
            raise DataError(
                f"{source.folder}: its {source.num_documents('train'):,} training documents cannot "
                f"be cut into {num_parts} parts of about equal tokens; give a smaller --parts"
            )
        made: list[PreparedDataset] = []
        for name, part in zip(names, parts, strict=True):
            manifest = _manifest(source, part, {"part": name, "parts": num_parts})
            if made:
                # What reading the text repaired and left out is told once.
                manifest = msgspec.structs.replace(
                    manifest,
                    replaced_bytes=0,
                    skipped_documents=0,
                    cut_documents=0,
                    filtered_documents={},
                    left_out_files={},
                )
            write_dataset(unfinished / name, manifest, source.tokenizer_folder)
            made.append(PreparedDataset(output / name, manifest))
    return made


def _hashed(fraction: float, offset: int) -> Chooser:
    """1 (val) where the hash of a document's number, as a number in [0, 1), is below `fraction`."""
    limit = np.uint64(min(int(fraction * 2**64), 2**64 - 1))

    def choose(first: int, end: int) -> np.ndarray:
        numbers = np.arange(offset + first, offset + end, dtype=np.uint64)
        return (_mix(numbers) < limit).astype(np.int64)

    return choose


def _mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014): 64 well-mixed bits of each number."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _even(source: PreparedDataset, split: Split, num_parts: int) -> Chooser:
    """Each document goes where its middle token lies."""
    starts = memory_map(source.folder / f"{split}.idx", "uint64")
    num_tokens = source.num_tokens(split)

    def choose(first: int, end: int) -> np.ndarray:
        bounds = starts[first : end + 1].astype(np.int64)
        if end >= len(starts):
            bounds = np.append(bounds, num_tokens)
        middles = (bounds[:-1] + bounds[1:]) // 2
        limits = np.arange(1, num_parts) * num_tokens // num_parts
        return np.searchsorted(limits, middles, side="right")

    return choose


def _share_text(infos: Any, files: Sequence[SplitFiles]) -> None:
    text_bytes = sum(info.text_bytes for info in infos)
    num_tokens = sum(file.num_tokens for file in files)
    given = taken = 0
    for file in files:
        taken += file.num_tokens
        file.text_bytes = text_bytes * taken // max(1, num_tokens) - given
        given += file.text_bytes


def _finish(files: Sequence[SplitFiles]) -> dict[str, SplitInfo]:
    found = {file.split: file.finish() for file in files}
    return {split: info for split, info in found.items() if info is not None}


def _manifest(
    source: PreparedDataset, splits: dict[str, SplitInfo], how: dict[str, Any]
) -> Manifest:
    settings = {"split_of": source.folder.name, **how}
    return msgspec.structs.replace(source.manifest, splits=splits, settings=settings)


def _splits(source: PreparedDataset) -> list[Split]:
    return [split for split in SPLITS if source.has_split(split)]


def _num_bytes(source: PreparedDataset) -> int:
    documents = sum(source.num_documents(split) for split in SPLITS)
    tokens = sum(source.num_tokens(split) for split in SPLITS)
    return token_bytes(source) + documents * 8 + tokens * has_mask(source)
