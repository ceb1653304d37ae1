"""Parts, one after the other in the order of shards, become the token files of a data set.

Where duplicates are left out, each part lists its documents with the xxh3_128 of their text. All
lists are dealt into buckets by the hash, so that equal documents meet in one bucket and each bucket
fits into memory; sorting it shows them. The first of equals stays, whichever split it is in. Two
different documents of one hash: below 1e-18 for 1e10 documents.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.prepare.build.completions import write_completions
from toolkit.data.prepare.build.parts import DOCUMENT, DOCUMENTS_NAME, Part, part_folder
from toolkit.data.prepare.build.split_files import SplitFiles, SplitWriter, copy_documents
from toolkit.data.tokens.prepared import SPLITS, Manifest, Split, SplitInfo, TokenDType
from toolkit.data.tokens.units import DOCUMENTS, UnitKind
from toolkit.storage.atomic import remove_tree

BUCKET_DOCUMENTS = 1 << 21
MAX_BUCKETS = 256


class Duplicates:
    """Which documents of each part are to be left out.

    Attributes:
        count: documents to leave out.
        text_bytes: UTF-8 bytes of their text, by split.
    """

    def __init__(self, parts_folder: Path, num_parts: int, workplace: Path) -> None:
        """Find them. `workplace` is an empty folder for files of about 25 bytes a document."""
        self._paths = [part_folder(parts_folder, n) / DOCUMENTS_NAME for n in range(num_parts)]
        sizes = [path.stat().st_size // DOCUMENT.itemsize for path in self._paths]
        self._offsets = np.cumsum([0, *sizes])
        number = int(self._offsets[-1])
        # One byte a document on disk, not in memory.
        self._drop = np.memmap(workplace / "drop", dtype=bool, mode="w+", shape=max(1, number))
        buckets = [
            workplace / f"{bucket:04d}"
            for bucket in range(min(MAX_BUCKETS, 1 + number // BUCKET_DOCUMENTS))
        ]
        for first, path in zip(self._offsets, self._paths, strict=False):
            self._deal(int(first), path, buckets)
        self.count = 0
        for bucket in filter(Path.exists, buckets):
            again = _found_again(np.fromfile(bucket, dtype="<u8").reshape(-1, 3))
            bucket.unlink()
            self._drop[again] = True
            self.count += len(again)
        self.text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        for index in range(num_parts):
            documents, drop = self._part(index)
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
        first = self._offsets[index]
        return documents, np.asarray(self._drop[first : first + len(documents)])

    def _deal(self, first: int, path: Path, buckets: Sequence[Path]) -> None:
        """Append hash and number of each document of a part to its bucket."""
        documents = np.fromfile(path, dtype=DOCUMENT)
        numbers = np.arange(first, first + len(documents), dtype="<u8")
        records = np.stack([documents["high"], documents["low"], numbers], axis=1)
        owners = documents["high"] % np.uint64(len(buckets))
        for bucket in np.unique(owners).tolist():
            with buckets[bucket].open("ab") as file:
                file.write(records[owners == bucket].tobytes())


def _found_again(records: np.ndarray) -> np.ndarray:
    """Numbers of the documents whose hash one of a smaller number has; `records` are hash (two
    columns) and number."""
    high, low, number = records[np.lexsort(records.T[::-1])].T
    return number[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]


class KeptParts:
    """Parts, and what of each is kept; `duplicates`: the documents that are left out."""

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        dtype: TokenDType,
        duplicates: Duplicates | None,
        unit: UnitKind | None = None,
    ) -> None:
        self._folder, self._parts, self._dtype = folder, parts, dtype
        self._duplicates, self._unit = duplicates, unit
        self.num_alone = 0
        """Binary rows that are the only ones of their split, set by `join`."""

    def num_bytes(self) -> int:
        """Bytes of the files that `join` will write."""
        total = 0
        for split in SPLITS:
            for files, drop in self._files(split):
                starts = np.fromfile(files.path("idx"), dtype=np.uint64).astype(np.int64)
                num_tokens = int(np.diff(starts, append=files.info.num_tokens)[~drop].sum())
                a_token = np.dtype(files.dtype).itemsize + (files.info.mask_hash is not None)
                total += num_tokens * a_token + 8 * int((~drop).sum())
        # What is joined first, and the units made of it, in which nothing is more than twice.
        return 3 * total if self._unit == "binary" else total

    def join(self, output: Path, *, has_mask: bool) -> dict[str, SplitInfo]:
        """Write the token files of the splits that hold at least one document, or two binary rows,
        into `output`."""
        if self._unit != "binary":
            return self._join(output, has_mask=has_mask)
        workplace = output.with_name("completions")
        remove_tree(workplace)
        workplace.mkdir()
        splits: dict[str, SplitInfo] = {}
        joined = self._join(workplace, has_mask=has_mask)
        for split in SPLITS:
            if split in joined:
                files = SplitFiles(workplace, split, self._dtype, joined[split])
                splits |= write_completions(files, output)
                self.num_alone += split not in splits
        remove_tree(workplace)
        return splits

    def _join(self, output: Path, *, has_mask: bool) -> dict[str, SplitInfo]:
        splits: dict[str, SplitInfo] = {}
        for split in SPLITS:
            writer = SplitWriter(output, split, self._dtype, has_mask=has_mask)
            for files, drop in self._files(split):
                chosen = -drop.astype(np.int64)
                copy_documents(files, [writer], chosen.__getitem__, lambda count: None)
                writer.text_bytes += files.info.text_bytes
            if self._duplicates is not None:
                left = writer.text_bytes - self._duplicates.text_bytes[split]
                writer.text_bytes = max(0, left)
            splits |= writer.finish()
        return splits

    def _files(self, split: Split) -> Iterator[tuple[SplitFiles, np.ndarray]]:
        for index, part in enumerate(self._parts):
            info = part.splits.get(split)
            if info is not None:
                drop = np.zeros(info.num_documents, dtype=bool)
                if self._duplicates is not None:
                    drop = self._duplicates.of(index, split)
                    if self._unit is not None:
                        drop = np.repeat(drop, DOCUMENTS)
                yield SplitFiles(part_folder(self._folder, index), split, self._dtype, info), drop


def sum_counts(found: Sequence[Part | Manifest]) -> dict[str, Any]:
    """What reading the text of all of them had to repair, cut and leave out."""
    names = ("replaced_bytes", "skipped_documents", "cut_documents")
    counts: dict[str, Any] = {name: sum(getattr(one, name) for one in found) for name in names}
    filtered = sum_each(one.filtered_documents for one in found)
    return {**counts, "filtered_documents": filtered}


def sum_each(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by name, which are sorted."""
    counts = list(counts)
    names = sorted({name for found in counts for name in found})
    return {name: sum(found.get(name, 0) for found in counts) for name in names}
