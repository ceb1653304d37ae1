"""The local cache: what was used longest ago goes first; what is used, or stored nowhere else,
stays."""

import pickle
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.data.prepare.store.stores import (
    at,
    corpus,
    ensure,
    files_of,
    set_last_used,
    start_process,
)
from toolkit.data.config import StoreConfig
from toolkit.data.prepare.build import join, parts
from toolkit.data.prepare.store.cache import (
    build_lock,
    ensure_local_dataset_cache_cap,
    read_record,
)
from toolkit.data.tokens.in_use import unused
from toolkit.errors import DataError
from toolkit.storage.locks import locked

NAMES = ("first", "second", "third")


@pytest.fixture
def store(tmp_path: Path) -> StoreConfig:
    (tmp_path / "store").mkdir()
    return StoreConfig(permanent_root=str(tmp_path / "store"))


@pytest.fixture
def root(tmp_path: Path, store: StoreConfig) -> Path:
    """Three stored data sets, used in the order of their names."""
    for name in NAMES:
        ensure(corpus(tmp_path, name), store)
    for age, name in enumerate(NAMES):
        set_last_used(tmp_path / "data" / name / "default", 1000.0 + age)
    return tmp_path / "data"


def size_of(folder: Path) -> int:
    return sum(len(data) for data in files_of(folder).values())


def present(root: Path) -> list[str]:
    return [name for name in NAMES if (root / name / "default").exists()]


def gigabytes(root: Path, *names: str) -> float:
    """A limit that has room for these data sets and no byte more."""
    return sum(size_of(root / name / "default") for name in names) / 1e9


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_the_least_recently_used_goes_first_and_no_more_than_needed(root: Path) -> None:
    assert ensure_local_dataset_cache_cap(root, gigabytes(root, *NAMES)) == []
    removed = ensure_local_dataset_cache_cap(root, gigabytes(root, "second", "third"))
    assert removed == [root / "first" / "default"]
    set_last_used(root / "second" / "default", 2000.0)
    ensure_local_dataset_cache_cap(root, gigabytes(root, "second"))
    assert present(root) == ["second"]
    assert sorted(path.name for path in (root / "first").iterdir()) == [
        ".default.lock", ".default.upload.lock", ".default.used",
    ]  # fmt: skip


def test_opening_a_data_set_is_use(tmp_path: Path, root: Path, store: StoreConfig) -> None:
    ensure(at(corpus(tmp_path, "first"), root), store)
    ensure_local_dataset_cache_cap(root, gigabytes(root, "first"))
    assert present(root) == ["first"]


def test_a_copy_makes_the_room_it_needs(tmp_path: Path, root: Path, store: StoreConfig) -> None:
    limited = msgspec.structs.replace(store, max_cache_gb=gigabytes(root, "second", "third"))
    size = size_of(root / "first" / "default")
    ensure_local_dataset_cache_cap(root, gigabytes(root, "second", "third"))
    assert present(root) == ["second", "third"]
    copied = ensure(at(corpus(tmp_path, "first"), root), limited)
    assert size_of(copied.folder) == size
    assert present(root) == ["first", "third"]


def test_a_data_set_stays_while_another_process_uses_it_and_goes_when_that_is_killed(
    tmp_path: Path,
    root: Path,
    store: StoreConfig,
    caplog: pytest.LogCaptureFixture,
    processes: list[subprocess.Popen[str]],
) -> None:
    then = "print('open', flush=True); sys.stdin.read()"
    processes.append(start_process(at(corpus(tmp_path, "first"), root), store, then=then))
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "open\n"
    set_last_used(root / "first" / "default", 1.0)
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == ["first"]
    assert caplog.messages == [
        f"{root} takes {gigabytes(root, 'first'):.3g} GB, more than store.max_cache_gb 1e-09; not "
        f"removed: {root}/first/default (in use)"
    ]
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == []


def test_a_forked_child_keeps_what_its_parent_opened(
    tmp_path: Path, root: Path, store: StoreConfig, processes: list[subprocess.Popen[str]]
) -> None:
    # The child outlives its parent; it ends with its standard input.
    then = "import os; child = os.fork(); print('here', flush=True) if child else sys.stdin.read()"
    processes.append(start_process(at(corpus(tmp_path, "first"), root), store, then=then))
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "here\n"
    processes[0].wait()
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == ["first"]
    assert processes[0].stdin is not None
    processes[0].stdin.close()
    assert processes[0].stdout.read() == ""  # the child has ended
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == []


def test_an_array_alone_keeps_its_data_set(tmp_path: Path, root: Path, store: StoreConfig) -> None:
    view = ensure(at(corpus(tmp_path, "first"), root), store).tokens("train")[3:].reshape(1, -1)
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == ["first"]
    del view
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == []


def test_a_pickled_data_set_is_in_use_where_it_arrives(
    tmp_path: Path, root: Path, store: StoreConfig
) -> None:
    data = pickle.dumps(ensure(at(corpus(tmp_path, "first"), root), store))
    with unused(root / "first" / "default") as is_unused:
        assert is_unused
    arrived = pickle.loads(data)
    with unused(root / "first" / "default") as is_unused:
        assert not is_unused
    assert arrived.num_documents("train") > 0


def test_what_is_stored_nowhere_else_stays_and_is_named(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only = ensure(corpus(tmp_path, "only"), StoreConfig()).folder
    set_last_used(only, 1.0)
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == []
    assert files_of(only).keys() >= {"train.bin"}
    assert f"not removed: {only} (no verified permanent copy)" in caplog.text


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ("store", "its permanent copy is out of reach"),
        ("store/first", "its permanent copy is gone or damaged"),
        ("store/first/default/val.bin", "its permanent copy is gone or damaged"),
    ],
)
def test_the_permanent_copy_is_looked_at_once_more_before_the_local_one_goes(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture, loss: str, reason: str
) -> None:
    lost = tmp_path / loss
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert "first" in present(root)
    assert f"{root}/first/default ({reason})" in caplog.text


def test_a_local_copy_stays_when_its_permanent_one_has_other_bytes_of_the_same_size(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "store" / "first" / "default" / "train.bin"
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == ["first"]
    assert f"{root}/first/default (its permanent copy is gone or damaged)" in caplog.text


def test_a_data_set_rebuilt_with_other_content_is_not_covered_by_the_old_record(
    tmp_path: Path, root: Path
) -> None:
    folder = root / "first" / "default"
    shutil.rmtree(folder)
    ensure(msgspec.structs.replace(corpus(tmp_path, "first"), append_eos=False), StoreConfig())
    assert read_record(folder) is not None
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert present(root) == ["first"]


def test_a_limit_below_the_data_set_is_said_before_anything_is_copied(
    tmp_path: Path, root: Path, store: StoreConfig
) -> None:
    small = msgspec.structs.replace(
        store, max_cache_gb=1e-6, tokenized_cache_dir=str(tmp_path / "other")
    )
    config = at(corpus(tmp_path, "first"), root)
    with pytest.raises(DataError) as failed:
        ensure(config, small)
    size = size_of(root / "first" / "default") / 1e9
    assert str(failed.value) == (
        f"store.max_cache_gb is 1e-06, but {tmp_path}/other/first/default alone takes {size:.3g} "
        "GB; set store.max_cache_gb to more than that"
    )
    assert not list((tmp_path / "other").rglob("*.bin"))
    assert not (tmp_path / "other" / "first" / ".default.download").exists()
    assert present(root) == list(NAMES)


def test_a_limit_below_a_data_set_in_the_making_is_said_before_its_parts_are_joined(
    tmp_path: Path, root: Path, store: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = msgspec.structs.replace(store, max_cache_gb=1e-6)
    config = corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(join.KeptParts, "join", None)  # would fail
        for _ in range(2):
            with pytest.raises(DataError, match=r"gb is 1e-06, but .*corpus/default alone takes"):
                ensure(config, small)
    assert present(root) == list(NAMES)
    assert not (tmp_path / "store" / "corpus").exists()
    with monkeypatch.context() as patch:
        patch.setattr(parts, "read_shard", None)  # the parts are there
        assert ensure(config, store).tokens("train").size
    assert (tmp_path / "store" / "corpus" / "default" / "dataset.json").exists()


def test_what_is_built_may_be_as_large_as_the_limit_and_no_byte_larger(
    tmp_path: Path, store: StoreConfig
) -> None:
    config = corpus(tmp_path).replace(deduplicate=True)
    texts = tmp_path / "texts" / "corpus"
    for path in sorted(texts.iterdir())[:30]:
        shutil.copy(path, texts / f"again-{path.name}")
    size = size_of(ensure(config, StoreConfig()).folder)
    for dropped, folder in ((1, "other"), (0, "exact")):
        limited = msgspec.structs.replace(
            store, max_cache_gb=(size - dropped) / 1e9, tokenized_cache_dir=str(tmp_path / folder)
        )
        if dropped:
            with pytest.raises(DataError, match="corpus/default alone takes"):
                ensure(config, limited)
            assert not (tmp_path / "store" / "corpus").exists()
        else:
            assert size_of(ensure(config, limited).folder) == size


def test_a_data_set_above_the_limit_is_not_stored_either(
    tmp_path: Path, store: StoreConfig
) -> None:
    config = corpus(tmp_path)
    built = ensure(config, StoreConfig())
    with pytest.raises(DataError, match=r"max_cache_gb is 1e-06, but .*corpus/default alone"):
        ensure(config, msgspec.structs.replace(store, max_cache_gb=1e-6))
    assert not (tmp_path / "store" / "corpus").exists()
    assert built.tokens("train").size


def test_what_a_killed_removal_left_is_no_data_set_and_goes_next_time(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ensure_local_dataset_cache_cap(root, gigabytes(root, "second", "third"))
    left = [path for path in (root / "first").iterdir() if path.is_dir()]
    assert len(left) == 1
    assert left[0].name.startswith(".default.removed-")
    assert present(root) == ["second", "third"]
    ensure_local_dataset_cache_cap(root, 1.0)
    assert not left[0].exists()
    assert present(root) == ["second", "third"]


def test_an_abandoned_copy_goes_and_one_that_grows_stays(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    growing = root / "fourth" / ".default.download"
    growing.mkdir(parents=True)
    (growing / "reserved.json").write_text("1000000")
    (root / "fourth" / ".default.building").mkdir()
    with locked(build_lock(root / "fourth" / "default")):
        ensure_local_dataset_cache_cap(root, 1e-3)
        assert growing.exists()
        assert present(root) == []
        assert "takes 0.001 GB, more than store.max_cache_gb 0.001" not in caplog.text
        ensure_local_dataset_cache_cap(root, 9e-4)
        assert f"not removed: {root}/fourth/default (being copied)" in caplog.text
    assert ensure_local_dataset_cache_cap(root, 9e-4) == [root / "fourth" / "default"]
    assert not growing.exists()
    assert (root / "fourth" / ".default.building").exists()


def test_parts_left_beside_a_whole_data_set_go_before_any_data_set(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = root / "first" / ".default.building"
    left.mkdir()
    (left / "000000.train.bin").write_bytes(bytes(1_000_000))
    with locked(build_lock(root / "first" / "default")):
        ensure_local_dataset_cache_cap(root, 1e-4)
        assert left.exists()
        assert f"{root}/first/default (being built, or to be continued)" in caplog.text
    ensure_local_dataset_cache_cap(root, 1e-4)
    assert left.exists(), "without the data set they are needed to continue"
    (root / "first" / "default").mkdir()
    (root / "first" / "default" / "dataset.json").write_text("{}")
    caplog.clear()
    assert ensure_local_dataset_cache_cap(root, 1e-4) == []
    assert sorted(path.name for path in (root / "first").iterdir() if path.is_dir()) == ["default"]
    assert not caplog.records


def test_processes_that_copy_and_evict_at_once_always_read_whole_data_sets(
    tmp_path: Path, root: Path, store: StoreConfig, processes: list[subprocess.Popen[str]]
) -> None:
    tight = msgspec.structs.replace(
        store,
        tokenized_cache_dir=str(tmp_path / "cache"),
        max_cache_gb=gigabytes(root, "first", "second"),
    )
    then = """
        import random
        for turn in range(25):
            name = random.choice(["first", "second", "third"])
            wanted = msgspec.structs.replace(config, dataset_name=name)
            prepared = ensure_prepared(wanted, store=store, progress=False)
            copied_at = (prepared.folder / "dataset.json").stat().st_mtime_ns
            print(name, int(prepared.tokens("train").sum()), copied_at, flush=True)
            prepared = None
    """
    config = at(corpus(tmp_path, "first"), root)
    processes.extend(start_process(config, tight, then=then) for _ in range(3))
    lines = [line.rpartition(" ") for p in processes for line in p.communicate()[0].splitlines()]
    sums = {
        name: int(ensure(at(corpus(tmp_path, name), root), store).tokens("train").sum())
        for name in NAMES
    }
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(lines) == 75
    assert {what for what, _, _ in lines} == {f"{name} {total}" for name, total in sums.items()}


def test_other_files_neither_count_nor_go(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "notes" / "big.txt").write_bytes(bytes(100_000))
    (root / "linked").symlink_to(root / "first")
    assert ensure_local_dataset_cache_cap(root, gigabytes(root, *NAMES)) == []
    ensure_local_dataset_cache_cap(root, 1e-9)
    assert (root / "notes" / "big.txt").stat().st_size == 100_000
    assert present(root) == []


def test_an_empty_or_missing_root_has_room(tmp_path: Path) -> None:
    assert ensure_local_dataset_cache_cap(tmp_path / "none", 1.0) == []
    with pytest.raises(DataError, match="what is needed alone takes 2 GB"):
        ensure_local_dataset_cache_cap(tmp_path / "none", 1.0, needed_bytes=2_000_000_000)
