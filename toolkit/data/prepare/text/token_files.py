"""Files of token ids without text, local or remote, cut into documents at their end token.

A document belongs to the range that its first token lies in. Ids are read in blocks of a few
megabytes (remote ones ahead of their use), and the ends of documents in a block are found by one
comparison of the whole block.
"""

import contextlib
import fnmatch
import glob
import io
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from toolkit.data.config import TokenFilesSourceConfig
from toolkit.data.prepare.text.files import (
    SourceFile,
    fingerprint_files,
    list_files,
)
from toolkit.data.prepare.text.reading import Counts, Piece, Reading
from toolkit.data.prepare.text.sources import (
    REMOTE_MARK,
    Plan,
    Range,
    group_ranges,
    shard_bytes,
)
from toolkit.errors import DataError, StorageError
from toolkit.storage.remote import RemoteFolder, Retries, is_url
from toolkit.threads import ThreadPool, Worker

log = logging.getLogger(__name__)

BLOCK_TOKENS = 1 << 20
BLOCKS_AHEAD = 3
"""Blocks of a remote file that are asked for before they are needed."""
HEAD_REQUESTS = 8
NUMPY_MAGIC = b"\x93NUMPY"
HEADER_BYTES = 1 << 12
"""As much of a file as holds any numpy header of an array of numbers."""
PROBE_SECONDS = 20.0
"""Other machines that do not tell by then whether files have changed are not waited for."""
_ASYNC_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "http", "https", "abfs", "az")


class NumpyHeader(NamedTuple):
    """What the header of a .npy file tells."""

    first_byte: int
    """Where the numbers begin."""
    num_values: int
    """Of all rows, where it has several."""
    dtype: np.dtype
    """Little-endian."""

    def disagreement(self, file_bytes: int) -> str | None:
        """What is wrong with a file of this size, or None."""
        found, rest = divmod(file_bytes - self.first_byte, self.dtype.itemsize)
        if (found, rest) == (self.num_values, 0):
            return None
        return (
            f"its numpy header tells of {self.num_values} numbers, it holds {found}; the file is "
            "cut short or damaged"
        )


def read_numpy_header(head: bytes, path: str) -> NumpyHeader | None:
    """The header that `head`, the first `HEADER_BYTES` of the file `path`, begins with, if any;
    DataError where its numbers do not lie one after the other in little-endian order."""
    if not head.startswith(NUMPY_MAGIC):
        return None
    stream, form = io.BytesIO(head), np.lib.format
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    try:
        shape, fortran_order, dtype = readers[form.read_magic(stream)](stream)
    except (ValueError, KeyError, SyntaxError) as error:
        raise DataError(f"{path}: its numpy header cannot be read: {error}") from None
    if dtype.newbyteorder("<") != dtype:
        raise DataError(
            f"{path}: its numpy header says {dtype.str}: the numbers are big-endian; convert the "
            "file to little-endian"
        )
    if fortran_order and len(shape) > 1:
        raise DataError(f"{path}: its numbers are stored by columns; convert it to C order")
    return NumpyHeader(stream.tell(), math.prod(shape), dtype)


def plan_token_files(source: TokenFilesSourceConfig) -> Plan:
    """Ranges of tokens of all files; DataError for those that are missing, or cannot hold numbers
    of the given type."""

    local, remote = list_files(source), _remote_files(source)
    files = [*local.files, *remote]
    num_bytes = sum(file.num_bytes for file in files)
    heads = dict[str, bytes]()
    if remote:
        with _pool_for([file.path for file in remote]) as pool:
            heads = dict(zip((file.path for file in remote), pool.map(_head, remote), strict=True))
    fingerprint = _fingerprint(local.files, remote)
    size = shard_bytes(num_bytes)
    ranges = (
        part
        for file in files
        for part in _cut(file, heads.get(file.path) or _head(file), source.dtype, size)
    )
    return Plan(group_ranges(ranges, size), fingerprint, num_bytes, local)


def fingerprint_if_reached(source: TokenFilesSourceConfig) -> str | None:
    """`Plan.fingerprint`; None, after a warning, where other machines do not answer at once."""
    probe = Worker("token-files-probe")
    try:
        local = list_files(source).files
        remote = probe.submit(lambda: _remote_files(source, Retries(1))).result(PROBE_SECONDS)
        return _fingerprint(local, remote)
    except (StorageError, TimeoutError) as error:
        reason = str(error) or f"no answer in {PROBE_SECONDS:.0f} s"
        log.warning("dataset.source.paths: not asked whether they have changed: %s", reason)
        return None
    finally:
        probe.stop()


def _fingerprint(local: Sequence[SourceFile], remote: Sequence[SourceFile]) -> str:
    """Of remote files, names, sizes and versions as their stores tell them; where one tells no
    version, its beginning."""
    fingerprint = fingerprint_files(local)
    if not remote:
        return fingerprint
    import xxhash

    digest = xxhash.xxh3_64(fingerprint.encode())
    for file in remote:
        digest.update(f"{file.name}\0{file.num_bytes}\0".encode())
        digest.update(file.version.encode() or _head(file))
    return f"{digest.hexdigest()}{REMOTE_MARK}"


def _head(file: SourceFile) -> bytes:
    if not is_url(file.path):
        with open(file.path, "rb", buffering=0) as opened:
            return opened.read(HEADER_BYTES)
    folder, name = _split_url(file.path)
    return RemoteFolder(folder).read(name, 0, min(HEADER_BYTES, file.num_bytes))


def read_tokens(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents whose first token lies in `part`; those longer than a block in pieces.
    DataError, with file and position, for an id that is not below `reading.vocab_size`."""
    assert isinstance(reading.source, TokenFilesSourceConfig)
    dtype, eos_id = np.dtype(reading.source.dtype).newbyteorder("<"), reading.eos_id
    # The token before tells whether a document begins here.
    first = max(part.start - 1, 0)
    document: int | None = 0 if part.start == 0 else None
    with contextlib.closing(_blocks(part, dtype, first)) as blocks:
        for offset, ids in blocks:
            _check_ids(ids, offset, part, reading.vocab_size)
            ends = np.flatnonzero(ids == eos_id) + (offset + 1)
            place, block_end = offset, offset + len(ids)
            for end in ends.tolist():
                if document == end - 1:
                    counts.skipped_documents += 1
                elif document is not None:
                    found = ids[place - offset : end - offset]
                    yield _piece(part, found, document, place, ends=True, reading=reading)
                place = end
                if end >= part.end:
                    return
                document = end
            if document is not None and place < block_end:
                found, ends_here = ids[place - offset :], block_end == part.num_tokens
                yield _piece(part, found, document, place, ends=ends_here, reading=reading)
            elif document is None and block_end >= part.end:
                return  # All of it belongs to a document of a range before.


def _piece(
    part: Range, ids: np.ndarray, document: int, start: int, *, ends: bool, reading: Reading
) -> Piece:
    """Tokens of the document that begins at token `document`, from token `start` of the file on."""
    piece = Piece(f"{part.name}:{document}", starts=start == document, ends=ends, ids=ids)
    if not (reading.with_digests and piece.starts):
        return piece
    import xxhash

    digest = xxhash.xxh3_128()
    for _, block in [(start, ids)] if ends else _blocks(part, ids.dtype, start):
        places = np.flatnonzero(block == reading.eos_id)
        digest.update(block[: places[0]].tobytes() if len(places) else block.tobytes())
        if len(places):
            break
    return piece._replace(digest=digest.intdigest())


def _check_ids(ids: np.ndarray, offset: int, part: Range, vocab_size: int) -> None:
    if int(ids.max()) < vocab_size:
        return
    place = int(np.argmax(ids >= vocab_size))
    raise DataError(
        f"{part.path}: token {offset + place} has id {ids[place]}, but the vocabulary has "
        f"{vocab_size} ids; check dataset.source.dtype and dataset.source.vocab_size (or the "
        "tokenizer)"
    )


def _blocks(
    part: Range, dtype: np.dtype, first: int
) -> Generator[tuple[int, np.ndarray], None, None]:
    """Blocks of ids from token `first` to the end of the file, with their place; the next ones are
    read while one is looked at."""
    folder, name = _split_url(part.path)
    remote = RemoteFolder(folder) if part.kind == "remote_tokens" else None

    def read(start: int) -> np.ndarray:
        end = min(start + BLOCK_TOKENS, part.num_tokens)
        begin, last = (part.first_byte + place * dtype.itemsize for place in (start, end))
        try:
            if remote is not None:
                data = remote.read(name, begin, last)
            else:
                with open(part.path, "rb", buffering=0) as file:
                    data = os.pread(file.fileno(), last - begin, begin)
        except FileNotFoundError:
            raise DataError(f"{part.path}: gone while it was being read") from None
        if len(data) != last - begin:
            raise DataError(f"{part.path}: cut short while it was being read; run again")
        return np.frombuffer(data, dtype=dtype)

    waiting: deque[tuple[int, Future[np.ndarray]]] = deque()
    with ThreadPool(1, thread_name_prefix="read-ahead") as pool:
        try:
            # What begins after the range is needed only for a document that reaches over its end.
            for start in range(first, part.num_tokens, BLOCK_TOKENS):
                waiting.append((start, pool.submit(read, start)))
                if len(waiting) > BLOCKS_AHEAD or start >= part.end:
                    place, block = waiting.popleft()
                    yield place, block.result()
            for place, block in waiting:
                yield place, block.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _cut(file: SourceFile, head: bytes, dtype: str, size: int) -> Iterator[Range]:
    """The ranges of one file, whose numbers begin at once, or after a numpy header that agrees."""
    itemsize = np.dtype(dtype).itemsize
    header = read_numpy_header(head, file.path)
    if header is not None and header.dtype != np.dtype(dtype):
        found = header.dtype
        raise DataError(
            f"{file.path}: its numpy header says {found.str.lstrip('<|')} ({found.name}), not "
            f"{dtype}; set dataset.source.dtype to that, or convert the file"
        )
    first_byte = header.first_byte if header is not None else 0
    num_tokens, rest = divmod(file.num_bytes - first_byte, itemsize)
    if rest:
        raise DataError(
            f"{file.path}: {file.num_bytes - first_byte} bytes of tokens are no multiple of the "
            f"{itemsize} bytes of {dtype}; the file is cut short, or dataset.source.dtype is wrong"
        )
    wrong = header.disagreement(file.num_bytes) if header is not None else None
    if wrong is not None:
        raise DataError(f"{file.path}: {wrong}")
    step = max(1, size // itemsize)
    for start in range(0, num_tokens, step):
        end = min(start + step, num_tokens)
        yield Range(
            kind="remote_tokens" if is_url(file.path) else "tokens", path=file.path,
            name=file.name, start=start, end=end, num_bytes=(end - start) * itemsize,
            first_byte=first_byte, num_tokens=num_tokens, file_bytes=file.num_bytes,
            modified_ns=file.modified_ns, version=file.version,
        )  # fmt: skip


def _remote_files(
    source: TokenFilesSourceConfig, retries: Retries | None = None
) -> list[SourceFile]:
    urls = [path.rstrip("/") for path in source.paths if is_url(path)]
    if not urls:
        return []
    with _pool_for(urls) as pool:
        files = list(pool.map(lambda url: _expand_url(url, source.suffixes, retries), urls))
    found: dict[str, SourceFile] = {}
    for file in itertools.chain.from_iterable(files):
        if file.num_bytes:
            found.setdefault(file.path, file)
    return sorted(found.values())


def _pool_for(urls: Sequence[str]) -> ThreadPool:
    """For questions to stores: several at a time where the libraries of all of them can."""
    return ThreadPool(HEAD_REQUESTS if all(u.startswith(_ASYNC_PROTOCOLS) for u in urls) else 1)


def _expand_url(url: str, suffixes: tuple[str, ...], retries: Retries | None) -> list[SourceFile]:
    """The file of a URL, those in a folder with one of `suffixes`, or those that a glob matches."""
    base, pattern = url, "*"
    if glob.has_magic(url):
        parts = url.split("/")
        plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base, pattern, suffixes = "/".join(parts[:plain]), "/".join(parts[plain:]), ("",)
    else:
        parent, name = _split_url(url)
        with contextlib.suppress(FileNotFoundError):
            num_bytes, version = RemoteFolder(parent, retries=retries).version(name)
            return [SourceFile(name, url, num_bytes, version=version)]
    chosen = [
        SourceFile(name, f"{base}/{name}", num_bytes, version=version)
        for name, (num_bytes, version) in RemoteFolder(base, retries=retries).versions().items()
        if fnmatch.fnmatchcase(name, pattern) and name.lower().endswith(suffixes)
    ]
    if not chosen:
        raise DataError(f"dataset.source.paths: {url}: no such file, or no token files there")
    return chosen


def _split_url(url: str) -> tuple[str, str]:
    folder, _, name = url.rpartition("/")
    return folder, name
