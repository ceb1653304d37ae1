"""The permanent copy: stored last what makes it exist, read back, and checked when it is copied;
errors name the file."""

import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

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
)
from tests.s3 import S3Server
from toolkit.data.config import DatasetConfig, FilesSourceConfig, StoreConfig
from toolkit.data.prepare.store import permanent as uploads
from toolkit.data.prepare.store.cache import read_record
from toolkit.data.prepare.store.permanent import content_fingerprint
from toolkit.data.prepare.store.store import describe_stored, stored_at
from toolkit.data.tokens.prepared import PreparedDataset, StoredFile
from toolkit.errors import ConfigError, DataError, StorageError
from toolkit.storage.remote import RemoteFolder


def test_dataset_json_is_stored_last_and_everything_is_read_back(
    tmp_path: Path, s3: S3Server, s3_store: StoreConfig
) -> None:
    prepared = ensure(corpus(tmp_path), s3_store)
    puts = [path.rpartition("/")[2] for method, path, _ in s3.requests if method == "PUT"]
    assert puts[0] == "uploading.json"
    assert puts[-2:] == ["files.json", "dataset.json"]
    assert puts[1:-2] == [name.rpartition("/")[2] for name in files_of(prepared.folder)
                          if name != "dataset.json" and "tokenizer" not in name] + [
        name.rpartition("/")[2] for name in files_of(prepared.folder) if "tokenizer/" in name
    ]  # fmt: skip
    for name in ("train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.json"):
        assert count(s3, "GET", name) == 1
    s3.requests.clear()
    ensure(corpus(tmp_path), s3_store)
    assert count(s3, "GET", ".bin") == 0
    assert len(s3.requests) < 12
    assert not [method for method, _, _ in s3.requests if method == "PUT"]


def test_a_truncated_stored_file_is_named_before_anything_is_copied(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    path = stored_folder(mounted) / "train.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=rf"train\.bin has {size - 10} bytes, expected {size}: the "
                       r"permanent copy is damaged; restore the file, or delete"):  # fmt: skip
        ensure(at(config, tmp_path / "other"), mounted)
    assert nothing_whole(tmp_path / "other")
    assert not (tmp_path / "other" / "corpus" / ".default.download").exists()


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["val.bin", "train.idx"])
def test_a_changed_stored_file_is_named_and_never_becomes_a_data_set(
    tmp_path: Path, mounted: StoreConfig, name: str, listed: bool
) -> None:
    config = corpus(tmp_path)
    built = ensure(config, mounted)
    folder = stored_folder(mounted)
    if not listed:
        (folder / "files.json").unlink()
        if built.manifest.splits["train"].index_hash is None and name == "train.idx":
            pytest.skip("an index without a hash")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} has changed since it was saved: the permanent"):
        ensure(at(config, tmp_path / "other"), mounted)
    assert nothing_whole(tmp_path / "other")
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert ensure(at(config, tmp_path / "other"), mounted).tokens("val").size


def test_a_copy_made_by_hand_is_taken_and_verified_by_the_machine_that_has_the_data(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    config = corpus(tmp_path)
    built = ensure(config, StoreConfig())
    shutil.copytree(built.folder, stored_folder(mounted))
    copied = ensure(at(config, tmp_path / "other"), mounted)
    assert files_of(copied.folder) == files_of(built.folder)
    assert not (stored_folder(mounted) / "files.json").exists()
    ensure(config, mounted)
    listed = json.loads((stored_folder(mounted) / "files.json").read_bytes())["files"]
    assert listed.keys() == files_of(built.folder).keys() - {"dataset.json"}
    assert stored_at(built) is not None


def test_names_that_lead_out_of_the_folder_are_not_copied(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    path = stored_folder(mounted) / "files.json"
    listed = json.loads(path.read_bytes())
    for name in ("../../evil", "tokenizer/../../../evil", "/tmp/evil"):
        listed["files"][name] = {"size": 1, "xxh3": None}
    path.write_text(json.dumps(listed))
    copied = ensure(at(config, tmp_path / "other"), mounted)
    assert files_of(copied.folder).keys() == {
        *files_of(tmp_path / "data" / FOLDER).keys()
    }  # fmt: skip


def test_an_upload_cut_short_is_one_warning_and_continued_next_time(
    tmp_path: Path, s3: S3Server, s3_store: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = corpus(tmp_path)
    caplog.set_level(logging.WARNING)

    def forbid(method: str, path: str) -> str | None:
        return "403" if method == "PUT" and path.endswith("val.bin") else None

    with s3.failing(forbid):
        prepared = ensure(config, s3_store)
    assert prepared.tokens("train").size
    assert stored_at(prepared) is None
    assert describe_stored(prepared).startswith("not stored permanently")
    assert len(caplog.records) == 1
    assert "not stored permanently, training goes on: uploading" in caplog.text
    with pytest.raises(DataError, match="no prepared data"):  # incomplete: it does not exist yet
        ensure(at(config, tmp_path / "other"), s3_store)
    s3.requests.clear()
    prepared = ensure(config, s3_store)
    assert count(s3, "PUT", "train.bin") == 0
    assert count(s3, "PUT", "val.bin") == 1
    assert stored_at(prepared) is not None
    assert ensure(at(config, tmp_path / "other"), s3_store).tokens("val").size


def test_a_killed_upload_looks_like_nothing_and_is_finished_next_time(
    tmp_path: Path, s3: S3Server, s3_store: StoreConfig
) -> None:
    config = corpus(tmp_path)
    started: list[subprocess.Popen[str]] = []

    def kill_at_val(method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith("val.bin") and started:
            started[0].kill()
            started[0].wait()
            return "reset"
        return None

    with s3.failing(kill_at_val):
        started.append(start_process(config, s3_store, then="print('stored')"))
        assert started[0].communicate()[0] == ""
    with pytest.raises(DataError, match="no prepared data"):
        ensure(at(config, tmp_path / "other"), s3_store)
    s3.requests.clear()
    assert stored_at(ensure(config, s3_store)) is not None
    assert count(s3, "PUT", "train.bin") == 0
    assert ensure(at(config, tmp_path / "other"), s3_store).tokens("val").size


def test_a_read_only_store_is_known_before_all_files_are_read(
    tmp_path: Path,
    s3: S3Server,
    s3_store: StoreConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "hash_file", None)  # would fail
    with s3.failing(lambda method, path: "403" if method == "PUT" else None):
        assert ensure(corpus(tmp_path), s3_store).tokens("train").size
    assert "training goes on: writing s3://" in caplog.text
    assert "not allowed" in caplog.text


def test_a_store_that_gives_back_something_else_gets_no_dataset_json(
    tmp_path: Path,
    mounted: StoreConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RemoteFolder, "hash", lambda self, name, size, bits=64: "0" * 32)
    prepared = ensure(corpus(tmp_path), mounted)
    assert "train.bin: what was stored reads back differently" in caplog.text
    assert stored_at(prepared) is None
    assert not (stored_folder(mounted) / "dataset.json").exists()


def test_a_damaged_local_file_is_never_stored(tmp_path: Path, mounted: StoreConfig) -> None:
    prepared = ensure(corpus(tmp_path), StoreConfig())
    data = bytearray((prepared.folder / "train.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (prepared.folder / "train.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.bin: content differs from dataset\.json"):
        ensure(corpus(tmp_path), mounted)
    assert not (stored_folder(mounted) / "dataset.json").exists()


def test_a_stored_file_that_was_lost_is_stored_anew_from_the_local_copy(
    tmp_path: Path, mounted: StoreConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = corpus(tmp_path)
    prepared = ensure(config, mounted)
    path = stored_folder(mounted) / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    ensure(config, mounted)
    assert f"train.bin has {len(whole) - 2} bytes" in caplog.text
    assert path.read_bytes() == whole
    caplog.clear()
    shutil.rmtree(stored_folder(mounted))
    ensure(config, mounted)
    assert "is gone (is it mounted?); it is stored anew" in caplog.text
    assert files_of(stored_folder(mounted)).keys() - {"files.json"} == files_of(
        prepared.folder
    ).keys()  # fmt: skip


def test_what_two_machines_built_alike_counts_as_stored_after_a_look(
    tmp_path: Path, s3: S3Server, s3_store: StoreConfig
) -> None:
    config = corpus(tmp_path)
    ensure(config, s3_store)
    twin = msgspec.structs.replace(config, root=str(tmp_path / "twin"))
    prepared = ensure(twin, StoreConfig())
    assert read_record(prepared.folder) is None
    s3.requests.clear()
    ensure(twin, s3_store)
    assert stored_at(prepared) is not None
    assert not [method for method, _, _ in s3.requests if method == "PUT"]


def silent(_: str) -> None:
    pass


def other_content(tmp_path: Path, config: DatasetConfig) -> PreparedDataset:
    """A data set of the same name and sizes, built on another machine of other text."""
    texts = tmp_path / "other texts"
    shutil.copytree(tmp_path / "texts" / "corpus", texts)
    for path in texts.iterdir():
        path.write_text(path.read_text().swapcase())
    config = msgspec.structs.replace(config, source=FilesSourceConfig(paths=[str(texts)]))
    return ensure(config.replace(root=str(tmp_path / "other")), StoreConfig())


def test_a_name_taken_since_the_first_look_is_refused_and_nothing_of_it_is_touched(
    tmp_path: Path, mounted: StoreConfig
) -> None:
    config = corpus(tmp_path)
    late = other_content(tmp_path, config)
    ensure(config, mounted)
    before = files_of(stored_folder(mounted))
    root = str(mounted.permanent_root)
    with pytest.raises(DataError, match=r"other/corpus/default has content .*, its permanent copy"):
        uploads.upload(late, root, FOLDER, note=silent)
    assert files_of(stored_folder(mounted)) == before
    assert ensure(at(config, tmp_path / "third"), mounted).tokens("train").size


@pytest.mark.parametrize("left", ["uploading.json", "files.json"])
def test_the_place_of_an_unfinished_upload_is_not_given_to_other_content(
    tmp_path: Path, mounted: StoreConfig, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus(tmp_path)
    late = other_content(tmp_path, config)
    first = ensure(config, StoreConfig())
    root, folder = str(mounted.permanent_root), stored_folder(mounted)
    write = RemoteFolder.write

    def stops(self: RemoteFolder, name: str, data: bytes) -> None:
        if name == ("files.json" if left == "uploading.json" else "dataset.json"):
            raise StorageError("gone")
        write(self, name, data)

    monkeypatch.setattr(RemoteFolder, "write", stops)
    with pytest.raises(StorageError, match="gone"):
        uploads.upload(first, root, FOLDER, note=silent)
    monkeypatch.undo()
    if left == "files.json":
        (folder / "uploading.json").unlink()
    before = files_of(folder)
    contents = [content_fingerprint(prepared.manifest) for prepared in (late, first)]
    with pytest.raises(DataError, match=rf"content {contents[0]}, .*/{left} says that .* began to "
                       rf"store {contents[1]} there: .* delete file://{folder} if"):  # fmt: skip
        uploads.upload(late, root, FOLDER, note=silent)
    assert files_of(folder) == before
    uploads.upload(first, root, FOLDER, note=silent)
    assert ensure(at(config, tmp_path / "third"), mounted).tokens("train").size


def test_of_two_uploads_that_begin_at_once_one_stops_before_its_next_file(
    tmp_path: Path, mounted: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus(tmp_path)
    late = other_content(tmp_path, config)
    root, hash_local = str(mounted.permanent_root), uploads._hash_local

    def meanwhile(prepared: PreparedDataset) -> dict[str, StoredFile]:
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "_hash_local", hash_local)
            (stored_folder(mounted) / "uploading.json").unlink()  # neither saw the other's
            ensure(config, mounted)
        return hash_local(prepared)

    monkeypatch.setattr(uploads, "_hash_local", meanwhile)
    with pytest.raises(DataError, match="has content"):
        uploads.upload(late, root, FOLDER, note=silent)
    monkeypatch.undo()
    built = ensure(config, mounted).folder
    stored = files_of(stored_folder(mounted))
    assert {name: stored[name] for name in files_of(built)} == files_of(built)


@pytest.mark.parametrize(
    ("root", "error", "message"),
    [
        ("gdrive://folder", ConfigError, r"gdrive://.*needs a library"),
        ("nope://folder", ConfigError, r"nope://.*cannot be opened"),
        ("/no/such/mount", StorageError, r"/no/such/mount: no such folder; mount it, or create"),
    ],
)
def test_a_root_that_cannot_be_is_one_line(
    tmp_path: Path, root: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ensure(corpus(tmp_path), StoreConfig(permanent_root=root))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda raw: raw[:-20], r"dataset\.json or files\.json is damaged"),
        (lambda raw: raw.replace(b'"format_version": 1', b'"format_version": 9'), "version 9"),
    ],
)
def test_a_stored_manifest_that_cannot_be_read_is_named(
    tmp_path: Path, mounted: StoreConfig, break_it: Callable[[bytes], bytes], message: str
) -> None:
    config = corpus(tmp_path)
    ensure(config, mounted)
    path = stored_folder(mounted) / "dataset.json"
    path.write_bytes(break_it(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        ensure(at(config, tmp_path / "other"), mounted)
    assert nothing_whole(tmp_path / "other")
