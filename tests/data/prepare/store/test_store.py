"""How a data set comes to a machine: built, stored, copied; a store out of reach, a copy that was
killed, a damaged local copy."""

import logging
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.prepare.store.stores import (
    FOLDER,
    at,
    corpus,
    count,
    ensure,
    files_of,
    nothing_whole,
    start_process,
    stored_folder,
    with_cache,
)
from tests.s3 import S3Server
from toolkit.data.config import StoreConfig
from toolkit.data.prepare.store import permanent
from toolkit.data.prepare.store.cache import read_record
from toolkit.data.prepare.store.store import describe_stored, stored_at
from toolkit.data.tokens.prepared import PreparedDataset, localize
from toolkit.errors import ConfigError, DataError, StorageError


@pytest.fixture(params=["path", "file", "memory", "s3"])
def any_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> StoreConfig:
    if request.param == "s3":
        return request.getfixturevalue("s3_store")
    if request.param == "memory":
        monkeypatch.setattr(MemoryFileSystem, "store", {})
        monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
        return StoreConfig(permanent_root="memory://root/")
    (tmp_path / "store").mkdir()
    protocol = "file://" if request.param == "file" else ""
    return StoreConfig(permanent_root=f"{protocol}{tmp_path}/store")


def test_what_one_machine_builds_another_gets_byte_for_byte(
    tmp_path: Path, any_store: StoreConfig
) -> None:
    config = corpus(tmp_path)
    built = ensure(config, any_store)
    record = stored_at(built)
    assert record is not None
    assert record.permanent_root == any_store.permanent_root
    assert f"/{FOLDER}, verified 20" in describe_stored(built)
    copied = ensure(at(config, tmp_path / "other"), any_store)
    assert copied.folder == tmp_path / "other" / FOLDER
    assert files_of(copied.folder) == files_of(built.folder)
    assert {"train.bin", "val.bin", "tokenizer/tokenizer.json"} <= files_of(built.folder).keys()
    assert stored_at(copied) is not None
    assert sorted(p.name for p in copied.folder.parent.iterdir()) == [
        ".default.lock", ".default.stored.json", ".default.used", "default",
    ]  # fmt: skip
    assert (copied.tokens("val") == built.tokens("val")).all()


def test_copies_go_to_the_cache_folder_whatever_the_root(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    store = with_cache(mounted, tmp_path / "cache")
    config = corpus(tmp_path)
    assert localize(config, store).root == str(tmp_path / "cache")
    assert localize(localize(config, store), store) == localize(config, store)
    assert localize(config, StoreConfig()) is config
    assert ensure(config, store).folder == tmp_path / "cache" / FOLDER
    assert not (tmp_path / "data").exists()


def test_a_store_out_of_reach_means_the_local_copy_and_one_warning(
    tmp_path: Path, mounted: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    shutil.rmtree(tmp_path / "store")
    caplog.set_level(logging.WARNING)
    prepared = ensure(config, mounted)
    assert prepared.num_documents("train") + prepared.num_documents("val") == 60
    assert [record.getMessage() for record in caplog.records] == [
        f"{prepared.folder}: its permanent copy is out of reach, the local copy is used: "
        f"{tmp_path}/store: no such folder; mount it, or create it"
    ]


def test_a_refused_connection_is_known_soon(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    s3_store: StoreConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = corpus(tmp_path)
    ensure(config, s3_store)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(permanent, "PROBE_SECONDS", 1.0)
    caplog.set_level(logging.WARNING)
    ensure(config, s3_store)
    assert "out of reach, the local copy is used" in caplog.text
    with pytest.raises(StorageError, match=r"not on this machine.*store\.permanent_root=null"):
        ensure(at(config, tmp_path / "other"), s3_store)
    assert nothing_whole(tmp_path / "other")


def test_a_server_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_store: StoreConfig
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(permanent, "PROBE_SECONDS", 0.3)
        with pytest.raises(StorageError, match=r"s3://bucket/.*: no answer in 0 s; or set"):
            ensure(corpus(tmp_path), s3_store)


def test_other_content_under_the_same_name_is_an_error_that_names_both(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    other = msgspec.structs.replace(config, append_eos=False, root=str(tmp_path / "other"))
    local = ensure(other, StoreConfig())
    with pytest.raises(DataError) as failed:
        ensure(other, mounted)
    for part in (str(local.folder), str(stored_folder(mounted)), "delete the local folder"):
        assert part in str(failed.value)
    assert local.tokens("train").size  # untouched


def test_a_stored_data_set_of_other_settings_is_refused_before_it_is_copied(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    other = msgspec.structs.replace(config, append_eos=False, root=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"append_eos: True there, False now") as failed:
        ensure(other, mounted)
    assert str(failed.value).startswith(f"file://{stored_folder(mounted)}: ")
    assert nothing_whole(tmp_path / "other")


def test_a_killed_copy_looks_like_nothing_and_goes_on_with_the_next_file(
    tmp_path: Path, s3: S3Server, s3_store: StoreConfig
) -> None:
    config = corpus(tmp_path)
    built = ensure(config, s3_store)
    started: list[subprocess.Popen[str]] = []

    def kill_at_val(method: str, path: str) -> str | None:
        if method == "GET" and path.endswith("val.bin") and started:
            started[0].kill()
            started[0].wait()
            return "reset"
        return None

    other = at(config, tmp_path / "other")
    with s3.failing(kill_at_val):
        started.append(start_process(other, s3_store, then="print('whole')"))
        assert started[0].communicate()[0] == ""
        assert started[0].returncode == -9
    assert nothing_whole(tmp_path / "other")
    grown = tmp_path / "other" / "corpus" / ".default.download"
    assert {p.name for p in grown.rglob("*") if p.is_file()} >= {"train.bin", "train.idx"}
    s3.requests.clear()
    copied = ensure(other, s3_store)
    assert files_of(copied.folder) == files_of(built.folder)
    assert count(s3, "GET", "train.bin") == 0
    assert count(s3, "GET", "val.bin") == 1
    assert not grown.exists()


def test_two_processes_copy_once(tmp_path: Path, s3: S3Server, s3_store: StoreConfig) -> None:
    config = corpus(tmp_path)
    ensure(config, s3_store)
    s3.requests.clear()
    other = at(config, tmp_path / "other")
    then = "print(int(prepared.tokens('train').sum()))"
    both = [start_process(other, s3_store, then=then) for _ in range(2)]
    sums = [process.communicate()[0] for process in both]
    assert sums[0] == sums[1] != ""
    assert count(s3, "GET", "train.bin") == 1


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest"])
def test_a_damaged_local_copy_is_mended_with_only_what_it_lacks(
    tmp_path: Path, s3: S3Server, s3_store: StoreConfig, damage: str
) -> None:
    config = corpus(tmp_path)
    prepared = ensure(config, s3_store)
    files = files_of(prepared.folder)
    path = prepared.folder / ("dataset.json" if damage == "no manifest" else "val.bin")
    path.unlink() if damage != "truncated" else path.write_bytes(path.read_bytes()[:-2])
    s3.requests.clear()
    assert files_of(ensure(config, s3_store).folder) == files
    assert count(s3, "GET", "train.bin") == 0
    assert count(s3, "GET", "val.bin") == (damage != "no manifest")


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path, mounted: StoreConfig) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    folder = tmp_path / "other" / FOLDER
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"exists, but is no prepared data set"):
        ensure(at(config, tmp_path / "other"), mounted)
    assert (folder / "thesis.tex").read_text() == "mine"


def test_a_full_disk_is_said_before_anything_is_copied(
    tmp_path: Path, mounted: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    usage = Counter(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), dict(usage)))
    with pytest.raises(DataError, match=r"bytes, its disk has 10 free; make room"):
        ensure(at(config, tmp_path / "other"), mounted)
    assert nothing_whole(tmp_path / "other")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_store_and_cache_in_one_folder_are_refused(tmp_path: Path, prefix: str) -> None:
    store = StoreConfig(permanent_root=f"{prefix}{tmp_path}/data")
    with pytest.raises(ConfigError, match="are the same folder"):
        ensure(corpus(tmp_path), store)


def test_a_data_set_without_a_store_is_as_before(tmp_path: Path) -> None:
    prepared = ensure(corpus(tmp_path), StoreConfig())
    assert isinstance(prepared, PreparedDataset)
    assert read_record(prepared.folder) is None
