"""Small data sets in stores and caches, for the tests of both."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec

from tests.data.corpus import files_config, write_texts
from tests.s3 import S3Server
from toolkit.data.config import DatasetConfig, StoreConfig
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.tokens.prepared import PreparedDataset

NUM_DOCUMENTS = 60
FOLDER = "corpus/default"


def corpus(folder: Path, name: str = "corpus") -> DatasetConfig:
    """A corpus of some hundred bytes below `folder`, with both splits; its text depends on
    `name`."""
    texts = write_texts(folder / "texts" / name, [f"{name} {i} " * 3 for i in range(NUM_DOCUMENTS)])
    return files_config(folder / "data", texts, validation_fraction=0.2, dataset_name=name)


def at(config: DatasetConfig, root: Path) -> DatasetConfig:
    """The same data set on another machine, which has not its text."""
    return msgspec.structs.replace(config, root=str(root), source=None)


def ensure(config: DatasetConfig, store: StoreConfig) -> PreparedDataset:
    """`ensure_prepared` without progress."""
    return ensure_prepared(config, store=store, progress=False)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a data set and its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start_process(config: DatasetConfig, store: StoreConfig, *, then: str) -> subprocess.Popen[str]:
    """A process that opens the data set as `prepared` and runs the code `then`."""
    code = """
        import sys, msgspec
        from toolkit.data.config import DatasetConfig, StoreConfig
        from toolkit.data.prepare.build.prepare import ensure_prepared
        config = msgspec.json.decode(sys.argv[1], type=DatasetConfig)
        store = msgspec.json.decode(sys.argv[2], type=StoreConfig)
        prepared = ensure_prepared(config, store=store, progress=False)
    """
    arguments = [msgspec.json.encode(value).decode() for value in (config, store)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code) + textwrap.dedent(then), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def stored_folder(store: StoreConfig) -> Path:
    """Where a store that is a folder keeps the corpus."""
    assert store.permanent_root is not None
    return Path(store.permanent_root) / FOLDER


def count(server: S3Server, method: str, name: str) -> int:
    """Requests for files of that name."""
    return sum(m == method and path.partition("?")[0].endswith(name) for m, path, _ in
               server.requests)  # fmt: skip


def with_cache(store: StoreConfig, folder: Path) -> StoreConfig:
    """The same store with another cache."""
    return msgspec.structs.replace(store, tokenized_cache_dir=str(folder))


def nothing_whole(root: Path) -> bool:
    """No folder under `root` that would pass for a data set."""
    visible = [p for p in root.rglob("dataset.json") if not any(
        part.startswith(".") for part in p.relative_to(root).parts)]  # fmt: skip
    return not visible and not (root / FOLDER).exists()


def set_last_used(folder: Path, when: float) -> None:
    """Seconds since 1970 of the last use of a folder."""
    os.utime(folder.with_name(f".{folder.name}.used"), (when, when))
