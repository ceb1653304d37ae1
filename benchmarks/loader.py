"""How fast batches come from prepared tokens, against other loaders.

    python benchmarks/loader.py --olmo-python olmo-venv/bin/python --peers-python peers/bin/python

Every loader reads rows of 1,024 tokens in random order from the same tokens, which lie in the page
cache, in one process without workers: `toolkit` (int64 batches of 64 rows, as training gets them,
read ahead by its thread and without it), OLMo-core's NumpyDataLoader, a memory-mapped table of
`datasets`, litdata and MosaicML streaming. Rounds take turns; the median counts. The first
`-python` is an environment with ai2-olmo-core, the second one with litdata and mosaicml-streaming;
without them those lines are left out.

Then every kind of rows, with documents of 400 tokens on average: CPU time of this process, its
threads included, and how much of one core that is at 10M tokens/s, what eight fast GPUs take.

Then, on a sparse file of 1e12 tokens: time and memory to open it, and to give batch 1,000,000.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from _report import Figure, write_json
from _synthetic import write_corpus
from rich.console import Console
from rich.table import Table

from toolkit.data.config import (
    DataConfig,
    DataLoaderConfig,
    DatasetConfig,
    FixedInstancesConfig,
    MixConfig,
    MixSourceConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.loader import get_dataloaders

LENGTH, ROWS = 1024, 64
ROUNDS = 7
FEW, MANY = 20, 2000
"""Batches a round, of the peers and of ours."""
GPU_TOKENS = 10e6
"""Tokens a second of eight GPUs."""
MEAN_DOCUMENT = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--olmo-python", help="interpreter of an environment with ai2-olmo-core")
    parser.add_argument("--peers-python", help="... with litdata and mosaicml-streaming")
    parser.add_argument("--tokens", type=float, default=50e6, help="tokens to read from")
    parser.add_argument("--only", choices=("peers", "kinds", "trillion"), help="one of the tables")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    tables: dict[str, Callable[[], list[Figure]]] = {
        "peers": lambda: peers(arguments),
        "kinds": lambda: kinds(int(arguments.tokens)),
        "trillion": trillion,
    }
    chosen = [arguments.only] if arguments.only else tables
    figures = [found for name in chosen for found in tables[name]()]
    write_json(arguments.json, figures)


def peers(arguments: argparse.Namespace) -> list[Figure]:
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
        medians = compare(loaders)
        for loader in loaders.values():
            loader.close()
    return [
        Figure(name=f"loader: {name}", value=value, unit="tokens/s", better="higher")
        for name, value in medians.items()
    ]


def trillion() -> list[Figure]:
    with tempfile.TemporaryDirectory() as text:
        write_corpus(Path(text) / "corpus" / "default", 10**12, is_sparse=True, hash_content=False)
        return start_on_a_trillion(Path(text))


def kinds(num_tokens: int) -> list[Figure]:
    """What each kind of rows costs."""
    names = ["fixed", "fixed, documents apart", "fixed, with targets", "packed", "packed, targets"]
    names += ["padded", "variable", "mixture", "mixture, packed"]
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        for name, has_mask in (("corpus", False), ("other", False), ("targets", True)):
            write_corpus(
                root / name / "default",
                num_tokens,
                is_sparse=False,
                mean_document=MEAN_DOCUMENT,
                has_mask=has_mask,
            )
        masked = FixedInstancesConfig(intra_document_masking=True)
        ratios = {"corpus": 0.7, "other": 0.3}
        mix = MixConfig(sources={n: MixSourceConfig(ratio=r) for n, r in ratios.items()})
        packed, with_targets = PackedInstancesConfig(), {"dataset_name": "targets"}
        changes: list[dict[str, Any]] = [
            {}, {"instances": masked}, with_targets, {"instances": packed},
            {"instances": packed, **with_targets}, {"instances": PaddedInstancesConfig()},
            {"instances": VariableInstancesConfig()}, {"mix": mix},
            {"mix": mix, "instances": packed},
        ]  # fmt: skip
        loaders = {
            name: Ours(root, prefetch_factor=4, **change)
            for name, change in zip(names, changes, strict=True)
        }
        costs: dict[str, list[float]] = {name: [] for name in loaders}
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(ROUNDS):
            for name, loader in loaders.items():
                started = time.process_time()
                seconds = loader.round(MANY // 4)
                tokens = MANY // 4 * ROWS * LENGTH
                costs[name].append((time.process_time() - started) / tokens)
                speeds[name].append(tokens / seconds)
        for loader in loaders.values():
            loader.close()
    table = Table(title=f"kinds of rows, documents of {MEAN_DOCUMENT} tokens")
    for column in ("rows", "M tokens/s", "CPU ns a token", "of one core at 10M tokens/s"):
        table.add_column(column, justify="left" if column == "rows" else "right")
    figures = []
    for name in loaders:
        cost = statistics.median(costs[name])
        table.add_row(
            name,
            f"{statistics.median(speeds[name]) / 1e6:.0f}",
            f"{cost * 1e9:.2f}",
            f"{cost * GPU_TOKENS:.1%}",
        )
        name = f"loader CPU: {name}"
        figures.append(Figure(name=name, value=cost * 1e9, unit="ns/token", better="lower"))
    Console().print(table)
    return figures


class Ours:
    """`TrainLoader` in this process."""

    batches = MANY

    def __init__(self, root: Path, *, prefetch_factor: int, **dataset: Any) -> None:
        self._loader, _ = get_dataloaders(config(root, prefetch_factor=prefetch_factor, **dataset))
        self._iterator = self._loader.iterate()
        next(self._iterator)

    def round(self, batches: int | None = None) -> float:
        started = time.perf_counter()
        for _ in range(batches or self.batches):
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


def compare(loaders: "dict[str, Ours | Peer]") -> dict[str, float]:
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
    return medians


def start_on_a_trillion(root: Path) -> list[Figure]:
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
    return [
        Figure(name="loader: set-up on 1e12 tokens", value=setup, unit="s", better="lower"),
        Figure(name="loader: batch 1,000,000", value=again * 1e3, unit="ms", better="lower"),
    ]


def config(root: Path, *, prefetch_factor: int, **dataset: Any) -> DataConfig:
    return DataConfig(
        dataset=DatasetConfig(root=str(root), sequence_length=LENGTH, **dataset),
        data_loader=DataLoaderConfig(
            global_batch_size=LENGTH * ROWS, prefetch_factor=prefetch_factor
        ),
    )


if __name__ == "__main__":
    main()
