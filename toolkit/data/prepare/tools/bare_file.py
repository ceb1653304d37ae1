"""A file of token ids without anything beside it."""

from pathlib import Path

import numpy as np

from toolkit.data.prepare.text.numpy_header import HEADER_BYTES, NumpyHeader, read_numpy_header
from toolkit.data.prepare.tools.inspection import (
    SAMPLE_TOKENS,
    BadIds,
    Inspection,
    Sample,
    SplitReport,
    count_lengths,
    spread,
    trimmed,
)
from toolkit.data.prepare.tools.scanning import BLOCK_TOKENS, scan_progress, token_blocks
from toolkit.errors import ConfigError, DataError

DTYPES = ("uint8", "uint16", "uint32", "uint64")


def inspect_file(
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
    size = path.stat().st_size
    header = _numpy_header(path)
    if header is not None:
        if dtype is not None and header.dtype.name != dtype:
            problems.append(f"{path}: its numpy header says {header.dtype.name}, not {dtype}")
        dtype = header.dtype.name
        wrong = header.disagreement(size)
        if wrong is not None:
            problems.append(f"{path}: {wrong}")
    dtype = dtype or "uint16"
    item = np.dtype(dtype).itemsize
    first_byte = header.first_byte if header is not None else 0
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
        report.samples = _first_document(ids, eos_id) if num_samples else []
    else:
        ends = _DocumentEnds(ids, eos_id)
        _scan_file(found, path, first_byte, ends, progress=progress)
        report.samples = _samples(ids, ends, report.num_documents or 1, num_samples)
    return found


class _DocumentEnds:
    """Where documents end: how many do in each block, and in one of the blocks each of them."""

    def __init__(self, ids: np.ndarray, eos_id: int | None) -> None:
        self._ids, self._eos_id = ids, eos_id
        self._bounds, self._counts = [0], [0]
        self._loaded, self._ends = -1, np.empty(0, dtype=np.int64)

    def look(self, position: int, block: np.ndarray) -> np.ndarray:
        """The ends in the next block, each one past the token that ends a document."""
        if self._eos_id is None:
            return self._ends
        ends = np.flatnonzero(block == self._eos_id) + position + 1
        self._bounds.append(position + len(block))
        self._counts.append(self._counts[-1] + len(ends))
        return ends

    def __getitem__(self, document: int) -> int:
        block = int(np.searchsorted(self._counts, document, side="right")) - 1
        if block + 1 >= len(self._bounds):
            return len(self._ids)
        if block != self._loaded:
            first, end = self._bounds[block : block + 2]
            self._ends = np.flatnonzero(self._ids[first:end] == self._eos_id) + first + 1
            self._loaded = block
        return int(self._ends[document - self._counts[block]])


def _samples(ids: np.ndarray, ends: _DocumentEnds, num_documents: int, count: int) -> list[Sample]:
    """The beginnings of documents spread over the file."""
    samples = []
    for number in spread(num_documents, count):
        start = ends[number - 1] if number else 0
        samples.append(_sample(ids, number, start, ends[number] - start))
    return samples


def _first_document(ids: np.ndarray, eos_id: int | None) -> list[Sample]:
    """It alone, with its length where it ends in the first block."""
    length: int | None = len(ids)
    if eos_id is not None:
        ends = np.flatnonzero(ids[:BLOCK_TOKENS] == eos_id)
        if len(ends) or len(ids) > BLOCK_TOKENS:
            length = int(ends[0]) + 1 if len(ends) else None
    return [_sample(ids, 0, 0, length)]


def _sample(ids: np.ndarray, document: int, start: int, length: int | None) -> Sample:
    shown = SAMPLE_TOKENS if length is None else min(length, SAMPLE_TOKENS)
    part = ids[start : start + shown].tolist()
    return Sample(document=document, num_tokens=length, ids=part, text=None)


def _scan_file(
    found: Inspection, path: Path, first_byte: int, all_ends: _DocumentEnds, *, progress: bool
) -> None:
    """Count ids and documents."""
    report, eos_id = found.splits[0], found.eos_id
    bad = BadIds(found.vocab_size)
    histogram = np.zeros(64, dtype=np.int64)
    start, documents, shortest = 0, 0, report.num_tokens
    with scan_progress("checking", report.num_bytes, enabled=progress) as advance:
        for position, block in token_blocks(
            path, found.dtype, first_byte=first_byte, num_tokens=report.num_tokens
        ):
            bad.look(position, block)
            ends = all_ends.look(position, block)
            if len(ends):
                lengths = np.diff(ends, prepend=start)
                documents += len(ends)
                start = int(ends[-1])
                count_lengths(histogram, lengths)
                report.longest = max(report.longest, int(lengths.max()))
                shortest = min(shortest, int(lengths.min()))
            advance(block.nbytes)
    report.largest_id = bad.largest
    if bad.count:
        found.problems.append(f"{path}: {bad.describe()}")
    if eos_id is not None:
        if start < report.num_tokens:
            rest = np.array([report.num_tokens - start])
            documents += 1
            count_lengths(histogram, rest)
            report.longest = max(report.longest, int(rest[0]))
            shortest = min(shortest, int(rest[0]))
        report.num_documents, report.shortest = documents, shortest
        report.histogram = trimmed(histogram)


def _numpy_header(path: Path) -> NumpyHeader | None:
    with path.open("rb") as file:
        header = read_numpy_header(file.read(HEADER_BYTES), str(path))
    if header is not None and header.dtype.name not in DTYPES:
        raise DataError(
            f"{path}: its numpy header says {header.dtype.name}; token files hold "
            f"{', '.join(DTYPES)}"
        )
    return header
