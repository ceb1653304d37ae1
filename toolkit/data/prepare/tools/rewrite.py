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
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from toolkit.data.prepare.build.join import sum_counts, sum_each
from toolkit.data.prepare.build.prepare import write_dataset
from toolkit.data.prepare.build.split_files import (
    Chooser,
    SplitFiles,
    SplitWriter,
    copy_documents,
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
from toolkit.data.tokens.units import documents_per_unit, name_of
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
        **sum_counts(manifests),
        left_out_files=sum_each(manifest.left_out_files for manifest in manifests),
        settings={"merged": [source.folder.name for source in sources]},
    )
    copies = []
    for split in SPLITS:
        files = [file for source in sources for file in _files(source, split)]
        copies.append(_Copy(files, [_all_to_first] * len(files), [("", split)]))
    return _rewrite("merging", sources, output, {"": merged}, copies, progress=progress)[0]


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
    files = [file for split in SPLITS for file in _files(source, split)]
    numbers = [0, *itertools.accumulate(file.info.num_documents for file in files)]
    step = documents_per_unit(source.unit)
    choosers = [
        _by_unit(_hashed(validation_fraction, number // step), step) for number in numbers[:-1]
    ]
    settings = {"split_of": source.folder.name, "validation_fraction": validation_fraction}
    manifest = msgspec.structs.replace(source.manifest, settings=settings)
    copies = [_Copy(files, choosers, [("", split) for split in SPLITS])]
    refusal = (
        f"all {count(numbers[-1], 'document')} would be held out; give a smaller "
        "--validation-fraction"
    )
    return _rewrite(
        "splitting", [source], output, {"": manifest}, copies, refusal, progress=progress
    )[0]


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
    step = documents_per_unit(source.unit)
    number = source.num_documents("train") // step
    refusal = (
        f"its {count(number, 'training document')} cannot be cut into {num_parts} parts of about "
        "equal tokens; give a smaller --parts"
    )
    if num_parts > number:
        raise DataError(f"{source.folder}: {refusal}")
    width = len(str(num_parts - 1))
    names = [f"part-{number:0{width}d}" for number in range(num_parts)]
    manifests = {}
    manifest = source.manifest
    for name in names:
        settings = {"split_of": source.folder.name, "part": name, "parts": num_parts}
        manifests[name] = msgspec.structs.replace(manifest, settings=settings)
        # What reading the text repaired and left out is told once.
        manifest = msgspec.structs.replace(manifest, **sum_counts([]), left_out_files={})
    copies = [
        _Copy(
            [file],
            [_by_unit(_even(file, num_parts, step), step)],
            [(name, split) for name in names],
        )
        for split in SPLITS
        for file in _files(source, split)
    ]
    return _rewrite("splitting", [source], output, manifests, copies, refusal, progress=progress)


class _Copy(NamedTuple):
    """Documents of `files` go to `outputs` (a data set and a split of it), as the chooser of each
    file says. Bytes of text are shared out by tokens."""

    files: Sequence[SplitFiles]
    choosers: Sequence[Chooser]
    outputs: Sequence[tuple[str, Split]]

    def run(self, folder: Path, dtype: TokenDType, advance: Advance) -> Iterator[dict[str, Any]]:
        """What becomes of each output, by split."""
        writers = []
        for name, split in self.outputs:
            (folder / name).mkdir(exist_ok=True)
            has_mask = _has_mask(self.files)
            writers.append(SplitWriter(folder / name, split, dtype, has_mask=has_mask))
        for file, choose in zip(self.files, self.choosers, strict=True):
            copy_documents(file, writers, choose, advance)
        text_bytes = sum(file.info.text_bytes for file in self.files)
        num_tokens = sum(writer.num_tokens for writer in writers)
        given = taken = 0
        for writer in writers:
            taken += writer.num_tokens
            writer.text_bytes = text_bytes * taken // max(1, num_tokens) - given
            given += writer.text_bytes
            yield writer.finish()


def _rewrite(
    what: str,
    sources: Sequence[PreparedDataset],
    output: str | os.PathLike[str],
    manifests: dict[str, Manifest],
    copies: Sequence[_Copy],
    refusal: str = "",
    *,
    progress: bool,
) -> list[PreparedDataset]:
    """The folder `output` with a data set for each of `manifests`, by its name below the folder;
    `refusal` is the error where one of them would have no training documents."""
    output = Path(output).expanduser()
    dtype = next(iter(manifests.values())).dtype
    files = [file for source in sources for split in SPLITS for file in _files(source, split)]
    num_tokens = sum(file.info.num_tokens for file in files)
    num_documents = sum(file.info.num_documents for file in files)
    num_bytes = num_tokens * (np.dtype(dtype).itemsize + _has_mask(files)) + num_documents * 8
    to_read = sum(file.info.num_tokens * np.dtype(file.dtype).itemsize for file in files)
    tokenizer = next((s.tokenizer_folder for s in sources if s.tokenizer_folder), None)
    splits: dict[str, dict[str, SplitInfo]] = {name: {} for name in manifests}
    with (
        new_folder(output, num_bytes) as folder,
        byte_progress(what, to_read, enabled=progress) as advance,
    ):
        for copy in copies:
            for (name, _), found in zip(
                copy.outputs, copy.run(folder, dtype, advance), strict=True
            ):
                splits[name] |= found
        if not all("train" in found for found in splits.values()):
            raise DataError(f"{sources[0].folder}: {refusal}")
        made = []
        for name, manifest in manifests.items():
            manifest = msgspec.structs.replace(manifest, splits=splits[name])
            write_dataset(folder / name, manifest, tokenizer)
            made.append(PreparedDataset(output / name, manifest))
    return made


def _open_source(folder: str | os.PathLike[str]) -> PreparedDataset:
    found = read_folder(Path(folder).expanduser())
    if found is None:
        raise DataError(
            f"{folder}: no prepared data set there ({MANIFEST_NAME} is missing); give a folder "
            "that `toolkit prepare` or `toolkit data tokenize` made"
        )
    return found


def _files(source: PreparedDataset, split: Split) -> list[SplitFiles]:
    """Of the split, where it is there."""
    manifest = source.manifest
    infos = [manifest.splits[split]] if source.has_split(split) else []
    return [SplitFiles(source.folder, split, manifest.dtype, info) for info in infos]


def _has_mask(files: Sequence[SplitFiles]) -> bool:
    return any(file.info.mask_hash is not None for file in files)


@contextlib.contextmanager
def new_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """A hidden folder, for `num_bytes`, that becomes `output` when the block ends without an error.
    DataError where that cannot be."""
    building = output.with_name(f".{output.name}.building")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(build_lock(output), wait=False) as is_locked:
            if not is_locked:
                raise DataError(
                    f"{output}: another process is making it; wait until it is done, or choose "
                    "another --out"
                )
            if os.path.lexists(output):
                raise DataError(f"{output}: exists already; remove it, or choose another --out")
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


def _check_same(sources: Sequence[PreparedDataset]) -> None:
    first = sources[0]
    for other in sources[1:]:
        differences = [
            f"{name} ({getattr(first.manifest, field)} and {getattr(other.manifest, field)})"
            for field, name in _POLICIES.items()
            if getattr(first.manifest, field) != getattr(other.manifest, field)
        ]
        if first.unit != other.unit:
            differences.append(f"what they hold ({name_of(first.unit)} and {name_of(other.unit)})")
        if differences:
            raise DataError(
                f"{first.folder} and {other.folder} differ in {', '.join(differences)}; "
                "prepare one of them again with the settings of the other"
            )


def _all_to_first(documents: slice) -> np.ndarray:
    return np.zeros(documents.stop - documents.start, dtype=np.int64)


def _hashed(fraction: float, offset: int) -> Chooser:
    """1 (val) where the hash of a document's number, as a number in [0, 1), is below `fraction`."""
    limit = np.uint64(min(int(fraction * 2**64), 2**64 - 1))

    def choose(documents: slice) -> np.ndarray:
        first, end = offset + documents.start, offset + documents.stop
        numbers = np.arange(first, end, dtype=np.uint64)
        return (_mix(numbers) < limit).astype(np.int64)

    return choose


def _mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014): 64 well-mixed bits of each number."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _by_unit(choose: Chooser, step: int) -> Chooser:
    """`step` documents that follow each other go where `choose` puts them, numbered as one."""
    if step == 1:
        return choose

    def choose_units(documents: slice) -> np.ndarray:
        first, end = documents.start // step, -(-documents.stop // step)
        return np.repeat(choose(slice(first, end)), step)[
            documents.start - first * step : documents.stop - first * step
        ]

    return choose_units


def _even(source: SplitFiles, num_parts: int, step: int) -> Chooser:
    """Each document, or `step` of them as one, goes where its middle token lies."""
    starts, num_tokens = memory_map(source.path("idx"), "uint64")[::step], source.info.num_tokens

    limits = np.arange(1, num_parts) * num_tokens // num_parts

    def choose(documents: slice) -> np.ndarray:
        bounds = starts[documents.start : documents.stop + 1].astype(np.int64)
        if documents.stop >= len(starts):
            bounds = np.append(bounds, num_tokens)
        return np.searchsorted(limits, (bounds[:-1] + bounds[1:]) // 2, side="right")

    return choose
