"""Plans of data that lies in a folder which cannot be written."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpus import files_config, random_text, write_texts
from toolkit.data.config import DatasetConfig, PackedInstancesConfig
from toolkit.data.instances.open import count_rows, ensure_plans, open_instances
from toolkit.data.instances.plans import find_note, keep_note
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.errors import DataError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetConfig:
    """Of data that is prepared, and has no plans yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = write_texts(tmp_path / "text", [random_text(5, seed) for seed in range(20)])
    found = files_config(
        tmp_path / "data", texts, sequence_length=256, instances=PackedInstancesConfig()
    )
    ensure_prepared(found, progress=False)
    return found


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Refuse all writing below `folder`, as a file system that is mounted read-only does."""
    mkdir, open_ = os.mkdir, os.open

    def refuse(path: Any) -> None:
        if Path(os.fspath(path)).is_relative_to(folder):
            raise OSError(number, os.strerror(number), os.fspath(path))

    def no_mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if not os.path.isdir(path):
            refuse(path)
        mkdir(path, *args, **kwargs)

    def no_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return open_(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", no_mkdir)
    monkeypatch.setattr(os, "open", no_open)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("has_folder", [False, True])
def test_plans_of_read_only_data_go_to_the_cache_folder(
    config: DatasetConfig,
    number: int,
    has_folder: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_folder:  # of another length
        other = config.replace(sequence_length=64)
        ensure_plans(ensure_prepared(config, progress=False), other)
    make_read_only(tmp_path / "data", monkeypatch, number)
    prepared = ensure_prepared(config, progress=False)
    assert count_rows(prepared, "train", config) is None
    ensure_plans(prepared, config)
    assert (prepared.folder / "packing").exists() == has_folder
    (plan,) = (tmp_path / "cache/toolkit/packing").glob("[!.]*")
    assert {"plan.json", "starts.npy"} <= {path.name for path in plan.iterdir()}
    rows = open_instances(prepared, "train", config)
    assert count_rows(prepared, "train", config) == [(256, rows.num_instances)]
    # The rows are those of a plan beside the tokens.
    read = rows.read(np.arange(rows.num_instances))["input_ids"]
    monkeypatch.undo()
    again = config.replace(root=str(tmp_path / "again"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "unused"))
    beside = open_instances(ensure_prepared(again, progress=False), "train", again)
    np.testing.assert_array_equal(beside.read(np.arange(rows.num_instances))["input_ids"], read)
    assert not (tmp_path / "unused").exists()


def test_without_any_place_for_plans_both_are_refused_in_one_line(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ensure_prepared(config, progress=False)
    make_read_only(tmp_path, monkeypatch, errno.EROFS)
    with pytest.raises(DataError, match=r"cache.*: cannot write the plan.*set XDG_CACHE_HOME to"):
        ensure_plans(prepared, config)


def test_notes_of_read_only_data_go_to_the_cache_folder(
    config: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ensure_prepared(config, progress=False)
    make_read_only(tmp_path / "data", monkeypatch, errno.EROFS)
    keep_note(prepared, "note", b"kept")
    assert find_note(prepared, "note") == b"kept"
    assert (tmp_path / "cache/toolkit/packing/note").read_bytes() == b"kept"
    assert find_note(prepared, "other") is None
