"""A look into token files: what they hold, and whether they are whole.

A prepared data set is checked against its dataset.json, a bare file against what the caller says of
it. Every file is read once, in blocks; all problems are found, not only the first.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from toolkit.data.instances.index import documents_of, scan_starts
from toolkit.data.prepare.build.split_files import BLOCK_TOKENS, memory_map, token_blocks
from toolkit.data.prepare.text.token_files import HEADER_BYTES, NumpyHeader, read_numpy_header
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.data.prepare.tools.report import Inspection, SplitReport
from toolkit.data.prepare.tools.samples import samples_of, wrong_units
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    NUM_BLOCKS_CHECKED_AT_OPEN,
    TOKENIZER_FOLDER,
    Manifest,
    SplitInfo,
    hash_blocks,
    read_manifest,
)
from toolkit.data.tokens.units import DOCUMENTS, MISMATCHED, REJECTED
from toolkit.errors import ConfigError, DataError
from toolkit.storage.progress import Advance, byte_progress

DTYPES = ("uint8", "uint16", "uint32", "uint64")
_OTHER_CONTENT = f"content differs from {MANIFEST_NAME} (hash of the whole file)"


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
            found = _bare_inspection(path, dtype, vocab_size, eos_id)
            found.is_quick = quick
            with byte_progress("checking", found.splits[0].num_bytes, enabled=progress) as advance:
                _look_into_file(path, found, num_samples, advance)
            return found
        told = [name for name, value in given.items() if value is not None]
        if told:
            raise ConfigError(f"{', '.join(told)}: {folder / MANIFEST_NAME} tells that; leave out")
        found = Inspection(
            path=str(folder),
            dtype=manifest.dtype,
            vocab_size=manifest.vocab_size,
            eos_id=manifest.eos_id,
            append_eos=manifest.append_eos,
            bos_id=manifest.bos_id,
            prepend_bos=manifest.prepend_bos,
            tokenizer=manifest.tokenizer_fingerprint,
            unit=None if manifest.unit is msgspec.UNSET else manifest.unit,
            audit=manifest.audit,
            splits=[],
            problems=[],
            is_quick=quick,
        )
        tokenizer = _tokenizer(folder, manifest, found.problems)
        splits = list(manifest.splits) if path.is_dir() else [path.stem]
        size = sum(_size(folder / f"{split}.bin") or 0 for split in splits)
        with byte_progress("checking", size, enabled=progress) as advance:
            for split in splits:
                check = _SplitCheck(folder, split, manifest.splits[split], found)
                check.run(tokenizer, num_samples, advance)
        return found
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}"
        ) from None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


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


class _SplitCheck:
    """The files of one split against what dataset.json, of which `found` is told, says of them."""

    def __init__(self, folder: Path, split: str, info: SplitInfo, found: Inspection) -> None:
        self._info, self._found = info, found
        self._files = {ending: folder / f"{split}.{ending}" for ending in ("bin", "idx", "mask")}
        self._report = SplitReport(
            name=split,
            num_bytes=_size(self._files["bin"]) or 0,
            num_tokens=info.num_tokens,
            num_documents=info.num_documents,
            num_targets=info.num_targets,
            bytes_per_token=info.text_bytes / info.num_tokens if info.text_bytes else None,
        )
        found.splits.append(self._report)

    def run(self, tokenizer: Tokenizer | None, num_samples: int, advance: Advance) -> None:
        info, found, path = self._info, self._found, self._files["bin"]
        ids = self._open("bin", info.num_tokens, found.dtype, "tokens")
        starts = self._open("idx", info.num_documents, "uint64", "documents")
        has_mask = info.mask_hash is not None
        mask = self._open("mask", info.num_tokens, "uint8", "tokens") if has_mask else None
        index_agrees = starts is not None and self._check_index(starts)
        if ids is not None and found.is_quick:
            self._check_sampled_blocks()
        elif ids is not None:
            scan = _IdScan(found.vocab_size)
            content_hash = _scan(path, found.dtype, scan.look, advance)
            self._report.largest_id = scan.largest
            if scan.wrong is not None:
                self._problem("bin", scan.wrong)
            if content_hash != info.content_hash:
                self._problem("bin", _OTHER_CONTENT)
        if ids is not None and starts is not None and index_agrees and len(ids) == info.num_tokens:
            self._check_document_ends(ids, starts)
            units = self._found.unit, mask
            self._report.samples = samples_of(ids, starts, tokenizer, num_samples, units)
            if found.unit is not None and mask is not None and not found.is_quick:
                self._check_units(ids, starts, mask)
        if mask is not None and not found.is_quick:
            self._check_mask()

    def _open(self, ending: str, count: int, dtype: str, what: str) -> np.ndarray | None:
        """The numbers of a file; None: there is none. A problem where its size is not as told."""
        path, itemsize = self._files[ending], np.dtype(dtype).itemsize
        size = _size(path)
        if size is None:
            self._problem(ending, "is missing; restore it, or prepare the data again")
            return None
        if size % itemsize:
            self._problem(
                ending, f"has {size:,} bytes, no multiple of the {itemsize} bytes of one number"
            )
        there, counted = size // itemsize, f"that {MANIFEST_NAME} counts"
        if size > count * itemsize:
            self._problem(ending, f"holds {there:,} {what} in place of {count:,} {counted}")
        elif size < count * itemsize:
            self._problem(ending, f"holds {there:,} of the {count:,} {what} {counted}: cut off")
        return memory_map(path, dtype)

    def _check_index(self, starts: np.ndarray) -> bool:
        """Whether the starts can be those of documents in these tokens."""
        info = self._info
        wrong, content_hash = scan_starts(starts, info.num_tokens)
        if wrong is not None:
            self._problem("idx", f"{wrong}; the index does not belong to these tokens")
        else:
            self._report.count_documents(starts, info.num_tokens)
        if not self._found.is_quick and info.index_hash not in (None, content_hash):
            self._problem("idx", _OTHER_CONTENT)
        return wrong is None and len(starts) == info.num_documents

    def _check_sampled_blocks(self) -> None:
        expected = self._info.block_hashes
        every = max(1, len(expected) // (NUM_BLOCKS_CHECKED_AT_OPEN * 4))
        for number, found in hash_blocks(self._files["bin"], every).items():
            if expected[number] != found:
                what = f"content differs from {MANIFEST_NAME} (sampled block {number})"
                self._problem("bin", what)
                return

    def _check_document_ends(self, ids: np.ndarray, starts: np.ndarray) -> None:
        found = self._found
        for is_asked, what, wanted, is_end in (
            (found.append_eos, "do not end with eos id", found.eos_id, True),
            (found.prepend_bos, "do not start with bos id", found.bos_id, False),
        ):
            wrong, first, done = 0, 0, 0
            for begins, lengths in documents_of(starts, len(ids)) if is_asked else ():
                places = begins + lengths - 1 if is_end else begins
                bad = np.flatnonzero(ids[np.clip(places, 0, len(ids) - 1)] != wanted)
                if not wrong and len(bad):
                    first = done + int(bad[0])
                wrong += len(bad)
                done += len(begins)
            if wrong:
                which = f"{wrong:,} of {done:,} documents {what} {wanted}"
                place = f"(first: document {first:,}), though {MANIFEST_NAME} says that all do"
                self._problem("bin", f"{which} {place}")

    def _check_mask(self) -> None:
        counts = np.zeros(256, dtype=np.int64)

        def look(_: int, block: np.ndarray) -> None:
            counts[:] += np.bincount(block, minlength=256)

        content_hash = _scan(self._files["mask"], "uint8", look)
        most = {None: 1, "pair": REJECTED, "binary": MISMATCHED}[self._found.unit]
        targets, others = int(counts[1:].sum()), int(counts[most + 1 :].sum())
        if others:
            may = "neither 0 nor 1" if most == 1 else f"not 0 to {most}"
            self._problem("mask", f"{others:,} of its numbers are {may}")
        if targets != self._info.num_targets:
            there = self._info.num_targets or 0
            self._problem("mask", f"has {targets:,} targets, {MANIFEST_NAME} says {there:,}")
        if content_hash != self._info.mask_hash:
            self._problem("mask", _OTHER_CONTENT)

    def _check_units(self, ids: np.ndarray, starts: np.ndarray, mask: np.ndarray) -> None:
        """Each unit is two documents with one prompt and targets of their own kinds."""
        if len(starts) % DOCUMENTS:
            self._problem("idx", f"{len(starts):,} documents are no whole number of units")
            return
        wrong = wrong_units(ids, starts, mask, self._found.unit or "pair")
        if wrong:
            which = f"{len(wrong):,} of {len(starts) // DOCUMENTS:,} units"
            what = "do not have one prompt with two answers of their own kinds"
            self._problem("mask", f"{which} {what} (first: unit {wrong[0]:,})")

    def _problem(self, ending: str, what: str) -> None:
        self._found.problems.append(f"{self._files[ending]}: {what}")


def _scan(
    path: Path,
    dtype: str,
    look: Callable[[int, np.ndarray], None],
    advance: Advance = lambda count: None,
    **part: int,
) -> str:
    """xxh3_128 of the numbers of a file (or `part` of it, see `token_blocks`); `look` is given
    every block with its position."""
    digest = xxhash.xxh3_128()
    for position, block in token_blocks(path, dtype, **part):
        digest.update(block.data)
        look(position, block)
        advance(block.nbytes)
    return digest.hexdigest()


class _IdScan:
    """Ids, block after block: `largest`, and how many lie outside the vocabulary."""

    def __init__(self, vocab_size: int | None) -> None:
        self.largest = 0
        self._vocab_size, self._count, self._first = vocab_size, 0, (0, 0)

    def look(self, position: int, block: np.ndarray) -> None:
        self.largest = max(self.largest, int(block.max()))
        if self._vocab_size is not None and self.largest >= self._vocab_size:
            outside = np.flatnonzero(block >= self._vocab_size)
            if not self._count and len(outside):
                self._first = position + int(outside[0]), int(block[outside[0]])
            self._count += len(outside)

    @property
    def wrong(self) -> str | None:
        """What is wrong with them, in words."""
        if not self._count:
            return None
        place, value = self._first
        return (
            f"token {place:,} has id {value:,}, outside the vocabulary of {self._vocab_size:,} "
            f"({self._count:,} such tokens)"
        )


def _bare_inspection(
    path: Path, dtype: str | None, vocab_size: int | None, eos_id: int | None
) -> Inspection:
    """A file of numbers without anything beside it, before they are looked at."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size: must be at least 1, not {vocab_size}")
    if eos_id is not None and (eos_id < 0 or (vocab_size is not None and eos_id >= vocab_size)):
        where = "negative" if eos_id < 0 else f"outside the vocabulary of {vocab_size:,}"
        raise ConfigError(f"--eos-id: {eos_id} is {where}")
    report = SplitReport(name=path.name, num_bytes=path.stat().st_size)
    return Inspection(
        path=str(path), dtype=dtype or "", vocab_size=vocab_size, eos_id=eos_id,
        splits=[report], problems=[],
    )  # fmt: skip


def _look_into_file(path: Path, found: Inspection, num_samples: int, advance: Advance) -> None:
    (report,), problems, eos_id = found.splits, found.problems, found.eos_id
    size, first_byte = report.num_bytes, 0
    header = _numpy_header(path)
    if header is not None:
        if found.dtype not in ("", header.dtype.name):
            problems.append(f"{path}: its numpy header says {header.dtype.name}, not {found.dtype}")
        found.dtype, first_byte = header.dtype.name, header.first_byte
        wrong = header.disagreement(size)
        if wrong is not None:
            problems.append(f"{path}: {wrong}")
    found.dtype = found.dtype or "uint16"
    item = np.dtype(found.dtype).itemsize
    if (size - first_byte) % item and not problems:
        problems.append(
            f"{path}: has {size - first_byte:,} bytes of numbers, no multiple of the {item} bytes "
            f"of a {found.dtype}: cut off, or --dtype is wrong"
        )
    report.num_tokens = num_tokens = (size - first_byte) // item
    if num_tokens == 0:
        problems.append(f"{path}: holds no tokens")
        return
    ids = np.memmap(path, dtype=found.dtype, mode="r", offset=first_byte, shape=(num_tokens,))
    if found.is_quick:
        # The first document alone, with its length where it ends in the first block.
        ends = np.flatnonzero(ids[:BLOCK_TOKENS] == eos_id)[:1] + 1
        is_known = eos_id is None or len(ends) or num_tokens <= BLOCK_TOKENS
        (sample,) = samples_of(ids[: int(ends[0])] if len(ends) else ids, np.zeros(1), None, 1)
        if not is_known:
            sample = msgspec.structs.replace(sample, num_tokens=None)
        report.samples = [sample][:num_samples]
        return
    scan = _IdScan(found.vocab_size)
    # Where documents begin: memory does not grow with the file.
    with tempfile.TemporaryFile() as starts_file:

        def look(position: int, block: np.ndarray) -> None:
            scan.look(position, block)
            ends = np.flatnonzero(block == eos_id) + position + 1
            starts_file.write(ends[ends < num_tokens].astype(np.uint64).tobytes())

        starts_file.write(bytes(8))
        _scan(path, found.dtype, look, advance, first_byte=first_byte, num_tokens=num_tokens)
        starts_file.flush()
        starts = np.memmap(starts_file, dtype=np.uint64, mode="r")
    report.largest_id = scan.largest
    if scan.wrong is not None:
        problems.append(f"{path}: {scan.wrong}")
    if eos_id is not None:
        report.num_documents = len(starts)
        report.count_documents(starts, num_tokens)
    report.samples = samples_of(ids, starts, None, num_samples)


def _numpy_header(path: Path) -> NumpyHeader | None:
    with path.open("rb") as file:
        header = read_numpy_header(file.read(HEADER_BYTES), str(path))
    if header is not None and header.dtype.name not in DTYPES:
        raise DataError(
            f"{path}: its numpy header says {header.dtype.name}; token files hold "
            f"{', '.join(DTYPES)}"
        )
    return header
