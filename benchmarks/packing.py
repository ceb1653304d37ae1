"""How well documents are packed into rows, how fast that is planned, and how fast rows are read.

    python benchmarks/packing.py --megabytes 60 --sequence-length 2048

The corpus is real and mixed: Python source and documentation of what is installed here, a document
a file, encoded by a byte-level BPE trained on it. Three ways of cutting it into rows:

    fixed      documents one after the other, cut every `sequence_length` tokens
    next fit   documents in file order; one that does not fit in what is left of a row begins a new
               row (what a simple loop over documents does)
    packed     best fit, decreasing

Documents longer than a row are cut in all three. The last table plans an index of made-up document
lengths alone.
"""

import argparse
import logging
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash
from _synthetic import write_corpus
from rich.console import Console
from rich.table import Table

from toolkit.data.config import BPETokenizerConfig, DatasetConfig, FilesSourceConfig
from toolkit.data.instances.base import InstanceDataset
from toolkit.data.instances.fixed import TokenDataset
from toolkit.data.instances.packed import PackedDataset
from toolkit.data.instances.plans import plan_of
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.tokens.prepared import PreparedDataset, SplitInfo

SUFFIXES = (".py", ".md", ".rst", ".txt")
READING_SECONDS = 3.0
READING_ROWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--documents", type=float, default=1e7, help="of the made-up index")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    length = arguments.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        files = corpus_files(int(arguments.megabytes * 1e6))
        config = DatasetConfig(
            root=folder,
            source=FilesSourceConfig(
                paths=[str(path) for path in files], suffixes=SUFFIXES, encoding_errors="replace"
            ),
            tokenizer=BPETokenizerConfig(vocab_size=arguments.vocab_size),
            validation_fraction=0.0,
        )
        prepared = ensure_prepared(config)
        compare(prepared, length)
        synthetic = Path(folder) / "synthetic"
        plan_synthetic(synthetic, int(arguments.documents), length)


def corpus_files(max_bytes: int) -> list[Path]:
    """Files of the installation in an order that mixes packages, up to about `max_bytes`."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    found = {p for root in roots for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file()}
    taken, total = [], 0
    for path in sorted(found, key=lambda p: xxhash.xxh3_64_intdigest(str(p).encode())):
        if total >= max_bytes:
            break
        size = path.stat().st_size
        if size:
            taken.append(path)
            total += size
    return taken


def compare(prepared: PreparedDataset, length: int) -> None:
    starts = np.asarray(prepared.document_starts("train")).astype(np.int64)
    lengths = np.diff(starts, append=prepared.num_tokens("train"))
    num_tokens = int(lengths.sum())
    fits = lengths <= length

    started = time.perf_counter()
    packed = PackedDataset(prepared, "train", length)
    packed_seconds = time.perf_counter() - started
    started = time.perf_counter()
    next_fit_rows = next_fit(lengths.tolist(), length)
    next_fit_seconds = time.perf_counter() - started
    fixed = TokenDataset(prepared, "train", length)
    masked = TokenDataset(prepared, "train", length, intra_document_masking=True)
    is_cut = starts // length != (starts + np.maximum(lengths, 1) - 1) // length

    table = Table(
        title=f"{len(lengths):,} documents, {num_tokens:,} tokens (median "
        f"{int(np.median(lengths)):,} a document, {1 - fits.mean():.1%} longer than {length})"
    )
    table.add_column("rows")
    for column in ("number", "filled", "cut though they fit", "plan (s)", "read (M tokens/s)"):
        table.add_column(column, justify="right")
    cut = int((is_cut & fits).sum())
    table.add_row("fixed", f"{fixed.num_instances:,}", "100%", f"{cut:,}", "", speed(fixed))
    table.add_row("fixed, masked", f"{masked.num_instances:,}", "100%", f"{cut:,}", "",
                  speed(masked))  # fmt: skip
    share = num_tokens / (next_fit_rows * length)
    table.add_row(
        "next fit", f"{next_fit_rows:,}", f"{share:.2%}", "0", f"{next_fit_seconds:.2f}", ""
    )
    table.add_row(
        "packed",
        f"{packed.num_instances:,}",
        f"{packed.header.efficiency:.2%}",
        f"{documents_cut(packed, length):,}",
        f"{packed_seconds:.2f}",
        speed(packed),
    )
    Console().print(table)


def next_fit(lengths: list[int], length: int) -> int:
    """Rows that documents take, each put after the one before it or into a new row."""
    rows, room = 0, 0
    for tokens in lengths:
        rows += tokens // length
        rest = tokens % length
        if rest > room:
            rows, room = rows + 1, length
        room -= rest
    return rows


def documents_cut(packed: PackedDataset, length: int) -> int:
    """Documents in pieces though they fit into a row, found by reading what rows hold."""
    parts = (part for row in range(packed.num_instances) for part in packed.documents(row))
    return sum(part.num_tokens <= length and part.end - part.start < part.num_tokens
               for part in parts)  # fmt: skip


def speed(dataset: InstanceDataset) -> str:
    generator, rows = np.random.default_rng(0), 0
    dataset.read(np.arange(dataset.num_instances))
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < READING_SECONDS:
        dataset.read(generator.integers(0, dataset.num_instances, READING_ROWS))
        rows += READING_ROWS
    return f"{rows * dataset.sequence_length / seconds / 1e6:,.0f}"


def plan_synthetic(folder: Path, num_documents: int, length: int) -> None:
    """Lengths are log-normal with a median of 245 tokens, as in web text."""
    import msgspec
    import psutil

    from toolkit.data.tokens.prepared import MANIFEST_NAME, Manifest

    generator, total = np.random.default_rng(0), 0
    write_corpus(folder, 1, is_sparse=True)
    with (folder / "train.idx").open("wb") as index:
        for first in range(0, num_documents, 1 << 20):
            count = min(1 << 20, num_documents - first)
            ends = np.cumsum(generator.lognormal(5.5, 1.2, count).astype(np.int64) + 1)
            starts = np.concatenate(([0], ends[:-1])) + total
            index.write(starts.astype(np.uint64).tobytes())
            total += int(ends[-1])
    with (folder / "train.bin").open("r+b") as tokens:
        tokens.truncate(2 * total)
    manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    old = manifest.splits["train"]
    zeros = xxhash.xxh3_64_hexdigest(bytes(4096))
    info = SplitInfo(
        num_tokens=total,
        num_documents=num_documents,
        text_bytes=total,
        content_hash=old.content_hash,
        block_hashes=[zeros] * len(old.block_hashes),
    )
    prepared = PreparedDataset(folder, msgspec.structs.replace(manifest, splits={"train": info}))
    before = psutil.Process().memory_full_info().uss
    started = time.perf_counter()
    dataset = PackedDataset(prepared, "train", length)
    seconds = time.perf_counter() - started
    memory = psutil.Process().memory_full_info().uss - before
    size = sum(
        p.stat().st_size for p in plan_of(prepared, "train", "packed", length).folder.iterdir()
    )
    table = Table(title=f"planning {num_documents:,} documents, {total:,} tokens")
    for column in ("seconds", "documents/s", "tokens/s", "filled", "on disk", "memory kept"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{seconds:.1f}",
        f"{num_documents / seconds:,.0f}",
        f"{total / seconds:,.0f}",
        f"{dataset.header.efficiency:.2%}",
        f"{size / 1e6:,.0f} MB",
        f"{memory / 1e6:,.0f} MB",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
