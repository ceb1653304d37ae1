"""Parts of token files: what one shard of the source became, and how it is written.

    000012.train.bin   token ids            000012.train.mask  uint8, only if the loss skips some
    000012.train.idx   uint64, starts       000012.docs        one `DOCUMENT` each, to find doubles
    000012.json        `Part`, written last

A part is complete when its .json file exists, was made for the same shard, and the hashes in it
agree with its other files: a part that a crash left half-written is recognised and made again.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from toolkit.data.prepare.build.encoding import Encoded
from toolkit.data.prepare.build.split_files import HashedFile
from toolkit.data.prepare.text.piece import Piece
from toolkit.errors import DataError
from toolkit.storage.atomic import hash_file
from toolkit.storage.foreign import read_json

COPY_BYTES = 4 << 20
DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("num_bytes", "<u8"), ("is_val", "u1")])
"""A document of a part: hash and bytes of its text, and where it went; in the shard's order."""

_LEFT_OVER = re.compile(r"\d+\.[a-z.]+\.\d+|\.\d+\.json\..+\.tmp")
"""Names of files of parts while they are written: by `PartFile`, and of the .json file."""


class PartSplit(msgspec.Struct, kw_only=True):
    """What a part adds to one split."""

    num_tokens: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    tokens_hash: str = ""
    starts_hash: str = ""
    mask_hash: str | None = None
    """None: there is no mask, the loss asks for every token."""


class Part(msgspec.Struct, kw_only=True):
    """Content of a part's .json file."""

    key: str
    """Identifies the shard: places and content of its files."""
    splits: dict[str, PartSplit]
    documents_hash: str | None = None
    replaced_bytes: int
    skipped_documents: int
    cut_documents: int = 0
    filtered_documents: dict[str, int] = {}


class TokenRules(msgspec.Struct, frozen=True, kw_only=True):
    """What the ids of one preparation must look like."""

    dtype: str
    vocab_size: int
    bos_id: int | None
    """Put before each document; None: nothing is."""
    eos_id: int | None
    """Put after each document; None: nothing is."""
    always_mask: bool = False
    """Write a mask even where it is all ones."""


def part_path(folder: str | os.PathLike[str], index: int, ending: str) -> Path:
    """`000012.train.bin` and its like."""
    return Path(folder) / f"{index:06d}.{ending}"


def read_part(folder: Path, index: int) -> Part | None:
    """The description of a part; None when there is no readable one."""
    try:
        return read_json(part_path(folder, index, "json"), DataError, Part)
    except (FileNotFoundError, DataError):
        return None


def is_complete(folder: Path, index: int, key: str) -> bool:
    """Whether the part is there, was made for the shard `key`, and is whole."""
    part = read_part(folder, index)
    if part is None or part.key != key:
        return False
    expected = {"docs": part.documents_hash}
    for split, stats in part.splits.items():
        expected[f"{split}.bin"] = stats.tokens_hash
        expected[f"{split}.idx"] = stats.starts_hash
        expected[f"{split}.mask"] = stats.mask_hash
    return all(
        _hash_file(part_path(folder, index, ending)) == content_hash
        for ending, content_hash in expected.items()
        if content_hash is not None
    )


def remove_left_over_files(folder: Path) -> None:
    """Remove what killed processes were writing; no worker may be running."""
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def read_blocks(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Bytes `start` to `end` of a file, some megabytes at a time."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        left = COPY_BYTES if end is None else end - start
        while left and (data := file.read(min(left, COPY_BYTES))):
            yield data
            if end is not None:
                left -= len(data)


class PartFile(HashedFile):
    """Until `finish` it has another name, because a worker of a killed job may still be writing the
    same part."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.with_name(f"{path.name}.{os.getpid()}"), bits=64)
        self._final = path

    def finish(self, *, keep: bool) -> str:
        """Give the file its name, or remove it; returns the hash of its content."""
        content_hash = self.close()
        if keep:
            os.replace(self.path, self._final)
        else:
            self.path.unlink(missing_ok=True)
        return content_hash


class SplitWriter:
    """Appends documents to the files of one split of a part."""

    def __init__(self, folder: str, index: int, split: str, rules: TokenRules) -> None:
        self._folder, self._index, self._split, self._rules = folder, index, split, rules
        self._dtype = np.dtype(rules.dtype)
        self._eos = self._one(rules.eos_id)
        self._bos = self._one(rules.bos_id)
        self._pending: list[np.ndarray] = []
        self._pending_masks: list[np.ndarray | bool | None] = []
        self._starts: list[int] = []
        self.stats = PartSplit()
        self._tokens, self._index_file = self._open("bin"), self._open("idx")
        self._mask: PartFile | None = None
        self._unmasked_tokens = 0
        if rules.always_mask:
            self._mask = self._open("mask")

    def add(self, piece: Piece, encoded: Encoded) -> None:
        """One piece of a document; the tokens around documents are added here."""
        ids, stats = encoded.ids, self.stats
        if piece.starts:
            self._starts.append(stats.num_tokens)
            stats.num_documents += 1
            if self._bos is not None and not encoded.starts_with_bos:
                self._append(self._bos, None if encoded.is_target is None else False)
        text = piece.text
        if text:
            stats.text_bytes += len(text) if text.isascii() else len(text.encode())
        self._append(ids, encoded.is_target)
        if piece.ends and self._eos is not None and not encoded.ends_with_eos:
            self._append(self._eos, None if encoded.eos_is_target else False)

    def flush(self) -> None:
        """Write what was added.

        Raises:
            DataError: for an id outside the vocabulary.
        """
        if self._pending:
            ids = np.concatenate(self._pending)
            largest = int(ids.max(initial=0))
            if largest >= self._rules.vocab_size:
                raise DataError(
                    f"dataset.tokenizer: gave id {largest}, but has a vocabulary of "
                    f"{self._rules.vocab_size}"
                )
            self._tokens.write(ids.astype(self._dtype, copy=False).tobytes())
            self._index_file.write(np.array(self._starts, dtype=np.uint64).tobytes())
            if self._mask is not None:
                self._fill_mask()
                mask = np.ones(len(ids), dtype=np.uint8)
                start = 0
                for part, is_target in zip(self._pending, self._pending_masks, strict=True):
                    if is_target is not None:
                        mask[start : start + len(part)] = is_target
                    start += len(part)
                self._mask.write(mask.tobytes())
            else:
                self._unmasked_tokens += len(ids)
        self._pending, self._pending_masks, self._starts = [], [], []

    def close(self, *, keep: bool) -> None:
        """Give the files their names (with hashes in `stats`), or remove them."""
        self.stats.tokens_hash = self._tokens.finish(keep=keep)
        self.stats.starts_hash = self._index_file.finish(keep=keep)
        if self._mask is not None:
            self.stats.mask_hash = self._mask.finish(keep=keep)

    def _append(self, ids: np.ndarray, is_target: "np.ndarray | bool | None") -> None:
        self._pending.append(ids)
        self.stats.num_tokens += len(ids)
        # The first piece with a mask opens the file; all tokens before it were targets.
        if is_target is not None and self._mask is None:
            self._mask = self._open("mask")
        self._pending_masks.append(is_target)

    def _fill_mask(self) -> None:
        assert self._mask is not None
        while self._unmasked_tokens:
            count = min(self._unmasked_tokens, COPY_BYTES)
            self._mask.write(b"\x01" * count)
            self._unmasked_tokens -= count

    def _one(self, token_id: int | None) -> np.ndarray | None:
        return None if token_id is None else np.array([token_id], dtype=self._dtype)

    def _open(self, ending: str) -> PartFile:
        return PartFile(part_path(self._folder, self._index, f"{self._split}.{ending}"))


def _hash_file(path: Path) -> str | None:
    try:
        return hash_file(path)
    except FileNotFoundError:
        return None
