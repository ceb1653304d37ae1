"""The permanent store: what is built is stored and read back, what is stored is copied and checked;
errors name the file."""

import json
import logging
import shutil
import socket
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.data.tokens.stores import at, corpus, ensure, files_of, start_process
from tests.s3 import BUCKET, S3Server, s3_server
from toolkit.data.config import StoreConfig
from toolkit.data.tokens import permanent
from toolkit.data.tokens.cache import read_record
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.data.tokens.store import describe_stored, localize, stored_at
from toolkit.errors import ConfigError, DataError, StorageError
from toolkit.storage.remote import RemoteFolder

FOLDER = "corpus/default"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    server = s3_server()
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    server.requests.clear()
    return server


@pytest.fixture
def s3_store(s3: S3Server) -> StoreConfig:
    return StoreConfig(permanent_root=f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def mounted(tmp_path: Path) -> StoreConfig:
    (tmp_path / "store").mkdir()
    return StoreConfig(permanent_root=str(tmp_path / "store"))


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


def stored_folder(store: StoreConfig) -> Path:
    assert store.permanent_root is not None
    return Path(store.permanent_root) / FOLDER


def count(server: S3Server, method: str, name: str) -> int:
    return sum(m == method and path.partition("?")[0].endswith(name) for m, path, _ in
               server.requests)  # fmt: skip


def with_cache(store: StoreConfig, folder: Path) -> StoreConfig:
    return msgspec.structs.replace(store, tokenized_cache_dir=str(folder))


def nothing_whole(root: Path) -> bool:
    """No folder under `root` that would pass for a data set."""
    visible = [p for p in root.rglob("dataset.json") if not any(
        part.startswith(".") for part in p.relative_to(root).parts)]  # fmt: skip
    return not visible and not (root / FOLDER).exists()


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


def test_a_read_only_store_is_known_before_all_files_are_read(
    tmp_path: Path,
    s3: S3Server,
    s3_store: StoreConfig,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permanent, "hash_file", None)  # would fail
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


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_store_and_cache_in_one_folder_are_refused(tmp_path: Path, prefix: str) -> None:
    store = StoreConfig(permanent_root=f"{prefix}{tmp_path}/data")
    with pytest.raises(ConfigError, match="are the same folder"):
        ensure(corpus(tmp_path), store)


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


def test_a_data_set_without_a_store_is_as_before(tmp_path: Path) -> None:
    prepared = ensure(corpus(tmp_path), StoreConfig())
    assert isinstance(prepared, PreparedDataset)
    assert read_record(prepared.folder) is None
