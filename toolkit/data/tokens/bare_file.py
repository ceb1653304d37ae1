"""A file of token ids without anything beside it."""

from pathlib import Path

import numpy as np

from toolkit.data.text.numpy_header import HEADER_BYTES, NumpyHeader, read_numpy_header
from toolkit.data.tokens.inspection import (
    SAMPLE_TOKENS,
    BadIds,
    Inspection,
    Sample,
    SplitReport,
    count_lengths,
    trimmed,
)
from toolkit.data.tokens.scanning import scan_progress, token_blocks
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
    starts = [0]
    if not quick:
        starts = _scan_file(found, path, first_byte, num_samples, progress=progress)
    samples = [int(start) for start in starts[:num_samples]]
    for number, start in enumerate(samples):
        part = ids[start : start + SAMPLE_TOKENS].tolist()
        if eos_id is not None and eos_id in part:
            part = part[: part.index(eos_id) + 1]
        report.samples.append(Sample(document=number, num_tokens=len(part), ids=part, text=None))
    return found


def _scan_file(
    found: Inspection, path: Path, first_byte: int, num_samples: int, *, progress: bool
) -> list[int]:
    """Count ids and documents; the starts of the first documents."""
    report, eos_id = found.splits[0], found.eos_id
    bad = BadIds(found.vocab_size)
    histogram = np.zeros(64, dtype=np.int64)
    starts, start, documents, shortest = [0], 0, 0, report.num_tokens
    with scan_progress("checking", report.num_bytes, enabled=progress) as advance:
        for position, block in token_blocks(
            path, found.dtype, first_byte=first_byte, num_tokens=report.num_tokens
        ):
            bad.look(position, block)
            if eos_id is not None:
                ends = np.flatnonzero(block == eos_id) + position + 1
                lengths = np.diff(ends, prepend=start)
                documents += len(ends)
                if len(ends):
                    start = int(ends[-1])
                    count_lengths(histogram, lengths)
                    report.longest = max(report.longest, int(lengths.max()))
                    shortest = min(shortest, int(lengths.min()))
                if len(starts) < num_samples:
                    starts += ends[: num_samples - len(starts)].tolist()
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
    return [s for s in starts if s < report.num_tokens]


def _numpy_header(path: Path) -> NumpyHeader | None:
    with path.open("rb") as file:
        header = read_numpy_header(file.read(HEADER_BYTES), str(path))
    if header is not None and header.dtype.name not in DTYPES:
        raise DataError(
            f"{path}: its numpy header says {header.dtype.name}; token files hold "
            f"{', '.join(DTYPES)}"
        )
    return header
