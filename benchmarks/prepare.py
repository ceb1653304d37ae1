"""Speed of `prepare` against `tokenizers.encode_batch_fast` alone, on the same text and cores.

    python benchmarks/prepare.py --megabytes 60

The text is the source code of the standard library, repeated up to the asked size, in files of
about a megabyte, with the quickstart's kind of tokenizer (byte-level BPE of 4,096 ids). "bare" has
all text in memory and only calls `encode_batch_fast`, which spreads over the cores by itself;
"prepare" is everything: reading, encoding, splitting, hashing, writing, joining, syncing. The two
take turns, so that other load on the machine hits both.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from toolkit.data.config import (
    DatasetConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    PythonStdlibSourceConfig,
)
from toolkit.data.text.readers import Counts, read_shard
from toolkit.data.text.sources import plan_source
from toolkit.data.tokens.pool import num_cores
from toolkit.data.tokens.prepare import prepare_dataset
from toolkit.data.tokens.bpe_tokenizer import train_bpe

FILE_BYTES = 1 << 20
BATCH_DOCUMENTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.megabytes, arguments.repeats)


def run(folder: Path, megabytes: int, repeats: int) -> None:
    stdlib = PythonStdlibSourceConfig(max_bytes=None)
    documents = [
        piece.text
        for shard in plan_source(stdlib, 0.0).shards
        for piece in read_shard(shard, stdlib, Counts())
    ]
    train_bpe(documents[:400], 4096).save(folder / "tokenizer")
    texts = write_files(folder / "text", documents, megabytes * 1_000_000)
    num_bytes = sum(len(text.encode()) for text in texts)

    bare, prepared = [], []
    for turn in range(repeats):
        num_tokens, seconds = encode_bare(folder / "tokenizer", texts)
        bare.append(seconds)
        prepared.append(encode_prepare(folder, turn, num_tokens))

    table = Table(title=f"{num_bytes / 1e6:.0f} MB of text, {num_cores()} cores, {repeats} turns")
    for column in ("", "seconds (median)", "tokens/s", "MB/s", "of bare"):
        table.add_column(column, justify="right")
    for name, times in (("encode_batch_fast", bare), ("toolkit prepare", prepared)):
        seconds = statistics.median(times)
        table.add_row(
            name,
            f"{seconds:.2f}",
            f"{num_tokens / seconds:,.0f}",
            f"{num_bytes / seconds / 1e6:.2f}",
            f"{statistics.median(bare) / seconds:.0%}",
        )
    Console().print(table)


def write_files(folder: Path, documents: list[str], num_bytes: int) -> list[str]:
    folder.mkdir()
    texts: list[str] = []
    pending, pending_bytes, total = [], 0, 0
    while total < num_bytes:
        for document in documents:
            pending.append(document)
            size = len(document.encode())
            pending_bytes, total = pending_bytes + size, total + size
            if pending_bytes >= FILE_BYTES or total >= num_bytes:
                texts.append("".join(pending))
                (folder / f"{len(texts):05d}.txt").write_bytes(texts[-1].encode())
                pending, pending_bytes = [], 0
            if total >= num_bytes:
                break
    return texts


def encode_bare(tokenizer_folder: Path, texts: list[str]) -> tuple[int, float]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    started, num_tokens = time.perf_counter(), 0
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[first : first + BATCH_DOCUMENTS]
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        num_tokens += sum(len(encoding) for encoding in encodings)
    return num_tokens, time.perf_counter() - started


def encode_prepare(folder: Path, turn: int, num_tokens: int) -> float:
    config = DatasetConfig(
        root=str(folder / f"data{turn}"),
        source=FilesSourceConfig(paths=[str(folder / "text")]),
        tokenizer=HFTokenizerConfig(path=str(folder / "tokenizer")),
    )
    started = time.perf_counter()
    prepared = prepare_dataset(config, progress=False)
    seconds = time.perf_counter() - started
    splits = prepared.manifest.splits.values()
    content = sum(split.num_tokens - split.num_documents for split in splits)
    assert abs(content - num_tokens) < 1e-3 * num_tokens, "prepare lost or invented tokens"
    shutil.rmtree(config.root)
    return seconds


if __name__ == "__main__":
    main()
