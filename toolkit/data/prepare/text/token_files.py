"""Files of token ids without text, local or remote, cut into documents at their end token.

A document belongs to the range that its first token lies in. Ids are read in blocks of a few
megabytes (remote ones ahead of their use), and the ends of documents in a block are found by one
comparison of the whole block.
"""

import contextlib
import fnmatch
import glob
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from typing import Literal, NamedTuple

import numpy as np

from toolkit.data.config import TokenFilesSourceConfig
from toolkit.data.prepare.text.files import (
    SAMPLE_BYTES,
    Listing,
    SourceFile,
    find_files,
    fingerprint_files,
)
from toolkit.data.prepare.text.numpy_header import HEADER_BYTES, NUMPY_MAGIC, read_numpy_header
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.text.reading import Counts, Reading
from toolkit.data.prepare.text.shards import Plan, Range, group_ranges, shard_bytes
from toolkit.errors import DataError
from toolkit.storage.remote import RemoteFolder, is_url
from toolkit.threads import ThreadPool

BLOCK_TOKENS = 1 << 20
BLOCKS_AHEAD = 3
"""Blocks of a remote file that are asked for before they are needed."""
HEAD_REQUESTS = 8
_ASYNC_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "http", "https", "abfs", "az")


class _Data(NamedTuple):
    """Where the numbers of one file lie."""

    first_byte: int
    num_tokens: int


def plan_token_files(source: TokenFilesSourceConfig) -> Plan:
    """Ranges of tokens of all files.

    Raises:
        DataError: for files that are missing, or cannot hold numbers of the given type.
    """
    import xxhash

    local = _local_listing(source)
    remote = _remote_files(source)
    num_bytes = sum(file.num_bytes for file in local.files) + sum(f.num_bytes for f in remote)
    heads = [_local_head(file.path) for file in local.files]
    fingerprint = fingerprint_files(local.files)
    if remote:
        heads += _remote_heads(remote)
        digest = xxhash.xxh3_64(fingerprint.encode())
        for file, head in zip(remote, heads[len(local.files) :], strict=True):
            digest.update(f"{file.name}\0{file.num_bytes}\0".encode() + head)
        fingerprint = digest.hexdigest()
    size = shard_bytes(num_bytes)
    files = [*local.files, *remote]
    ranges = (
        part
        for file, head in zip(files, heads, strict=True)
        for part in _cut(file, _find_data(file, head, source.dtype), source.dtype, size)
    )
    shards = group_ranges(ranges, size)
    return Plan(
        shards,
        fingerprint,
        num_bytes,
        local.num_empty,
        tuple(local.files),
        left_out_files=local.left_out,
    )


def local_token_files(source: TokenFilesSourceConfig) -> Listing | None:
    """The files, when none is remote."""
    return None if any(is_url(path) for path in source.paths) else _local_listing(source)


def read_tokens(part: Range, reading: Reading, counts: Counts) -> Iterator[Piece]:
    """The documents whose first token lies in `part`; those longer than a block in pieces.

    Raises:
        DataError: an id is not below `reading.vocab_size`; names the file and the position.
    """
    source = reading.source
    assert isinstance(source, TokenFilesSourceConfig)
    dtype, eos_id = np.dtype(source.dtype).newbyteorder("<"), reading.eos_id
    start = part.start
    # The token before tells whether a document begins here.
    begins = start == 0
    first = start if begins else start - 1
    document: int | None = start if begins else None
    with contextlib.closing(_blocks(part, dtype, first)) as blocks:
        for offset, ids in blocks:
            _check_ids(ids, offset, part, reading.vocab_size)
            ends = np.flatnonzero(ids == eos_id) + (offset + 1)
            place = offset
            for end in ends.tolist():
                if document == end - 1:
                    counts.skipped_documents += 1
                elif document is not None:
                    yield _piece(part, ids, offset, document, place, end, True, reading, dtype)
                place = end
                if end >= part.end:
                    return
                document = end
            block_end = offset + len(ids)
            if document is not None and place < block_end:
                ends_here = block_end == part.document_end
                yield _piece(
                    part, ids, offset, document, place, block_end, ends_here, reading, dtype
                )
            elif document is None and block_end >= part.end:
                # All of it belongs to a document of a range before.
                return


def _piece(
    part: Range,
    ids: np.ndarray,
    offset: int,
    document: int,
    start: int,
    end: int,
    ends: bool,
    reading: Reading,
    dtype: np.dtype,
) -> Piece:
    """Tokens `start` to `end` of the file, of the document that begins at token `document`."""
    found = ids[start - offset : end - offset]
    piece = Piece(f"{part.name}:{document}", starts=start == document, ends=ends, ids=found)
    if not (reading.with_digests and piece.starts):
        return piece
    import xxhash

    digest = xxhash.xxh3_128()
    if ends:
        digest.update(np.ascontiguousarray(_without_eos(found, reading.eos_id)).tobytes())
        return piece._replace(digest=digest.intdigest())
    with contextlib.closing(_blocks(part, dtype, start)) as blocks:
        for _, block in blocks:
            places = np.flatnonzero(block == reading.eos_id)
            digest.update(block[: places[0]].tobytes() if len(places) else block.tobytes())
            if len(places):
                break
    return piece._replace(digest=digest.intdigest())


def _without_eos(ids: np.ndarray, eos_id: int | None) -> np.ndarray:
    return ids[:-1] if ids[-1] == eos_id else ids


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
    """Blocks of ids from token `first` to the end of the file, with their place."""
    starts = range(first, part.document_end, BLOCK_TOKENS)

    def byte_range(start: int) -> tuple[int, int]:
        end = min(start + BLOCK_TOKENS, part.document_end)
        first_byte = part.document_start
        return first_byte + start * dtype.itemsize, first_byte + end * dtype.itemsize

    if part.kind == "tokens":
        with open(part.path, "rb", buffering=0) as file:
            for start in starts:
                begin, end = byte_range(start)
                file.seek(begin)
                data = file.read(end - begin)
                if len(data) != end - begin:
                    raise DataError(f"{part.path}: cut short while it was being read; run again")
                yield start, np.frombuffer(data, dtype=dtype)
        return
    folder, name = _split_url(part.path)
    remote = RemoteFolder(folder)
    waiting: deque[tuple[int, Future[bytes]]] = deque()
    with ThreadPool(1, thread_name_prefix="read-ahead") as pool:
        try:
            # What begins after the range is needed only for a document that reaches over its end.
            for start in starts:
                waiting.append((start, pool.submit(remote.read, name, *byte_range(start))))
                if len(waiting) > BLOCKS_AHEAD or start >= part.end:
                    yield _arrived(waiting, part, dtype)
            while waiting:
                yield _arrived(waiting, part, dtype)
        finally:
            for _, future in waiting:
                future.cancel()


def _arrived(
    waiting: "deque[tuple[int, Future[bytes]]]", part: Range, dtype: np.dtype
) -> tuple[int, np.ndarray]:
    start, future = waiting.popleft()
    try:
        return start, np.frombuffer(future.result(), dtype=dtype)
    except FileNotFoundError:
        raise DataError(f"{part.path}: gone while it was being read") from None


def _cut(file: SourceFile, data: _Data, dtype: str, size: int) -> Iterator[Range]:
    itemsize = np.dtype(dtype).itemsize
    step = max(1, size // itemsize)
    kind: Literal["tokens", "remote_tokens"] = "remote_tokens" if is_url(file.path) else "tokens"
    for start in range(0, data.num_tokens, step):
        end = min(start + step, data.num_tokens)
        yield Range(
            kind=kind, path=file.path, name=file.name, start=start, end=end,
            num_bytes=(end - start) * itemsize, document_start=data.first_byte,
            document_end=data.num_tokens, file_bytes=file.num_bytes, modified_ns=file.modified_ns,
        )  # fmt: skip


def _find_data(file: SourceFile, head: bytes, dtype: str) -> _Data:
    """Where the numbers begin: at once, or after a numpy header that agrees with `dtype`."""
    itemsize = np.dtype(dtype).itemsize
    header = read_numpy_header(head, file.path)
    if header is not None and header.dtype != np.dtype(dtype):
        found = header.dtype
        raise DataError(
            f"{file.path}: its numpy header says {found.str.lstrip('<|')} ({found.name}), not "
            f"{dtype}; set dataset.source.dtype to that, or convert the file"
        )
    size = file.num_bytes - (header.first_byte if header is not None else 0)
    if size % itemsize:
        raise DataError(
            f"{file.path}: {size} bytes of tokens are no multiple of the {itemsize} bytes of "
            f"{dtype}; the file is cut short, or dataset.source.dtype is wrong"
        )
    wrong = header.disagreement(file.num_bytes) if header is not None else None
    if wrong is not None:
        raise DataError(f"{file.path}: {wrong}")
    return _Data(file.num_bytes - size, size // itemsize)


def _local_head(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEADER_BYTES)
        return head if head.startswith(NUMPY_MAGIC) else b""


def _local_listing(source: TokenFilesSourceConfig) -> Listing:
    paths = [path for path in source.paths if not is_url(path)]
    if not paths and source.paths:
        return Listing([], 0)
    return find_files(paths, source.suffixes, holding="tokens")


def _remote_files(source: TokenFilesSourceConfig) -> list[SourceFile]:
    found: dict[str, SourceFile] = {}
    for url in source.paths:
        if is_url(url):
            for file in _expand_url(url.rstrip("/"), source.suffixes):
                if file.num_bytes:
                    found.setdefault(file.path, file)
    return sorted(found.values())


def _expand_url(url: str, suffixes: tuple[str, ...]) -> Iterator[SourceFile]:
    parent, name = _split_url(url)
    if not glob.has_magic(url):
        with contextlib.suppress(FileNotFoundError):
            yield SourceFile(name, url, RemoteFolder(parent).size(name))
            return
        base, pattern = url, "*"
    else:
        parts = url.split("/")
        plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        base, pattern = "/".join(parts[:plain]), "/".join(parts[plain:])
        suffixes = ("",)
    sizes = RemoteFolder(base).sizes()
    chosen = [
        name
        for name in sorted(sizes)
        if fnmatch.fnmatchcase(name, pattern) and name.lower().endswith(suffixes)
    ]
    if not chosen:
        raise DataError(f"dataset.source.paths: {url}: no such file, or no token files there")
    for name in chosen:
        yield SourceFile(name, f"{base}/{name}", sizes[name])


def _remote_heads(files: list[SourceFile]) -> list[bytes]:
    def head(file: SourceFile) -> bytes:
        folder, name = _split_url(file.path)
        return RemoteFolder(folder).read(name, 0, min(SAMPLE_BYTES, file.num_bytes))

    threads = HEAD_REQUESTS if files[0].path.startswith(_ASYNC_PROTOCOLS) else 1
    with ThreadPool(threads) as pool:
        return list(pool.map(head, files))


def _split_url(url: str) -> tuple[str, str]:
    folder, _, name = url.rpartition("/")
    return folder, name
