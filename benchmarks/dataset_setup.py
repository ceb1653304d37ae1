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
from _synthetic import write_corpus
from rich.console import Console
from rich.table import Table

from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.data.loader import get_dataloaders


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
        write_corpus(Path(root) / "corpus" / "default", num_tokens, is_sparse=True)
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


if __name__ == "__main__":
    main()
