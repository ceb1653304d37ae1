"""The files of one split of a prepared data set against its dataset.json."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from toolkit.data.instances.index import IndexScan
from toolkit.data.prepare.tools.inspection import (
    BadIds,
    SplitReport,
    count_lengths,
    file_size,
    trimmed,
)
from toolkit.data.prepare.tools.scanning import Advance, memory_map, token_blocks
from toolkit.data.tokens.prepared import (
    MANIFEST_NAME,
    NUM_BLOCKS_CHECKED_AT_OPEN,
    Manifest,
    Split,
    hash_blocks,
)

_NOTHING = np.empty(0, dtype=np.uint64)
_DOCUMENTS_AT_ONCE = 1 << 20


class SplitCheck:
    """The files of one split against the manifest."""

    def __init__(self, folder: Path, split: Split, manifest: Manifest, problems: list[str]) -> None:
        self._manifest, self._info = manifest, manifest.splits[split]
        self._problems = problems
        self._files = {ending: folder / f"{split}.{ending}" for ending in ("bin", "idx", "mask")}
        self._index_agrees = False
        self.is_readable = False
        self._report = SplitReport(name=split, num_bytes=file_size(self._files["bin"]) or 0)

    def run(self, *, quick: bool, advance: Advance) -> SplitReport:
        info, report, manifest = self._info, self._report, self._manifest
        report.num_tokens, report.num_documents = info.num_tokens, info.num_documents
        report.num_targets = info.num_targets
        report.bytes_per_token = (
            info.text_bytes / info.num_tokens if info.text_bytes and info.num_tokens else None
        )
        item = np.dtype(manifest.dtype).itemsize
        has_tokens = self._check_size("bin", info.num_tokens, item, "tokens")
        has_index = self._check_size("idx", info.num_documents, 8, "documents")
        if info.mask_hash is not None:
            self._check_size("mask", info.num_tokens, 1, "tokens")
        self.ids = memory_map(self._files["bin"], manifest.dtype) if has_tokens else _NOTHING
        self.starts = memory_map(self._files["idx"], "uint64") if has_index else _NOTHING
        if has_index:
            self._check_index(quick=quick)
        self.is_readable = 0 < len(self.ids) == info.num_tokens and self._index_agrees
        if has_tokens:
            if quick:
                self._check_sampled_blocks()
            else:
                self._check_tokens(advance)
        if self.is_readable:
            self._check_document_ends()
        if info.mask_hash is not None and not quick and self._files["mask"].exists():
            self._check_mask()
        return report

    def _check_size(self, ending: str, count: int, itemsize: int, what: str) -> bool:
        """Whether the file is there; a problem where its size is not as recorded."""
        path, expected = self._files[ending], count * itemsize
        size = file_size(path)
        if size is None:
            self._problem(path, "is missing; restore it, or prepare the data again")
            return False
        if size % itemsize:
            self._problem(
                path, f"has {size:,} bytes, no multiple of the {itemsize} bytes of one number"
            )
        if size != expected:
            here = f"holds {size // itemsize:,} of the {count:,} {what}"
            more = size > expected
            here = f"holds {size // itemsize:,} {what} in place of {count:,}" if more else here
            self._problem(
                path, f"{here} that {MANIFEST_NAME} counts" + ("" if more else ": cut off")
            )
        return True

    def _check_index(self, *, quick: bool) -> None:
        path, limit, report = self._files["idx"], self._info.num_tokens, self._report
        scan = IndexScan(limit)
        histogram = np.zeros(64, dtype=np.int64)
        shortest: int | None = None

        def count(lengths: np.ndarray) -> None:
            nonlocal shortest
            if len(lengths) == 0:
                return
            report.longest = max(report.longest, int(lengths.max()))
            least = int(lengths.min())
            shortest = least if shortest is None else min(shortest, least)
            count_lengths(histogram, lengths)
            report.empty_documents += int((lengths == 0).sum())

        last = limit
        for position, block in token_blocks(path, "uint64"):
            lengths = scan.look(position, block).astype(np.int64)
            if scan.wrong is None:
                count(lengths if position else lengths[1:])
            last = int(block[-1])
        if len(self.starts) and scan.wrong is None:
            count(np.array([limit - last]))
        if scan.wrong is not None:
            self._problem(path, f"{scan.wrong}; the index does not belong to these tokens")
        else:
            report.shortest = shortest or 0
            report.histogram = trimmed(histogram)
            self._index_agrees = len(self.starts) == self._info.num_documents
        wanted = self._info.index_hash
        if wanted is not None and not quick and scan.content_hash != wanted:
            self._problem(path, f"content differs from {MANIFEST_NAME} (hash of the whole file)")

    def _check_tokens(self, advance: Advance) -> None:
        path, vocab_size = self._files["bin"], self._manifest.vocab_size
        digest = xxhash.xxh3_128()
        bad = BadIds(vocab_size)
        for position, block in token_blocks(path, self._manifest.dtype):
            digest.update(block.data)
            bad.look(position, block)
            advance(block.nbytes)
        self._report.largest_id = bad.largest
        if bad.count:
            self._problem(path, bad.describe())
        if digest.hexdigest() != self._info.content_hash:
            self._problem(path, f"content differs from {MANIFEST_NAME} (hash of the whole file)")

    def _check_sampled_blocks(self) -> None:
        path, expected = self._files["bin"], self._info.block_hashes
        every = max(1, len(expected) // (NUM_BLOCKS_CHECKED_AT_OPEN * 4))
        for number, found in hash_blocks(path, every).items():
            if expected[number] != found:
                self._problem(
                    path, f"content differs from {MANIFEST_NAME} (sampled block {number})"
                )
                return

    def _check_document_ends(self) -> None:
        manifest, count, starts = self._manifest, len(self.ids), self.starts
        rules: list[tuple[str, int | None, Callable[[np.ndarray], np.ndarray]]] = []
        if manifest.append_eos:
            rules.append(("do not end with eos id", manifest.eos_id, lambda bounds: bounds[1:] - 1))
        if manifest.prepend_bos:
            rules.append(("do not start with bos id", manifest.bos_id, lambda bounds: bounds[:-1]))
        for what, wanted, place in rules:
            wrong, first = 0, 0
            for position in range(0, len(starts), _DOCUMENTS_AT_ONCE):
                bounds = starts[position : position + _DOCUMENTS_AT_ONCE + 1].astype(np.int64)
                if position + _DOCUMENTS_AT_ONCE >= len(starts):
                    bounds = np.append(bounds, count)
                places = place(bounds)
                is_wrong = self.ids[np.clip(places, 0, count - 1)] != wanted
                if not wrong and is_wrong.any():
                    first = position + int(np.argmax(is_wrong))
                wrong += int(is_wrong.sum())
            if wrong:
                self._problem(
                    self._files["bin"],
                    f"{wrong:,} of {len(starts):,} documents {what} {wanted} (first: document "
                    f"{first:,}), though {MANIFEST_NAME} says that all do",
                )

    def _check_mask(self) -> None:
        path, targets, others = self._files["mask"], 0, 0
        digest = xxhash.xxh3_128()
        for _, block in token_blocks(path, "uint8"):
            digest.update(block.data)
            targets += int(np.count_nonzero(block))
            others += int(np.count_nonzero(block > 1))
        if others:
            self._problem(path, f"{others:,} of its numbers are neither 0 nor 1")
        if targets != self._info.num_targets:
            self._problem(path, f"has {targets:,} targets, {MANIFEST_NAME} says "
                          f"{self._info.num_targets or 0:,}")  # fmt: skip
        if digest.hexdigest() != self._info.mask_hash:
            self._problem(path, f"content differs from {MANIFEST_NAME} (hash of the whole file)")

    def _problem(self, path: Path, what: str) -> None:
        self._problems.append(f"{path}: {what}")
