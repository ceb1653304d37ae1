"""A look into token files: what they hold, and whether they are whole.

A prepared data set is checked against its dataset.json, a bare file against what the caller says of
it. Every file is read once, in blocks; all problems are found, not only the first.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

from toolkit.data.prepare.build.split_files import BLOCK_TOKENS
from toolkit.data.prepare.text.token_files import HEADER_BYTES, NumpyHeader, read_numpy_header
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.prepare.tools.check import Sample, SplitCheck, SplitReport, file_size, scan_ids
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    TOKENIZER_FOLDER,
    Manifest,
    Split,
    read_manifest,
)
from toolkit.errors import ConfigError, DataError
from toolkit.storage.progress import byte_progress

DTYPES = ("uint8", "uint16", "uint32", "uint64")
SAMPLE_TOKENS = 120
"""Tokens shown of a sampled document."""


class Inspection(msgspec.Struct, kw_only=True):
    """What was found at one path."""

    path: str
    dtype: str
    vocab_size: int | None
    eos_id: int | None
    append_eos: bool | None = None
    bos_id: int | None = None
    prepend_bos: bool = False
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None for a bare file."""
    splits: list[SplitReport]
    problems: list[str]
    """All that is wrong, in the order it was found; empty: the files are whole."""
    is_quick: bool = False


def inspect_path(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    vocab_size: int | None = None,
    eos_id: int | None = None,
    num_samples: int = 3,
    quick: bool = False,
    progress: bool = True,
) -> Inspection:
    """Look at a prepared folder, at one of its .bin files, or at a bare file of token ids.

    Args:
        dtype, vocab_size, eos_id: of a bare file (default: uint16, any id, no documents).
        num_samples: documents of each split that are decoded, spread over it.
        quick: sizes, index and a few blocks only.
        progress: a bar on a terminal.

    Raises:
        ConfigError: these do not go with the path.
        DataError: there is nothing at the path, or its dataset.json cannot be read.
    """
    path = Path(path).expanduser()
    if num_samples < 0:
        raise ConfigError(f"-n: must not be negative: {num_samples}")
    given = {"--dtype": dtype, "--vocab-size": vocab_size, "--eos-id": eos_id}
    folder = path if path.is_dir() else path.parent
    try:
        manifest = read_manifest(folder)
        if path.is_dir() and manifest is None:
            raise DataError(f"{path}: no {MANIFEST_NAME} there; give a prepared folder, or a file")
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if manifest is None or (not path.is_dir() and path.stem not in manifest.splits):
            return _inspect_file(path, dtype, vocab_size, eos_id, num_samples, quick, progress)
        told = [name for name, value in given.items() if value is not None]
        if told:
            raise ConfigError(f"{', '.join(told)}: {folder / MANIFEST_NAME} tells that; leave out")
        chosen = list(manifest.splits) if path.is_dir() else [path.stem]
        return _inspect_folder(folder, manifest, chosen, num_samples, quick, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}"
        ) from None


def _inspect_folder(
    folder: Path,
    manifest: Manifest,
    splits: Sequence[str],
    num_samples: int,
    quick: bool,
    progress: bool,
) -> Inspection:
    found = Inspection(
        path=str(folder),
        dtype=manifest.dtype,
        vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id,
        append_eos=manifest.append_eos,
        bos_id=manifest.bos_id,
        prepend_bos=manifest.prepend_bos,
        tokenizer=manifest.tokenizer_fingerprint,
        splits=[],
        problems=[],
        is_quick=quick,
    )
    tokenizer = _tokenizer(folder, manifest, found.problems)
    size = sum(file_size(folder / f"{split}.bin") or 0 for split in splits)
    with byte_progress("checking", size, enabled=progress) as advance:
        for split in splits:
            check = SplitCheck(folder, cast(Split, split), manifest, found.problems)
            report = check.run(quick=quick, advance=advance)
            found.splits.append(report)
            if check.is_readable:
                report.samples = _samples(
                    check.ids, len(check.starts), check.start_of, tokenizer, num_samples
                )
    return found


def _tokenizer(folder: Path, manifest: Manifest, problems: list[str]) -> Tokenizer | None:
    place = folder / TOKENIZER_FOLDER
    if not place.is_dir():
        return None
    try:
        tokenizer = load_tokenizer(place)
    except DataError as error:
        problems.append(str(error))
        return None
    # A source of token files may name the end of documents where the tokenizer does not.
    eos_id = manifest.eos_id if tokenizer.eos_id is None else tokenizer.eos_id
    for name, there, recorded in (
        ("fingerprint", tokenizer.fingerprint, manifest.tokenizer_fingerprint),
        ("vocabulary size", tokenizer.vocab_size, manifest.vocab_size),
        ("end-of-document id", eos_id, manifest.eos_id),
    ):
        if there != recorded:
            problems.append(
                f"{place}: its {name} is {there}, {MANIFEST_NAME} says {recorded}; it is not the "
                "tokenizer that made the tokens"
            )
            break
    return tokenizer


def _inspect_file(
    path: Path,
    dtype: str | None,
    vocab_size: int | None,
    eos_id: int | None,
    num_samples: int,
    quick: bool,
    progress: bool,
) -> Inspection:
    """A file of numbers without anything beside it."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size: must be at least 1, not {vocab_size}")
    if eos_id is not None and (eos_id < 0 or (vocab_size is not None and eos_id >= vocab_size)):
        where = "negative" if eos_id < 0 else f"outside the vocabulary of {vocab_size:,}"
        raise ConfigError(f"--eos-id: {eos_id} is {where}")
    problems: list[str] = []
    size, first_byte = path.stat().st_size, 0
    header = _numpy_header(path)
    if header is not None:
        if dtype is not None and header.dtype.name != dtype:
            problems.append(f"{path}: its numpy header says {header.dtype.name}, not {dtype}")
        dtype, first_byte = header.dtype.name, header.first_byte
        wrong = header.disagreement(size)
        if wrong is not None:
            problems.append(f"{path}: {wrong}")
    dtype = dtype or "uint16"
    item = np.dtype(dtype).itemsize
    if (size - first_byte) % item and not problems:
        problems.append(
            f"{path}: has {size - first_byte:,} bytes of numbers, no multiple of the {item} bytes "
            f"of a {dtype}: cut off, or --dtype is wrong"
        )
    num_tokens = (size - first_byte) // item
    report = SplitReport(name=path.name, num_bytes=size, num_tokens=num_tokens)
    found = Inspection(
        path=str(path), dtype=dtype, vocab_size=vocab_size, eos_id=eos_id,
        splits=[report], problems=problems, is_quick=quick,
    )  # fmt: skip
    if num_tokens == 0:
        problems.append(f"{path}: holds no tokens")
        return found
    ids = np.memmap(path, dtype=dtype, mode="r", offset=first_byte, shape=(num_tokens,))
    if quick:
        # The first document alone, with its length where it ends in the first block.
        ends = np.flatnonzero(ids[:BLOCK_TOKENS] == eos_id)
        is_known = eos_id is None or len(ends) or num_tokens <= BLOCK_TOKENS
        length = int(ends[0]) + 1 if len(ends) else num_tokens
        shown = ids[: min(length, SAMPLE_TOKENS)].tolist()
        sample = Sample(document=0, num_tokens=length if is_known else None, ids=shown, text=None)
        report.samples = [sample] if num_samples else []
        return found
    documents = _Documents(ids, eos_id)

    def look(position: int, block: np.ndarray) -> None:
        report.count_lengths(documents.look(position, block))

    with byte_progress("checking", size, enabled=progress) as advance:
        report.largest_id, wrong, _ = scan_ids(
            path, dtype, vocab_size, advance,
            first_byte=first_byte, num_tokens=num_tokens, look=look,
        )  # fmt: skip
    if wrong is not None:
        problems.append(f"{path}: {wrong}")
    number = documents.finish(report)
    report.samples = _samples(ids, number, documents.start_of, None, num_samples)
    return found


class _Documents:
    """Where the documents of a bare file begin: only how many end in each block is kept."""

    def __init__(self, ids: np.ndarray, eos_id: int | None) -> None:
        self._ids, self._eos_id = ids, eos_id
        self._bounds, self._counts, self._start = [0], [0], 0

    def look(self, position: int, block: np.ndarray) -> np.ndarray:
        """The lengths of the documents that end in the next block."""
        ends = np.flatnonzero(block == self._eos_id) + position + 1
        self._bounds.append(position + len(block))
        self._counts.append(self._counts[-1] + len(ends))
        lengths = np.diff(ends, prepend=self._start)
        self._start = int(ends[-1]) if len(ends) else self._start
        return lengths

    def finish(self, report: SplitReport) -> int:
        """How many documents there are, the last of which may have no end."""
        number = self._counts[-1]
        if self._start < len(self._ids):
            number += 1
            if self._eos_id is not None:
                report.count_lengths(np.array([len(self._ids) - self._start]))
        report.num_documents = None if self._eos_id is None else number
        return number

    def start_of(self, document: int) -> int:
        if document == 0:
            return 0
        block = int(np.searchsorted(self._counts, document - 1, side="right")) - 1
        if block + 1 >= len(self._bounds):
            return len(self._ids)
        first, end = self._bounds[block : block + 2]
        ends = np.flatnonzero(self._ids[first:end] == self._eos_id) + first + 1
        return int(ends[document - 1 - self._counts[block]])


def _samples(
    ids: np.ndarray,
    num_documents: int,
    start_of: Callable[[int], int],
    tokenizer: Tokenizer | None,
    count: int,
) -> list[Sample]:
    """The beginnings of documents at equal distances from the first on."""
    samples = []
    for number in sorted({turn * num_documents // count for turn in range(count)}):
        start, end = start_of(number), start_of(number + 1)
        part = ids[start : min(end, start + SAMPLE_TOKENS)].tolist()
        text = tokenizer.decode(part) if tokenizer is not None else None
        samples.append(Sample(document=number, num_tokens=end - start, ids=part, text=text))
    return samples


def _numpy_header(path: Path) -> NumpyHeader | None:
    with path.open("rb") as file:
        header = read_numpy_header(file.read(HEADER_BYTES), str(path))
    if header is not None and header.dtype.name not in DTYPES:
        raise DataError(
            f"{path}: its numpy header says {header.dtype.name}; token files hold "
            f"{', '.join(DTYPES)}"
        )
    return header
