"""How fast `prepare` reads the same documents out of every format: a table of `prepare.py`."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import zstandard
from _report import Figure
from rich.console import Console
from rich.table import Table

from toolkit.data.config import (
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    HubSourceConfig,
    SourceConfig,
)
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.text.reading import Counts, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source

FILES = 4
"""Files of each format but txt."""


def compare_formats(documents: list[str], folder: Path, tokenizer: Path) -> list[Figure]:
    """Write `documents` in every format below `folder`, read them, and prepare them."""
    num_bytes = sum(len(text.encode()) for text in documents)
    table = Table(title=f"{len(documents):,} documents, {num_bytes / 1e6:.0f} MB of text")
    table.add_column("format")
    for column in ("MB in files", "read: documents/s", "MB/s", "prepare: documents/s", "MB/s"):
        table.add_column(column, justify="right")
    figures = []
    for name, write in WRITERS.items():
        place = folder / name
        place.mkdir(parents=True)
        source = write(documents, place)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        reading = speed(lambda source=source: read(source))
        config = DatasetConfig(
            root=str(folder / "data"),
            dataset_name=name.replace(" ", "-"),
            source=source,
            tokenizer=HFTokenizerConfig(path=str(tokenizer)),
        )
        preparing = speed(lambda config=config: prepare_dataset(config, progress=False))
        cells = [f"{size / 1e6:.1f}"]
        for seconds in (reading, preparing):
            cells += [f"{len(documents) / seconds:,.0f}", f"{num_bytes / seconds / 1e6:.1f}"]
        table.add_row(name, *cells)
        for what, seconds in (("read", reading), ("prepare", preparing)):
            label, value = f"prepare: {what} {name}", num_bytes / seconds / 1e6
            figures.append(Figure(name=label, value=value, unit="MB/s", better="higher"))
    Console(width=120).print(table)
    return figures


def speed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read(source: SourceConfig) -> None:
    """Every document, in this process, to nowhere."""
    reading = Reading(source=source)
    for shard in plan_source(source, 0.0).shards:
        for _ in read_shard(shard, reading, Counts()):
            pass


def parts_of(documents: list[str]) -> list[list[str]]:
    return [documents[first::FILES] for first in range(FILES)]


def write_txt(documents: list[str], folder: Path) -> SourceConfig:
    for number, text in enumerate(documents):
        (folder / f"{number:06d}.txt").write_bytes(text.encode())
    return FilesSourceConfig(paths=[str(folder)])


def write_lines(ending: str, compress: Callable[[bytes], bytes]) -> Any:
    def write(documents: list[str], folder: Path) -> SourceConfig:
        for number, part in enumerate(parts_of(documents)):
            lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part]
            data = compress("".join(lines).encode())
            (folder / f"{number}.jsonl{ending}").write_bytes(data)
        return FilesSourceConfig(paths=[str(folder)])

    return write


def write_tables(ending: str, write_one: Callable[[Any, Path], object]) -> Any:
    def write(documents: list[str], folder: Path) -> SourceConfig:
        for number, part in enumerate(parts_of(documents)):
            write_one(pyarrow.table({"text": part}), folder / f"{number}.{ending}")
        if ending == "csv":
            # No format of ours: `datasets` reads it, as any folder that it knows.
            return HubSourceConfig(name=str(folder))
        return FilesSourceConfig(paths=[str(folder)])

    return write


def write_arrow(table: Any, path: Path) -> None:
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table, max_chunksize=256)


def write_saved(documents: list[str], folder: Path) -> SourceConfig:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(str(folder))
    return DiskSourceConfig(path=str(folder))


def write_hub(documents: list[str], folder: Path) -> SourceConfig:
    for number, part in enumerate(parts_of(documents)):
        path = folder / f"train-{number}-of-{FILES}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": part}), path, row_group_size=256)
    return HubSourceConfig(name=str(folder))


def write_parquet(table: Any, path: Path) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=256)


def write_csv(table: Any, path: Path) -> None:
    datasets.Dataset(table).to_csv(str(path))


WRITERS: dict[str, Callable[[list[str], Path], SourceConfig]] = {
    "txt": write_txt,
    "jsonl": write_lines("", bytes),
    "jsonl.gz": write_lines(".gz", gzip.compress),
    "jsonl.zst": write_lines(".zst", zstandard.compress),
    "parquet": write_tables("parquet", write_parquet),
    "arrow": write_tables("arrow", write_arrow),
    "saved data set": write_saved,
    "hub, parquet": write_hub,
    "hub, csv": write_tables("csv", write_csv),
}
