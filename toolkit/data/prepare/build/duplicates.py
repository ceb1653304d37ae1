"""Documents that were there before, byte for byte, found in bounded memory.

Each part lists its documents with the xxh3_128 of their text. All lists are dealt into buckets by
the first bits of the hash, so that equal documents meet in one bucket and each bucket fits into
memory; sorting it shows them. The first of equals, in the order of shards, stays, whichever split
it is in. What is found depends on the source alone, never on the number of processes.

Two different documents of one hash: below 1e-18 for 1e10 documents.
"""

from pathlib import Path

import numpy as np

from toolkit.data.prepare.build.parts import DOCUMENT, part_path
from toolkit.data.tokens.prepared import SPLITS, Split

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
        self._folder = parts_folder
        sizes = [
            part_path(parts_folder, index, "docs").stat().st_size // DOCUMENT.itemsize
            for index in range(num_parts)
        ]
        self._offsets = np.cumsum([0, *sizes])
        num_documents = int(self._offsets[-1])
        self._drop = np.zeros(0, dtype=np.uint8)
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
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
        self.count = self._count()

    def of(self, index: int, split: Split) -> np.ndarray:
        """Which documents that start in part `index` are left out of `split`: bool, shape
        `(documents of the part in that split,)`."""
        documents, drop = self._part(index)
        return drop[documents["is_val"] == (split == "val")]

    def _part(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        documents = np.fromfile(part_path(self._folder, index, "docs"), dtype=DOCUMENT)
        drop = self._drop[self._offsets[index] : self._offsets[index + 1]]
        return documents, np.asarray(drop).astype(bool)

    def _deal(self, workplace: Path, num_buckets: int) -> None:
        waiting: list[np.ndarray] = []
        count = 0
        last = len(self._offsets) - 2
        for index in range(last + 1):
            documents = np.fromfile(part_path(self._folder, index, "docs"), dtype=DOCUMENT)
            records = np.empty(len(documents), dtype=_RECORD)
            records["high"], records["low"] = documents["high"], documents["low"]
            records["number"] = np.arange(self._offsets[index], self._offsets[index + 1])
            waiting.append(records)
            count += len(records)
            if count >= BUCKET_DOCUMENTS or index == last:
                self._append(workplace, np.concatenate(waiting), num_buckets)
                waiting, count = [], 0

    def _append(self, workplace: Path, records: np.ndarray, num_buckets: int) -> None:
        buckets = (records["high"] % np.uint64(num_buckets)).astype(np.int64)
        order = np.argsort(buckets, kind="stable")
        ends = np.cumsum(np.bincount(buckets, minlength=num_buckets))
        for bucket, chosen in enumerate(np.split(order, ends[:-1])):
            with (workplace / f"{bucket:04d}").open("ab") as file:
                file.write(records[chosen].tobytes())

    def _search(self, path: Path) -> None:
        records = np.fromfile(path, dtype=_RECORD)
        path.unlink()
        records = records[np.lexsort((records["number"], records["low"], records["high"]))]
        again = records[1:][
            (records["high"][1:] == records["high"][:-1])
            & (records["low"][1:] == records["low"][:-1])
        ]
        self._drop[again["number"]] = 1

    def _count(self) -> int:
        count = 0
        for index in range(len(self._offsets) - 1):
            documents, drop = self._part(index)
            count += int(drop.sum())
            for split in SPLITS:
                chosen = drop & (documents["is_val"] == (split == "val"))
                self.text_bytes[split] += int(documents["num_bytes"][chosen].sum())
        return count
