"""Timings are kept for each question, and nothing that is wrong with the cache stops a run."""

import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from toolkit.autotune import cache
from toolkit.autotune.choices import Timings

BF16 = Timings(precision={"fp32": 2.0, "bf16": 1.0}, threads={2: 1.0, 1: 3.0})
FP32 = Timings(precision={"fp32": 1.0, "bf16": 2.0})
KEY = {"device": "cpu", "products": [[1, 2, 3]]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def never() -> Timings:
    raise AssertionError("measured again")


def test_the_first_measurement_stays() -> None:
    notices: list[str] = []
    assert cache.find(KEY) is None
    assert cache.find_or_measure(KEY, lambda: BF16, notices) == BF16
    assert cache.find_or_measure(KEY, never, notices) == BF16
    assert cache.find_or_measure({**KEY, "device": "cuda"}, lambda: FP32, notices) == FP32
    assert cache.find(KEY) == BF16
    assert notices == []


def test_what_does_not_last_is_for_its_own_start_alone() -> None:
    busy = msgspec.structs.replace(FP32, lasts=False)
    assert cache.find_or_measure(KEY, lambda: busy, []) == busy
    assert cache.find(KEY) is None
    assert cache.find_or_measure(KEY, lambda: BF16, []) == BF16


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"key": {}, "timings": {"precision": {"fp32": -1}}}',
        '{"key": {}, "timings": {"precision": {"fp32": "fast"}}}',
    ],
)
def test_a_corrupt_file_is_measured_again_with_one_notice(content: str) -> None:
    cache.find_or_measure(KEY, lambda: BF16, [])
    (file,) = cache.folder().glob("*.json")
    file.write_text(content)
    notices: list[str] = []
    assert cache.find(KEY) is None
    assert cache.find_or_measure(KEY, lambda: FP32, notices) == FP32
    (notice,) = notices
    assert notice.startswith(f"{file}: ")
    assert notice.endswith("; measured again")
    assert cache.find(KEY) == FP32


def test_a_file_of_another_question_does_not_count() -> None:
    cache.find_or_measure(KEY, lambda: BF16, [])
    (file,) = cache.folder().glob("*.json")
    file.write_text(file.read_text().replace('"cpu"', '"gpu"'))
    assert cache.find(KEY) is None


@pytest.mark.parametrize("how", ["file", "read-only"])
def test_where_nothing_can_be_kept_each_start_measures(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root writes everywhere")
        tmp_path.chmod(0o500)
    else:
        (tmp_path / "occupied").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    for _ in range(2):
        notices: list[str] = []
        assert cache.find_or_measure(KEY, lambda: BF16, notices) == BF16
        (notice,) = notices
        assert "measurements cannot be kept" in notice
    tmp_path.chmod(0o700)


def test_a_cache_folder_that_is_relative_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "some/rel")
    notices: list[str] = []
    assert cache.find_or_measure(KEY, lambda: BF16, notices) == BF16
    assert "XDG_CACHE_HOME is relative" in notices[0]
    assert "some/rel" in notices[0]


def test_of_several_starts_one_measures_and_all_agree() -> None:
    measured: list[int] = []
    answers: list[Timings] = []

    def measure() -> Timings:
        measured.append(1)
        time.sleep(0.1)
        return BF16 if len(measured) == 1 else FP32

    def start() -> None:
        answers.append(cache.find_or_measure(KEY, measure, []))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [BF16] * 4
    assert len(measured) == 1


def test_a_lock_that_is_not_given_back_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    monkeypatch.setattr(cache, "_SECONDS_TO_WAIT", 0.05)
    cache.folder().mkdir(parents=True)
    lock = filelock.FileLock(cache._path(KEY).with_suffix(".lock"))
    with lock:
        assert cache.find_or_measure(KEY, lambda: BF16, []) == BF16
    assert cache.find(KEY) == BF16
