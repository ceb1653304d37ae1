"""Time and memory to start on a prepared data set of a billion tokens.

    python benchmarks/dataset_setup.py --tokens 1e9

The token file is sparse: it has its full size, but takes no room on disk. Measured after the
imports: set-up is from the config to the loaders, the first batch is one from the middle of an
epoch. Memory is what the process gained: resident at the end of set-up, and anonymous (its own,
without the pages of the file that the kernel maps from its cache) with the first batch in hand.
"""

import argparse
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.data.loader import get_dataloaders
from toolkit.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    NUM_BLOCKS,
    Manifest,
    SplitInfo,
    hash_blocks,
)
from toolkit.data.tokenizer import ByteTokenizer
from toolkit.storage.atomic import hash_file, write_json_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=float, default=1e9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        config = DataConfig(
            dataset=DatasetConfig(root=root),
            data_loader=DataLoaderConfig(global_batch_size=65_536),
        )
        num_tokens = int(arguments.tokens)
        write_sparse(Path(root) / "corpus" / "default", num_tokens)
        setup, setup_memory, first_batch, memory = measure(config)
    table = Table(title=f"data set-up on {num_tokens:,} tokens")
    for column in ("set-up (s)", "set-up (MB)", "first batch (s)", "both, anonymous (MB)"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{setup:.4f}", f"{setup_memory / 1e6:.1f}", f"{first_batch:.4f}", f"{memory / 1e6:.1f}"
    )
    Console().print(table)


def measure(config: DataConfig) -> tuple[float, int, float, int]:
    resident, anonymous = memory_bytes()
    started = time.perf_counter()
    train, _ = get_dataloaders(config)
    ready = time.perf_counter()
    setup_memory = memory_bytes()[0] - resident
    reading = time.perf_counter()
    batches = train.iterate(train.steps_per_epoch // 2)
    next(batches)
    done = time.perf_counter()
    extra = memory_bytes()[1] - anonymous
    batches.close()
    return ready - started, setup_memory, done - reading, extra


def memory_bytes() -> tuple[int, int]:
    """Resident and anonymous memory of this process."""
    memory = psutil.Process().memory_info()
    return memory.rss, memory.rss - memory.shared


def write_sparse(folder: Path, num_tokens: int) -> None:
    folder.mkdir(parents=True)
    tokens, starts = folder / "train.bin", folder / "train.idx"
    with tokens.open("wb") as file:
        file.truncate(num_tokens * 2)
    starts.write_bytes(bytes(8))
    tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer")
    blocks = hash_blocks(tokens)
    info = SplitInfo(
        num_tokens=num_tokens,
        num_documents=1,
        text_bytes=num_tokens,
        content_hash=hash_file(tokens),
        block_hashes=[blocks[number] for number in range(NUM_BLOCKS)],
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        append_eos=True,
        tokenizer_fingerprint=tokenizer.fingerprint,
        source_fingerprint="sparse",
        replaced_bytes=0,
        skipped_documents=0,
        settings={},
        splits={"train": info},
    )
    write_json_atomic(folder / MANIFEST_NAME, manifest)


if __name__ == "__main__":
    main()
