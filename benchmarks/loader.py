"""How fast batches come from prepared tokens, against other loaders.

    python benchmarks/loader.py --olmo-python olmo-venv/bin/python --peers-python peers/bin/python

Every loader reads rows of 1,024 tokens in random order from the same tokens, which lie in the page
cache, in one process without workers: `toolkit` (int64 batches of 64 rows, as training gets them,
read ahead by its thread and without it), OLMo-core's NumpyDataLoader, a memory-mapped table of
`datasets`, litdata and MosaicML streaming. Rounds take turns; the median counts. The first
`-python` is an environment with ai2-olmo-core, the second one with litdata and mosaicml-streaming;
without them those lines are left out.

Then, on a sparse file of 1e12 tokens: time and memory to open it, and to give batch 1,000,000.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _synthetic import write_corpus
from rich.console import Console
from rich.table import Table

from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.data.loader import get_dataloaders

LENGTH, ROWS = 1024, 64
ROUNDS = 7
FEW, MANY = 20, 2000
"""Batches a round, of the peers and of ours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--olmo-python", help="interpreter of an environment with ai2-olmo-core")
    parser.add_argument("--peers-python", help="... with litdata and mosaicml-streaming")
    parser.add_argument("--tokens", type=float, default=50e6, help="tokens to read from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        write_corpus(root / "corpus" / "default", int(arguments.tokens), is_sparse=False)
        loaders = {
            "toolkit": Ours(root, prefetch_factor=4),
            "toolkit, no thread": Ours(root, prefetch_factor=0),
            "datasets": Peer(sys.executable, "datasets", root),
        }
        if arguments.olmo_python:
            loaders["OLMo-core"] = Peer(arguments.olmo_python, "olmo_core", root)
        if arguments.peers_python:
            loaders["litdata"] = Peer(arguments.peers_python, "litdata", root)
            loaders["MosaicML streaming"] = Peer(arguments.peers_python, "streaming", root)
        compare(loaders)
        for loader in loaders.values():
            loader.close()
    with tempfile.TemporaryDirectory() as text:
        write_corpus(Path(text) / "corpus" / "default", 10**12, is_sparse=True, hash_content=False)
        start_on_a_trillion(Path(text))


class Ours:
    """`TrainLoader` in this process."""

    batches = MANY

    def __init__(self, root: Path, *, prefetch_factor: int) -> None:
        self._loader, _ = get_dataloaders(config(root, prefetch_factor=prefetch_factor))
        self._iterator = self._loader.iterate()
        next(self._iterator)

    def round(self) -> float:
        started = time.perf_counter()
        for _ in range(self.batches):
            next(self._iterator)
        return time.perf_counter() - started

    def close(self) -> None:
        self._iterator.close()


class Peer:
    """Another loader in a process of its own."""

    batches = FEW

    def __init__(self, python: str, name: str, root: Path) -> None:
        tokens = root / "corpus" / "default" / "train.bin"
        worker = Path(__file__).with_name("_loader_peers.py")
        folder = tempfile.mkdtemp(dir=root)
        self._process = subprocess.Popen(
            [python, str(worker), name, str(tokens), str(LENGTH), str(ROWS), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def round(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self.batches}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))} ended: run it by hand")
        return float(line)


def compare(loaders: "dict[str, Ours | Peer]") -> None:
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            speeds[name].append(loader.batches * ROWS * LENGTH / loader.round())
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    table = Table(title=f"loaders, rows of {LENGTH:,} tokens, {ROWS} a batch, from page cache")
    for column in ("loader", "M tokens/s", "slowest round", "toolkit is"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, median in medians.items():
        ratio = medians["toolkit"] / median
        table.add_row(
            name, f"{median / 1e6:.1f}", f"{min(speeds[name]) / 1e6:.1f}", f"{ratio:.3g}x"
        )
    Console().print(table)


def start_on_a_trillion(root: Path) -> None:
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    loader, _ = get_dataloaders(config(root, prefetch_factor=0))
    setup, memory = time.perf_counter() - started, process.memory_info().rss - before
    seconds = []
    for number in range(1_000_000, 1_000_011):
        started = time.perf_counter()
        loader.global_batch(number)
        seconds.append(time.perf_counter() - started)
    table = Table(title="a trillion tokens (sparse file)")
    for column in ("set-up (s)", "memory (MB)", "batch 1,000,000, first time (ms)", "again (ms)"):
        table.add_column(column, justify="right")
    again = statistics.median(seconds[1:])
    table.add_row(
        f"{setup:.4f}", f"{memory / 1e6:.1f}", f"{seconds[0] * 1e3:.2f}", f"{again * 1e3:.2f}"
    )
    Console().print(table)


def config(root: Path, *, prefetch_factor: int) -> DataConfig:
    return DataConfig(
        dataset=DatasetConfig(root=str(root), sequence_length=LENGTH),
        data_loader=DataLoaderConfig(
            global_batch_size=LENGTH * ROWS, prefetch_factor=prefetch_factor
        ),
    )


if __name__ == "__main__":
    main()
