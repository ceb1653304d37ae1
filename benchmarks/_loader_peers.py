"""Other loaders, for `loader.py`: runs under the interpreter that has them.

Arguments: the name of a loader, a file of uint16 ids without a header, tokens a row, rows a batch,
and a folder to write into. Answers with a line once the first batch was read; then reads a number
of batches a line and answers with the seconds they took. What the libraries print goes to standard
error.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, tokens, length, rows, folder = sys.argv[1:]
    started = time.perf_counter()
    batches = LOADERS[name](Path(tokens), int(length), int(rows), Path(folder))
    next(batches)
    answers.write(f"{time.perf_counter() - started}\n")
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        answers.write(f"{time.perf_counter() - started}\n")


def olmo_core(tokens: Path, length: int, rows: int, folder: Path) -> Iterator[Any]:
    """NumpyDataLoader over a NumpyFSLDataset; int64 ids."""
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.data.types import NumpyDatasetDType

    dataset = NumpyFSLDatasetConfig(
        paths=[str(tokens)],
        sequence_length=length,
        tokenizer=TokenizerConfig(vocab_size=257, eos_token_id=256, pad_token_id=256),
        work_dir=str(folder / "olmo-core"),
        dtype=NumpyDatasetDType.uint16,
    ).build()
    dataset.prepare()
    config = NumpyDataLoaderConfig(global_batch_size=length * rows, seed=0, num_workers=0)
    loader = config.build(dataset)
    for epoch in itertools.count(1):
        loader.reshuffle(epoch)
        yield from loader


def hf_datasets(tokens: Path, length: int, rows: int, folder: Path) -> Iterator[Any]:
    """A memory-mapped arrow table of int32 rows behind torch's DataLoader; int64 ids."""
    import datasets
    import torch

    path = folder / "datasets"
    datasets.Dataset.from_dict(
        {"input_ids": instances(tokens, length).astype(np.int32)}
    ).save_to_disk(path)
    table = datasets.load_from_disk(path).with_format("torch")
    return forever(torch.utils.data.DataLoader(table, batch_size=rows, shuffle=True))


def litdata_tokens(tokens: Path, length: int, rows: int, folder: Path) -> Iterator[Any]:
    """StreamingDataLoader over local chunks with its TokensLoader; int32 ids."""
    import litdata

    path, loader = str(folder / "litdata"), litdata.TokensLoader(block_size=length)
    content = instances(tokens, length).astype(np.int32)
    litdata.optimize(
        fn=as_tensor,
        inputs=list(content),
        output_dir=path,
        chunk_size=length * 4096,
        item_loader=loader,
        num_workers=1,
    )
    dataset = litdata.StreamingDataset(path, item_loader=loader, shuffle=True)
    return forever(litdata.StreamingDataLoader(dataset, batch_size=rows, num_workers=0))


def mosaic_streaming(tokens: Path, length: int, rows: int, folder: Path) -> Iterator[Any]:
    """MosaicML StreamingDataset over local MDS shards behind torch's DataLoader; uint16 ids."""
    import streaming
    import torch

    path = str(folder / "streaming")
    with streaming.MDSWriter(out=path, columns={"tokens": f"ndarray:uint16:{length}"}) as writer:
        for row in instances(tokens, length):
            writer.write({"tokens": row})
    dataset = streaming.StreamingDataset(local=path, shuffle=True, batch_size=rows)
    return forever(torch.utils.data.DataLoader(dataset, batch_size=rows))


LOADERS = {
    "olmo_core": olmo_core,
    "datasets": hf_datasets,
    "litdata": litdata_tokens,
    "streaming": mosaic_streaming,
}


def instances(tokens: Path, length: int) -> np.ndarray:
    """The file as rows."""
    content = np.fromfile(tokens, dtype=np.uint16)
    return content[: len(content) // length * length].reshape(-1, length)


def as_tensor(row: np.ndarray) -> Any:
    """One row as litdata wants it."""
    import torch

    return torch.from_numpy(row)


def forever(loader: Any) -> Iterator[Any]:
    """Pass after pass."""
    while True:
        yield from loader


if __name__ == "__main__":
    main()
