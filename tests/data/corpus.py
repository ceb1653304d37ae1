"""Small corpora for the tests of `toolkit.data`."""

from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.config import (
    ByteTokenizerConfig,
    DataConfig,
    DataLoaderConfig,
    DatasetConfig,
    FilesSourceConfig,
    TokenizerConfig,
)

BYTE_EOS = 256


def files_config(
    root: Path,
    *paths: Path,
    tokenizer: TokenizerConfig | None = None,
    source: dict[str, Any] | None = None,
    **changes: Any,
) -> DatasetConfig:
    """Byte-level data set of local files under `root`."""
    changes = {"num_processes": 1, "validation_fraction": 0.0, **changes}
    return DatasetConfig(
        root=str(root),
        source=FilesSourceConfig(paths=[str(path) for path in paths], **(source or {})),
        tokenizer=tokenizer or ByteTokenizerConfig(),
        **changes,
    )


def write_texts(folder: Path, texts: list[str]) -> Path:
    """One .txt file for each text."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04d}.txt").write_bytes(text.encode())
    return folder


def random_text(num_lines: int, seed: int = 0) -> str:
    """Lines of made-up words."""
    generator = np.random.default_rng(seed)
    words = ["".join(letters) for letters in generator.choice(list("abcdefgh"), (200, 5))]
    lines = generator.integers(0, len(words), (num_lines, 8)).tolist()
    return "".join(" ".join(words[i] for i in line) + "\n" for line in lines)


def data_config(dataset: DatasetConfig, **loader: Any) -> DataConfig:
    """Config of loaders over `dataset`."""
    return DataConfig(dataset=dataset, data_loader=DataLoaderConfig(**loader))
