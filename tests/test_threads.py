"""Every thread uses the GPU of the one that started it; shown with a CUDA that only counts."""

import ast
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toolkit
from toolkit.data.prefetch import read_ahead
from toolkit.metrics.recorder import MetricsRecorder
from toolkit.metrics.system import SystemMonitor
from toolkit.threads import Thread, ThreadPool
from toolkit.train.callbacks import checkpointer
from toolkit.train.callbacks.config import CheckpointerConfig


class FakeCuda:
    """A current device for each thread, 0 where none was set."""

    def __init__(self) -> None:
        self._local = threading.local()
        self.is_initialized = True

    def set_device(self, device: int) -> None:
        self._local.device = device

    def current_device(self) -> int:
        assert self.is_initialized, "asking would open a context"
        return getattr(self._local, "device", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: fake.is_initialized)
    monkeypatch.setattr(torch.cuda, "set_device", fake.set_device)
    monkeypatch.setattr(torch.cuda, "current_device", fake.current_device)
    fake.set_device(3)
    return fake


def test_threads_and_pools_start_on_the_device_of_their_maker(cuda: FakeCuda) -> None:
    seen: list[int] = []
    thread = Thread(target=lambda: seen.append(cuda.current_device()))
    thread.start()
    thread.join()
    with ThreadPool(2, "x") as pool:
        seen += pool.map(lambda _: cuda.current_device(), range(4))
        inner = pool.submit(lambda: _device_in_a_new_thread(cuda)).result()
    assert [*seen, inner] == [3] * 6


def _device_in_a_new_thread(cuda: FakeCuda) -> int:
    seen: list[int] = []
    thread = Thread(target=lambda: seen.append(cuda.current_device()))
    thread.start()
    thread.join()
    return seen[0]


def test_an_idle_cuda_is_not_woken(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.is_initialized = False
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("opens a context"))
    with ThreadPool(1) as pool:
        assert pool.submit(lambda: "done").result() == "done"


def test_metrics_are_delivered_on_the_ranks_own_device(cuda: FakeCuda) -> None:
    seen = []
    recorder = MetricsRecorder(
        collect_interval=1, deliver=lambda stream, records: seen.append(cuda.current_device())
    )
    recorder.record(1, {"loss": 1.0})
    recorder.close()
    assert seen == [3]


def test_a_background_save_writes_on_the_ranks_own_device(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(checkpointer, "begin_save", lambda *_, **__: None)
    saver: Any = checkpointer.Checkpointer(CheckpointerConfig())
    saver.state = SimpleNamespace(step=1, state_tensors=dict, has_own_parts=True)
    saver.state.train_module, saver.state.also_evaluated = SimpleNamespace(averages=None), ()
    copy = SimpleNamespace(finish=lambda: None)
    saver._shards = SimpleNamespace(copy=lambda tensors, **_: copy)
    monkeypatch.setattr(saver, "_write", lambda *_: seen.append(cuda.current_device()))
    saver._save("permanent", in_background=True)
    saver._wait()
    assert seen == [3]
    assert saver._take_error() is None


def test_data_is_read_ahead_on_the_ranks_own_device(cuda: FakeCuda) -> None:
    def items() -> Iterator[int]:
        while True:
            yield cuda.current_device()

    reader = read_ahead(items(), 2)
    assert next(reader) == 3
    reader.close()


def test_as_many_are_ready_whatever_their_sizes() -> None:
    """Of items of size 8 one is; of size 1 then four."""
    made: list[int] = []

    def items() -> Iterator[int]:
        for size in (8, 8, *(1 for _ in range(50))):
            made.append(size)
            yield size

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 10
        while len(made) < number and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == number

    reader = read_ahead(items(), 4, size=lambda size: size)
    for number in (2, 6, 7):
        next(reader)
        wait_for(number)
    reader.close()


def test_the_machine_is_sampled_on_the_ranks_own_device(cuda: FakeCuda, tmp_path: Path) -> None:
    seen: list[int] = []
    monitor = SystemMonitor(60.0, lambda record: seen.append(cuda.current_device()), tmp_path)
    monitor.start()
    monitor.stop()
    assert seen == [3]


def test_no_thread_is_started_by_other_means() -> None:
    root = Path(toolkit.__file__).parent
    others = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        if path.name != "threads.py" or path.parent != root
        for node in ast.walk(ast.parse(path.read_text()))
        if _names_a_thread(node)
    ]
    assert others == [], "use toolkit.threads there"


def _names_a_thread(node: ast.AST) -> bool:
    names = ("Thread", "Timer", "ThreadPoolExecutor", "start_new_thread")
    if isinstance(node, ast.Attribute):
        return (
            isinstance(node.value, ast.Name)
            and node.value.id == "threading"
            and (node.attr in names)
        )
    if isinstance(node, ast.ImportFrom):
        libraries = ("threading", "concurrent.futures", "_thread")
        return node.module in libraries and any(alias.name in names for alias in node.names)
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "to_thread"
