"""Parts, one after the other in the order of shards, become the token files of a data set.

Where duplicates are left out, each part lists its documents with the xxh3_128 of their text. All
lists are dealt into buckets by the first bits of the hash, so that equal documents meet in one
bucket and each bucket fits into memory; sorting it shows them. The first of equals stays, whichever
split it is in. Two different documents of one hash: below 1e-18 for 1e10 documents.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from toolkit.data.prepare.build.parts import DOCUMENT, DOCUMENTS_NAME, Part, part_folder
from toolkit.data.prepare.build.split_files import (
    SplitFiles,
    SplitWriter,
    copy_documents,
    finish_all,
)
from toolkit.data.tokens.prepared import SPLITS, Split, SplitInfo, TokenDType

BUCKET_DOCUMENTS = 1 << 21
MAX_BUCKETS = 1024
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


class Duplicates:
    """Which documents of each part are to be left out.

    Attributes:
        count: documents to leave out.
        text_bytes: UTF-8 bytes of their text, by split.
    """

    def __init__(self, parts_folder: Path, num_parts: int, workplace: Path) -> None:
        """Find them. `workplace` is an empty folder for files of about 25 bytes a document."""
        self._paths = [
            part_folder(parts_folder, index) / DOCUMENTS_NAME for index in range(num_parts)
        ]
        sizes = [path.stat().st_size // DOCUMENT.itemsize for path in self._paths]
        self._offsets = np.cumsum([0, *sizes])
        num_documents = int(self._offsets[-1])
        self._drop = np.zeros(0, dtype=np.uint8)
        if num_documents:
            # One byte a document on disk, not in memory.
            self._drop = np.memmap(
                workplace / "drop", dtype=np.uint8, mode="w+", shape=(num_documents,)
            )
            num_buckets = 1
            while num_documents > num_buckets * BUCKET_DOCUMENTS and num_buckets < MAX_BUCKETS:
                num_buckets *= 2
            self._deal(workplace, num_buckets)
            for bucket in range(num_buckets):
                self._search(workplace / f"{bucket:04d}")
        self.count = 0
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        for index in range(num_parts):
            documents, drop = self._part(index)
            self.count += int(drop.sum())
            for split in SPLITS:
                chosen = drop & (documents["is_val"] == (split == "val"))
                self.text_bytes[split] += int(documents["num_bytes"][chosen].sum())

    def of(self, index: int, split: Split) -> np.ndarray:
        """Which documents of part `index` are left out of `split`: bool, shape
        `(documents of the part in that split,)`."""
        documents, drop = self._part(index)
        return drop[documents["is_val"] == (split == "val")]

    def _part(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        documents = np.fromfile(self._paths[index], dtype=DOCUMENT)
        drop = self._drop[self._offsets[index] : self._offsets[index + 1]]
        return documents, np.asarray(drop).astype(bool)

    def _deal(self, workplace: Path, num_buckets: int) -> None:
        waiting: list[np.ndarray] = []
        count = 0
        for index, path in enumerate(self._paths):
            documents = np.fromfile(path, dtype=DOCUMENT)
            records = np.empty(len(documents), dtype=_RECORD)
            records["high"], records["low"] = documents["high"], documents["low"]
            records["number"] = np.arange(self._offsets[index], self._offsets[index + 1])
            waiting.append(records)
            count += len(records)
            if count >= BUCKET_DOCUMENTS or index == len(self._paths) - 1:
                records = np.concatenate(waiting)
                buckets = (records["high"] % np.uint64(num_buckets)).astype(np.int64)
                order = np.argsort(buckets, kind="stable")
                ends = np.cumsum(np.bincount(buckets, minlength=num_buckets))
                for bucket, chosen in enumerate(np.split(order, ends[:-1])):
                    with (workplace / f"{bucket:04d}").open("ab") as file:
                        file.write(records[chosen].tobytes())
                waiting, count = [], 0

    def _search(self, path: Path) -> None:
        records = np.fromfile(path, dtype=_RECORD)
        path.unlink()
        records = records[np.lexsort((records["number"], records["low"], records["high"]))]
        is_again = (records["high"][1:] == records["high"][:-1]) & (
            records["low"][1:] == records["low"][:-1]
        )
        self._drop[records[1:][is_again]["number"]] = 1


class KeptParts:
    """Parts, and what of each is kept; `duplicates`: the documents that are left out."""

    def __init__(
        self, folder: Path, parts: Sequence[Part], dtype: TokenDType, duplicates: Duplicates | None
    ) -> None:
        self._folder, self._parts, self._dtype = folder, parts, dtype
        self._duplicates = duplicates

    def num_bytes(self) -> int:
        """Bytes of the files that `join` will write."""
        total = 0
        for split in SPLITS:
            for files, drop in self._files(split):
                starts = np.fromfile(files.path("idx"), dtype=np.uint64).astype(np.int64)
                num_tokens = int(np.diff(starts, append=files.info.num_tokens)[~drop].sum())
                a_token = np.dtype(files.dtype).itemsize + (files.info.mask_hash is not None)
                total += num_tokens * a_token + 8 * int((~drop).sum())
        return total

    def join(self, output: Path, *, has_mask: bool) -> dict[str, SplitInfo]:
        """Write the token files of the splits that hold at least one token into `output`."""
        writers = [SplitWriter(output, split, self._dtype, has_mask=has_mask) for split in SPLITS]
        try:
            for writer in writers:
                for files, drop in self._files(writer.split):

                    def choose(first: int, end: int, drop: np.ndarray = drop) -> np.ndarray:
                        return -drop[first:end].astype(np.int64)

                    copy_documents(files, [writer], choose, lambda count: None)
                    writer.text_bytes += files.info.text_bytes
                if self._duplicates is not None:
                    left = writer.text_bytes - self._duplicates.text_bytes[writer.split]
                    writer.text_bytes = max(0, left)
        finally:
            for writer in writers:
                writer.close()
        return finish_all(writers)

    def _files(self, split: Split) -> Iterator[tuple[SplitFiles, np.ndarray]]:
        for index, part in enumerate(self._parts):
            info = part.splits.get(split)
            if info is not None:
                drop = np.zeros(info.num_documents, dtype=bool)
                if self._duplicates is not None:
                    drop = self._duplicates.of(index, split)
                yield SplitFiles(part_folder(self._folder, index), split, self._dtype, info), drop
