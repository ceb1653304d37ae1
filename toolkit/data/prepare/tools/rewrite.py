"""New data sets made of the documents of others: several merged, or one cut anew.

1. The new folder is written under a hidden name beside its place, by one process at a time; there
   is room for it, or nothing is begun.
2. Every source file is read once, in blocks; its hash is checked at its end, so that damage is not
   handed on.
3. The new files are counted and hashed as they are written; everything is synced, and the folder
   gets its name in one rename. What a killed process leaves under the hidden name, the
   next one removes.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import xxhash

from toolkit.data.prepare.build.prepare import write_dataset
from toolkit.data.prepare.build.split_files import (
    Chooser,
    SplitFiles,
    SplitWriter,
    copy_documents,
    finish_all,
    memory_map,
)
from toolkit.data.prepare.store.cache import build_lock
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    PreparedDataset,
    Split,
    SplitInfo,
    TokenDType,
    read_folder,
)
from toolkit.errors import ConfigError, DataError
from toolkit.storage import atomic
from toolkit.storage.locks import locked
from toolkit.storage.progress import Advance, byte_progress
from toolkit.wording import count

RESERVE_BYTES = 16 << 20
"""Kept free beside the token files: for the manifest, the tokenizer, and others."""

_POLICIES = {
    "tokenizer_fingerprint": "tokenizer",
    "vocab_size": "vocabulary size",
    "eos_id": "end-of-document id",
    "append_eos": "append_eos",
    "bos_id": "start-of-document id",
    "prepend_bos": "prepend_bos",
}


def merge_datasets(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> PreparedDataset:
    """All documents of `folders`, in this order, as the data set `output`.

    The type of the ids is the widest of theirs. Where one has a mask of targets, so has the
    result: all tokens of the others are targets.

    Raises:
        ConfigError: fewer than two data sets, or one twice.
        DataError: they differ in tokenizer or in how documents start and end; one is damaged;
            `output` exists, or there is no room for it.
    """
    if len(folders) < 2:
        raise ConfigError("merge needs at least two data sets; give two or more folders")
    places = [Path(folder).expanduser().resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{folder}: given twice; to see data more often, use a mix")
    sources = [_open_source(folder) for folder in folders]
    _check_same(sources)
    manifests = [source.manifest for source in sources]
    is_wide = any(manifest.dtype == "uint32" for manifest in manifests)
    text = "\n".join(manifest.source_fingerprint for manifest in manifests)
    merged = msgspec.structs.replace(
        manifests[0],
        dtype="uint32" if is_wide else "uint16",
        source_fingerprint=xxhash.xxh3_64_hexdigest(text.encode()),
        replaced_bytes=sum(manifest.replaced_bytes for manifest in manifests),
        skipped_documents=sum(manifest.skipped_documents for manifest in manifests),
        cut_documents=sum(manifest.cut_documents for manifest in manifests),
        filtered_documents=_sums([manifest.filtered_documents for manifest in manifests]),
        left_out_files=_sums([manifest.left_out_files for manifest in manifests]),
        settings={"merged": [source.folder.name for source in sources]},
    )
    tokenizer = next((s.tokenizer_folder for s in sources if s.tokenizer_folder), None)
    with _rewriting("merging", sources, output, merged.dtype, progress=progress) as rewriting:
        splits: dict[str, SplitInfo] = {}
        for split in SPLITS:
            files = [_files(source, split) for source in sources if source.has_split(split)]
            choosers = [_all_to_first] * len(files)
            splits |= rewriting.copy(files, choosers, [("", split)], _has_mask(files))[""]
        rewriting.write("", merged, splits, tokenizer)
    return rewriting.made[0]


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
    source = _open_source(folder)
    files = [_files(source, split) for split in SPLITS if source.has_split(split)]
    numbers = [0, *itertools.accumulate(file.info.num_documents for file in files)]
    choosers = [_hashed(validation_fraction, number) for number in numbers[:-1]]
    dtype = source.manifest.dtype
    with _rewriting("splitting", [source], output, dtype, progress=progress) as rewriting:
        outputs = [("", split) for split in SPLITS]
        splits = rewriting.copy(files, choosers, outputs, _has_mask(files))[""]
        if "train" not in splits:
            raise DataError(
                f"{source.folder}: all {count(numbers[-1], 'document')} would be held out; give a "
                "smaller --validation-fraction"
            )
        settings = {"split_of": source.folder.name, "validation_fraction": validation_fraction}
        manifest = msgspec.structs.replace(source.manifest, settings=settings)
        rewriting.write("", manifest, splits, source.tokenizer_folder)
    return rewriting.made[0]


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
    source = _open_source(folder)
    width = len(str(num_parts - 1))
    names = [f"part-{number:0{width}d}" for number in range(num_parts)]
    dtype = source.manifest.dtype
    with _rewriting("splitting", [source], output, dtype, progress=progress) as rewriting:
        parts: dict[str, dict[str, SplitInfo]] = {name: {} for name in names}
        for split in (split for split in SPLITS if source.has_split(split)):
            files = [_files(source, split)]
            outputs = [(name, split) for name in names]
            choosers = [_even(files[0], num_parts)]
            for name, info in rewriting.copy(files, choosers, outputs, _has_mask(files)).items():
                parts[name] |= info
        if not all("train" in part for part in parts.values()):
            number = count(source.num_documents("train"), "training document")
            raise DataError(
                f"{source.folder}: its {number} cannot be cut into {num_parts} parts of about "
                "equal tokens; give a smaller --parts"
            )
        manifest = source.manifest
        for name, part in parts.items():
            settings = {"split_of": source.folder.name, "part": name, "parts": num_parts}
            manifest = msgspec.structs.replace(manifest, settings=settings)
            rewriting.write(name, manifest, part, source.tokenizer_folder)
            # What reading the text repaired and left out is told once.
            manifest = msgspec.structs.replace(
                manifest, replaced_bytes=0, skipped_documents=0, cut_documents=0,
                filtered_documents={}, left_out_files={},
            )  # fmt: skip
    return rewriting.made


class _Rewriting:
    """The making of one folder, which holds one data set or several.

    Attributes:
        made: the data sets that were written, under their final names.
    """

    def __init__(self, folder: Path, output: Path, dtype: TokenDType, advance: Advance) -> None:
        self._folder, self._output, self._dtype, self._advance = folder, output, dtype, advance
        self.made: list[PreparedDataset] = []

    def copy(
        self,
        sources: Sequence[SplitFiles],
        choosers: Sequence[Chooser],
        outputs: Sequence[tuple[str, Split]],
        has_mask: bool,
    ) -> dict[str, dict[str, SplitInfo]]:
        """Copy the documents of each source to the outputs (a data set and a split of it) that its
        chooser names. Bytes of text are shared out by tokens."""
        with contextlib.ExitStack() as stack:
            writers = []
            for name, split in outputs:
                place = self._folder / name
                place.mkdir(exist_ok=True)
                writers.append(SplitWriter(place, split, self._dtype, has_mask=has_mask))
                stack.enter_context(contextlib.closing(writers[-1]))
            for source, choose in zip(sources, choosers, strict=True):
                copy_documents(source, writers, choose, self._advance)
        text_bytes = sum(source.info.text_bytes for source in sources)
        num_tokens = sum(writer.num_tokens for writer in writers)
        given = taken = 0
        found: dict[str, dict[str, SplitInfo]] = {name: {} for name, _ in outputs}
        for (name, _), writer in zip(outputs, writers, strict=True):
            taken += writer.num_tokens
            writer.text_bytes = text_bytes * taken // max(1, num_tokens) - given
            given += writer.text_bytes
            found[name] |= finish_all([writer])
        return found

    def write(
        self, name: str, manifest: Manifest, splits: dict[str, SplitInfo], tokenizer: Path | None
    ) -> None:
        """Complete one data set."""
        manifest = msgspec.structs.replace(manifest, splits=splits)
        write_dataset(self._folder / name, manifest, tokenizer)
        self.made.append(PreparedDataset(self._output / name, manifest))


@contextlib.contextmanager
def _rewriting(
    what: str,
    sources: Sequence[PreparedDataset],
    output: str | os.PathLike[str],
    dtype: TokenDType,
    *,
    progress: bool,
) -> Iterator[_Rewriting]:
    output = Path(output).expanduser()
    files = [_files(source, split) for source in sources for split in source.manifest.splits]
    num_tokens = sum(file.info.num_tokens for file in files)
    num_documents = sum(file.info.num_documents for file in files)
    num_bytes = num_tokens * (np.dtype(dtype).itemsize + _has_mask(files)) + num_documents * 8
    to_read = sum(file.info.num_tokens * np.dtype(file.dtype).itemsize for file in files)
    with (
        new_folder(output, num_bytes) as folder,
        byte_progress(what, to_read, enabled=progress) as advance,
    ):
        yield _Rewriting(folder, output, dtype, advance)


def _open_source(folder: str | os.PathLike[str]) -> PreparedDataset:
    found = read_folder(Path(folder).expanduser())
    if found is None:
        raise DataError(
            f"{folder}: no prepared data set there ({MANIFEST_NAME} is missing); give a folder "
            "that `toolkit prepare` or `toolkit data tokenize` made"
        )
    return found


def _files(source: PreparedDataset, split: str) -> SplitFiles:
    info = source.manifest.splits[split]
    return SplitFiles(source.folder, cast(Split, split), source.manifest.dtype, info)


def _has_mask(files: Sequence[SplitFiles]) -> bool:
    return any(file.info.mask_hash is not None for file in files)


@contextlib.contextmanager
def new_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """A hidden folder, for `num_bytes`, that becomes `output` when the block ends without an error.
    DataError where that cannot be."""
    building = output.with_name(f".{output.name}.building")
    try:
        _check_is_new(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(build_lock(output), wait=False) as is_locked:
            if not is_locked:
                raise DataError(
                    f"{output}: another process is making it; wait until it is done, or choose "
                    "another --out"
                )
            _check_is_new(output)
            free = shutil.disk_usage(output.parent).free
            if num_bytes + RESERVE_BYTES > free:
                raise DataError(
                    f"{output}: needs {num_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free "
                    "there; make room, or choose another --out"
                )
            try:
                with atomic.new_folder(output, unfinished=building / "output") as unfinished:
                    yield unfinished
            finally:
                # What a preparation of the same name left there to go on with is of use only
                # without the folder.
                with contextlib.suppress(OSError):
                    shutil.rmtree(building) if output.exists() else building.rmdir()
    except OSError as error:
        raise DataError(
            f"{error.filename or output}: cannot be read or written: {error.strerror or error}"
        ) from error


def _check_is_new(output: Path) -> None:
    if os.path.lexists(output):
        raise DataError(f"{output}: exists already; remove it, or choose another --out")


def _check_same(sources: Sequence[PreparedDataset]) -> None:
    first = sources[0]
    for other in sources[1:]:
        differences = [
            f"{name} ({getattr(first.manifest, field)} and {getattr(other.manifest, field)})"
            for field, name in _POLICIES.items()
            if getattr(first.manifest, field) != getattr(other.manifest, field)
        ]
        if differences:
            raise DataError(
                f"{first.folder} and {other.folder} differ in {', '.join(differences)}; "
                "prepare one of them again with the settings of the other"
            )


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    names = sorted({name for found in counts for name in found})
    return {name: sum(found.get(name, 0) for found in counts) for name in names}


def _all_to_first(first: int, end: int) -> np.ndarray:
    return np.zeros(end - first, dtype=np.int64)


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


def _even(source: SplitFiles, num_parts: int) -> Chooser:
    """Each document goes where its middle token lies."""
    starts, num_tokens = memory_map(source.path("idx"), "uint64"), source.info.num_tokens

    def choose(first: int, end: int) -> np.ndarray:
        bounds = starts[first : end + 1].astype(np.int64)
        if end >= len(starts):
            bounds = np.append(bounds, num_tokens)
        middles = (bounds[:-1] + bounds[1:]) // 2
        limits = np.arange(1, num_parts) * num_tokens // num_parts
        return np.searchsorted(limits, middles, side="right")

    return choose
